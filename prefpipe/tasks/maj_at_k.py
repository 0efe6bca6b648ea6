"""Share of held-out problems whose most frequent answer among k samples is right."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from prefpipe.answers import check_rule, final_answer, gold_answer
from prefpipe.components import register
from prefpipe.errors import ConfigError
from prefpipe.records import Completion, EvalResult, Pair, Prompt
from prefpipe.statistics import wilson
from prefpipe.tasks import Policy, Task, grouped, with_answer


@register("task")
@dataclass
class MajAtK(Task):
    """Majority vote (self-consistency, Wang et al. 2022, arXiv:2203.11171) over numbers, not strings: 1,200 = 1200.0.

    Samples without an answer do not vote; of equally frequent answers the one seen first wins.
    """

    name: str = "maj_at_k"
    k: int = 8
    temperature: float = 0.7
    rule: str = "last_hash"
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        check_rule("task.maj_at_k.rule", self.rule)
        if self.k < 1:
            raise ConfigError(f"task.maj_at_k.k={self.k} must be at least 1")
        if self.temperature <= 0:
            raise ConfigError(
                f"task.maj_at_k.temperature={self.temperature} must be above 0; greedy samples are all alike"
            )

    def metrics(self) -> list[str]:
        return [f"maj@{self.k}"]

    def evaluate(
        self, policy: Policy, prompts: list[Prompt], pairs: list[Pair]
    ) -> tuple[list[EvalResult], list[Completion]]:
        problems = with_answer(self.name, prompts)
        completions = policy.sample(
            problems, num_samples=self.k, temperature=self.temperature, max_new_tokens=self.max_new_tokens
        )
        groups = grouped(completions)
        right = sum(majority([final_answer(c.text, self.rule) for c in group]) == _gold(group[0]) for group in groups)
        low, high = wilson(right, len(groups))
        result = EvalResult(
            task=self.name,
            metric=self.metrics()[0],
            value=right / len(groups),
            low=low,
            high=high,
            n=len(groups),
            details={"k": self.k, "temperature": self.temperature, "tie": "first seen"},
        )
        return [result], completions


def majority(answers: Sequence[Fraction | None]) -> Fraction | None:
    """The most frequent answer, the first seen among equals; None when nobody answered."""
    votes = Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None


def _gold(completion: Completion) -> Fraction | None:
    assert completion.answer is not None
    return gold_answer(completion.answer)
