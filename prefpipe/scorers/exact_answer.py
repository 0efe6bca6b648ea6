"""1 for a right final answer, 0 for a wrong one."""

from collections.abc import Sequence
from dataclasses import dataclass

from prefpipe.answers import check_rule, final_answer, gold_answer
from prefpipe.components import register
from prefpipe.records import Completion
from prefpipe.scorers import Missing, Score, Scorer, ScoringContext


@register("scorer")
@dataclass
class ExactAnswer(Scorer):
    """Whether the number that a completion ends in is that of the prompt's reference answer, as exact fractions.

    rule: how the number is found, see prefpipe/answers.py. A completion without one is wrong; a prompt without a
        reference number cannot be scored.
    """

    name: str = "exact_answer"
    rule: str = "last_hash"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rule("scorer.rule", self.rule)

    def score(self, completions: Sequence[Completion], context: ScoringContext) -> list[Score | Missing]:
        return [self._score(completion) for completion in completions]

    def _score(self, completion: Completion) -> float | Missing:
        gold = None if completion.answer is None else gold_answer(completion.answer)
        if gold is None:
            return Missing("no_exact_answer")
        return float(final_answer(completion.text, self.rule) == gold)
