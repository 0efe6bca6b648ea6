"""Answers whose statements cite sentences of a document, as LongCite and SelfCite write them.

A document's sentences carry the tags <C0>, <C1>, …; an answer is `<statement>text<cite>[a-b][c-d]</cite></statement>`
again and again, [a-b] citing the sentences from a to b, both included, and `<cite></cite>` nothing.
"""

import itertools
import random
import re
from collections.abc import Callable, Sequence

CITE = re.compile(r"<cite>(.*?)</cite>", re.DOTALL)
_RANGE = re.compile(r"\[(\d+)-(\d+)\]")

LONGEST_RANGE, CUT_RANGE = 11, 6
"""Length balancing: a range of more sentences than the first is cut to the second."""
NEAREST, FARTHEST = 3, 10
"""Sentences between what chosen cites and a range that is made up for rejected."""
MAX_TRIES = 1000

Range = tuple[int, int]


def cited(answer: str) -> list[list[Range]]:
    """The ranges of each <cite> in order; those that end before they start are left out."""
    return [_ranges(found) for found in CITE.findall(answer)]


def with_citations(answer: str, ranges: Sequence[Sequence[Range]]) -> str:
    """The answer with other ranges, one list for each <cite> that it has."""
    new = iter(ranges)
    return CITE.sub(lambda _: f"<cite>{citation_text(next(new))}</cite>", answer)


def with_citation(answer: str, statement: int, citation: str) -> str:
    """The answer with another text in one <cite>, by the number of that."""
    found = next(itertools.islice(CITE.finditer(answer), statement, None))
    return answer[: found.start(1)] + citation + answer[found.end(1) :]


def citation_text(ranges: Sequence[Range]) -> str:
    """As it stands in a <cite>: [a-b][c-d]."""
    return "".join(f"[{a}-{b}]" for a, b in ranges)


def renumbered(answer: str, place: Callable[[int], int]) -> str:
    """The answer with each cited sentence number replaced by `place` of it."""
    return with_citations(answer, [[(place(a), place(b)) for a, b in ranges] for ranges in cited(answer)])


def balanced(
    chosen: str, rejected: str, rng: random.Random, *, num_sentences: int | None = None
) -> tuple[str, str] | None:
    """Both answers with citations of equal length, so that a model learns where to cite and not how much.

    Length balancing of SelfCite (Chuang et al. 2025, arXiv:2502.09604), statement by statement; None where the answers
    have another number of statements, which leaves nothing to compare.

    Ranges over 11 sentences are cut to 6 and touching ones merged. Where chosen has more ranges, made-up ones are added
    to rejected, 3 to 10 sentences before the first or after the last that chosen cites, overlapping nothing, until
    numbers and total lengths are equal; where the total is too long for that, rejected's own are shortened first.
    Otherwise the outer ends of rejected's first and last range move until the totals are equal, at random on either
    side, and not onto a range of chosen. What has no room (a document's ends, ranges of one sentence) stays unequal.

    Args:
        num_sentences: of the document; no citation goes beyond it. None: not known.
    """
    ours, theirs = ([_merged(_cut(ranges)) for ranges in cited(answer)] for answer in (chosen, rejected))
    if len(ours) != len(theirs):
        return None
    last = None if num_sentences is None else num_sentences - 1
    new = [_balanced_ranges(good, bad, rng, last) for good, bad in zip(ours, theirs, strict=True)]
    return with_citations(chosen, ours), with_citations(rejected, new)


def coverage(ranges: Sequence[Range]) -> int:
    """How many sentences ranges cite together; they must not overlap."""
    return sum(end - start + 1 for start, end in ranges)


def _ranges(text: str) -> list[Range]:
    found = [(int(start), int(end)) for start, end in _RANGE.findall(text)]
    return [(start, end) for start, end in found if start <= end]


def _cut(ranges: Sequence[Range]) -> list[Range]:
    return [(a, a + CUT_RANGE - 1 if b - a + 1 > LONGEST_RANGE else b) for a, b in ranges]


def _merged(ranges: Sequence[Range]) -> list[Range]:
    """Sorted, and those that touch or overlap made one."""
    merged: list[Range] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _balanced_ranges(chosen: list[Range], rejected: list[Range], rng: random.Random, last: int | None) -> list[Range]:
    """Rejected's new ranges for one statement."""
    if not chosen or chosen == rejected:
        return rejected
    missing = len(chosen) - len(rejected)
    if missing > 0:
        shortened = _resized(rejected, coverage(chosen) - missing, rng, chosen, last, grow=False)
        room = coverage(chosen) - coverage(shortened)
        return sorted(shortened + _made_up(chosen, shortened, _composition(room, missing, rng), rng, last))
    return _resized(rejected, coverage(chosen), rng, chosen, last, grow=True)


def _resized(
    ranges: list[Range], total: int, rng: random.Random, chosen: Sequence[Range], last: int | None, *, grow: bool
) -> list[Range]:
    """The ranges with their outer ends moved until they cite `total` sentences, as far as there is room."""
    change = total - coverage(ranges)
    if not ranges or change == 0 or (change > 0 and not grow):
        return ranges
    tries = [_moved(ranges, change, rng, last) for _ in range(31)]
    return next((moved for moved in tries if not set(moved) & (set(chosen) - set(ranges))), tries[0])


def _moved(ranges: list[Range], change: int, rng: random.Random, last: int | None) -> list[Range]:
    (first, first_end), (last_start, end) = ranges[0], ranges[-1]
    if change > 0:
        before = first
        after = change if last is None else max(0, last - end)
    else:
        single = len(ranges) == 1
        before = first_end - first
        after = end - (first if single else last_start)
        # One range gives at both ends, and keeps one sentence.
        change = -min(-change, before if single else before + after)
    amount = abs(change)
    low, high = max(0, amount - after), min(amount, before)
    at_start = rng.randint(low, high) if low <= high else high
    at_end = min(amount - at_start, after)
    if change < 0:
        at_start, at_end = -at_start, -at_end
    moved = list(ranges)
    moved[0] = (moved[0][0] - at_start, moved[0][1])
    moved[-1] = (moved[-1][0], moved[-1][1] + at_end)
    return moved


def _composition(total: int, parts: int, rng: random.Random) -> list[int]:
    """`parts` numbers of at least 1 that sum to `total`, every way alike likely; all 1 where the total is too small."""
    if total <= parts:
        return [1] * parts
    cuts = sorted(rng.sample(range(1, total), parts - 1))
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]


def _made_up(
    chosen: Sequence[Range], rejected: Sequence[Range], lengths: Sequence[int], rng: random.Random, last: int | None
) -> list[Range]:
    used = [*chosen, *rejected]
    made: list[Range] = []
    for length in lengths:
        for _ in range(MAX_TRIES):
            distance = rng.randint(NEAREST, FARTHEST)
            if rng.random() < 0.5:
                end = chosen[0][0] - distance
                start = end - length + 1
            else:
                start = chosen[-1][1] + distance
                end = start + length - 1
            free = all(end < a or b < start for a, b in used)
            if free and start >= 0 and (last is None or end <= last):
                made.append((start, end))
                used.append((start, end))
                break
    return made
