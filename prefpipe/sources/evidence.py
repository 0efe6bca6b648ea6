"""Long documents shortened to what their citations need.

The rule is that of SelfCite (Chuang et al. 2025, arXiv:2502.09604): sentences that an answer cites stay, the others go,
those farthest from a cited one first. Here what is left is numbered anew, and the citations with it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prefpipe.citations import cited, renumbered
from prefpipe.records import Demonstration, Message, Pair, Prompt, ScoredCompletion, prompt_id
from prefpipe.sources.builders import Record
from prefpipe.sources.codes import BadRow

DOCUMENT_START, DOCUMENT_END = "[Document Start]\n", "\n[Document End]"
"""What stands around the document in prompts of LongCite and SelfCite."""
TAG = re.compile(r"<C(\d+)>")
ANSWERS: dict[type, tuple[str, ...]] = {
    Prompt: ("answer",),
    ScoredCompletion: ("text", "answer"),
    Demonstration: ("text", "answer"),
    Pair: ("chosen", "rejected"),
}
CountTokens = Callable[[Sequence[str]], list[int]]


@dataclass
class Shortened:
    """What was done to the rows of a source. over_budget: prompts whose cited sentences alone are too long."""

    rows: int = 0
    sentences_dropped: int = 0
    over_budget: int = 0

    def as_data(self) -> dict[str, int]:
        """For the manifest."""
        return {"rows": self.rows, "sentences_dropped": self.sentences_dropped, "over_budget": self.over_budget}


@dataclass(frozen=True)
class EvidenceLimit:
    """Shortens rows. max_tokens: of prompt and answer; reserved_tokens: of these, left for an answer to be sampled.

    count_tokens: of each of some texts.
    """

    max_tokens: int
    reserved_tokens: int
    count_tokens: CountTokens

    def apply(self, records: Sequence[Record], counts: Shortened) -> list[Record]:
        """The records of one row with a document that fits, or as they are where it does already.

        Tokens are those of the text without sentence tags. Where all of it and the longest answer stay below
        max_tokens, nothing changes; otherwise sentences go until they fit into max_tokens - reserved_tokens, less what
        stands before and after the document. Without any citation the head of the document goes first. Citations of
        sentences that are not there are left out of what must stay.

        Raises BadRow where the prompt has no document with numbered sentences.
        """
        messages = records[0].messages
        head, sentences, tail = _parts(messages[-1]["content"])
        before = [message["content"] for message in messages[:-1]]
        answers = [text for record in records for key in ANSWERS[type(record)] if (text := getattr(record, key))]
        lengths = self.count_tokens([*sentences, *before, head, tail])
        lengths, frame = lengths[: len(sentences)], sum(lengths[len(sentences) :])
        whole = sum(self.count_tokens([*before, head + "".join(sentences) + tail]))
        longest = max(self.count_tokens(answers), default=0) if answers else 0
        if whole + longest < self.max_tokens:
            return list(records)
        keys = {
            place
            for answer in answers
            for ranges in cited(answer)
            for start, end in ranges
            for place in range(start, min(end + 1, len(sentences)))
        }
        budget = self.max_tokens - self.reserved_tokens - frame
        kept = kept_sentences(lengths, keys, budget)
        counts.over_budget += sum(lengths[place] for place in kept) > budget
        if len(kept) == len(sentences):
            return list(records)
        counts.rows += 1
        counts.sentences_dropped += len(sentences) - len(kept)
        return [_with(record, head, [sentences[place] for place in kept], tail, kept) for record in records]


def kept_sentences(lengths: Sequence[int], keys: set[int], budget: int) -> list[int]:
    """The places of the sentences that stay, ascending.

    All in `keys` stay. The others go by decreasing distance to the nearest of those, the first of equally far ones
    first, until the lengths of what stays sum to at most `budget`.
    """
    distances = _distances(len(lengths), keys)
    total = sum(lengths)
    dropped: set[int] = set()
    for place in sorted(set(range(len(lengths))) - keys, key=lambda place: (-distances[place], place)):
        if total <= budget:
            break
        dropped.add(place)
        total -= lengths[place]
    return [place for place in range(len(lengths)) if place not in dropped]


def _distances(number: int, keys: set[int]) -> list[float]:
    """Of each place to the nearest key: one sweep from either end."""
    distances = [0.0 if place in keys else float("inf") for place in range(number)]
    for places in (range(1, number), range(number - 2, -1, -1)):
        step = places.step
        for place in places:
            distances[place] = min(distances[place], distances[place - step] + 1)
    return distances


def _parts(content: str) -> tuple[str, list[str], str]:
    """What stands before the document, its sentences without tags, what stands after it."""
    start, end = content.find(DOCUMENT_START), content.rfind(DOCUMENT_END)
    document = content[start + len(DOCUMENT_START) : end] if 0 <= start < end else ""
    lead, *pieces = TAG.split(document)
    numbers, sentences = [int(number) for number in pieces[::2]], pieces[1::2]
    if not sentences or lead.strip() or numbers != list(range(len(numbers))):
        raise BadRow(
            "CIT",
            f"source.evidence_tokens needs a document of sentences <C0>, <C1>, … in order between "
            f"{DOCUMENT_START.strip()} and {DOCUMENT_END.strip()} in the last user turn; leave the row out, or the "
            f"setting",
        )
    return content[: start + len(DOCUMENT_START)], sentences, content[end:]


def _with(record: Record, head: str, sentences: Sequence[str], tail: str, kept: Sequence[int]) -> Record:
    """The record with that document; `kept` are the old numbers of its sentences."""
    document = "".join(f"<C{place}>{sentence}" for place, sentence in enumerate(sentences))
    messages = [*record.messages[:-1], Message(role=record.messages[-1]["role"], content=head + document + tail)]
    new = {old: place for place, old in enumerate(kept)}
    # A citation of a sentence that never was stays beyond the end.
    answers: dict[str, Any] = {
        key: renumbered(text, lambda old: new.get(old, old))
        for key in ANSWERS[type(record)]
        if (text := getattr(record, key))
    }
    meta = {**record.meta, "num_sentences": len(kept), "sentences": list(kept)}
    return replace(record, prompt_id=prompt_id(messages), messages=messages, meta=meta, **answers)
