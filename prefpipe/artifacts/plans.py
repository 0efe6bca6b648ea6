"""Plans: what an artifact is to be made of, and how that differs from what is there."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import orjson

from prefpipe.artifacts.reading import digest, is_complete, manifest, partial_path

_planning = ContextVar("planning", default=False)


@dataclass(frozen=True)
class Plan:
    """What an artifact is made of: equal plans mean that the existing artifact can be used as it is.

    uses: the config parts that the stage reads, as plain data or dataclasses; nothing else invalidates the artifact.
    parents: input name → artifact folders it reads.
    """

    stage: str
    schema: str
    uses: Mapping[str, Any]
    parents: Mapping[str, Sequence[Path]] = field(default_factory=dict)

    def as_data(self) -> dict[str, Any]:
        """The comparable part of the manifest: plain JSON data, parents by digest."""
        parents = {
            name: [{"digest": digest(path), "schema": manifest(path)["schema"]} for path in paths]
            for name, paths in self.parents.items()
        }
        plan = {"stage": self.stage, "schema": self.schema, "uses": self.uses, "parents": parents}
        return cast(
            dict[str, Any], orjson.loads(orjson.dumps(plan, default=_recorded, option=orjson.OPT_PASSTHROUGH_DATACLASS))
        )


def _recorded(value: Any) -> Any:
    """For orjson: a dataclass as its fields without those of prefpipe.components.runtime, anything else as its text."""
    if is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in fields(value) if f.metadata.get("recorded", True)}
    return str(value)


def comparable(found: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a manifest that plans are compared by."""
    return {name: found.get(name) for name in ("stage", "schema", "uses", "parents")}


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Which keys differ between two plans, as "loss.beta 0.1 -> 0.2" lines."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            inside = "" if not prefix and key in ("uses", "parents") else f"{prefix}{key}."
            if key in old and key in new:
                found += differences(old[key], new[key], inside)
            else:
                value = old.get(key, new.get(key))
                found.append(f"{inside.rstrip('.')} {'was' if key in old else 'is now'} {value!r}")
        return found
    if old == new:
        return []
    name = prefix.rstrip(".")
    if (
        isinstance(old, list)
        and isinstance(new, list)
        and any(isinstance(x, dict) and "digest" in x for x in old + new)
    ):
        return [f"its input {name!r} has other content"]
    return [f"{name} {old!r} -> {new!r}"]


def changes(path: Path, plan: Plan) -> list[str]:
    """How the plan that an artifact was made with differs from `plan`, as "loss.beta 0.1 -> 0.2" lines; [] if not."""
    return differences(comparable(manifest(path)), plan.as_data())


class PlanFound(Exception):  # noqa: N818
    """Not an error: raised by `draft` inside `planning`, to tell what the stage would write."""

    def __init__(self, out: Path, plan: Plan, *, overwrite: bool) -> None:
        super().__init__(str(out))
        self.out, self.plan, self.overwrite = out, plan, overwrite


class NotKnownError(Exception):
    """Raised where a plan would have to do the work that it predicts, such as a download."""


@contextmanager
def planning() -> Iterator[None]:
    """Run a stage only up to its first artifact, where `draft` raises PlanFound; nothing is written.

    This way a plan compares exactly the settings that the stage would record.
    """
    token = _planning.set(True)
    try:
        yield
    finally:
        _planning.reset(token)


def is_planning() -> bool:
    """Whether this runs inside `planning`, where files of gigabytes should not be read."""
    return _planning.get()


class Outlook(NamedTuple):
    """What `draft` would find. state: "there", "other" settings, "unfinished", "leftovers" of other settings, "none".

    changes: how the settings differ. parts: finished ones of an unfinished artifact.
    """

    state: str
    changes: list[str]
    parts: int = 0


def outlook(out: Path, plan: Plan) -> Outlook:
    """What `draft` would find of an artifact. Raises ArtifactError where a parent is missing."""
    wanted, work = plan.as_data(), partial_path(out)
    if is_complete(work) and comparable(manifest(work)) == wanted:
        return Outlook("there", [])
    if is_complete(out):
        changed = differences(comparable(manifest(out)), wanted)
        return Outlook("other" if changed else "there", changed)
    try:
        begun = orjson.loads((work / "plan.json").read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return Outlook("leftovers" if work.exists() else "none", [])
    changed = differences(begun, wanted)
    parts = len(list((work / "progress").glob("?????.json")))
    return Outlook("leftovers" if changed else "unfinished", changed, parts)
