"""Functions of DPO's margin other than the logistic one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefpipe.components import register
from prefpipe.losses.base import (
    BetaLoss,
    LossOutput,
    PairScores,
    check,
    check_choice,
    check_smoothing,
    log_ratios,
    log_sigmoid,
    mean_log_ratios,
    scaled,
    score_margins,
)

if TYPE_CHECKING:
    from torch import Tensor

    from prefpipe.logps import PairLogps


@register("loss")
@dataclass
class IPO(BetaLoss):
    """Identity Preference Optimization, Azar et al. 2023, arXiv:2310.12036, Eq. 17.

    loss = (h_w / n_w - h_l / n_l - 1 / (2 beta))^2

    beta: the paper's tau; the log-ratio margin is pulled to 1 / (2 beta), so a smaller beta asks for a larger margin.
    normalize: `mean` as above, the authors' correction, without which beta depends on completion length
        (huggingface/trl#1265), as in TRL, LLaMA-Factory and HALOs; `sum` is (D - 1 / (2 beta))^2, as in OpenRLHF and
        DPO's own repository.
    """

    name: str = "ipo"
    beta: float = 0.1
    normalize: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("normalize", self.normalize, ["mean", "sum"])

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        ratios = mean_log_ratios if self.normalize == "mean" else log_ratios
        chosen, rejected = ratios(policy, reference)
        loss = (chosen - rejected - 1 / (2 * self.beta)) ** 2
        return LossOutput(loss, *scaled(self.beta, (chosen, rejected)))


@register("loss")
@dataclass
class Hinge(BetaLoss):
    """Hinge loss on DPO's margin, RSO's hinge-norm, Liu et al. 2023, arXiv:2309.06657.

    loss = max(0, 1 - beta D)

    TRL, LLaMA-Factory and torchtune compute the same; HALOs' `slic` is the loss of that name here.

    beta: the paper's gamma, 1 / the margin at which a pair counts as learnt; 0.05 to 0.5.
    """

    name: str = "hinge"
    beta: float = 0.1

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = scaled(self.beta, log_ratios(policy, reference))
        return LossOutput((1 - (chosen - rejected)).relu(), chosen, rejected)


@register("loss")
@dataclass
class EXO(BetaLoss):
    """Efficient Exact Optimization, Ji et al. 2024, arXiv:2402.00856, Eq. 16, for pairs.

    loss = KL([q, 1 - q] || [1 - epsilon, epsilon]), q = sigma(beta D)

    The reverse of the KL that cDPO minimizes, with the same optimum q = 1 - epsilon.

    beta: as in DPO, 0.1 to 0.5.
    label_smoothing: epsilon in (0, 0.5), as at 0 the loss is infinite (ms-swift changes 0 to 0.001 without a word).
    """

    name: str = "exo"
    beta: float = 0.1
    label_smoothing: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_smoothing(self.label_smoothing, "at 0 EXO is infinite, 0.001 is usual", zero=False)

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = scaled(self.beta, log_ratios(policy, reference))
        margin, epsilon = chosen - rejected, self.label_smoothing
        of_chosen = margin.sigmoid() * (log_sigmoid(margin) - math.log1p(-epsilon))
        of_rejected = (-margin).sigmoid() * (log_sigmoid(-margin) - math.log(epsilon))
        return LossOutput(of_chosen + of_rejected, chosen, rejected)


@register("loss")
@dataclass
class DiscoPOP(BetaLoss):
    """Discovered Preference Optimization, Lu et al. 2024, arXiv:2406.08414, Eq. 5.

    loss = (1 - m) ls(x) + m e^-x, x = beta D, m = sigma(x / tau)

    Not convex: at tau=0.05 the slope in x is +0.78 where policy = reference, the other sign. Left to itself, a pair
    goes down to the minimum at x = -0.12; beyond the hump at x = 0.07 the loss falls as x grows.

    beta: as in DPO, 0.01 to 0.1.
    tau: width in x of the change from the one part to the other; the paper's 0.05.
    """

    name: str = "discopop"
    beta: float = 0.1
    tau: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check("tau", self.tau, self.tau > 0, "above 0")

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = scaled(self.beta, log_ratios(policy, reference))
        x = chosen - rejected
        # m e^-x in one exponential: as a product, it is 0 times infinity for rejected pairs, as in TRL.
        loss = -(-x / self.tau).sigmoid() * log_sigmoid(x) + (log_sigmoid(x / self.tau) - x).exp()
        return LossOutput(loss, chosen, rejected)


@register("loss")
@dataclass
class RPO(BetaLoss):
    """Reward-aware Preference Optimization, Nemotron-4 340B, arXiv:2406.11704; Sun et al. 2025, arXiv:2502.00203.

    loss = d(beta D, eta (s_w - s_l)): the margin of rewards follows that of the scores, where DPO's grows without end.

    Not the RPO of Pang et al., which is DPO with nll_weight. Only NeMo-Aligner trains it.

    beta: as in DPO, 0.01 to 0.5.
    eta: scale of the scores, above 0 (`gt_reward_scale` in NeMo-Aligner, where 1 is the default); the margin of rewards
        aimed at is eta times that of the scores, so it depends on their unit.
    distance: d(x, y) is 0 where x = y. `squared`: (x - y)^2. `backward_kl`, of the Nemotron-4 report:
        KL([sigma(y), 1 - sigma(y)] || [sigma(x), 1 - sigma(x)]), DPO with soft labels. `forward_kl`: x and y exchanged.
        The names are NeMo-Aligner's (`rpo_sq`, `rpo_bwd_kl`, `rpo_fwd_kl`); elsewhere forward is the KL from the data.
    """

    name: str = "rpo"
    beta: float = 0.1
    eta: float = 1.0
    distance: str = "backward_kl"

    def __post_init__(self) -> None:
        super().__post_init__()
        check("eta", self.eta, self.eta > 0, "above 0")
        check_choice("distance", self.distance, ["squared", "forward_kl", "backward_kl"])

    @property
    def needs_scores(self) -> bool:
        return True

    def compare_scored(self, policy: PairLogps, reference: PairLogps | None, scores: PairScores | None) -> LossOutput:
        chosen, rejected = scaled(self.beta, log_ratios(policy, reference))
        margin, target = chosen - rejected, self.eta * score_margins(scores, chosen)
        if self.distance == "squared":
            loss = (margin - target) ** 2
        elif self.distance == "backward_kl":
            loss = bernoulli_kl(target, margin)
        else:
            loss = bernoulli_kl(margin, target)
        return LossOutput(loss, chosen, rejected)


def bernoulli_kl(x: Tensor, y: Tensor) -> Tensor:
    """KL([sigma(x), 1 - sigma(x)] || [sigma(y), 1 - sigma(y)])."""
    return x.sigmoid() * (log_sigmoid(x) - log_sigmoid(y)) + (-x).sigmoid() * (log_sigmoid(-x) - log_sigmoid(-y))
