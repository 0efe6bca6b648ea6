"""Reference log-probabilities kept between runs: token by token, by content, so that no loss or beta makes them stale.

A sweep, or the next one, computes them once per model. `write_csv` and `read_csv` exchange sums with other programs.
"""

import csv
import errno
import fcntl
import hashlib
import logging
import math
import os
import re
import secrets
import socket
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
import orjson
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from prefpipe.errors import ArtifactError, ConfigError, DataError
from prefpipe.files import fsync_folder, now, write_json

log = logging.getLogger(__name__)

Logps = NDArray[np.float32]

FORMAT = "reference_logps/1"
PRECISIONS = ("fp32", "bf16", "fp16")
KEY_BYTES = 32
MAX_LOGP = 1e-3
"""A log-probability is at most 0; a float32 log-softmax may round to a little more."""
SECONDS_BETWEEN_TRIES = 0.2
SECONDS_BETWEEN_LINES = 60.0
SECONDS_TO_KEEP_LEFTOVERS = 86_400.0


def completion_key(prompt_ids: NDArray[np.integer[Any]], completion_ids: NDArray[np.integer[Any]]) -> bytes:
    """What identifies a completion after its prompt: sha256 over the lengths and the token ids of both.

    Args:
        prompt_ids: [P] integers, the prompt as the model sees it, cut or not.
        completion_ids: [C] integers, the completion before its end was cut, so that all cuts share one key.

    Raises:
        TypeError: the ids are not integers.
    """
    prompt, completion = (ids.astype("<i4", casting="same_kind") for ids in (prompt_ids, completion_ids))
    lengths = np.array([len(prompt), len(completion)], dtype="<i8")
    return hashlib.sha256(lengths.tobytes() + prompt.tobytes() + completion.tobytes()).digest()


class _Rows(NamedTuple):
    """The index: N stored completions, ordered by the first eight bytes of the key, then by age of their part."""

    keys: NDArray[np.uint8]  # [N, 32]
    part: NDArray[np.int32]  # [N], position in ReferenceCache._parts
    start: NDArray[np.int64]  # [N], the first of its values in the part
    length: NDArray[np.int64]  # [N]
    crc: NDArray[np.uint32]  # [N], of key and values

    def take(self, which: NDArray[Any]) -> "_Rows":
        return _Rows(*(column[which] for column in self))


_NO_ROWS = _Rows(
    np.empty((0, KEY_BYTES), np.uint8),
    np.empty(0, np.int32),
    np.empty(0, np.int64),
    np.empty(0, np.int64),
    np.empty(0, np.uint32),
)


class _DamagedError(Exception):
    """A part holds something else than it should."""

    def __init__(self, file: Path, what: str) -> None:
        super().__init__(what)
        self.file, self.what = file, what


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
    A part has keys uint8 [n, 32], offsets int64 [n + 1], logps float32 [offsets[n]], and crc uint32 [n] over the key
    and the values of each row. A damaged part is renamed to `….damaged` with a warning, and its values become unknown.
    In memory there is an index of about 64 bytes a completion; values are read when they are asked for.
    """

    def __init__(self, folder: Path, *, weights: str, precision: str) -> None:
        """Open the cache of one model, or begin it.

        Args:
            folder: root of all caches, shared by all runs.
            weights: digest of the frozen model: weights, config, and what else changes its log-probabilities.
            precision: of its forward pass: "fp32", "bf16" or "fp16".

        Raises:
            ConfigError: another precision.
            ArtifactError: the manifest in the folder is of another model, precision or format, damaged, or gone.
        """
        if precision not in PRECISIONS:
            raise ConfigError(f"precision={precision} is none of {', '.join(PRECISIONS)}")
        assert re.fullmatch(r"[\w-]+", weights), weights
        self.folder = folder / f"{weights}-{precision}"
        self._parts: list[Path] = []
        self._known: set[str] = set()
        self._use(_NO_ROWS)
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
            For each key float32 [length], nats, bit for bit what was added; None where no array of that length or
            longer is known. When several are, it is the one that was added first.
        """
        while True:
            rows = self._find(keys, lengths)
            if (rows < 0).any() and self._refresh():
                continue
            try:
                return self._read(rows, lengths)
            except _DamagedError as error:
                self._set_aside(error)

    def add(self, keys: Sequence[bytes], values: Sequence[Logps]) -> None:
        """Publish values as one part: all of them, or none when the process is killed.

        Args:
            keys: of `completion_key`, K of them; of doubled ones the longest array is kept.
            values: for each key float32 [length], nats.

        Raises:
            DataError: a value is not finite, or above 0.
        """
        longest: dict[bytes, Logps] = {}
        for number, (key, logps) in enumerate(zip(keys, values, strict=True)):
            assert len(key) == KEY_BYTES, key
            assert logps.dtype == np.float32, logps.dtype
            assert logps.ndim == 1, logps.shape
            if not _are_logps(logps):
                raise DataError(
                    f"reference log-probabilities of completion {number} of {len(keys)}: {_first_bad(logps)} is not a "
                    f"finite number of at most 0; use hardware.precision=fp32 or bf16, or check the reference's weights"
                )
            if key not in longest or len(logps) > len(longest[key]):
                longest[key] = logps
        if longest:
            self._publish(sorted(longest.items()))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One process at a time; the others wait, saying for whom. It ends with its holder, however that ends.

        Where the file system has no locks there is a warning instead: then several may compute the same values.
        """
        with (self.folder / "lock").open("a+b", buffering=0) as file:
            self._wait_for(file)
            try:
                _write_holder(file)
                self._drop_leftovers()
                yield
            finally:
                file.truncate(0)
                with suppress(OSError):
                    # Closing alone would leave the lock to forked children.
                    fcntl.flock(file, fcntl.LOCK_UN)

    # -------------------------------------------------------------------------------------------- index

    def _check_manifest(self, expected: dict[str, str]) -> None:
        file = self.folder / "manifest.json"
        remedy = f"delete {self.folder} and its values are computed again"
        has_parts = any(_is_part(path.name) for path in self.folder.iterdir())  # first: another may be beginning it
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

    def _use(self, rows: _Rows) -> None:
        first = _first_bytes(rows.keys)
        order = np.argsort(first, kind="stable")
        self._rows, self._first = rows.take(order), first[order]

    def _refresh(self) -> bool:
        """Index the parts that are new; whether there were any."""
        new = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if _is_part(entry.name) and entry.name not in self._known:
                    with suppress(FileNotFoundError):  # another process has set it aside
                        new.append((entry.stat().st_mtime_ns, entry.name))
        tables = [self._rows]
        for _, name in sorted(new):
            file = self.folder / name
            self._parts.append(file)
            self._known.add(name)
            try:
                tables.append(_load_index(file, len(self._parts) - 1))
            except _DamagedError as error:
                self._set_aside(error)
        if len(tables) > 1:
            self._use(_Rows(*(np.concatenate(columns) for columns in zip(*tables, strict=True))))
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

    def _set_aside(self, error: _DamagedError) -> None:
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

    # -------------------------------------------------------------------------------------------- parts

    def _read(self, rows: NDArray[np.int64], lengths: Sequence[int]) -> list[Logps | None]:
        values: list[Logps | None] = [None] * len(rows)
        hits = np.flatnonzero(rows >= 0)
        hits = hits[np.lexsort((self._rows.start[rows[hits]], self._rows.part[rows[hits]]))]
        for number, group in groupby(hits.tolist(), key=lambda hit: int(self._rows.part[rows[hit]])):
            file = self._parts[number]
            try:
                with safe_open(file, framework="numpy") as part:
                    stored = part.get_slice("logps")
                    for hit in group:
                        values[hit] = self._checked(file, rows[hit], stored)[: lengths[hit]]
            except (SafetensorError, FileNotFoundError) as error:
                raise _DamagedError(file, str(error)) from None
        return values

    def _checked(self, file: Path, row: np.int64, stored: Any) -> Logps:
        """All values of one row of the index. stored: the slices of its part."""
        start, length = int(self._rows.start[row]), int(self._rows.length[row])
        # safetensors takes an empty slice at the end for one out of bounds.
        logps: Logps = stored[start : start + length] if length else np.empty(0, np.float32)
        if zlib.crc32(logps.tobytes(), zlib.crc32(self._rows.keys[row])) != self._rows.crc[row]:
            raise _DamagedError(file, f"values {start} to {start + length} do not match their checksum")
        if not _are_logps(logps):
            raise _DamagedError(file, f"{_first_bad(logps)} is not a log-probability")
        return logps

    def _publish(self, items: list[tuple[bytes, Logps]]) -> None:
        lengths = [len(logps) for _, logps in items]
        tensors: dict[str, NDArray[Any]] = {
            "keys": np.frombuffer(b"".join(key for key, _ in items), dtype=np.uint8).reshape(-1, KEY_BYTES),
            "offsets": np.cumsum([0, *lengths], dtype=np.int64),
            "logps": np.concatenate([logps for _, logps in items]),
            "crc": np.array([zlib.crc32(logps.tobytes(), zlib.crc32(key)) for key, logps in items], dtype=np.uint32),
        }
        # Not save_file: it makes files that only their owner can read.
        content = save(tensors)
        file = self.folder / f"part-{hashlib.sha256(content).hexdigest()}.safetensors"
        _write_aside(file, content)

    # -------------------------------------------------------------------------------------------- lock

    def _wait_for(self, file: IO[bytes]) -> None:
        began = said = 0.0
        holder = ""
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                current, at = _holder(file), time.monotonic()
                began = began or at
                if current != holder or at - said >= SECONDS_BETWEEN_LINES:
                    log.info("%s: waiting %.0f s for %s, who computes its values", self.folder, at - began, current)
                    holder, said = current, at
                time.sleep(SECONDS_BETWEEN_TRIES)
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                    raise
                log.warning("%s cannot be locked (%s): processes may compute the same values", file.name, error)
                return
            else:
                if holder:
                    log.info("%s: free after %.0f s", self.folder, time.monotonic() - began)
                return

    def _drop_leftovers(self) -> None:
        """Remove what killed writers left; a day is longer than any write takes."""
        for leftover in self.folder.glob("part-*.tmp"):
            with suppress(OSError):
                if time.time() - leftover.stat().st_mtime > SECONDS_TO_KEEP_LEFTOVERS:
                    leftover.unlink()


def _is_part(name: str) -> bool:
    return name.startswith("part-") and name.endswith(".safetensors")


def _first_bytes(keys: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """[N], the first eight bytes of each key as a number."""
    return np.ascontiguousarray(keys[:, :8]).view(">u8")[:, 0].astype(np.uint64)


def _are_logps(logps: Logps) -> bool:
    """Whether all values are finite and at most 0, up to rounding."""
    return not len(logps) or bool(logps.min() > -np.inf and logps.max() <= MAX_LOGP)  # a NaN is greater than nothing


def _first_bad(logps: Logps) -> float:
    return next(value for value in map(float, logps) if not (math.isfinite(value) and value <= MAX_LOGP))


def _load_index(file: Path, number: int) -> _Rows:
    """The index of one part. Raises _DamagedError when the file is cut, or its sizes do not belong together."""
    try:
        with safe_open(file, framework="numpy") as part:
            keys, offsets, crc = (part.get_tensor(name) for name in ("keys", "offsets", "crc"))
            logps = part.get_slice("logps")
            shape, dtype = logps.get_shape(), logps.get_dtype()
    except (SafetensorError, FileNotFoundError) as error:
        raise _DamagedError(file, str(error)) from None
    n = len(keys)
    kinds = (keys.dtype, offsets.dtype, crc.dtype, dtype) == (np.uint8, np.int64, np.uint32, "F32")
    sizes = (keys.shape, offsets.shape, crc.shape, len(shape)) == ((n, KEY_BYTES), (n + 1,), (n,), 1)
    if not kinds or not sizes or offsets[0] != 0 or offsets[-1] != shape[0] or (np.diff(offsets) < 0).any():
        raise _DamagedError(file, "its sizes do not belong together")
    return _Rows(keys, np.full(n, number, dtype=np.int32), offsets[:-1], np.diff(offsets), crc)


def _write_aside(file: Path, content: bytes) -> None:
    """Write a file durably: aside under a name of its own, fsync, rename."""
    temporary = file.with_name(f"{file.name}.{secrets.token_hex(8)}.tmp")
    with temporary.open("xb") as aside:
        aside.write(content)
        aside.flush()
        os.fsync(aside.fileno())
    temporary.rename(file)
    fsync_folder(file.parent)


def _write_holder(file: IO[bytes]) -> None:
    note = {"host": socket.gethostname(), "pid": os.getpid(), "since": now(), "job": os.environ.get("SLURM_JOB_ID")}
    file.truncate(0)
    file.write(orjson.dumps(note))


def _holder(file: IO[bytes]) -> str:
    file.seek(0)
    try:
        note = orjson.loads(file.read())
        job = f", Slurm job {note['job']}" if note["job"] else ""
        return f"process {note['pid']} on {note['host']} since {note['since']}{job}"
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return "another process"


# ------------------------------------------------------------------------------------------------ CSV


class PairSums(NamedTuple):
    """Reference log-probabilities of one pair as other programs exchange them. The fields are the columns of the CSV.

    full_id: the pair's name, unique within its split. reference_chosen_logps, reference_rejected_logps: nats, summed
    over completion tokens. chosen_tokens, rejected_tokens: how many were summed.
    """

    full_id: str
    split: str
    reference_chosen_logps: float
    reference_rejected_logps: float
    chosen_tokens: int
    rejected_tokens: int

    @property
    def name(self) -> tuple[str, str]:
        return self.full_id, self.split


def write_csv(path: Path, rows: Iterable[PairSums]) -> None:
    """Write sums, one row per pair, under a header, UTF-8; every float64 keeps its bits.

    Raises:
        DataError: two rows have one full_id and split, or a value is not what `read_csv` accepts.
    """
    seen: set[tuple[str, str]] = set()
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
            writer.writerow(PairSums._fields)
            for row in rows:
                _pair_sums(f"{path}: row {len(seen) + 1}", [str(value) for value in row])
                if row.name in seen:
                    raise DataError(f"{path}: full_id={row.full_id}, split={row.split} names two pairs; make it unique")
                seen.add(row.name)
                writer.writerow(row)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)


def read_csv(path: Path) -> list[PairSums]:
    """Read sums back, every value checked; the order of the columns is free.

    Raises:
        DataError: a column is missing, unknown or doubled, a pair is doubled, a row is too short or long, a sum is no
            finite number of at most 0, a count is no whole number of at least 1, or the file is not CSV in UTF-8.
    """
    found: dict[tuple[str, str], int] = {}
    rows = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            if sorted(header) != sorted(PairSums._fields):
                raise DataError(
                    f"{path}:1: the columns are {','.join(header)}, expected are exactly {','.join(PairSums._fields)}; "
                    f"add, rename or drop some (with pandas: index=False)"
                )
            order = [header.index(name) for name in PairSums._fields]
            for cells in reader:
                where = f"{path}:{reader.line_num}"
                if len(cells) != len(header):
                    raise DataError(
                        f"{where}: {len(cells)} cells, but the header has {len(header)}; write the row again"
                    )
                row = _pair_sums(where, [cells[column] for column in order])
                if row.name in found:
                    raise DataError(
                        f"{where}: full_id={row.full_id}, split={row.split} is in line {found[row.name]} too; drop one"
                    )
                found[row.name] = reader.line_num
                rows.append(row)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}:{reader.line_num + 1}: not CSV in UTF-8 ({error}); export it again") from None
    return rows


def match_sums(rows: Iterable[PairSums], pairs: Sequence[tuple[str, str, int, int]]) -> NDArray[np.float64]:
    """The sums of a CSV in the order of the pairs of a run, for losses of sums and token counts.

    All a sum allows is used with the tokens that were summed: DPO, and with the counts IPO and others of means. Losses
    that look at single tokens, and completions cut elsewhere, need a ReferenceCache; a sum cannot fill one.

    Args:
        rows: of `read_csv`; pairs that the run has not are skipped.
        pairs: full_id, split, number of chosen and of rejected tokens, as the run has them after cutting.

    Returns:
        [2, len(pairs)], nats, chosen then rejected.

    Raises:
        DataError: a pair is not among the rows, or was summed over another number of tokens.
    """
    known = {row.name: row for row in rows}
    sums = np.empty((2, len(pairs)))
    for number, (full_id, split, *tokens) in enumerate(pairs):
        row = known.get((full_id, split))
        if row is None:
            raise DataError(f"full_id={full_id}, split={split} has no reference log-probabilities; compute them again")
        if [row.chosen_tokens, row.rejected_tokens] != tokens:
            raise DataError(
                f"full_id={full_id}, split={split}: the sums are over {row.chosen_tokens} chosen and "
                f"{row.rejected_tokens} rejected tokens, but here there are {tokens[0]} and {tokens[1]}; use the same "
                f"tokenizer, chat template, training.max_tokens and max_prompt_tokens, or compute them again"
            )
        sums[:, number] = row.reference_chosen_logps, row.reference_rejected_logps
    return sums


def _pair_sums(where: str, cells: Sequence[str]) -> PairSums:
    """One row, checked. cells: in the order of the fields."""
    values: list[str | float | int] = [*cells[:2]]
    for name, cell in zip(PairSums._fields[2:4], cells[2:4], strict=True):
        number = _float(cell)
        if not (math.isfinite(number) and number <= MAX_LOGP):
            raise DataError(
                f"{where}: {name}={cell!r} is not a finite number of at most 0; give the summed log-probability in nats"
            )
        values.append(number)
    for name, cell in zip(PairSums._fields[4:], cells[4:], strict=True):
        if not re.fullmatch(r"0*[1-9][0-9]{0,8}", cell):
            raise DataError(
                f"{where}: {name}={cell!r} is not a whole number of at least 1; give the number of tokens summed"
            )
        values.append(int(cell))
    if not cells[0]:
        raise DataError(f"{where}: full_id is empty; give every pair a name")
    return PairSums(*cast(tuple[str, str, float, float, int, int], tuple(values)))


def _float(text: str) -> float:
    """NaN where the text is no decimal number; Python alone would take `1_0`."""
    try:
        return float("nan" if "_" in text else text)
    except ValueError:
        return math.nan
