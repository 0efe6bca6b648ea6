"""Share of held-out pairs whose chosen side a reward model prefers."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from prefpipe.components import register
from prefpipe.errors import DataError
from prefpipe.records import EvalResult, Pair, Prompt, ScoredCompletion
from prefpipe.statistics import bootstrap_mean
from prefpipe.tasks import Policy, Task


@register("task")
@dataclass
class RewardAccuracy(Task):
    """Of the reward model that stage=train loss=bradley_terry made; equal rewards count one half.

    details: by source, and where chosen has more characters than rejected, and fewer: far apart, they tell that length
    is what was learnt. The mean over sources is what RewardBench (Lambert et al. 2024, arXiv:2403.13787) ranks by.
    no_reward: pairs that the template refuses, left out.
    """

    name: str = "reward_accuracy"

    def metrics(self) -> list[str]:
        return ["reward_accuracy"]

    def evaluate(
        self, policy: Policy, prompts: list[Prompt], pairs: list[Pair]
    ) -> tuple[list[EvalResult], list[ScoredCompletion]]:
        if not pairs:
            raise DataError(
                "task=reward_accuracy needs held-out pairs, and there are none: raise data_mixer.heldout_fraction, or "
                "use data that holds pairs"
            )
        rewards = policy.pair_rewards(pairs)
        pairs = [pair for pair, both in zip(pairs, rewards, strict=True) if both is not None]
        margins = [both[0] - both[1] for both in rewards if both is not None]
        right = [0.5 if margin == 0 else float(margin > 0) for margin in margins]
        groups: dict[str, list[float]] = defaultdict(list)
        for pair, value in zip(pairs, right, strict=True):
            groups[f"source/{pair.source}"].append(value)
            if len(pair.chosen) != len(pair.rejected):
                groups["chosen_longer" if len(pair.chosen) > len(pair.rejected) else "chosen_shorter"].append(value)
        shares = {name: _mean(values) for name, values in sorted(groups.items())}
        sources = [share for name, share in shares.items() if name.startswith("source/")]
        low, high = bootstrap_mean(right)
        details = {
            "mean_margin": _mean(margins),
            "mean_over_sources": _mean(sources),
            "accuracy": shares,
            "no_reward": len(rewards) - len(pairs),
        }
        result = EvalResult(
            task=self.name,
            metric=self.metrics()[0],
            value=_mean(right),
            low=low,
            high=high,
            n=len(right),
            details=details,
        )
        return [result], []


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
