"""Texts that are nearly the same, and prompts of evaluation sets inside of other prompts.

Two texts are compared by the Jaccard similarity of their sets of SHINGLE words in a row. Which ones need comparing is
found by MinHash and its bands (Broder 1997; datasketch makes the signatures and chooses the bands); whether they are
similar is then computed exactly, so that nothing is removed by a chance collision. Of pairs right at the threshold
some nine in ten are found (at 0.9 four in five), of those 0.1 above it 99 in 100.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, NamedTuple

from prefpipe.words import jaccard, ngram_hashes, words

if TYPE_CHECKING:
    import numpy as np

SHINGLE = 3
NUM_PERMUTATIONS = 128
RECALL_WEIGHT = 0.9
"""For the choice of bands: how much a missed pair counts against one that is compared in vain."""
DOUBT = 0.15
"""A similarity that signatures estimate is off by less than this; three standard deviations of 128 at 0.5 are 0.13."""


class Near(NamedTuple):
    """The number of the text that another is similar to, and how similar it is."""

    place: int
    similarity: float


class Sketches:
    """MinHash signatures of many texts, 512 bytes each whatever the length, and which of them are near to others."""

    def __init__(self) -> None:
        from datasketch import MinHash

        self._blank = MinHash(NUM_PERMUTATIONS, hashfunc=_itself)
        self._signatures = bytearray()
        self._without_words: set[int] = set()
        self._number = 0

    def __len__(self) -> int:
        return self._number

    def add(self, found: Sequence[str]) -> None:
        """Take the next text, as words; it gets the next number, from 0."""
        shingles = ngram_hashes(list(found), SHINGLE)
        if not len(shingles):
            self._without_words.add(self._number)
        minhash = self._blank.copy()
        minhash.update_batch((shingles >> 32).tolist())
        self._signatures += minhash.hashvalues.tobytes()
        self._number += 1

    def near(
        self,
        threshold: float,
        text: Callable[[int], str],
        *,
        fixed: int = 0,
        among: bool = True,
        without: AbstractSet[int] = frozenset(),
    ) -> dict[int, Near]:
        """Each text that is near to a kept one before it → the first such. All others are kept.

        Memory beyond the signatures is 8 bytes for each band that a text shares with another.

        Args:
            threshold: at least so similar texts are near. text: of a number, asked for where signatures say so.
            fixed: the first so many texts are kept whatever they are like. among: False compares the others with
                these alone. without: texts that take no part. Texts without words are near to nothing.
        """
        import numpy as np

        signatures = np.frombuffer(self._signatures, np.uint32).reshape(-1, NUM_PERMUTATIONS)
        members, buckets = _shared_bands(signatures, threshold)
        kept: dict[int, list[int]] = {}
        found: dict[int, Near] = {}
        starts = np.flatnonzero(np.diff(members, prepend=-1))
        for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(members)], strict=True):
            number = int(members[start])
            if number in without or number in self._without_words:
                continue
            mine = buckets[start:end].tolist()
            if number >= fixed:
                near = _first_near(number, {n for b in mine for n in kept.get(b, ())}, signatures, threshold, text)
                if near is not None:
                    found[number] = near
                if near is not None or not among:
                    continue
            for bucket in mine:
                kept.setdefault(bucket, []).append(number)
        return found


def _shared_bands(signatures: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """(text, bucket) for each band that at least two texts have alike, by text."""
    import numpy as np
    from datasketch import MinHashLSH

    bands = MinHashLSH(threshold, NUM_PERMUTATIONS, weights=(1 - RECALL_WEIGHT, RECALL_WEIGHT))
    texts: list[np.ndarray] = []
    buckets: list[np.ndarray] = []
    num_buckets = 0
    for band in range(bands.b):
        keys = np.zeros(len(signatures), np.uint64)
        for column in range(band * bands.r, (band + 1) * bands.r):
            keys *= np.uint64(0x9E3779B97F4A7C15)
            keys += signatures[:, column]
            keys ^= keys >> np.uint64(32)
        order = np.argsort(keys, kind="stable")
        new = np.diff(keys[order], prepend=~keys[order[:1]]) != 0
        bucket = np.cumsum(new) - 1
        shared = np.bincount(bucket)[bucket] > 1 if len(bucket) else new
        texts.append(order[shared].astype(np.uint32))
        buckets.append((bucket[shared] + num_buckets).astype(np.int64))
        num_buckets += len(signatures)
    members, labels = np.concatenate(texts), np.concatenate(buckets)
    by_text = np.argsort(members, kind="stable")
    return members[by_text].astype(np.int64), labels[by_text]


def _first_near(
    number: int, candidates: set[int], signatures: np.ndarray, threshold: float, text: Callable[[int], str]
) -> Near | None:
    import numpy as np

    if not candidates:
        return None
    ordered = np.array(sorted(candidates))
    estimates = (signatures[ordered] == signatures[number]).mean(axis=1)
    likely = ordered[estimates >= threshold - DOUBT].tolist()
    mine = _shingles(text(number)) if likely else set()
    for place in likely:
        similarity = jaccard(mine, _shingles(text(place)))
        if similarity >= threshold:
            return Near(place, similarity)
    return None


def _shingles(text: str) -> set[int]:
    return set(ngram_hashes(words(text), SHINGLE).tolist())


class NgramOverlap:
    """Which prompts of evaluation sets stand, word for word, in another text.

    One does where at least `share` of its runs of `size` words are in the text, as when Tülu 3 was decontaminated
    (Lambert et al. 2024, arXiv:2411.15124: 8 words, half). One of fewer words does where it is the whole text.
    16 bytes for each run.
    """

    def __init__(self, prompts: Iterable[tuple[int, Sequence[str]]], *, size: int, share: float) -> None:
        """prompts: a number of the caller's, and the words."""
        import numpy as np

        self._size, self._share = size, share
        self._short: dict[tuple[str, ...], int] = {}
        self._num_runs: dict[int, int] = {}
        hashes, owners = array("Q"), array("l")
        for number, found in prompts:
            if len(found) < size:
                if found:
                    self._short.setdefault(tuple(found), number)
                continue
            runs = np.unique(ngram_hashes(list(found), size))
            self._num_runs[number] = len(runs)
            hashes.frombytes(runs.tobytes())
            owners.extend([number] * len(runs))
        keys = np.frombuffer(hashes, np.uint64) if hashes else np.empty(0, np.uint64)
        order = np.argsort(keys, kind="stable")
        self._keys = keys[order]
        self._owners = np.frombuffer(owners, np.dtype("l"))[order] if owners else np.empty(0, np.int64)

    def find(self, found: Sequence[str]) -> Near | None:
        """The prompt of which most stands in a text, given as words, where that is enough."""
        import numpy as np

        if len(found) < self._size:
            number = self._short.get(tuple(found))
            return None if number is None else Near(number, 1.0)
        runs = np.unique(ngram_hashes(list(found), self._size))
        starts = np.searchsorted(self._keys, runs, "left")
        ends = np.searchsorted(self._keys, runs, "right")
        shared: dict[int, int] = defaultdict(int)
        for start, end in zip(starts[ends > starts].tolist(), ends[ends > starts].tolist(), strict=True):
            for owner in self._owners[start:end].tolist():
                shared[owner] += 1
        best = max(
            (Near(owner, count / self._num_runs[owner]) for owner, count in shared.items()),
            key=lambda near: (near.similarity, -near.place),
            default=None,
        )
        return best if best is not None and best.similarity >= self._share else None


def _itself(value: int) -> int:
    return value
