"""Words of a text, and how alike two texts are by them."""

import re
import zlib
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

# Chinese and Japanese write no spaces: there a character counts as a word. So does a mark, as in 3 - 1 and 3 + 1.
_UNSPACED = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")


def words(text: str) -> list[str]:
    """Words, numbers and marks in order, without regard to case."""
    return _WORD.findall(text.casefold())


def jaccard(first: AbstractSet[object], second: AbstractSet[object]) -> float:
    """What two sets share of what either has, in [0, 1]; 1 for two empty ones."""
    common = len(first & second)
    total = len(first) + len(second) - common
    return common / total if total else 1.0


def ngram_hashes(found: list[str], size: int) -> "np.ndarray":
    """A 64-bit number for each `size` words in a row, [number of words - size + 1] uint64; one for all of fewer words.

    The same for the same words in every process. No words, no numbers.
    """
    import numpy as np

    codes = np.fromiter((zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in found), np.uint64, len(found))
    size = min(size, len(codes))
    if not size:
        return codes
    hashes = np.zeros(len(codes) - size + 1, np.uint64)
    for place in range(size):
        hashes *= np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bit of an earlier word is lost
        hashes += codes[place : place + len(hashes)] + np.uint64(1)
    # The low bits of a product depend on the low bits of its factors alone: mix them (finalizer of MurmurHash3).
    hashes ^= hashes >> np.uint64(33)
    hashes *= np.uint64(0xFF51AFD7ED558CCD)
    hashes ^= hashes >> np.uint64(33)
    return hashes
