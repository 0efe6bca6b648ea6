"""Losses that treat each completion separately, not only the difference of the two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefpipe.components import register
from prefpipe.losses.base import (
    BetaLoss,
    LossOutput,
    PairScores,
    check,
    check_choice,
    log_ratios,
    log_sigmoid,
    scaled,
    score_margins,
)

if TYPE_CHECKING:
    from torch import Tensor

    from prefpipe.logps import PairLogps


@register("loss")
@dataclass
class NCA(BetaLoss):
    """Noise Contrastive Alignment, Chen et al. 2024, arXiv:2402.05369, for pairs.

    loss = ls(beta h_w) + ls(-beta h_w) / 2 + ls(-beta h_l) / 2

    Rewards are kept near 0, where DPO constrains only their difference, so the likelihood of chosen cannot drop freely.

    beta: as in DPO, 0.01 to 0.1.
    """

    name: str = "nca"
    beta: float = 0.1

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = scaled(self.beta, log_ratios(policy, reference))
        loss = -log_sigmoid(chosen) - (log_sigmoid(-chosen) + log_sigmoid(-rejected)) / 2
        return LossOutput(loss, chosen, rejected)


@register("loss")
@dataclass
class BCO(BetaLoss):
    """Binary Classifier Optimization, Jung et al. 2024, arXiv:2404.04656, on pairs and with a constant shift.

    loss = ls(beta h_w - delta) + ls(delta - beta h_l)

    beta: as in DPO, 0.01 to 0.1.
    delta: the reward that separates good from bad. The paper, LLaMA-Factory and ms-swift keep a running mean of the
        rewards, which makes a pair's loss depend on the batches before it; TRL 1.x fixes it at 0, as here by default.
    """

    name: str = "bco"
    beta: float = 0.1
    delta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check("delta", self.delta, True, "a reward; 0 is usual")

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = scaled(self.beta, log_ratios(policy, reference))
        return LossOutput(-log_sigmoid(chosen - self.delta) - log_sigmoid(self.delta - rejected), chosen, rejected)


@register("loss")
@dataclass
class SPPO(BetaLoss):
    """Self-Play Preference Optimization, Wu et al. 2024, arXiv:2405.00675, Eq. 4.7.

    loss = (h_w - (P - 1/2) / beta)^2 + (h_l + (P - 1/2) / beta)^2, P the probability that chosen is the better one

    TRL and the libraries that follow it have only the hard labels.

    beta: 1 / the paper's eta. Log-ratios of whole completions are pulled to +-1 / (2 beta); the paper's 0.001 asks for
        500 nats and loses 1 / (2 beta^2) = 500,000 at the start, so watch training.max_grad_norm.
    labels: `hard` is P = 1; `scores` is P = sigma(s_w - s_l), the paper's soft labels for a pair whose scores are
        log-odds, as a Bradley-Terry reward model's are (the paper's P are means over samples, by PairRM).
    """

    name: str = "sppo"
    beta: float = 0.001
    labels: str = "hard"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("labels", self.labels, ["hard", "scores"])

    @property
    def needs_scores(self) -> bool:
        return self.labels == "scores"

    def compare_scored(self, policy: PairLogps, reference: PairLogps | None, scores: PairScores | None) -> LossOutput:
        chosen, rejected = log_ratios(policy, reference)
        # tanh(x / 2) = 2 sigma(x) - 1, without the digits that sigma(x) - 1/2 loses near 0.
        target: Tensor | float = 1 / (2 * self.beta)
        if self.labels == "scores":
            target = (score_margins(scores, chosen) / 2).tanh() / (2 * self.beta)
        return LossOutput((chosen - target) ** 2 + (rejected + target) ** 2, *scaled(self.beta, (chosen, rejected)))


@register("loss")
@dataclass
class CalDPO(BetaLoss):
    """Calibrated DPO, Xiao et al. 2024, arXiv:2412.14516.

    loss = ls(D) + (h_w - 1 / (2 beta))^2 + (h_l + 1 / (2 beta))^2

    SPPO's squares, which calibrate the log-ratios, and a logistic loss of their difference, without beta in it as in
    the authors' paper.

    beta: log-ratios of whole completions are pulled to +-1 / (2 beta), as in sppo: 0.001 asks for 500 nats.
    """

    name: str = "cal_dpo"
    beta: float = 0.001

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = log_ratios(policy, reference)
        target = 1 / (2 * self.beta)
        loss = -log_sigmoid(chosen - rejected) + (chosen - target) ** 2 + (rejected + target) ** 2
        return LossOutput(loss, *scaled(self.beta, (chosen, rejected)))


@register("loss")
@dataclass
class APOZero(BetaLoss):
    """Anchored Preference Optimization, zero, D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7.

    loss = 1 - sigma(beta h_w) + sigma(beta h_l)

    For chosen completions that are better than what the model writes: chosen goes up, rejected down, each separately.

    beta: as in DPO, 0.05 to 0.5.
    """

    name: str = "apo_zero"
    beta: float = 0.1

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = scaled(self.beta, log_ratios(policy, reference))
        return LossOutput((-chosen).sigmoid() + rejected.sigmoid(), chosen, rejected)


@register("loss")
@dataclass
class APODown(BetaLoss):
    """Anchored Preference Optimization, down, D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 8.

    loss = sigma(beta h_w) + 1 - sigma(beta D)

    For chosen completions that are worse than what the model writes: both go down, rejected further.

    beta: as in DPO, 0.05 to 0.5.
    """

    name: str = "apo_down"
    beta: float = 0.1

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = scaled(self.beta, log_ratios(policy, reference))
        return LossOutput(chosen.sigmoid() + (rejected - chosen).sigmoid(), chosen, rejected)
