"""The completions of one prompt brought together, in bounded memory."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

import orjson

from prefpipe import artifacts
from prefpipe.errors import ArtifactError
from prefpipe.records import RECORDS, Completion

C = TypeVar("C", bound=Completion)

NUM_BUCKETS = 64


def completions(path: Path, record: type[C], *, key: str) -> Iterator[C]:
    """The rows of an artifact of `record` or a kind of it (scored completions are completions), streamed."""
    kind = _kind(path, record, key)
    return artifacts.read(path, kind, key=key)


def grouped(paths: Sequence[Path], record: type[C], scratch: Path, *, key: str) -> Iterator[list[C]]:
    """The completions of each prompt, wherever they stand in however many artifacts of `record` or a kind of it.

    Completions that stand together already are streamed; others are first dealt into NUM_BUCKETS files by prompt, so
    that memory holds one bucket at most. Order: by first appearance of the prompt, within a bucket when dealt.

    Args:
        scratch: an empty folder. key: the config key that named the artifacts, for error messages.
    """
    kinds = [_kind(path, record, key) for path in paths]
    if stand_together(paths, record, key=key):
        rows = itertools.chain.from_iterable(
            artifacts.read(path, kind, key=key) for path, kind in zip(paths, kinds, strict=True)
        )
        yield from (list(group) for _, group in itertools.groupby(rows, key=lambda row: row.prompt_id))
        return
    for bucket in _deal(paths, kinds, scratch, key):
        groups: dict[str, list[C]] = {}
        for path, kind in zip(bucket, kinds, strict=True):
            with path.open("rb") as file:
                for line in file:
                    row = kind(**orjson.loads(line))
                    groups.setdefault(row.prompt_id, []).append(row)
        yield from groups.values()


def stand_together(paths: Sequence[Path], record: type[C], *, key: str) -> bool:
    """Whether no prompt comes back after another one. 8 bytes a prompt; reads ids without parsing the rows."""
    seen: set[int] = set()
    last = None
    for path in paths:
        for line in artifacts.read_rows(path, _kind(path, record, key).schema, key=key):
            current = _prompt_number(line)
            if current != last and current in seen:
                return False
            seen.add(current)
            last = current
    return True


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
    """NUM_BUCKETS buckets; each is one file of lines for every artifact."""
    files = [
        [scratch / f"{bucket:02d}-{number}.jsonl" for number in range(len(paths))] for bucket in range(NUM_BUCKETS)
    ]
    for number, (path, kind) in enumerate(zip(paths, kinds, strict=True)):
        handles: list[BinaryIO] = [bucket[number].open("wb") for bucket in files]
        try:
            for line in artifacts.read_rows(path, kind.schema, key=key):
                handles[_prompt_number(line) % NUM_BUCKETS].write(line)
        finally:
            for handle in handles:
                handle.close()
    yield from files


def _prompt_number(line: bytes) -> int:
    """The prompt_id of a row as a number. It is the first field of every record, so the rest need not be parsed."""
    start = len(b'{"prompt_id":"')
    return int(line[start : start + 16], 16)
