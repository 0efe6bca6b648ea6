"""Documents of numbered sentences in a prompt, and what the statements of an answer cite of them.

The format is that of LongCite (Zhang et al. 2024, arXiv:2409.02897) and SelfCite; prefpipe/citations.py has its ranges.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from prefpipe.citations import CITE, Range, cited
from prefpipe.errors import DataError
from prefpipe.records import Completion

TAG = re.compile(r"<C(\d+)>")
MOST_RANGES = 3
"""Of one statement; further ones are ignored, as LongCite and SelfCite do."""
SHORT_TEXT = 5
"""Characters outside of statements that are none yet."""
_MARK = re.compile(r"</?statement>")


class Statement(NamedTuple):
    """text: without marks. ranges: the sentences that it cites."""

    text: str
    ranges: list[Range]


def sentence_spans(completion: Completion, document_end: str) -> list[Range]:
    """Where in the last user turn the sentences of its document stand, in characters, the end not included.

    They are meta.sentence_spans, [[start, end], …], or those behind the tags <C0>, <C1>, … up to `document_end`.
    Raises DataError where meta.sentence_spans are no places of that turn in order.
    """
    text = completion.messages[-1]["content"]
    given = completion.meta.get("sentence_spans")
    if given is None:
        return tagged_spans(text, document_end)
    spans = [(int(start), int(end)) for start, end in given]
    if any(a > b for a, b in spans) or any(b > c for (_, b), (c, _) in pairwise(spans)):
        raise DataError(
            f"completion {completion.completion_id} has meta.sentence_spans that overlap or run backwards; they "
            f"must be [[start, end], ...] in the order of the text"
        )
    if spans and not 0 <= spans[0][0] <= spans[-1][1] <= len(text):
        raise DataError(
            f"completion {completion.completion_id} has meta.sentence_spans up to {spans[-1][1]}, and its last "
            f"turn has {len(text)} characters; they must count characters of that turn"
        )
    return spans


def tagged_spans(text: str, document_end: str) -> list[Range]:
    """Where the sentences behind <C0>, <C1>, … stand, tags included; none without the mark of the document's end."""
    starts: list[int] = []
    for tag in TAG.finditer(text):
        if int(tag[1]) == len(starts):
            starts.append(tag.start())
    end = text.find(document_end, starts[-1]) if starts else -1
    if end < 0:
        return []
    return list(zip(starts, [*starts[1:], len(text[:end].rstrip())], strict=True))


def merged_ranges(ranges: Sequence[Range], num_sentences: int) -> list[Range]:
    """The ranges within a document, one that starts right behind the one before it joined to that, the first three."""
    merged: list[Range] = []
    for start, end in ranges:
        if start >= num_sentences:
            continue
        end = min(end, num_sentences - 1)
        if merged and start == merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged[:MOST_RANGES]


def statements(answer: str, num_sentences: int) -> list[Statement]:
    """What an answer says, in order: `<statement>text<cite>…</cite></statement>`, and text of more than five characters
    between those, which cites nothing. Ranges as of `merged_ranges`.
    """
    found: list[Statement] = []
    place = 0
    for cite, ranges in zip(CITE.finditer(answer), cited(answer), strict=True):
        before, _, text = answer[place : cite.start()].rpartition("<statement>")
        found += _free(before)
        statement = Statement(_MARK.sub("", text).strip(), merged_ranges(ranges, num_sentences))
        if statement != ("", []):
            found.append(statement)
        place = cite.end()
    return [*found, *_free(answer[place:])]


def without_citations(answer: str) -> str:
    """The answer without what it cites, and without the marks of statements."""
    return _MARK.sub("", CITE.sub("", answer)).strip()


def _free(text: str) -> list[Statement]:
    text = _MARK.sub("", text).strip()
    return [Statement(text, [])] if len(text) > SHORT_TEXT else []
