"""Completion length as a score: a baseline, and a check for length bias."""

from collections.abc import Sequence
from dataclasses import dataclass

from prefpipe.components import register
from prefpipe.errors import ConfigError
from prefpipe.records import Completion
from prefpipe.scorers import Missing, Score, Scorer, ScoringContext


@register("scorer")
@dataclass
class Length(Scorer):
    """Minus the distance, in words, from a target length."""

    name: str = "length"
    target_words: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_words < 0:
            raise ConfigError(f"scorer.target_words={self.target_words} must be at least 0")

    def score(self, completions: Sequence[Completion], context: ScoringContext) -> list[Score | Missing]:
        return [-float(abs(len(completion.text.split()) - self.target_words)) for completion in completions]
