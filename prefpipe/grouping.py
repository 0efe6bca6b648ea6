"""The completions of one prompt brought together, in bounded memory."""

import itertools
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import orjson

from prefpipe import artifacts
from prefpipe.errors import ArtifactError
from prefpipe.records import RECORDS, Completion, row_reader

if TYPE_CHECKING:
    import numpy as np

C = TypeVar("C", bound=Completion)

WINDOW_BYTES = 2**20
"""Of rows, not parsed yet, that are brought together at a time; or those of one prompt."""
ID = slice(len(b'{"prompt_id":"'), len(b'{"prompt_id":"') + 16)
"""Where a row's prompt_id stands: it is the first field of every record, so the rest need not be parsed."""


def completions(path: Path, record: type[C], *, key: str) -> Iterator[C]:
    """The rows of an artifact of `record` or a kind of it (scored completions are completions), streamed."""
    return artifacts.read(path, _kind(path, record, key), key=key)


def grouped(paths: Sequence[Path], record: type[C], *, key: str) -> Iterator[list[C]]:
    """The completions of each prompt, wherever they stand in however many artifacts of `record` or a kind of it.

    Two passes: `Runs.of`, which checks the digests, and one that makes the records, in the order of the files where the
    rows of every prompt stand together, else by windows of prompts. Order: by first appearance of the prompt, and
    within it as the rows stand.

    Args:
        key: the config key that named the artifacts, for error messages.
    """
    runs = Runs.of(paths, record, key=key)
    if runs.together:
        rows = itertools.chain.from_iterable(
            artifacts.read(path, _kind(path, record, key), key=key, verified=False) for path in paths
        )
        yield from (list(group) for _, group in itertools.groupby(rows, key=attrgetter("prompt_id")))
        return
    for window in runs.windows():
        groups: dict[bytes, list[tuple[Part[C], bytes]]] = {}
        for part, line in runs.lines(window):
            groups.setdefault(line[ID], []).append((part, line))
        # Parsed one prompt at a time: records of a whole window would not stay in the processor's cache.
        for group in groups.values():
            yield [part.made(orjson.loads(line)) for part, line in group]


class Part(NamedTuple, Generic[C]):
    """A file of rows. start: its first byte, in all files put end to end. made: makes a row's fields a record."""

    start: int
    file: Path
    made: Callable[[dict[str, Any]], C]


@dataclass(frozen=True)
class Runs(Generic[C]):
    """Where the prompts of some artifacts stand: a run is of rows of one prompt, one behind the other.

    ids: of the N runs' prompts, as numbers. starts: N + 1, the first byte of each run, in all files put end to end, and
    the end of the last one. 16 bytes a run; `windows` takes some 50 more.
    """

    ids: "array[int]"
    starts: "array[int]"
    parts: list[Part[C]]

    @classmethod
    def of(cls, paths: Sequence[Path], record: type[C], *, key: str) -> "Runs[C]":
        """Reads every row and parses none. Raises ArtifactError as artifacts.read_rows does, and for unknown ids."""
        runs = cls(array("Q"), array("q"), [])
        place = 0
        for path in paths:
            kind, last, end = _kind(path, record, key), b"", place
            for part in artifacts.manifest(path, key=key)["parts"]:
                runs.parts.append(Part(end, path / part["name"], row_reader(kind)))
                end += part["bytes"]
            for line in artifacts.read_rows(path, kind.schema, key=key):
                current = line[ID]
                if current != last:
                    runs.ids.append(_number(current, path))
                    runs.starts.append(place)
                    last = current
                place += len(line)
        runs.starts.append(place)
        return runs

    @cached_property
    def together(self) -> bool:
        """Whether no prompt comes back after another one."""
        import numpy as np

        ids = np.array(self.ids, np.uint64)
        ids = ids[np.flatnonzero(np.diff(ids, prepend=~ids[:1]))]  # one may go on where the next artifact begins
        return len(np.unique(ids)) == len(ids)

    def windows(self) -> "Iterator[np.ndarray]":
        """Numbers of runs, ascending: all those of some prompts, of WINDOW_BYTES, by first appearance."""
        import numpy as np

        _, first, prompt = np.unique(np.array(self.ids, np.uint64), return_index=True, return_inverse=True)
        sizes = np.bincount(prompt, weights=np.diff(np.array(self.starts)))
        order = first.argsort()
        window = np.empty(len(order), np.int64)
        window[order] = sizes[order].cumsum() // WINDOW_BYTES
        of_run = window[prompt]
        members = of_run.argsort(kind="stable")
        yield from np.split(members, np.flatnonzero(np.diff(of_run[members])) + 1)

    def lines(self, runs: "np.ndarray") -> Iterator[tuple[Part[C], bytes]]:
        """The rows of some runs, ascending, not parsed."""
        for number, ranges in itertools.groupby(self._ranges(runs), key=itemgetter(0)):
            part = self.parts[number]
            with part.file.open("rb") as file:
                for _, start, end in ranges:
                    file.seek(start - part.start)
                    for line in file.read(end - start).splitlines():
                        yield part, line

    def _ranges(self, runs: "np.ndarray") -> Iterator[tuple[int, int, int]]:
        """Number of a part, first byte, end: runs that touch are read at once, but for the borders of parts."""
        import numpy as np

        borders = [*(part.start for part in self.parts), self.starts[-1]]
        for touching in np.split(runs, np.flatnonzero(np.diff(runs) != 1) + 1):
            place, end = self.starts[touching[0]], self.starts[touching[-1] + 1]
            while place < end:
                number = bisect_right(borders, place) - 1
                stop = min(end, borders[number + 1])
                yield number, place, stop
                place = stop


def _number(prompt: bytes, path: Path) -> int:
    try:
        return int(prompt, 16)
    except ValueError:
        artifacts.verify(path)
        raise ArtifactError(f"{path}: a row begins with {prompt!r}, not with a prompt_id of 16 hex digits") from None


def _kind(path: Path, record: type[C], key: str) -> type[C]:
    schema = artifacts.manifest(path, key=key)["schema"]
    kind = RECORDS.get(schema)
    if kind is None or not issubclass(kind, record):
        allowed = " or ".join(name for name, known in RECORDS.items() if issubclass(known, record))
        raise ArtifactError(
            f"{key}={path} holds {schema}, but {allowed} is read here; point {key} at the output of a stage that "
            f"writes that"
        )
    return kind
