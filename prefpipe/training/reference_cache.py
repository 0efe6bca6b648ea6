"""Reference log-probabilities kept between runs: token by token, by content, so that no loss or beta makes them stale.

A sweep, or the next one, computes them once per model. Keys: reference_keys.py; files: reference_parts.py.
"""

import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from prefpipe.errors import ArtifactError, ConfigError, DataError
from prefpipe.files import write_json
from prefpipe.training import reference_lock, reference_parts
from prefpipe.training.reference_keys import KEY_BYTES
from prefpipe.training.reference_parts import NO_ROWS, DamagedError, Logps, Rows, is_part

log = logging.getLogger(__name__)

FORMAT = "reference_logps/1"
DTYPES: dict[str, type[np.floating[Any]]] = {
    "fp32": np.float32,
    "bf16": np.float32,
    "fp16": np.float32,
    "fp64": np.float64,
}
"""Precision of a forward pass → of the log-probabilities that come out of it."""
SECONDS_TO_KEEP_LEFTOVERS = 86_400.0


class ReferenceCache:
    """Per-token log-probabilities of completions under frozen weights, kept between runs.

    Any number of processes may read and add at once. Where several could start on the same pairs, one computes:

        known = cache.get(keys, lengths)
        if any(values is None for values in known):
            with cache.lock():
                known = cache.get(keys, lengths)  # whoever had the lock before has added its values
                ...                               # compute what is still None
                cache.add(missing_keys, values)   # now and then, so that a killed run keeps what it has

    On disk: `<folder>/<weights>-<precision>/part-<sha256>.safetensors`, each written aside and renamed, never changed.
    A part has keys uint8 [n, 32], offsets int64 [n + 1], logps [offsets[n]] in self.dtype, and crc uint32 [n] over the
    key and the values of each row. A damaged part is renamed to `….damaged` with a warning, and its values become
    unknown. In memory there is an index of about 64 bytes a completion; values are read when they are asked for.

    dtype: float32; of precision "fp64" float64.
    """

    def __init__(self, folder: Path, *, weights: str, precision: str) -> None:
        """Open the cache of one model, or begin it.

        Args:
            folder: root of all caches, shared by all runs.
            weights: digest of the frozen model: weights, config, and what else changes its log-probabilities.
            precision: of its forward pass: "fp64", "fp32", "bf16" or "fp16".

        Raises:
            ConfigError: another precision.
            ArtifactError: the manifest in the folder is of another model, precision or format, damaged, or gone.
        """
        if precision not in DTYPES:
            raise ConfigError(f"precision={precision} is none of {', '.join(DTYPES)}")
        assert re.fullmatch(r"[\w-]+", weights), weights
        self.folder = folder / f"{weights}-{precision}"
        self.dtype = np.dtype(DTYPES[precision])
        self._parts: list[Path] = []
        self._known: set[str] = set()
        self._use(NO_ROWS)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_manifest({"format": FORMAT, "weights": weights, "precision": precision})
        self._refresh()

    def get(self, keys: Sequence[bytes], lengths: Sequence[int]) -> list[Logps | None]:
        """The values of completions, as long as asked for; parts that others have added since are seen.

        Args:
            keys: of `completion_key`, K of them, in any order, doubled ones too.
            lengths: how many tokens of each are wanted. A longer stored array is cut: in a causal model the end of a
                completion does not change what comes before it.

        Returns:
            For each key [length] in self.dtype, nats, bit for bit what was added; None where no array of that length or
            longer is known. When several are, it is the one that was added first.
        """
        while True:
            rows = self._find(keys, lengths)
            if (rows < 0).any() and self._refresh():
                continue
            try:
                return self._read(rows, lengths)
            except DamagedError as error:
                self._set_aside(error)

    def add(self, keys: Sequence[bytes], values: Sequence[Logps]) -> None:
        """Publish values as one part: all of them, or none when the process is killed.

        Args:
            keys: of `completion_key`, K of them; of doubled ones the longest array is kept.
            values: for each key [length] in self.dtype, nats.

        Raises:
            DataError: a value is not finite, or above 0.
        """
        longest: dict[bytes, Logps] = {}
        for number, (key, logps) in enumerate(zip(keys, values, strict=True)):
            assert len(key) == KEY_BYTES, key
            assert logps.dtype == self.dtype, logps.dtype
            assert logps.ndim == 1, logps.shape
            if not reference_parts.are_logps(logps):
                raise DataError(
                    f"reference log-probabilities of completion {number} of {len(keys)}: "
                    f"{reference_parts.first_bad(logps)} is not a finite number of at most 0; use "
                    f"hardware.precision=fp32 or bf16, or check the reference's weights"
                )
            if key not in longest or len(logps) > len(longest[key]):
                longest[key] = logps
        if longest:
            reference_parts.publish(self.folder, sorted(longest.items()))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One process at a time; the others wait, saying for whom. It ends with its holder, however that ends."""
        with reference_lock.lock(self.folder):
            self._drop_leftovers()
            yield

    def _drop_leftovers(self) -> None:
        """Remove what killed writers left; a day is longer than any write takes."""
        for leftover in self.folder.glob("part-*.tmp"):
            with suppress(OSError):
                if time.time() - leftover.stat().st_mtime > SECONDS_TO_KEEP_LEFTOVERS:
                    leftover.unlink()

    def _check_manifest(self, expected: dict[str, str]) -> None:
        file = self.folder / "manifest.json"
        remedy = f"delete {self.folder} and its values are computed again"
        has_parts = any(is_part(path.name) for path in self.folder.iterdir())  # first: another may be beginning it
        if not file.exists():
            if has_parts:
                raise ArtifactError(f"{file} is missing, so nothing says which model its values are of; {remedy}")
            write_json(file, expected)
        try:
            found = orjson.loads(file.read_bytes())
        except orjson.JSONDecodeError as error:
            raise ArtifactError(f"{file} is not JSON ({error}); {remedy}") from None
        found = found if isinstance(found, dict) else {}
        wrong = [f"{key}={found.get(key)}, not {value}" for key, value in expected.items() if found.get(key) != value]
        if wrong:
            raise ArtifactError(
                f"{file} says {', '.join(wrong)}: the folder was renamed, or its files changed; {remedy}"
            )

    def _use(self, rows: Rows) -> None:
        """Order the index by the first eight bytes of the key, then by age of the part."""
        first = _first_bytes(rows.keys)
        order = np.argsort(first, kind="stable")
        self._rows, self._first = rows.take(order), first[order]

    def _refresh(self) -> bool:
        """Index the parts that are new; whether there were any."""
        new = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if is_part(entry.name) and entry.name not in self._known:
                    with suppress(FileNotFoundError):  # another process has set it aside
                        new.append((entry.stat().st_mtime_ns, entry.name))
        tables = [self._rows]
        for _, name in sorted(new):
            file = self.folder / name
            self._parts.append(file)
            self._known.add(name)
            try:
                tables.append(reference_parts.load_index(file, len(self._parts) - 1, self.dtype))
            except DamagedError as error:
                self._set_aside(error)
        if len(tables) > 1:
            self._use(Rows(*(np.concatenate(columns) for columns in zip(*tables, strict=True))))
        return len(tables) > 1

    def _find(self, keys: Sequence[bytes], lengths: Sequence[int]) -> NDArray[np.int64]:
        """[K], the row of the index for each key, -1 where there is none."""
        wanted = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES)
        shortest = np.asarray(lengths, dtype=np.int64)
        assert len(wanted) == len(keys) == len(shortest)
        found = np.full(len(keys), -1, dtype=np.int64)
        if not len(self._rows.keys):
            return found
        first = _first_bytes(wanted)
        begin, end = (np.searchsorted(self._first, first, side) for side in ("left", "right"))
        for step in range(int((end - begin).max(initial=0))):
            row = np.minimum(begin + step, len(self._rows.keys) - 1)
            fits = (begin + step < end) & (self._rows.length[row] >= shortest)
            fits &= (self._rows.keys[row] == wanted).all(axis=1) & (found < 0)
            found[fits] = row[fits]
        return found

    def _read(self, rows: NDArray[np.int64], lengths: Sequence[int]) -> list[Logps | None]:
        values: list[Logps | None] = [None] * len(rows)
        hits = np.flatnonzero(rows >= 0)
        hits = hits[np.lexsort((self._rows.start[rows[hits]], self._rows.part[rows[hits]]))]
        for number, group in groupby(hits.tolist(), key=lambda hit: int(self._rows.part[rows[hit]])):
            of_part = list(group)
            found = reference_parts.read_values(self._parts[number], self._rows.take(rows[of_part]), self.dtype)
            for hit, logps in zip(of_part, found, strict=True):
                values[hit] = logps[: lengths[hit]]
        return values

    def _set_aside(self, error: DamagedError) -> None:
        """Forget a part, and move it out of everybody's way if that is allowed."""
        file = error.file
        outcome = "it is renamed to *.damaged"
        try:
            file.rename(file.with_name(f"{file.name}.damaged"))
        except FileNotFoundError:
            outcome = "another process has moved it"
        except OSError as why:
            outcome = f"it is ignored, as it cannot be renamed ({why.strerror})"
        if not file.exists():
            self._known.discard(file.name)  # the same values, computed again, have the same name
        log.warning("%s: %s; %s, and its values are computed again", file, error.what, outcome)
        numbers = [number for number, part in enumerate(self._parts) if part == file]
        self._use(self._rows.take(~np.isin(self._rows.part, numbers)))


def _first_bytes(keys: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """[N], the first eight bytes of each key as a number."""
    return np.ascontiguousarray(keys[:, :8]).view(">u8")[:, 0].astype(np.uint64)
