"""Agreement with a label that came with the data."""

from collections.abc import Sequence
from dataclasses import dataclass

from prefpipe.components import register
from prefpipe.errors import ConfigError
from prefpipe.records import Completion
from prefpipe.scorers import Missing, Score, Scorer, ScoringContext


@register("scorer")
@dataclass
class Label(Scorer):
    """1 where a completion is, or ends in, the label of its prompt, else 0. For classification and multiple choice.

    match: "equal" compares the whole text, "last_word" its last word, "contains" looks anywhere; all ignore case, outer
        white space and final punctuation.
    key: where the label stands: "answer", or a key of the prompt's meta.
    """

    name: str = "label"
    match: str = "last_word"
    key: str = "answer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.match not in ("equal", "last_word", "contains"):
            raise ConfigError(f"scorer.match={self.match} must be equal, last_word or contains")

    def score(self, completions: Sequence[Completion], context: ScoringContext) -> list[Score | Missing]:
        return [self._score(completion) for completion in completions]

    def _score(self, completion: Completion) -> float | Missing:
        given = completion.answer if self.key == "answer" else completion.meta.get(self.key)
        if given is None:
            return Missing("no_label")
        label, text = _plain(str(given)), _plain(completion.text)
        if self.match == "contains":
            return float(label in text)
        if self.match == "last_word":
            text = _plain(text.split()[-1]) if text else ""
        return float(text == label)


def _plain(text: str) -> str:
    return text.strip().rstrip(".!?,;:").casefold()
