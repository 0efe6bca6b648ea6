"""Sequences with common prefixes, laid out so that a shared prefix is computed once.

Completions of one prompt share it; candidates of a context ablation share a document up to the first sentence that one
of them lacks. Whatever the reason, what counts here is the longest common prefix in tokens.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from prefpipe.training.attention import Document
from prefpipe.training.batches import Batch

LEAST_SHARED, LEAST_SHARE = 16, 1 / 16
"""In tokens, and as a share of a row: below these, masked attention costs more than sharing the prefix saves."""


class Row(NamedTuple):
    """ids: [T] int32 of one sequence. start: the log-probabilities of ids[start:] are asked for, start >= 1.

    With start = T nothing is predicted; the last token's hidden state is still there, for a reward.
    """

    ids: np.ndarray
    start: int


def shared_batches(rows: Sequence[Row], *, max_tokens: int) -> Iterator[tuple[list[int], Batch]]:
    """Batches of one row without padding, each shared prefix once: (indices of the batch's rows, the batch).

    A batch holds at most max_tokens tokens, or a single row. How rows are batched changes results only in their last
    digits.
    """
    # As big-endian bytes, token ids compare like the numbers they are.
    order = sorted(range(len(rows)), key=lambda i: (rows[i].ids.astype(">i4").tobytes(), rows[i].start))
    waiting: list[list[tuple[int, int]]] = []
    tokens = 0
    for group in _groups(rows, order, max_tokens):
        size = _size(rows, group)
        if waiting and tokens + size > max_tokens:
            yield _batch(rows, waiting)
            waiting, tokens = [], 0
        waiting.append(group)
        tokens += size
    if waiting:
        yield _batch(rows, waiting)


def _groups(rows: Sequence[Row], order: Sequence[int], max_tokens: int) -> Iterator[list[tuple[int, int]]]:
    """Neighbours in lexicographic order that share a prefix, as `_shared` gives them, as many as fit into a batch."""
    group: list[int] = []
    tokens = 0
    for index in order:
        shared = common_prefix(rows[group[-1]].ids, rows[index].ids) if group else 0
        if group and (shared < LEAST_SHARED or tokens + len(rows[index].ids) - shared > max_tokens):
            yield from _fitting(rows, group, max_tokens)
            group, tokens, shared = [], 0, 0
        group.append(index)
        tokens += len(rows[index].ids) - shared
    if group:
        yield from _fitting(rows, group, max_tokens)


def _fitting(rows: Sequence[Row], group: Sequence[int], max_tokens: int) -> Iterator[list[tuple[int, int]]]:
    """A group, halved until it fits: rows may share less with the group's base than with their neighbours."""
    found = _shared(rows, group)
    if len(group) == 1 or _size(rows, found) <= max_tokens:
        yield found
        return
    half = len(group) // 2
    yield from _fitting(rows, group[:half], max_tokens)
    yield from _fitting(rows, group[half:], max_tokens)


def _size(rows: Sequence[Row], group: Sequence[tuple[int, int]]) -> int:
    return sum(len(rows[number].ids) - shared for number, shared in group)


def _shared(rows: Sequence[Row], group: Sequence[int]) -> list[tuple[int, int]]:
    """The group's rows, each with the number of tokens it shares with the base, the first, which shares most in all."""
    neighbours = [common_prefix(rows[a].ids, rows[b].ids) for a, b in pairwise(group)]
    # In lexicographic order, the common prefix of two rows is the shortest one of the neighbours between them.
    common = np.zeros((len(group), len(group)), dtype=np.int64)
    for a in range(len(group)):
        common[a, a + 1 :] = np.minimum.accumulate(np.array(neighbours[a:], dtype=np.int64))
    common += common.T
    base = int(common.sum(1).argmax())
    found = [(group[base], 0)]
    for place, number in enumerate(group):
        length, shared = len(rows[number].ids), int(common[base, place])
        if place != base:
            # A row keeps at least one token of its own, because its last hidden state must exist.
            worth = shared >= max(LEAST_SHARED, LEAST_SHARE * length)
            found.append((number, min(shared, length - 1) if worth else 0))
    return found


def common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """Length of the longest common prefix of two sequences, in tokens."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length


def _batch(rows: Sequence[Row], groups: Sequence[Sequence[tuple[int, int]]]) -> tuple[list[int], Batch]:
    members: list[int] = []
    ids, places, states, ends = [], [], [], []
    documents: list[Document] = []
    end = 0
    for group in groups:
        base, read, first = end, rows[group[0][0]].start - 1, len(documents)
        for number, shared in group:
            row = rows[number]
            own = len(row.ids) - shared
            # The hidden state of token t - 1 predicts token t.
            asked = np.arange(row.start - 1, len(row.ids) - 1)
            states.append(np.where(asked < shared, base + asked, end + asked - shared))
            if row.start - 1 < shared:
                read = min(read, row.start - 1)
            documents.append(Document(end, end + own, base, shared, end + max(0, row.start - 1 - shared)))
            members.append(number)
            ids.append(row.ids[shared:])
            places.append(np.arange(shared, len(row.ids)))
            end += own
            ends.append(end - 1)
        documents[first] = documents[first]._replace(read=base + read)
    lengths = np.array([len(rows[i].ids) - rows[i].start for i in members])
    return members, Batch(
        input_ids=torch.from_numpy(np.concatenate(ids).astype(np.int64)[None]),
        position_ids=torch.from_numpy(np.concatenate(places)[None]),
        documents=documents,
        positions=torch.from_numpy(np.concatenate(states)),
        targets=torch.from_numpy(np.concatenate([rows[i].ids[rows[i].start :] for i in members]).astype(np.int64)),
        sequences=torch.from_numpy(np.repeat(np.arange(len(members)), lengths)),
        offsets=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        lengths=torch.from_numpy(lengths),
        width=int(lengths.max()),
        ends=torch.tensor(ends),
    )
