"""Share of held-out problems that at least one of k samples solves."""

from dataclasses import dataclass, field
from math import comb

from prefpipe.answers import check_rule
from prefpipe.components import register
from prefpipe.errors import ConfigError
from prefpipe.records import Completion, EvalResult, Pair, Prompt
from prefpipe.statistics import bootstrap_mean
from prefpipe.tasks import Policy, Task, correct, grouped, with_answer


@register("task")
@dataclass
class PassAtK(Task):
    """1 - C(wrong, k) / C(n, k), the unbiased estimate of Chen et al. 2021, arXiv:2107.03374; bootstrap over problems.

    k: which k to report; num_samples: n, drawn for each problem at `temperature`.
    """

    name: str = "pass_at_k"
    k: list[int] = field(default_factory=lambda: [1, 4])
    num_samples: int = 8
    temperature: float = 0.7
    rule: str = "last_hash"
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        check_rule("task.pass_at_k.rule", self.rule)
        if not self.k or min(self.k) < 1 or max(self.k) > self.num_samples:
            raise ConfigError(
                f"task.pass_at_k.k={self.k} must lie in 1 .. task.pass_at_k.num_samples={self.num_samples}"
            )
        if self.temperature <= 0:
            raise ConfigError(
                f"task.pass_at_k.temperature={self.temperature} must be above 0; greedy samples are all alike"
            )

    def metrics(self) -> list[str]:
        return [f"pass@{k}" for k in self.k]

    def evaluate(
        self, policy: Policy, prompts: list[Prompt], pairs: list[Pair]
    ) -> tuple[list[EvalResult], list[Completion]]:
        problems = with_answer(self.name, prompts)
        completions = policy.sample(
            problems, num_samples=self.num_samples, temperature=self.temperature, max_new_tokens=self.max_new_tokens
        )
        wrong = [sum(correct(c, self.rule) is not True for c in group) for group in grouped(completions)]
        results = []
        for k, metric in zip(self.k, self.metrics(), strict=True):
            values = [pass_at_k(self.num_samples, self.num_samples - count, k) for count in wrong]
            low, high = bootstrap_mean(values)
            details = {"k": k, "num_samples": self.num_samples, "temperature": self.temperature}
            value = sum(values) / len(values)
            results.append(
                EvalResult(
                    task=self.name, metric=metric, value=value, low=low, high=high, n=len(values), details=details
                )
            )
        return results, completions


def pass_at_k(n: int, right: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, hold one of the right ones."""
    return 1.0 - comb(n - right, k) / comb(n, k)
