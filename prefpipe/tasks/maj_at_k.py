"""Share of held-out problems whose most frequent answer among k samples is right."""

from dataclasses import dataclass

from prefpipe.components import register
from prefpipe.equivalence.answers import DECIDED, EQUAL
from prefpipe.errors import ConfigError
from prefpipe.records import EvalResult, Pair, Prompt, ScoredCompletion
from prefpipe.tasks import AnswerTask, Policy, grouped, judged


@register("task")
@dataclass
class MajAtK(AnswerTask):
    """Majority vote (self-consistency, Wang et al. 2022, arXiv:2203.11171) over values, not strings: 1,200 = 1200.0.

    Samples without an answer do not vote; of equally frequent answers the one seen first wins. With
    equivalence=math_verify samples are compared with each other, k (k - 1) / 2 times for a problem at most, so their
    answers must be given as LaTeX (rule=boxed).
    """

    name: str = "maj_at_k"
    k: int = 8
    temperature: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.equivalence == "math_verify" and self.rule != "boxed":
            raise ConfigError(
                f"task.maj_at_k.rule={self.rule} finds an answer only beside the reference, and votes are compared "
                f"with each other; task.maj_at_k.equivalence=math_verify needs rule=boxed"
            )
        if self.k < 1:
            raise ConfigError(f"task.maj_at_k.k={self.k} must be at least 1")
        if self.temperature <= 0:
            raise ConfigError(
                f"task.maj_at_k.temperature={self.temperature} must be above 0; greedy samples are all alike"
            )

    def metrics(self) -> list[str]:
        return self._with_not_compared(f"maj@{self.k}")

    def evaluate(
        self, policy: Policy, prompts: list[Prompt], pairs: list[Pair]
    ) -> tuple[list[EvalResult], list[ScoredCompletion]]:
        completions = policy.sample(
            self.problems(prompts),
            num_samples=self.k,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
        )
        verdicts = self.answers.verdicts(completions)
        winners = self.answers.majorities(grouped(completions))
        found = [
            winner if isinstance(winner, str) else verdicts[problem * self.k + winner]
            for problem, winner in enumerate(winners)
        ]
        left_out = self.not_compared(found)
        decided = [verdict for verdict in found if verdict in DECIDED]
        details = {"k": self.k, "temperature": self.temperature, "tie": "first seen"}
        result = self.of_problems(self.metrics()[0], decided.count(EQUAL), len(decided), details=details)
        return [result, *left_out], judged(completions, verdicts)
