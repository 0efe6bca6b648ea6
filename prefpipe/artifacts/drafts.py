"""Writing artifacts: part by part, resumed after a kill, and published by one rename."""

import hashlib
import logging
import os
import platform
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import orjson

from prefpipe import __version__
from prefpipe.artifacts.accounts import Account, describe_counts, summed
from prefpipe.artifacts.lock import WriteLock
from prefpipe.artifacts.plans import Plan, PlanFound, comparable, differences, is_planning
from prefpipe.artifacts.reading import BUFFER_BYTES, is_complete, manifest, partial_path
from prefpipe.errors import ArtifactError
from prefpipe.files import chunks, fsync_folder, now, sha256_of, write_json
from prefpipe.provenance import git_state, versions

log = logging.getLogger(__name__)

RECORDS_PER_PART = 50_000


def draft(out: Path, plan: Plan, *, overwrite: bool = False) -> "Draft":
    """Open an artifact for writing; use as a context manager, return early when `is_current`.

    Raises ArtifactError when it exists with another plan (naming the keys) or another process is writing it.
    """
    if is_planning():
        raise PlanFound(out, plan, overwrite=overwrite)
    return Draft(out, plan, overwrite=overwrite)


class Draft:
    """An artifact being written. Leaving the `with` block publishes it; after an error the finished parts remain."""

    def __init__(self, out: Path, plan: Plan, *, overwrite: bool) -> None:
        self.out, self.plan, self.overwrite = out, plan, overwrite
        self.work = partial_path(out)
        self.is_current = False
        self.notes: dict[int, dict[str, Any]] = {}
        self.extra: dict[str, Any] = {}
        self._plan = plan.as_data()
        self._lock = WriteLock(out)
        self._started = time.time()

    def __enter__(self) -> "Draft":
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and not self.is_current:
                self._publish()
        finally:
            self._lock.release()

    @property
    def scratch(self) -> Path:
        """A folder for what is needed only while the artifact is written; publishing removes it."""
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
        """Write part `index` durably. The counts are those of an Account."""
        account = Account(rows_in, rows_out, filtered or {}, quarantined, kept or {}, measured or {})
        self.commit_counted(index, records, lambda: account)

    def commit_counted(self, index: int, records: Iterable[Any], account: Callable[[], Account]) -> None:
        """Write part `index` durably. account: asked once all records are made and written."""
        part = self._write_lines(f"part-{index:05d}.jsonl", records)
        counted = account()
        note: dict[str, Any] = {"parts": [part], **counted.as_data()}
        if counted.quarantined:
            note["quarantine"] = [self._write_lines(f"quarantine-{index:05d}.jsonl", counted.quarantined)]
        write_json(self._note(index), note)
        self.notes[index] = note

    @property
    def measured(self) -> Counter[str]:
        """The `measured` counts of all parts together, including those of killed attempts."""
        return sum((Counter(note.get("measured", {})) for note in self.notes.values()), Counter[str]())

    def commit_stream(self, records: Iterable[Any], *, start: int = 0) -> int:
        """Write records in parts of at most RECORDS_PER_PART, without row accounting. Returns how many."""
        total = 0
        for offset, chunk in enumerate(chunks(records, RECORDS_PER_PART)):
            self.commit(start + offset, chunk, rows_in=len(chunk), rows_out=len(chunk))
            total += len(chunk)
        return total

    def add_files(self, names: Iterable[str], *, num_records: int = 0) -> None:
        """Take files that were written straight into `work` (weights, tokenizers, figures) as the artifact's parts."""
        parts = []
        for name in sorted(names):
            file = self.work / name
            parts.append({"name": name, "num_records": 0, "bytes": file.stat().st_size, "sha256": sha256_of(file)})
        if parts:
            parts[0]["num_records"] = num_records
        self.notes[0] = {"parts": parts, **Account(rows_in=0, rows_out=0).as_data()}

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

    def _open(self) -> None:
        self._refuse_own_output()
        if is_complete(self.work) and comparable(manifest(self.work)) == self._plan:
            self._move_into_place()
        if is_complete(self.out) and not self.overwrite:
            changes = differences(comparable(manifest(self.out)), self._plan)
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
        """An artifact made from itself would name a parent that no longer exists, and grow with every repeat."""
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
        """A part's note, if note and part are intact; else None, and the part is made again."""
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
        counts = summed(notes)
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
        of_rows = counts["rows_in"] or content["num_records"] or not parts
        what = f"{content['num_records']} records, {describe_counts(counts)}" if of_rows else f"{len(parts)} files"
        log.info("%s: %s", self.out, what)

    def _move_into_place(self) -> None:
        """The last step. The manifest is there, so a kill from here on loses nothing: `_open` finishes the move."""
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
