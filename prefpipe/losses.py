"""Losses as pure functions of log-probabilities. To add one: a class here and conf/loss/<name>.yaml.

Nothing here imports torch at the top: the config needs these classes, and `prefpipe --help` should not wait for torch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from prefpipe.components import register
from prefpipe.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from prefpipe.logps import PairLogps


class LossOutput(NamedTuple):
    """Per-pair results, all [B]. Rewards are detached: they are for logging, never for gradients."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


@dataclass
class Loss:
    """What every loss has: a name, and what it reads.

    needs_reference: whether `reference` log-probabilities change it. pairwise: whether it reads the rejected side.
    """

    name: str = "???"
    needs_reference: ClassVar[bool] = True
    pairwise: ClassVar[bool] = True

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        """Per-pair loss.

        Args:
            policy: of the model that is trained, [B] each, nats, summed over completion tokens.
            reference: the same of the frozen model; None only where needs_reference is False.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no loss")

    def describe(self) -> str:
        """Name and knobs, for the log."""
        knobs = [f"{field.name}={getattr(self, field.name)}" for field in fields(self) if field.name != "name"]
        return " ".join([self.name, *knobs])


@register("loss")
@dataclass
class DPO(Loss):
    """Direct Preference Optimization, Rafailov et al. 2023, arXiv:2305.18290, Eq. 7.

    beta: strength of the pull towards the reference; the paper uses 0.1 to 0.5.
    label_smoothing: probability in [0, 0.5) that a label is flipped (conservative DPO, Mitchell 2023).
    """

    name: str = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"loss.label_smoothing={self.label_smoothing} must be in [0, 0.5); 0 is plain DPO")

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        assert reference is not None
        chosen = self.beta * (policy.chosen - reference.chosen)
        rejected = self.beta * (policy.rejected - reference.rejected)
        margin = chosen - rejected
        loss = -(1 - self.label_smoothing) * log_sigmoid(margin) - self.label_smoothing * log_sigmoid(-margin)
        return LossOutput(loss, chosen.detach(), rejected.detach())


@register("loss")
@dataclass
class IPO(Loss):
    """Identity Preference Optimization, Azar et al. 2023, arXiv:2310.12036, Eq. 17.

    beta: the paper's tau; the log-ratio margin is pulled to 1 / (2 beta), so a smaller beta asks for a larger margin.
    Log-ratios are per-token means: with sums, beta would depend on completion length (the authors' correction,
    huggingface/trl#1265).
    """

    name: str = "ipo"
    beta: float = 0.1

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        assert reference is not None
        (policy_chosen, policy_rejected), (chosen, rejected) = policy.per_token(), reference.per_token()
        chosen, rejected = policy_chosen - chosen, policy_rejected - rejected
        loss = (chosen - rejected - 1 / (2 * self.beta)) ** 2
        return LossOutput(loss, (self.beta * chosen).detach(), (self.beta * rejected).detach())


@register("loss")
@dataclass
class SimPO(Loss):
    """Simple Preference Optimization, Meng et al. 2024, arXiv:2405.14734, Eq. 6. Needs no reference.

    beta: reward scale. The authors use 2.0 to 2.5, sometimes 10; not comparable with DPO's beta.
    gamma: target reward margin, the paper's gamma (TRL: `simpo_gamma`), 0.3 to 1.6; 1.0 when neither is given.
    gamma_beta_ratio: the same margin in units of beta, as the authors' repository spells it. Giving both is an error.
    """

    name: str = "simpo"
    beta: float = 2.0
    gamma: float | None = None
    gamma_beta_ratio: float | None = None
    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        if self.gamma is not None and self.gamma_beta_ratio is not None:
            raise ConfigError(
                f"loss.gamma={self.gamma} and loss.gamma_beta_ratio={self.gamma_beta_ratio} both set SimPO's margin "
                f"(gamma = ratio x beta); give one of the two"
            )
        if self.gamma is None:
            self.gamma = 1.0 if self.gamma_beta_ratio is None else self.gamma_beta_ratio * self.beta

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        assert self.gamma is not None
        chosen, rejected = policy.per_token()
        loss = -log_sigmoid(self.beta * (chosen - rejected) - self.gamma)
        return LossOutput(loss, (self.beta * chosen).detach(), (self.beta * rejected).detach())

    def describe(self) -> str:
        assert self.gamma is not None
        return f"simpo beta={self.beta} gamma={self.gamma:g} (gamma/beta={self.gamma / self.beta:g})"


@register("loss")
@dataclass
class SFT(Loss):
    """Supervised fine-tuning on the chosen completions: their summed negative log-likelihood.

    The training loop divides by the tokens of the whole global batch, not by pairs: a token counts the same wherever it
    stands (the accumulation bug of huggingface/transformers#34191).
    """

    name: str = "sft"
    needs_reference: ClassVar[bool] = False
    pairwise: ClassVar[bool] = False

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        return LossOutput(-policy.chosen, policy.chosen.detach(), policy.rejected.detach())


def log_sigmoid(x: Tensor) -> Tensor:
    """log(1 / (1 + e^-x)) without overflow."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)


def check_positive(key: str, value: float) -> None:
    """Raise ConfigError unless loss.<key> is above 0."""
    if not value > 0:
        raise ConfigError(f"loss.{key}={value} must be above 0")
