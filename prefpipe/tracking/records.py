"""What there is to tell of an artifact: a record beside it, <name>.tracking.json, written with or without a tracker.

A record says what a run is called, what it was made with and where it hangs in the tree. Its numbers are not in it:
they are read from the artifact, so that whoever tells a tracker of them, and whenever, tells the same.
"""

import dataclasses
import hashlib
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from prefpipe import artifacts
from prefpipe.files import write_json
from prefpipe.records import EvalResult
from prefpipe.tracking import Row

SUFFIX = ".tracking.json"
GROUPS = ("sweep", "loop")
"""Kinds of runs that stand for no artifact."""


@dataclass
class Record:
    """What is told of an artifact, or of a group of runs.

    id: of its run, in every tracker. kind: sweep, loop, or the stage that made the artifact.
    started: ms since 1970. parent: the record of the group it belongs to, as a path from this one's folder.
    plan: digest of what the artifact is made of; of another one is another run.
    replaces: digest of the artifact that stood in its place when it began.
    into: records whose runs its results are told to as well → the step that they stand for. own_run: else it has none.
    params: settings at the start. resumed: those that were other ones in a later attempt.
    """

    id: str
    kind: str
    name: str
    started: int
    parent: str | None = None
    plan: str = ""
    replaces: str | None = None
    own_run: bool = True
    into: dict[str, int] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    resumed: list[dict[str, str]] = field(default_factory=list)

    def all_tags(self) -> dict[str, str]:
        """With what later attempts changed, as resume.1.<key>."""
        changes = {f"resume.{n}.{k}": v for n, changed in enumerate(self.resumed, 1) for k, v in changed.items()}
        return {"stage": self.kind, **self.tags, **changes}


def path_of(artifact: Path) -> Path:
    """The record of an artifact."""
    return artifact.with_name(f"{artifact.name}{SUFFIX}")


def artifact_of(path: Path) -> Path:
    """The artifact of a record."""
    return path.with_name(path.name.removesuffix(SUFFIX))


def read(path: Path) -> Record:
    """A record. Raises OSError or ValueError where there is none that can be read."""
    return Record(**orjson.loads(path.read_bytes()))


def find(path: Path) -> Record | None:
    """A record, or None where there is none."""
    try:
        return read(path)
    except FileNotFoundError:
        return None


def ensure_group(path: Path, kind: str, name: str, **known: Any) -> Path:
    """The record of a sweep or a loop, made by whoever comes first: all others find the same id."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        write_json(mine, dataclasses.asdict(_new(kind, name, **known)))
        try:
            os.link(mine, path)  # unlike a rename it fails where somebody was faster, on every file system
        except FileExistsError:
            pass
        finally:
            mine.unlink()
    return path


def begin(
    artifact: Path,
    kind: str,
    name: str,
    *,
    made: bool,
    parent: Path | None,
    params: dict[str, str],
    tags: dict[str, str],
    **known: Any,
) -> Path:
    """The record of an artifact: the one it has, or else a new one.

    An attempt that goes on with the same plan goes on with the same record, whatever the machine and the time.

    Args:
        made: whether the artifact stands there; else its work folder does.
        known: further fields of the record.
    """
    path = path_of(artifact)
    plan = plan_of(artifact if made else artifacts.partial_path(artifact)) or {}
    replaces = artifacts.digest(artifact) if not made and artifacts.is_complete(artifact) else None
    found = find(path)
    if found is None or found.plan != digest_of(plan) or (not made and found.replaces != replaces):
        above = os.path.relpath(parent, path.parent) if parent else None
        tags = {**_digests(plan), **tags}
        new = {"plan": digest_of(plan), "replaces": replaces, "parent": above, "params": params, "tags": tags}
        found = _new(kind, name, **new, **known)
    elif not made:
        changed = {key: value for key, value in params.items() if found.params.get(key) != value}
        if changed and changed not in found.resumed:
            found.resumed.append(changed)
    write_json(path, dataclasses.asdict(found))
    return path


def plan_of(folder: Path) -> dict[str, Any] | None:
    """What an artifact, or one that is being made, is made of; None where there is neither."""
    for name in ("plan.json", "manifest.json"):
        try:
            found = orjson.loads((folder / name).read_bytes())
        except FileNotFoundError:
            continue
        return {key: found.get(key) for key in ("stage", "schema", "uses", "parents")}
    return None


def current(artifact: Path, record: Record) -> Path | None:
    """The folder that holds what a record is of; None when it is gone, or of other settings by now."""
    folders = [artifact, artifacts.partial_path(artifact)]
    if record.replaces and artifacts.is_complete(artifact) and artifacts.digest(artifact) == record.replaces:
        folders.reverse()
    plans = [plan_of(folder) for folder in folders]
    return next((f for f, plan in zip(folders, plans, strict=True) if plan and digest_of(plan) == record.plan), None)


def steps(folder: Path, after: int = 0) -> Iterator[Row]:
    """The rows of an artifact's metrics.jsonl whose step is later; a line that is still being written is left out."""
    try:
        with (folder / "metrics.jsonl").open("rb") as lines:
            for line in lines:
                row = as_row(line)
                if row is not None and row.step > after:
                    yield row
    except FileNotFoundError:
        return


def as_row(line: bytes) -> Row | None:
    """One line of metrics.jsonl; None where it is not whole."""
    if not line.endswith(b"\n"):
        return None
    try:
        found = orjson.loads(line)
        return Row(int(found["step"]), {key: float(found[key]) for key in found if _is_metric(key, found[key])})
    except (orjson.JSONDecodeError, KeyError):
        return None


def last_step(folder: Path) -> int:
    """How many steps a checkpoint was trained for."""
    return max((row.step for row in steps(folder)), default=0)


def results(artifact: Path) -> dict[str, float]:
    """What a finished artifact has come to: an evaluation's results, else its rows by what became of them."""
    manifest = artifacts.manifest(artifact)
    if manifest["schema"] == EvalResult.schema:
        return {f"eval/{r.task}/{r.metric}": r.value for r in artifacts.read(artifact, EvalResult, key="evals")}
    values = {"data/num_records": float(manifest["num_records"])}
    for name, count in manifest["counts"].items():
        nested = count.items() if isinstance(count, Mapping) else [("", count)]
        values |= {f"data/{name}/{reason}".rstrip("/"): float(number) for reason, number in nested}
    return values


def _new(kind: str, name: str, **known: Any) -> Record:
    return Record(uuid.uuid4().hex, kind, name, int(time.time() * 1000), **known)


def _is_metric(key: str, value: Any) -> bool:
    return key != "step" and isinstance(value, int | float)


def digest_of(plan: Mapping[str, Any]) -> str:
    """Of settings, whatever their order."""
    return hashlib.sha256(orjson.dumps(plan, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _digests(plan: Mapping[str, Any]) -> dict[str, str]:
    """Tags that tell what an artifact was made of: settings and data."""
    uses = orjson.dumps(plan.get("uses"), option=orjson.OPT_SORT_KEYS)
    tags = {"config": hashlib.sha256(uses).hexdigest()}
    for name, parents in (plan.get("parents") or {}).items():
        tags[f"data.{name}"] = parents[0]["digest"] if len(parents) == 1 else digest_of({"parents": parents})
    return tags
