"""Losses of the policy alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from prefpipe.components import register
from prefpipe.errors import ConfigError
from prefpipe.losses.base import (
    BetaLoss,
    Loss,
    LossOutput,
    PairLoss,
    PairScores,
    check,
    check_choice,
    expm1,
    log1mexp,
    log_sigmoid,
    scaled,
)

if TYPE_CHECKING:
    from prefpipe.logps import PairLogps


@register("loss")
@dataclass
class SimPO(BetaLoss):
    """Simple Preference Optimization, Meng et al. 2024, arXiv:2405.14734, Eq. 6. Needs no reference.

    loss = ls(beta (a_w - a_l) - gamma), or with alpha, ls(beta (u_w - u_l) - gamma), u = (1 - e^(-alpha a)) / alpha

    TRL and ms-swift add an NLL term by default (`cpo_alpha` 1.0) and TRL, LLaMA-Factory and ms-swift spell the margin
    as gamma; the authors' repository, open-instruct and HALOs as its ratio to beta.

    beta: reward scale. The authors use 2.0 to 2.5, sometimes 10; not comparable with DPO's beta.
    gamma: target reward margin, the paper's gamma (TRL: `simpo_gamma`), 0.3 to 1.6; 1.0 when neither is given.
    gamma_beta_ratio: the same margin in units of beta, as the authors' repository spells it. Giving both is an error.
    alpha: shape of the reward, AlphaPO (Gupta et al. 2025, arXiv:2501.03884); 0, its limit, is SimPO. Above 0,
        probabilities near 0 count for more.
    """

    name: str = "simpo"
    beta: float = 2.0
    gamma: float | None = None
    gamma_beta_ratio: float | None = None
    alpha: float = 0.0
    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma is not None and self.gamma_beta_ratio is not None:
            raise ConfigError(
                f"loss.gamma={self.gamma} and loss.gamma_beta_ratio={self.gamma_beta_ratio} both set SimPO's margin "
                f"(gamma = ratio x beta); give one of the two"
            )
        if self.gamma is None:
            self.gamma = 1.0 if self.gamma_beta_ratio is None else self.gamma_beta_ratio * self.beta
        check("gamma", self.gamma, True, "a margin, 0.3 to 1.6")
        check("alpha", self.alpha, True, "0 for SimPO, or AlphaPO's alpha")

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        assert self.gamma is not None
        chosen, rejected = policy.per_token()
        if self.alpha:
            chosen, rejected = (-expm1(-self.alpha * mean) / self.alpha for mean in (chosen, rejected))
        chosen, rejected = scaled(self.beta, (chosen, rejected))
        return LossOutput(-log_sigmoid(chosen - rejected - self.gamma), chosen, rejected)

    def knobs(self) -> list[str]:
        assert self.gamma is not None
        gamma = f"gamma={self.gamma:g} (gamma/beta={self.gamma / self.beta:g})"
        return [f"beta={self.beta}", gamma, *([f"alpha={self.alpha}"] if self.alpha else [])]


@register("loss")
@dataclass
class CPO(BetaLoss):
    """Contrastive Preference Optimization, Xu et al. 2024, arXiv:2401.08417. Needs no reference.

    loss = ls(beta (l_w - l_l)) + nll_weight (-l_w / n_w)

    The paper's NLL is a sum over tokens, the authors' code and TRL take the mean over a micro-batch's tokens.

    beta: 0.1, as the paper; 0.01 to 0.1. Sums, not means: long completions have the larger rewards.
    nll_weight: 1.0, as the paper (`cpo_alpha` in TRL and ms-swift).
    """

    name: str = "cpo"
    nll_weight: float = 1.0
    beta: float = 0.1
    needs_reference: ClassVar[bool] = False

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = scaled(self.beta, (policy.chosen, policy.rejected))
        return LossOutput(-log_sigmoid(chosen - rejected), chosen, rejected)


@register("loss")
@dataclass
class ORPO(BetaLoss):
    """Odds Ratio Preference Optimization, Hong et al. 2024, arXiv:2403.07691. Needs no reference.

    loss = nll_weight (-a_w) + beta ls(log(odds_w / odds_l)), odds = e^a / (1 - e^a)

    The authors' code and TRL take the NLL over prompt and completion, LLaMA-Factory over the completion, as here.

    beta: the paper's lambda, weight of the odds ratio, 0.1 to 1 (`beta` in TRL too).
    nll_weight: 1.0, as the paper; 0 leaves the odds ratio alone.
    """

    name: str = "orpo"
    nll_weight: float = 1.0
    beta: float = 0.1
    needs_reference: ClassVar[bool] = False

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = policy.per_token()
        log_odds = chosen - rejected - (log1mexp(chosen) - log1mexp(rejected))
        return LossOutput(-self.beta * log_sigmoid(log_odds), *scaled(self.beta, (chosen, rejected)))


@register("loss")
@dataclass
class SLiC(PairLoss):
    """Sequence Likelihood Calibration, SLiC-HF, Zhao et al. 2023, arXiv:2305.10425. Needs no reference.

    loss = max(0, delta - l_w + l_l) + nll_weight (-l_w / n_w)

    The paper's regularizer is a likelihood of the reference text of its SFT data, which may be another than chosen.
    TRL's and LLaMA-Factory's `hinge`, once called slic, is `hinge` here. Rewards are l.

    delta: margin of the summed log-probabilities, nats, at least 0; 0.5 to 10.
    nll_weight: the paper's lambda; 0.1 to 10 in the grid of SimPO's authors, for a sum over tokens.
    """

    name: str = "slic"
    nll_weight: float = 1.0
    delta: float = 1.0
    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check("delta", self.delta, self.delta >= 0, "at least 0")

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        return LossOutput((self.delta - policy.chosen + policy.rejected).relu(), policy.chosen, policy.rejected)


@register("loss")
@dataclass
class SFT(Loss):
    """Supervised fine-tuning: the summed negative log-likelihood of the assistant's turns in demonstrations or pairs.

    What the assistant says counts, up to and including the token that ends its turn; system and user turns and the
    headers of turns are context. Of a pair the chosen side is read. The training loop divides by the tokens of the
    whole global batch, not by conversations: a token counts the same wherever it stands (the accumulation bug of
    huggingface/transformers#34191).

    turns: "all" trains on every turn of the assistant (LION; TRL's `assistant_only_loss`), "last" on the final one (a
        completion of its prompt; LLaMA-Factory's `mask_history`). They differ for conversations of several turns only.
    """

    name: str = "sft"
    turns: str = "all"
    needs_reference: ClassVar[bool] = False
    pairwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choice("turns", self.turns, ("all", "last"))

    @property
    def all_turns(self) -> bool:
        return self.turns == "all"

    def __call__(self, policy: PairLogps, reference: PairLogps | None, scores: PairScores | None = None) -> LossOutput:
        return LossOutput(-policy.chosen, policy.chosen.detach(), policy.rejected.detach())
