"""What the losses share: base classes, inputs and outputs, and the functions they are built from.

Nothing here imports torch at the top: the config needs these classes, and `prefpipe --help` should not wait for torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from prefpipe.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from prefpipe.logps import PairLogps


class PairScores(NamedTuple):
    """Scores that came with the pairs, [B] float each, in the scorer's own unit."""

    chosen: Tensor
    rejected: Tensor


class LossOutput(NamedTuple):
    """Per-pair results, all [B]. Rewards are for logging, never for gradients: a loss returns them detached."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


@dataclass
class Loss:
    """What every loss has: a name, and what it reads.

    needs_reference: whether `reference` log-probabilities change it. pairwise: whether it reads the rejected side.
    reads: which optional parts of PairLogps it reads: "token_logps", "collision", "kl".
    batch_wise: whether a pair's loss depends on the other pairs of its batch; such a loss is refused where a global
        batch is cut into micro-batches.
    of_rewards: whether it is a function of rewards (PairRewards) and trains a reward model.
    """

    name: str = "???"
    needs_reference: ClassVar[bool] = True
    pairwise: ClassVar[bool] = True
    reads: ClassVar[frozenset[str]] = frozenset()
    batch_wise: ClassVar[bool] = False
    of_rewards: ClassVar[bool] = False

    @property
    def needs_scores(self) -> bool:
        """Whether it reads the scores of the pairs; a setting of the loss may decide that."""
        return False

    @property
    def all_turns(self) -> bool:
        """Whether it trains on every turn of the assistant; the sides of a pair differ only in the last one."""
        return False

    def __call__(self, policy: PairLogps, reference: PairLogps | None, scores: PairScores | None = None) -> LossOutput:
        """Per-pair loss.

        Args:
            policy: of the model that is trained, [B] each, nats, summed over completion tokens.
            reference: the same of the frozen model; None only where needs_reference is False.
            scores: of the pairs; None only where needs_scores is False.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no loss")

    def describe(self) -> str:
        """Name and knobs, for the log."""
        return " ".join([self.name, *self.knobs()])

    def knobs(self) -> list[str]:
        """`key=value` of every setting that `describe` does not add itself."""
        kept = [field.name for field in fields(self) if field.name not in {"name", "nll_weight"}]
        return [f"{key}={getattr(self, key)}" for key in kept]


@dataclass
class PairLoss(Loss):
    """A comparison of chosen with rejected, to which the negative log-likelihood of chosen can be added.

    loss = compare(policy, reference) + nll_weight * (-l_w / n_w), or compare_scored, for a loss that reads scores

    nll_weight: 0 is none; Iterative RPO (Pang et al. 2024, arXiv:2404.19733) uses 1.0 on DPO. Also known as RPO-alpha
        (`rpo_alpha` in ms-swift), `nll_loss_coef` (OpenRLHF), `pref_ftx` (LLaMA-Factory), `cpo_alpha` and the loss type
        `sft` (TRL). Each pair's mean per token weighs the same here, in OpenRLHF and in LLaMA-Factory; TRL and the
        authors of CPO and SimPO take the mean over all chosen tokens of a micro-batch, where long completions weigh
        more and the value depends on how a batch is cut.
    """

    nll_weight: float = 0.0

    def __post_init__(self) -> None:
        check("nll_weight", self.nll_weight, self.nll_weight >= 0, "at least 0; 0 adds no NLL term")

    def __call__(self, policy: PairLogps, reference: PairLogps | None, scores: PairScores | None = None) -> LossOutput:
        """See Loss. The NLL term stands here, for all, and never reaches the rewards (huggingface/trl#5079)."""
        loss, chosen, rejected = self.compare_scored(policy, reference, scores)
        if self.nll_weight:
            loss = loss - self.nll_weight * policy.chosen / policy.chosen_tokens
        return LossOutput(loss, chosen.detach(), rejected.detach())

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        """Per-pair loss without the NLL term, and rewards, which need not be detached."""
        raise NotImplementedError(f"{type(self).__name__} defines no comparison")

    def compare_scored(self, policy: PairLogps, reference: PairLogps | None, scores: PairScores | None) -> LossOutput:
        """What a loss that reads scores defines in place of `compare`."""
        return self.compare(policy, reference)

    def describe(self) -> str:
        return super().describe() + (f" nll_weight={self.nll_weight}" if self.nll_weight else "")


@dataclass
class BetaLoss(PairLoss):
    """A pair loss whose rewards beta scales. Every loss has its own default beta; they are not comparable."""

    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check("beta", self.beta, self.beta > 0, "above 0")


MAX_EXPONENT = 80.0
"""e^80 = 5.5e34 and its product with a log-probability of 1,000 nats are finite in float32."""


def log_ratios(policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
    """h of chosen and rejected, ([B], [B]), nats, summed over tokens."""
    assert reference is not None
    return policy.chosen - reference.chosen, policy.rejected - reference.rejected


def mean_log_ratios(policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
    """h / n of chosen and rejected, ([B], [B]), nats per token."""
    assert reference is not None
    (policy_chosen, policy_rejected), (chosen, rejected) = policy.per_token(), reference.per_token()
    return policy_chosen - chosen, policy_rejected - rejected


def score_margins(scores: PairScores | None, like: Tensor) -> Tensor:
    """s_w - s_l, [B], in the dtype and on the device of another tensor."""
    assert scores is not None
    return (scores.chosen - scores.rejected).to(like)


def scaled(beta: float, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Both times beta."""
    return beta * pair[0], beta * pair[1]


def log_sigmoid(x: Tensor) -> Tensor:
    """log(1 / (1 + e^-x)) without overflow."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)


def smoothed_logistic(margin: Tensor, epsilon: float) -> Tensor:
    """(1 - epsilon) ls(margin) + epsilon ls(-margin): the cross-entropy where a label is flipped at rate epsilon."""
    return -(1 - epsilon) * log_sigmoid(margin) - epsilon * log_sigmoid(-margin)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0, exact near 0 where log1p(-e^x) is not; at 0 itself large and without a gradient."""
    import torch

    return torch.log(-torch.expm1(x.clamp(max=-torch.finfo(x.dtype).tiny)))


def expm1(x: Tensor) -> Tensor:
    """e^x - 1, continued by its tangent above MAX_EXPONENT: finite, with a gradient."""
    return x.clamp(max=MAX_EXPONENT).expm1() + math.exp(MAX_EXPONENT) * (x - MAX_EXPONENT).relu()


def check(key: str, value: float, holds: bool, rule: str) -> None:
    """Raise ConfigError unless loss.<key> is finite and the rule holds."""
    if not (math.isfinite(value) and holds):
        raise ConfigError(f"loss.{key}={value} must be {rule}")


def check_smoothing(value: float, remark: str, *, zero: bool = True) -> None:
    """Raise ConfigError unless loss.label_smoothing is in [0, 0.5), or, without zero, in (0, 0.5)."""
    allowed = 0 <= value < 0.5 and (zero or value > 0)
    check("label_smoothing", value, allowed, f"in {'[' if zero else '('}0, 0.5); {remark}")


def check_choice(key: str, value: str | int, choices: Sequence[str | int]) -> None:
    """Raise ConfigError unless loss.<key> is one of the choices."""
    if value not in choices:
        raise ConfigError(f"loss.{key}={value} must be one of {', '.join(map(str, choices))}")
