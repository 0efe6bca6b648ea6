"""DPO and its logistic relatives, which fit the sigmoid of a margin to the labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefpipe.components import register
from prefpipe.losses.base import (
    BetaLoss,
    LossOutput,
    check,
    check_smoothing,
    log_ratios,
    log_sigmoid,
    mean_log_ratios,
    scaled,
    smoothed_logistic,
)

if TYPE_CHECKING:
    from prefpipe.logps import PairLogps


@register("loss")
@dataclass
class DPO(BetaLoss):
    """Direct Preference Optimization, Rafailov et al. 2023, arXiv:2305.18290, Eq. 7.

    loss = (1 - epsilon) ls(beta D) + epsilon ls(-beta D)

    beta: strength of the pull towards the reference; the paper uses 0.1 to 0.5, later work down to 0.01.
    label_smoothing: epsilon, the probability in [0, 0.5) that a label is flipped (conservative DPO, Mitchell 2023);
        0 is plain DPO. The optimum is sigma(beta D) = 1 - epsilon. TRL 1.x accepts the key and ignores it here.
    """

    name: str = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_smoothing(self.label_smoothing, "0 is plain DPO")

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = scaled(self.beta, log_ratios(policy, reference))
        return LossOutput(smoothed_logistic(chosen - rejected, self.label_smoothing), chosen, rejected)


@register("loss")
@dataclass
class RobustDPO(BetaLoss):
    """Provably robust DPO, Chowdhury et al. 2024, arXiv:2403.00409: unbiased where labels are flipped at a known rate.

    loss = ((1 - epsilon) ls(beta D) - epsilon ls(-beta D)) / (1 - 2 epsilon)

    Unlike dpo's label_smoothing it has no optimum at a finite margin, and it falls below 0 there.

    beta: as in DPO, 0.1 to 0.5.
    label_smoothing: epsilon, the rate of flipped labels in [0, 0.5), usually 0.1; 0 is plain DPO.
    """

    name: str = "robust"
    beta: float = 0.1
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_smoothing(self.label_smoothing, "0 is plain DPO")

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = scaled(self.beta, log_ratios(policy, reference))
        margin, epsilon = chosen - rejected, self.label_smoothing
        loss = (epsilon * log_sigmoid(-margin) - (1 - epsilon) * log_sigmoid(margin)) / (1 - 2 * epsilon)
        return LossOutput(loss, chosen, rejected)


@register("loss")
@dataclass
class DPONorm(BetaLoss):
    """Length-normalized DPO, as trained for Tülu 3, Lambert et al. 2024, arXiv:2411.15124.

    loss = ls(beta (h_w / n_w - h_l / n_l))

    TRL calls it `sigmoid_norm`, open-instruct `dpo_norm`.

    beta: 5.0, as open-instruct: log-ratios per token are smaller than DPO's by the completion's length, so that DPO's
        0.1 would leave rewards of a few thousandths; 2 to 10.
    """

    name: str = "dpo_norm"
    beta: float = 5.0

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = scaled(self.beta, mean_log_ratios(policy, reference))
        return LossOutput(-log_sigmoid(chosen - rejected), chosen, rejected)


@register("loss")
@dataclass
class RDPO(BetaLoss):
    """Length-regularized DPO, Park et al. 2024, arXiv:2403.19159.

    loss = ls(beta D + alpha (n_w - n_l))

    A chosen completion that is the longer one has a head start in the margin and is pushed up less, one that is the
    shorter one more. Rewards are beta h, without the length.

    beta: as in DPO, 0.01 to 0.1.
    alpha: reward per token of length, at least 0; 0 is DPO. The authors of SimPO search 0.05 to 1.0 for it; alpha times
        the usual difference of lengths should be of the order of 1.
    """

    name: str = "rdpo"
    beta: float = 0.1
    alpha: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check("alpha", self.alpha, self.alpha >= 0, "at least 0; 0 is DPO")

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = scaled(self.beta, log_ratios(policy, reference))
        # A float times an integer tensor would be float32, whatever the log-probabilities are.
        longer = self.alpha * (policy.chosen_tokens - policy.rejected_tokens).to(chosen.dtype)
        return LossOutput(-log_sigmoid(chosen - rejected + longer), chosen, rejected)


@register("loss")
@dataclass
class DPOP(BetaLoss):
    """DPO-Positive (Smaug), Pal et al. 2024, arXiv:2402.13228: keeps the chosen completion from becoming less likely.

    loss = ls(beta (D - lambda max(0, r_w - l_w)))

    The penalty has its kink where training from its own reference starts. A fall of at most 0.001 nats is therefore
    none: the first step is DPO's, and rounding does not decide about lambda times its gradient.

    beta: as in DPO; 0.1 to 0.3.
    dpop_lambda: the paper's lambda, weight of the penalty, at least 0; 0 is DPO, the paper's value is 50.
    """

    name: str = "dpop"
    beta: float = 0.3
    dpop_lambda: float = 50.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check("dpop_lambda", self.dpop_lambda, self.dpop_lambda >= 0, "at least 0; 0 is DPO")

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        ratios = log_ratios(policy, reference)
        chosen, rejected = scaled(self.beta, ratios)
        penalty = self.dpop_lambda * -chosen * (ratios[0] < -1e-3)
        return LossOutput(-log_sigmoid(chosen - rejected - penalty), chosen, rejected)
