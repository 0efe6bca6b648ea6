"""Telling a tracker what a record is of, once: <name>.<tracker>.json beside the record says what it has been told.

Before a call its arguments are noted, time included; after it, that it came through. A call whose answer got lost is
made again with the same arguments, which a tracker takes once.
"""

import dataclasses
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from filelock import FileLock

from prefpipe import artifacts
from prefpipe.errors import PrefpipeError
from prefpipe.files import write_json
from prefpipe.tracking import Row, Sink, records

log = logging.getLogger(__name__)

VALUES_AT_ONCE = 1000
PAUSE_SECONDS = 0.5


class TrackingError(PrefpipeError, RuntimeError):
    """A tracker did not take what it was told."""

    kind = "tracking"


@dataclass
class Told:
    """What a tracker has been told of a record.

    id: of the record. run: the tracker's own id for its run. described: a digest of the settings that it has.
    steps: metrics up to this step. pending: (last step, ms since 1970) of rows that may have come through.
    results: record whose run the results went to ("" for its own) → (what of which run, ms since 1970, came through).
    """

    id: str
    run: str = ""
    described: str = ""
    steps: int = 0
    pending: list[int] | None = None
    results: dict[str, list[Any]] = field(default_factory=dict)
    status: str = ""


class Teller:
    """Tells one tracker about one record; use as a context manager, which waits for others that do the same."""

    def __init__(self, path: Path, sink: Sink) -> None:
        self.path, self.sink = path, sink
        self.artifact = records.artifact_of(path)
        self.note = self.artifact.with_name(f"{self.artifact.name}.{sink.name}.json")
        self._lock = FileLock(path.with_name(f".{self.note.stem}.lock"))

    def __enter__(self) -> "Teller":
        self._lock.acquire()
        try:
            self.record = records.read(self.path)
            self.told = self._read()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def open(self) -> None:
        """Find or make the record's run, below those it belongs to, and tell its settings."""
        parent = run_of(self.path.parent / self.record.parent, self.sink) if self.record.parent else None
        run = self.sink.open(self.record, parent)
        if run != self.told.run:
            # Another store, or one that was deleted: it knows nothing yet.
            self.told = Told(self.record.id, run)
            self._write()
        params, tags = self.record.params, self.record.all_tags()
        if records.current(self.artifact, self.record) == self.artifact:
            tags[self.artifact.name] = artifacts.digest(self.artifact)
        described = records.digest_of({"params": params, "tags": tags})
        if described != self.told.described:
            self.sink.describe(run, params, tags)
            self.told.described = described
            self._write()
        if self.record.kind in records.GROUPS and not self.told.status:
            self.set_status("FINISHED", _now())  # a group has no end of its own, and should not seem to run for ever

    def tell_steps(self, rows: Iterable[Row]) -> None:
        """Metrics of the rows that come after what has been told."""
        for batch in self._batches(row for row in rows if row.step > self.told.steps):
            if self.told.pending is None:
                self.told.pending = [batch[-1].step, _now()]
                self._write()
            self.sink.log(self.told.run, batch, self.told.pending[1])
            self.told.steps, self.told.pending = batch[-1].step, None
            self._write()

    def tell_results(self) -> None:
        """What the finished artifact has come to, to its own run and to those that it belongs into."""
        if self.record.own_run and self.record.kind != "train":
            self._tell_results("", 0)
        for into, step in self.record.into.items():
            self._tell_results(into, step)

    def set_status(self, status: str, time: int) -> None:
        """RUNNING, FINISHED, FAILED or KILLED, since a time in ms; a sink is told of changes."""
        if self.record.own_run and status != self.told.status:
            self.sink.set_status(self.told.run, status, time)
            self.told.status = status
            self._write()

    def _tell_results(self, into: str, step: int) -> None:
        digest = artifacts.digest(self.artifact)
        run = run_of(self.path.parent / into, self.sink) if into else self.told.run
        # A run that was made anew has no results, whatever was told to the one before.
        key = f"{digest} {run}"
        known = self.told.results.get(into)
        if known is None or known[0] != key:
            known = self.told.results[into] = [key, _now(), False]
            self._write()
        if not known[2]:
            self.sink.summarize(run, Row(step, records.results(self.artifact)), known[1])
            known[2] = True
            self._write()

    def _batches(self, rows: Iterable[Row]) -> Iterator[list[Row]]:
        """Of some hundred values. One whose answer got lost comes first and as it was, so it waits for all its rows."""
        batch: list[Row] = []
        for row in rows:
            pending = self.told.pending
            if batch and (row.step > pending[0] if pending else _size(batch) + len(row.values) > VALUES_AT_ONCE):
                yield batch
                batch = []
            batch.append(row)
        if batch and (self.told.pending is None or batch[-1].step >= self.told.pending[0]):
            yield batch

    def _read(self) -> Told:
        try:
            told = Told(**orjson.loads(self.note.read_bytes()))
        except FileNotFoundError:
            told = Told(self.record.id)
        return told if told.id == self.record.id else Told(self.record.id)

    def _write(self) -> None:
        write_json(self.note, dataclasses.asdict(self.told))


def run_of(path: Path, sink: Sink) -> str:
    """The tracker's id for the run of a record, made with those above it where they are missing."""
    with Teller(path, sink) as teller:
        teller.open()
        return teller.told.run


def tell(path: Path, sink: Sink, outcome: str | None = None) -> None:
    """Everything that there is to tell of a record and was not told yet.

    Args:
        outcome: FINISHED, FAILED or KILLED, when the stage has just ended.
    """
    with Teller(path, sink) as teller:
        record = teller.record
        if record.own_run:
            teller.open()
        if record.kind in records.GROUPS:
            if outcome:
                teller.set_status(outcome, _now())
            return
        folder = records.current(teller.artifact, record)
        if folder is None:
            return
        if record.own_run:
            teller.tell_steps(records.steps(folder, after=teller.told.steps))
        if folder == teller.artifact:
            teller.tell_results()
            teller.set_status("FINISHED", int((folder / "manifest.json").stat().st_mtime * 1000))
        elif outcome:
            teller.set_status(outcome, _now())


def tell_patiently(path: Path, sink: Sink, outcome: str | None = None) -> str:
    """tell, again and again for sink.wait_seconds while others are at it; what went wrong, "" for nothing."""
    end = time.monotonic() + sink.wait_seconds
    while True:
        try:
            tell(path, sink, outcome)
            return ""
        except Exception as error:  # whatever a tracker throws, the run is worth more than its record
            log.debug("%s, %s: %s", sink.name, path, error, exc_info=True)
            if not sink.is_busy(error) or time.monotonic() > end:
                return f"{type(error).__name__}: {error}"
            time.sleep(PAUSE_SECONDS)


class Follower:
    """Tells of a training run while it runs, by the tail of its metrics.jsonl."""

    def __init__(self, path: Path, sink: Sink) -> None:
        self.path, self.sink = path, sink
        self.work = artifacts.partial_path(records.artifact_of(path))
        self._offset, self._is_open = 0, False

    def look(self) -> None:
        """Tell what is new since the last look."""
        with Teller(self.path, self.sink) as teller:
            if not self._is_open:
                teller.open()
            self._is_open = False  # after an error the run may be gone
            teller.set_status("RUNNING", _now())
            rows, end = self._tail(teller.told.steps)
            teller.tell_steps(rows)
            self._offset, self._is_open = end, True

    def _tail(self, told: int) -> tuple[list[Row], int]:
        """(rows after the last offset, the new offset); from the start, where the file is not the one it was."""
        rows, end = _rows_from(self.work / "metrics.jsonl", self._offset)
        if rows is None or (rows and rows[0].step > told + 1):
            rows, end = _rows_from(self.work / "metrics.jsonl", 0)
        return rows or [], end


def _rows_from(file: Path, offset: int) -> tuple[list[Row] | None, int]:
    """(whole rows behind an offset, where they end); None where the offset is no beginning of a line."""
    rows: list[Row] = []
    try:
        with file.open("rb") as lines:
            if offset:
                lines.seek(offset - 1)
                if lines.read(1) != b"\n":
                    return None, 0
            for line in lines:
                row = records.as_row(line)
                if row is None:
                    return (rows, offset) if not line.endswith(b"\n") else (None, 0)
                rows.append(row)
                offset += len(line)
    except FileNotFoundError:
        return [], 0
    return rows, offset


def _size(batch: list[Row]) -> int:
    return sum(len(row.values) for row in batch)


def _now() -> int:
    return int(time.time() * 1000)
