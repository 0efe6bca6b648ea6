"""Share of held-out pairs whose chosen side the policy finds likelier."""

from collections.abc import Sequence
from dataclasses import dataclass

from prefpipe.components import register
from prefpipe.errors import DataError
from prefpipe.records import EvalResult, Pair, Prompt, ScoredCompletion
from prefpipe.statistics import bootstrap_mean
from prefpipe.tasks import Policy, Task


@register("task")
@dataclass
class PairAccuracy(Task):
    """By summed and by mean log-probability (DPO and SimPO rank by the one and the other); equal values count one half.

    Comparing it before and after training needs no reference model: the reference is the policy before.
    """

    name: str = "pair_accuracy"

    def metrics(self) -> list[str]:
        return ["pair_accuracy_sum", "pair_accuracy_mean"]

    def evaluate(
        self, policy: Policy, prompts: list[Prompt], pairs: list[Pair]
    ) -> tuple[list[EvalResult], list[ScoredCompletion]]:
        if not pairs:
            raise DataError(
                "task=pair_accuracy needs held-out pairs, and there are none: raise data_mixer.heldout_fraction, use "
                "data that holds pairs, or choose another task"
            )
        logps = policy.pair_logps(pairs)
        sums = [chosen - rejected for chosen, _, rejected, _ in logps]
        means = [chosen / n_chosen - rejected / n_rejected for chosen, n_chosen, rejected, n_rejected in logps]
        return [self._share(*found) for found in zip(self.metrics(), (sums, means), strict=True)], []

    def _share(self, metric: str, margins: Sequence[float]) -> EvalResult:
        values = [0.5 if margin == 0 else float(margin > 0) for margin in margins]
        low, high = bootstrap_mean(values)
        mean_margin = sum(margins) / len(margins)
        value = sum(values) / len(values)
        details = {"mean_margin_nats": mean_margin}
        return EvalResult(
            task=self.name, metric=metric, value=value, low=low, high=high, n=len(values), details=details
        )
