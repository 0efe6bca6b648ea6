"""The completions of one prompt brought together, in bounded memory."""

import itertools
from array import array
from collections.abc import Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import BinaryIO, TypeVar

import orjson

from prefpipe import artifacts
from prefpipe.errors import ArtifactError
from prefpipe.records import RECORDS, Completion, row_reader

C = TypeVar("C", bound=Completion)

BUCKET_BYTES = 32 * 2**20
"""Of rows in a file, at most and about, where rows are dealt; as records they take some three times that."""
MAX_BUCKETS = 512
"""Files that are open at the same time."""
DEALING_BYTES = 16 * 2**20
"""Waiting to be written to all of them."""
ID = slice(len(b'{"prompt_id":"'), len(b'{"prompt_id":"') + 16)
"""Where a row's prompt_id stands: it is the first field of every record, so the rest need not be parsed."""


def completions(path: Path, record: type[C], *, key: str) -> Iterator[C]:
    """The rows of an artifact of `record` or a kind of it (scored completions are completions), streamed."""
    kind = _kind(path, record, key)
    return artifacts.read(path, kind, key=key)


def grouped(paths: Sequence[Path], record: type[C], scratch: Path, *, key: str) -> Iterator[list[C]]:
    """The completions of each prompt, wherever they stand in however many artifacts of `record` or a kind of it.

    Completions that stand together already are streamed; others are first dealt into files of some BUCKET_BYTES by
    prompt, so that memory holds one of them. Order: by first appearance of the prompt, within a file when dealt.

    Args:
        scratch: an empty folder. key: the config key that named the artifacts, for error messages.
    """
    kinds = [_kind(path, record, key) for path in paths]
    if stand_together(paths, record, key=key):
        rows = itertools.chain.from_iterable(
            artifacts.read(path, kind, key=key) for path, kind in zip(paths, kinds, strict=True)
        )
        yield from (list(group) for _, group in itertools.groupby(rows, key=attrgetter("prompt_id")))
        return
    for bucket in _deal(paths, kinds, scratch, key):
        groups: dict[str, list[C]] = {}
        for path, kind in zip(bucket, kinds, strict=True):
            made = row_reader(kind)
            with path.open("rb", buffering=artifacts.BUFFER_BYTES) as file:
                for line in file:
                    row = made(orjson.loads(line))
                    groups.setdefault(row.prompt_id, []).append(row)
        yield from groups.values()


def stand_together(paths: Sequence[Path], record: type[C], *, key: str) -> bool:
    """Whether no prompt comes back after another one. 8 bytes a prompt; reads ids without parsing the rows."""
    import numpy as np

    numbers = array("Q")
    last = b""
    for path in paths:
        for line in artifacts.read_rows(path, _kind(path, record, key).schema, key=key, verified=False):
            current = line[ID]
            if current != last:
                numbers.append(int(current, 16))
                last = current
    found = np.frombuffer(numbers, np.uint64) if numbers else np.empty(0, np.uint64)
    return len(np.unique(found)) == len(found)


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


def _deal(paths: Sequence[Path], kinds: Sequence[type[C]], scratch: Path, key: str) -> Iterator[list[Path]]:
    """The buckets; each is one file of lines for every artifact."""
    total = sum(part["bytes"] for path in paths for part in artifacts.manifest(path, key=key)["parts"])
    num_buckets = min(MAX_BUCKETS, 1 + total // BUCKET_BYTES)
    files = [
        [scratch / f"{bucket:03d}-{number}.jsonl" for number in range(len(paths))] for bucket in range(num_buckets)
    ]
    for number, (path, kind) in enumerate(zip(paths, kinds, strict=True)):
        buffering = max(8192, DEALING_BYTES // num_buckets)
        handles: list[BinaryIO] = [bucket[number].open("wb", buffering=buffering) for bucket in files]
        try:
            for line in artifacts.read_rows(path, kind.schema, key=key):
                handles[int(line[ID], 16) % num_buckets].write(line)
        finally:
            for handle in handles:
                handle.close()
    yield from files
