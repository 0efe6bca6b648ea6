"""Share of held-out problems that greedy decoding solves."""

from dataclasses import dataclass

from prefpipe.components import register
from prefpipe.equivalence.answers import DECIDED, EQUAL, WITHOUT_ANSWER
from prefpipe.records import EvalResult, Pair, Prompt, ScoredCompletion
from prefpipe.tasks import AnswerTask, Policy, judged


@register("task")
@dataclass
class Accuracy(AnswerTask):
    """Greedy accuracy with Wilson's 95 % interval, and how often no answer could be found."""

    name: str = "accuracy"

    def metrics(self) -> list[str]:
        return self._with_not_compared("accuracy", "no_answer")

    def evaluate(
        self, policy: Policy, prompts: list[Prompt], pairs: list[Pair]
    ) -> tuple[list[EvalResult], list[ScoredCompletion]]:
        problems = self.problems(prompts)
        completions = policy.sample(problems, num_samples=1, temperature=0.0, max_new_tokens=self.max_new_tokens)
        verdicts = self.answers.verdicts(completions)
        left_out = self.not_compared(verdicts)
        decided = [verdict for verdict in verdicts if verdict in DECIDED]
        results = [
            self.of_problems("accuracy", decided.count(EQUAL), len(decided)),
            self.of_problems("no_answer", decided.count(WITHOUT_ANSWER), len(decided)),
        ]
        return [*results, *left_out], judged(completions, verdicts)
