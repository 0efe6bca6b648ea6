"""Share of held-out problems that greedy decoding solves."""

from dataclasses import dataclass

from prefpipe.answers import check_rule
from prefpipe.components import register
from prefpipe.records import Completion, EvalResult, Pair, Prompt
from prefpipe.statistics import wilson
from prefpipe.tasks import Policy, Task, correct, with_answer


@register("task")
@dataclass
class Accuracy(Task):
    """Greedy accuracy with Wilson's 95 % interval, and how often no answer could be found.

    rule: how the answer is found, see prefpipe/answers.py.
    max_new_tokens: null takes the generator's.
    """

    name: str = "accuracy"
    rule: str = "last_hash"
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        check_rule("task.accuracy.rule", self.rule)

    def metrics(self) -> list[str]:
        return ["accuracy", "no_answer"]

    def evaluate(
        self, policy: Policy, prompts: list[Prompt], pairs: list[Pair]
    ) -> tuple[list[EvalResult], list[Completion]]:
        problems = with_answer(self.name, prompts)
        completions = policy.sample(problems, num_samples=1, temperature=0.0, max_new_tokens=self.max_new_tokens)
        verdicts = [correct(completion, self.rule) for completion in completions]
        n, right = len(verdicts), sum(verdict is True for verdict in verdicts)
        missing = sum(verdict is None for verdict in verdicts)
        results = [
            EvalResult(task=self.name, metric=metric, value=count / n, low=low, high=high, n=n)
            for metric, count in zip(self.metrics(), (right, missing), strict=True)
            for low, high in [wilson(count, n)]
        ]
        return results, completions
