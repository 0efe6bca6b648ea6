"""A weighted sum of scores that are there already."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefpipe.components import register
from prefpipe.errors import ConfigError, DataError
from prefpipe.records import Completion, ScoredCompletion
from prefpipe.scorers import Missing, Score, Scorer, ScoringContext
from prefpipe.settings import mapping


@register("scorer")
@dataclass
class Combined(Scorer):
    """sum of weight x score. A completion that lacks one of them has none ("no_<score>"); nothing counts as 0.

    Scores are taken in their own units, which the weights must bring together.

    weights: by name as in the scored completions, e.g. '{exact_answer: 1.0, logprob.mean: 0.1}'; any number but 0.
    """

    name: str = "combined"
    weights: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.weights = mapping("scorer.weights", self.weights, float)
        for score, weight in self.weights.items():
            if not math.isfinite(weight) or weight == 0:
                raise ConfigError(
                    f"scorer.weights.{score}={weight} must be a number other than 0; leave it out instead"
                )

    def score(self, completions: Sequence[Completion], context: ScoringContext) -> list[Score | Missing]:
        if not self.weights:
            raise ConfigError("scorer.weights=null names no score; give e.g. scorer.weights='{exact_answer: 1.0}'")
        return [self._score(completion) for completion in completions]

    def _score(self, completion: Completion) -> float | Missing:
        if not isinstance(completion, ScoredCompletion):
            raise DataError(
                f"inputs.completions: completion {completion.completion_id} has no scores to combine; run stage=score "
                f"with scorer={next(iter(self.weights)).partition('.')[0]} first, and name its output"
            )
        missing = next((name for name in self.weights if name not in completion.scores), None)
        if missing is not None:
            return Missing(f"no_{missing}")
        return math.fsum(weight * completion.scores[name] for name, weight in self.weights.items())
