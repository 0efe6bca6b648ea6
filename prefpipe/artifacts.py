"""Artifacts: a folder of `part-*.jsonl` plus a `manifest.json` that is the done-mark, the provenance and the schema.

An artifact appears whole (one rename) or not at all. While it is written it lives beside its place as `<name>.partial`,
part by part; a part counts once its note under `progress/` exists, so a killed run goes on after its last part.
Everything but `provenance.json` (times, host, command line) is a function of inputs and settings, byte for byte.
"""

import hashlib
import logging
import os
import platform
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar, cast

import orjson
from filelock import FileLock, Timeout

from prefpipe import __version__
from prefpipe.errors import ArtifactError
from prefpipe.files import chunks, fsync_folder, now, sha256_of, write_json
from prefpipe.provenance import git_state, versions
from prefpipe.records import row_reader

log = logging.getLogger(__name__)
R = TypeVar("R")

RECORDS_PER_PART = 50_000
HOLDER_SECONDS = 5.0
"""How long to wait for the name of a folder's holder; it writes it as soon as it has the lock."""
BUFFER_BYTES = 2**20
"""Read or written at a time; with Python's 8 KiB a call for every few rows takes a tenth of stage=pair."""


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


# ------------------------------------------------------------------------------------------------ reading


def is_complete(path: Path) -> bool:
    """Whether an artifact was published here."""
    return (path / "manifest.json").is_file()


def manifest(path: Path, *, key: str = "") -> dict[str, Any]:
    """The manifest of an artifact. Raises ArtifactError, naming `key`, when there is none or it is damaged."""
    prefix = f"{key}={path}" if key else str(path)
    try:
        data = orjson.loads((path / "manifest.json").read_bytes())
    except FileNotFoundError:
        partial = partial_path(path)
        hint = f"; a half-finished {partial.name} is there: run its stage again" if partial.exists() else ""
        raise ArtifactError(f"{prefix}: no artifact here (no manifest.json){hint}") from None
    except orjson.JSONDecodeError as error:
        raise ArtifactError(
            f"{prefix}/manifest.json is not JSON ({error}); delete the folder, run its stage again"
        ) from None
    if not isinstance(data, dict) or "schema" not in data or "parts" not in data:
        raise ArtifactError(f"{prefix}/manifest.json has no schema and parts; delete the folder, run its stage again")
    return data


def changes(path: Path, plan: Plan) -> list[str]:
    """How an artifact's plan differs from another, as "loss.beta 0.1 -> 0.2" lines; [] where it is that one's."""
    return differences(_comparable(manifest(path)), plan.as_data())


def digest(path: Path) -> str:
    """What identifies an artifact's content: sha256 over its schema and the digests of its parts."""
    found = manifest(path)
    content = [found["schema"], [[p["name"], p["sha256"]] for p in found["parts"]]]
    return hashlib.sha256(orjson.dumps(content)).hexdigest()


def read_rows(path: Path, schema: str, *, key: str, verified: bool = True) -> Iterator[bytes]:
    """The raw lines of an artifact, verified part by part against the manifest while streaming.

    Args:
        verified: False leaves the digests alone, for a first look at rows that are read again.
    Raises:
        ArtifactError: the schema is another one, or a part is missing, cut, or changed.
    """
    found = manifest(path, key=key)
    if found["schema"] != schema:
        raise ArtifactError(
            f"{key}={path} holds {found['schema']}, but {schema} is read here; point {key} at the output of the stage "
            f"that writes {schema}"
        )
    for part in found["parts"]:
        file = path / part["name"]
        seen, rows = hashlib.sha256(), 0
        try:
            with file.open("rb", buffering=BUFFER_BYTES) as lines:
                if not verified:
                    yield from lines
                    continue
                for line in lines:
                    seen.update(line)
                    rows += 1
                    yield line
        except FileNotFoundError:
            raise ArtifactError(f"{file} is missing, but {path}/manifest.json lists it") from None
        if seen.hexdigest() != part["sha256"]:
            raise ArtifactError(
                f"{file} does not match its manifest ({rows} rows, {part['num_records']} expected): it was changed "
                f"after it was published; delete {path} and run stage={found['stage']} again"
            )


def read(path: Path, record: type[R], *, key: str) -> Iterator[R]:
    """The records of an artifact, in order, streamed. `key` is the config key that named it, for error messages."""
    made = row_reader(record)
    for line in read_rows(path, record.schema, key=key):  # type: ignore[attr-defined]
        yield made(orjson.loads(line))


def verify(path: Path) -> None:
    """Check every listed file against its digest. Raises ArtifactError naming the first that is missing or changed."""
    for part in manifest(path)["parts"]:
        file = path / part["name"]
        if not file.is_file():
            raise ArtifactError(f"{file} is missing, but {path}/manifest.json lists it")
        if sha256_of(file) != part["sha256"]:
            raise ArtifactError(f"{file} does not match {path}/manifest.json: it was changed after it was published")


# ------------------------------------------------------------------------------------------------ planning


_planning = ContextVar("planning", default=False)


class PlanFound(Exception):  # noqa: N818
    """No error: how a stage that is run within `planning` tells what it would write."""

    def __init__(self, out: Path, plan: Plan, *, overwrite: bool) -> None:
        super().__init__(str(out))
        self.out, self.plan, self.overwrite = out, plan, overwrite


class NotKnownError(Exception):
    """What a plan cannot say without doing what it is there to foresee, such as a download."""


@contextmanager
def planning() -> Iterator[None]:
    """Within it a stage comes as far as its first artifact, where `draft` raises PlanFound, and writes nothing.

    So a plan compares the very settings that the stage would record.
    """
    token = _planning.set(True)
    try:
        yield
    finally:
        _planning.reset(token)


def is_planning() -> bool:
    """Whether this is `planning`, and files of gigabytes should be left alone."""
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
    if is_complete(work) and _comparable(manifest(work)) == wanted:
        return Outlook("there", [])
    if is_complete(out):
        changed = differences(_comparable(manifest(out)), wanted)
        return Outlook("other" if changed else "there", changed)
    try:
        begun = orjson.loads((work / "plan.json").read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return Outlook("leftovers" if work.exists() else "none", [])
    changed = differences(begun, wanted)
    parts = len(list((work / "progress").glob("?????.json")))
    return Outlook("leftovers" if changed else "unfinished", changed, parts)


# ------------------------------------------------------------------------------------------------ writing


def draft(out: Path, plan: Plan, *, overwrite: bool = False) -> "Draft":
    """Open an artifact for writing; use as a context manager, return early when `is_current`.

    Raises ArtifactError when it exists with another plan (naming the keys) or another process is writing it.
    """
    if is_planning():
        raise PlanFound(out, plan, overwrite=overwrite)
    return Draft(out, plan, overwrite=overwrite)


class Draft:
    """An artifact in the making. Leaving the `with` block without an error publishes it; an error leaves the parts."""

    def __init__(self, out: Path, plan: Plan, *, overwrite: bool) -> None:
        self.out, self.plan, self.overwrite = out, plan, overwrite
        self.work = partial_path(out)
        self.is_current = False
        self.notes: dict[int, dict[str, Any]] = {}
        self.extra: dict[str, Any] = {}
        self._plan = plan.as_data()
        self._lock = FileLock(out.parent / f".{out.name}.lock", timeout=0)
        self._holder = out.parent / f".{out.name}.holder.json"
        self._started = time.time()

    def __enter__(self) -> "Draft":
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self._acquire()
        try:
            self._open()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and not self.is_current:
                self._publish()
        finally:
            self._release()

    @property
    def scratch(self) -> Path:
        """A folder for what is needed only while the artifact is made; it goes when the artifact is published."""
        return self.work / "progress"

    def has(self, index: int) -> bool:
        """Whether part `index` was committed by an earlier, killed attempt."""
        return index in self.notes

    def commit(
        self,
        index: int,
        records: Iterable[Any],
        *,
        rows_in: int,
        rows_out: int,
        filtered: Mapping[str, int] | None = None,
        quarantined: Sequence[Mapping[str, Any]] = (),
        kept: Mapping[str, int] | None = None,
        measured: Mapping[str, int] | None = None,
    ) -> None:
        """Write part `index` durably.

        rows_in, rows_out: input rows (prompts, files' lines) read for this part, and those of them that are in it.
        filtered: reason → rows left out on purpose. quarantined: bad rows, each with at least a "code".
        kept: what is lacking → rows that are in all the same. measured: counts of another kind, see `measured`.
        """
        part = self._write_lines(f"part-{index:05d}.jsonl", records)
        self._note_part(
            index,
            part,
            rows_in=rows_in,
            rows_out=rows_out,
            filtered=filtered,
            quarantined=quarantined,
            kept=kept,
            measured=measured,
        )

    def commit_counted(self, index: int, records: Iterable[Any], account: Callable[[], Mapping[str, Any]]) -> None:
        """Write part `index` durably while its records are made.

        account: asked once all are written; gives the keyword arguments of `commit`.
        """
        part = self._write_lines(f"part-{index:05d}.jsonl", records)
        self._note_part(index, part, **account())

    def _note_part(
        self,
        index: int,
        part: Mapping[str, Any],
        *,
        rows_in: int,
        rows_out: int,
        filtered: Mapping[str, int] | None = None,
        quarantined: Sequence[Mapping[str, Any]] = (),
        kept: Mapping[str, int] | None = None,
        measured: Mapping[str, int] | None = None,
    ) -> None:
        left_out = dict(sorted((filtered or {}).items()))
        codes = dict(sorted(Counter(str(row["code"]) for row in quarantined).items()))
        if rows_in != rows_out + sum(left_out.values()) + sum(codes.values()):
            raise AssertionError(f"rows lost: {rows_in} in, {rows_out} out, filtered {left_out}, quarantined {codes}")
        note: dict[str, Any] = {
            "parts": [part],
            "rows_in": rows_in,
            "rows_out": rows_out,
            "filtered": left_out,
            "quarantined": codes,
        }
        if kept:
            note["kept"] = dict(kept)
        if measured:
            note["measured"] = dict(measured)
        if quarantined:
            note["quarantine"] = [self._write_lines(f"quarantine-{index:05d}.jsonl", quarantined)]
        write_json(self._note(index), note)
        self.notes[index] = note

    @property
    def measured(self) -> Counter[str]:
        """What `commit` was told to have measured, added up over all parts, those of killed attempts too."""
        return sum((Counter(note.get("measured", {})) for note in self.notes.values()), Counter[str]())

    def commit_stream(self, records: Iterable[Any], *, start: int = 0) -> int:
        """Write records in parts of at most RECORDS_PER_PART, without row accounting. Returns how many."""
        total = 0
        for offset, chunk in enumerate(chunks(records, RECORDS_PER_PART)):
            self.commit(start + offset, chunk, rows_in=len(chunk), rows_out=len(chunk))
            total += len(chunk)
        return total

    def _write_lines(self, name: str, rows: Iterable[Any]) -> dict[str, Any]:
        """Write rows as JSON lines aside, fsync, rename; returns the part's entry for the manifest."""
        seen, count, size = hashlib.sha256(), 0, 0
        temporary = self.work / f"{name}.tmp"
        with temporary.open("wb", buffering=BUFFER_BYTES) as file:
            for row in rows:
                line = orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
                file.write(line)
                seen.update(line)
                count, size = count + 1, size + len(line)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self.work / name)
        return {"name": name, "num_records": count, "bytes": size, "sha256": seen.hexdigest()}

    def _note(self, index: int) -> Path:
        return self.work / "progress" / f"{index:05d}.json"

    def _acquire(self) -> None:
        """Raises ArtifactError, naming who holds the folder."""
        deadline = time.monotonic() + HOLDER_SECONDS
        while True:
            try:
                self._lock.acquire()
                break
            except Timeout:
                who = self._who()
                if who or time.monotonic() > deadline:
                    who = who or "another process"
                    raise ArtifactError(f"{self.out} is being written by {who}; wait for it, or end it") from None
                time.sleep(0.02)  # it has the lock and has not said so yet, or has just let go of it
        try:
            write_json(
                self._holder,
                {
                    "host": socket.gethostname(),
                    "pid": os.getpid(),
                    "since": now(),
                    "job": os.environ.get("SLURM_JOB_ID"),
                },
            )
        except BaseException:
            self._lock.release()
            raise

    def _who(self) -> str:
        """Who holds the folder; "" where nobody has said so but a process that is gone."""
        try:
            holder = orjson.loads(self._holder.read_bytes())
        except (OSError, orjson.JSONDecodeError):
            return ""
        if holder["host"] == socket.gethostname() and not _is_alive(holder["pid"]):
            return ""
        job = f", Slurm job {holder['job']}" if holder.get("job") else ""
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}{job}"

    def _release(self) -> None:
        self._holder.unlink(missing_ok=True)
        self._lock.release()

    def _open(self) -> None:
        self._refuse_own_output()
        if is_complete(self.work) and _comparable(manifest(self.work)) == self._plan:
            self._move_into_place()
        if is_complete(self.out) and not self.overwrite:
            changes = differences(_comparable(manifest(self.out)), self._plan)
            if changes:
                raise ArtifactError(
                    f"{self.out} was made with other settings: {'; '.join(changes)}. "
                    f"Set overwrite=true to replace it, or another exp_name to keep both"
                )
            self._check_files()
            self.is_current = True
            log.info("%s is up to date", self.out)
            return
        if self.work.exists() and not self._resumable():
            log.info("%s: leftovers of other settings, starting afresh", self.work)
            shutil.rmtree(self.work)
        (self.work / "progress").mkdir(parents=True, exist_ok=True)
        write_json(self.work / "plan.json", self._plan)
        for file in sorted((self.work / "progress").glob("*.json")):
            note = self._read_note(file)
            if note is not None:
                self.notes[int(file.stem)] = note
        if self.notes:
            log.info("%s: going on after %d finished parts", self.out, len(self.notes))

    def _refuse_own_output(self) -> None:
        """An artifact made of itself would name a parent that is gone, and grow with every repeat."""
        for name, paths in self.plan.parents.items():
            if self.out.resolve() in [path.resolve() for path in paths]:
                raise ArtifactError(
                    f"inputs.{name}={self.out} is also where stage={self.plan.stage} writes; choose another exp_name, "
                    f"or a part of this run with a name of its own: point=NAME, for this stage and those after it"
                )

    def _resumable(self) -> bool:
        try:
            return bool(orjson.loads((self.work / "plan.json").read_bytes()) == self._plan)
        except (OSError, orjson.JSONDecodeError):
            return False

    def _read_note(self, file: Path) -> dict[str, Any] | None:
        """A part's note, if the note and the part survived the kill; else the part is made again."""
        try:
            note = cast(dict[str, Any], orjson.loads(file.read_bytes()))
            entries = note["parts"] + note.get("quarantine", [])
            intact = all(sha256_of(self.work / entry["name"]) == entry["sha256"] for entry in entries)
        except (OSError, orjson.JSONDecodeError, KeyError):
            intact = False
        return note if intact else None

    def _check_files(self) -> None:
        for part in manifest(self.out)["parts"]:
            file = self.out / part["name"]
            if not file.is_file() or file.stat().st_size != part["bytes"]:
                raise ArtifactError(f"{file} is missing or cut; delete {self.out} and run the same command again")

    def _publish(self) -> None:
        notes = [self.notes[index] for index in sorted(self.notes)]
        parts = [part for note in notes for part in note["parts"]]
        counts: dict[str, Any] = {"rows_in": 0, "rows_out": 0, "filtered": Counter(), "quarantined": Counter()}
        for note in notes:
            for name, value in counts.items():
                counts[name] = value + note[name] if isinstance(value, int) else value + Counter(note[name])
        counts["filtered"] = dict(sorted(counts["filtered"].items()))
        counts["quarantined"] = dict(sorted(counts["quarantined"].items()))
        kept = sum((Counter(note.get("kept", {})) for note in notes), Counter[str]())
        if kept:
            counts["kept"] = dict(sorted(kept.items()))
        content = {
            **self._plan,
            "num_records": sum(part["num_records"] for part in parts),
            "counts": counts,
            "parts": parts,
            "quarantine": [entry for note in notes for entry in note.get("quarantine", [])],
            **self.extra,
            "parent_paths": {
                name: [os.path.relpath(path, self.out) for path in paths] for name, paths in self.plan.parents.items()
            },
            "prefpipe": __version__,
            "versions": versions(),
            **git_state(),
        }
        provenance = {
            "created": now(),
            "seconds": round(time.time() - self._started, 3),
            "host": socket.gethostname(),
            "platform": platform.platform(),
            "command": sys.argv,
        }
        write_json(self.work / "provenance.json", provenance)
        write_json(self.work / "manifest.json", content)
        self._move_into_place()
        log.info("%s: %d records, %s", self.out, content["num_records"], describe_counts(counts))

    def _move_into_place(self) -> None:
        """The last step: the manifest is written, so a kill from here on loses nothing (`_open` finishes it)."""
        shutil.rmtree(self.work / "progress", ignore_errors=True)
        (self.work / "plan.json").unlink(missing_ok=True)
        for stray in self.work.glob("*.tmp"):
            stray.unlink()
        aside = self.out.with_name(f"{self.out.name}.replaced")
        shutil.rmtree(aside, ignore_errors=True)
        if self.out.exists():
            self.out.rename(aside)
        self.work.rename(self.out)
        fsync_folder(self.out.parent)
        shutil.rmtree(aside, ignore_errors=True)

    def add_files(self, names: Iterable[str], *, num_records: int = 0) -> None:
        """Take files that were written straight into `work` (weights, tokenizers, figures) as the artifact's parts."""
        parts = []
        for name in sorted(names):
            file = self.work / name
            parts.append({"name": name, "num_records": 0, "bytes": file.stat().st_size, "sha256": sha256_of(file)})
        if parts:
            parts[0]["num_records"] = num_records
        self.notes[0] = {"parts": parts, "rows_in": 0, "rows_out": 0, "filtered": {}, "quarantined": {}}


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def partial_path(out: Path) -> Path:
    """Where an artifact lives until it is published."""
    return out.with_name(f"{out.name}.partial")


def _recorded(value: Any) -> Any:
    """What JSON has no word for: a dataclass by its fields, but for prefpipe.components.runtime ones; else its text."""
    if is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in fields(value) if f.metadata.get("recorded", True)}
    return str(value)


def _comparable(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: found.get(name) for name in ("stage", "schema", "uses", "parents")}


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Which keys differ between two plans, as "loss.beta 0.1 -> 0.2" lines."""
    if isinstance(old, dict) and isinstance(new, dict):
        changes = []
        for key in sorted(old.keys() | new.keys()):
            inside = "" if not prefix and key in ("uses", "parents") else f"{prefix}{key}."
            if key in old and key in new:
                changes += differences(old[key], new[key], inside)
            else:
                value = old.get(key, new.get(key))
                changes.append(f"{inside.rstrip('.')} {'was' if key in old else 'is now'} {value!r}")
        return changes
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


def describe_counts(counts: Mapping[str, Any]) -> str:
    """Row accounting as one line for the log."""
    text = f"{counts['rows_out']} of {counts['rows_in']} rows used"
    for kind in ("filtered", "quarantined", "kept"):
        if counts.get(kind):
            text += f"; {kind}: " + ", ".join(f"{reason} {n}" for reason, n in counts[kind].items())
    return text
