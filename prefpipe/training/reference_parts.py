"""The files of the reference cache: written aside and renamed, never changed, every value under a checksum."""

import hashlib
import math
import os
import secrets
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from prefpipe.files import fsync_folder
from prefpipe.training.reference_keys import KEY_BYTES

Logps = NDArray[np.floating[Any]]
"""[tokens], nats: float64 of a float64 model, float32 of every other."""

MAX_LOGP = 1e-3
"""A log-probability is at most 0; a float32 log-softmax may round to a little more."""


class Rows(NamedTuple):
    """The index of N stored completions."""

    keys: NDArray[np.uint8]  # [N, 32]
    part: NDArray[np.int32]  # [N], the number of the part
    start: NDArray[np.int64]  # [N], the first of its values in the part
    length: NDArray[np.int64]  # [N]
    crc: NDArray[np.uint32]  # [N], of key and values

    def take(self, which: NDArray[Any]) -> "Rows":
        """Some of them."""
        return Rows(*(column[which] for column in self))


NO_ROWS = Rows(
    np.empty((0, KEY_BYTES), np.uint8),
    np.empty(0, np.int32),
    np.empty(0, np.int64),
    np.empty(0, np.int64),
    np.empty(0, np.uint32),
)


class DamagedError(Exception):
    """A part holds something else than it should."""

    def __init__(self, file: Path, what: str) -> None:
        super().__init__(what)
        self.file, self.what = file, what


def is_part(name: str) -> bool:
    """Whether a file of this name is a part, and whole."""
    return name.startswith("part-") and name.endswith(".safetensors")


def are_logps(logps: Logps) -> bool:
    """Whether all values are finite and at most 0, up to rounding."""
    return not len(logps) or bool(logps.min() > -np.inf and logps.max() <= MAX_LOGP)  # a NaN is greater than nothing


def first_bad(logps: Logps) -> float:
    """The first value that is no log-probability."""
    return next(value for value in map(float, logps) if not (math.isfinite(value) and value <= MAX_LOGP))


def load_index(file: Path, number: int, dtype: np.dtype[Any]) -> Rows:
    """The index of one part. Raises DamagedError when the file is cut, or its sizes do not belong together."""
    try:
        with safe_open(file, framework="numpy") as part:
            keys, offsets, crc = (part.get_tensor(name) for name in ("keys", "offsets", "crc"))
            logps = part.get_slice("logps")
            shape, kind = logps.get_shape(), logps.get_dtype()
    except (SafetensorError, FileNotFoundError) as error:
        raise DamagedError(file, str(error)) from None
    n = len(keys)
    kinds = (keys.dtype, offsets.dtype, crc.dtype, kind) == (np.uint8, np.int64, np.uint32, f"F{8 * dtype.itemsize}")
    sizes = (keys.shape, offsets.shape, crc.shape, len(shape)) == ((n, KEY_BYTES), (n + 1,), (n,), 1)
    if not kinds or not sizes or offsets[0] != 0 or offsets[-1] != shape[0] or (np.diff(offsets) < 0).any():
        raise DamagedError(file, "its sizes do not belong together")
    return Rows(keys, np.full(n, number, dtype=np.int32), offsets[:-1], np.diff(offsets), crc)


def read_values(file: Path, rows: Rows, dtype: np.dtype[Any]) -> list[Logps]:
    """All values of each of some rows of one part. Raises DamagedError where they are not what was written."""
    try:
        with safe_open(file, framework="numpy") as part:
            stored = part.get_slice("logps")
            # safetensors takes an empty slice at the end for one out of bounds.
            values = [
                stored[start : start + length] if length else np.empty(0, dtype)
                for start, length in zip(rows.start.tolist(), rows.length.tolist(), strict=True)
            ]
    except (SafetensorError, FileNotFoundError) as error:
        raise DamagedError(file, str(error)) from None
    for key, start, logps, crc in zip(rows.keys, rows.start.tolist(), values, rows.crc.tolist(), strict=True):
        if zlib.crc32(logps.tobytes(), zlib.crc32(key)) != crc:
            raise DamagedError(file, f"values {start} to {start + len(logps)} do not match their checksum")
        if not are_logps(logps):
            raise DamagedError(file, f"{first_bad(logps)} is not a log-probability")
    return values


def publish(folder: Path, items: Sequence[tuple[bytes, Logps]]) -> None:
    """Write keys and values as one part, durably, named by its content: whole, or not at all."""
    lengths = [len(logps) for _, logps in items]
    tensors: dict[str, NDArray[Any]] = {
        "keys": np.frombuffer(b"".join(key for key, _ in items), dtype=np.uint8).reshape(-1, KEY_BYTES),
        "offsets": np.cumsum([0, *lengths], dtype=np.int64),
        "logps": np.concatenate([logps for _, logps in items]),
        "crc": np.array([zlib.crc32(logps.tobytes(), zlib.crc32(key)) for key, logps in items], dtype=np.uint32),
    }
    # Not save_file: it makes files that only their owner can read.
    content = save(tensors)
    file = folder / f"part-{hashlib.sha256(content).hexdigest()}.safetensors"
    temporary = file.with_name(f"{file.name}.{secrets.token_hex(8)}.tmp")
    with temporary.open("xb") as aside:
        aside.write(content)
        aside.flush()
        os.fsync(aside.fileno())
    temporary.rename(file)
    fsync_folder(folder)
