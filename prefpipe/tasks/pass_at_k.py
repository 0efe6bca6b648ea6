"""Share of held-out problems that at least one of k samples solves."""

from dataclasses import dataclass, field
from math import comb

from prefpipe.components import register
from prefpipe.equivalence.answers import DECIDED, EQUAL
from prefpipe.errors import ConfigError
from prefpipe.records import EvalResult, Pair, Prompt, ScoredCompletion
from prefpipe.statistics import bootstrap_mean
from prefpipe.tasks import AnswerTask, Policy, judged


@register("task")
@dataclass
class PassAtK(AnswerTask):
    """1 - C(wrong, k) / C(n, k), the unbiased estimate of Chen et al. 2021, arXiv:2107.03374; bootstrap over problems.

    k: which k to report; num_samples: n, drawn for each problem at `temperature`. A problem with a sample that cannot
    be compared is left out.
    """

    name: str = "pass_at_k"
    k: list[int] = field(default_factory=lambda: [1, 4])
    num_samples: int = 8
    temperature: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.k or min(self.k) < 1 or max(self.k) > self.num_samples:
            raise ConfigError(
                f"task.pass_at_k.k={self.k} must lie in 1 .. task.pass_at_k.num_samples={self.num_samples}"
            )
        if self.temperature <= 0:
            raise ConfigError(
                f"task.pass_at_k.temperature={self.temperature} must be above 0; greedy samples are all alike"
            )

    def metrics(self) -> list[str]:
        return self._with_not_compared(*(f"pass@{k}" for k in self.k))

    def evaluate(
        self, policy: Policy, prompts: list[Prompt], pairs: list[Pair]
    ) -> tuple[list[EvalResult], list[ScoredCompletion]]:
        n = self.num_samples
        completions = policy.sample(
            self.problems(prompts), num_samples=n, temperature=self.temperature, max_new_tokens=self.max_new_tokens
        )
        verdicts = self.answers.verdicts(completions)
        groups = [verdicts[start : start + n] for start in range(0, len(verdicts), n)]
        left_out = self.not_compared([next((v for v in group if v not in DECIDED), EQUAL) for group in groups])
        right = [group.count(EQUAL) for group in groups if all(verdict in DECIDED for verdict in group)]
        results = []
        for k in self.k:
            values = [pass_at_k(n, count, k) for count in right]
            low, high = bootstrap_mean(values)
            details = {"k": k, "num_samples": n, "temperature": self.temperature}
            value = sum(values) / len(values)
            results.append(
                EvalResult(
                    task=self.name,
                    metric=f"pass@{k}",
                    value=value,
                    low=low,
                    high=high,
                    n=len(values),
                    details=details,
                )
            )
        return [*results, *left_out], judged(completions, verdicts)


def pass_at_k(n: int, right: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, hold one of the right ones."""
    return 1.0 - comb(n - right, k) / comb(n, k)
