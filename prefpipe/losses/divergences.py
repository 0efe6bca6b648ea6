"""DPO with divergences from the reference other than the reverse KL."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefpipe.components import register
from prefpipe.errors import ConfigError
from prefpipe.losses.base import (
    MAX_EXPONENT,
    BetaLoss,
    LossOutput,
    check,
    check_choice,
    expm1,
    log_ratios,
    log_sigmoid,
    scaled,
)

if TYPE_CHECKING:
    from torch import Tensor

    from prefpipe.logps import PairLogps


@register("loss")
@dataclass
class FDPO(BetaLoss):
    """DPO with divergences other than the reverse KL, Wang et al. 2023, arXiv:2309.16240.

    loss = ls(beta (u_w - u_l)), u = f'(e^h) - f'(1), which by divergence is
    reverse_kl: h, so DPO. forward_kl: 1 - e^-h. js: log 2 + log sigma(h). alpha: (e^((alpha-1) h) - 1) / (alpha - 1)

    Constants of f' cancel between chosen and rejected. Above an exponent of 80, e^x goes on as its tangent, to stay
    finite in float32 (TRL clips there, which ends the gradient too). Rewards are beta u.

    beta: as in DPO, 0.1 to 0.5.
    divergence: js by default, between the two KLs.
    alpha: with divergence=alpha only, in [0, 1]: 0 is forward_kl, 1 reverse_kl, 0.5 the default there; TRL's
        `f_alpha_divergence_coef`. The paper's alpha is 1 - ours.
    """

    name: str = "fdpo"
    beta: float = 0.1
    divergence: str = "js"
    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("divergence", self.divergence, ["reverse_kl", "forward_kl", "js", "alpha"])
        if self.divergence == "alpha":
            self.alpha = 0.5 if self.alpha is None else self.alpha
            check("alpha", self.alpha, 0 <= self.alpha <= 1, "in [0, 1]")
        elif self.alpha is not None:
            raise ConfigError(
                f"loss.alpha={self.alpha} would be ignored with loss.divergence={self.divergence}; "
                f"drop it, or use loss.divergence=alpha"
            )

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = (self.beta * self.derivative(h) for h in log_ratios(policy, reference))
        return LossOutput(-log_sigmoid(chosen - rejected), chosen, rejected)

    def derivative(self, h: Tensor) -> Tensor:
        """f'(e^h) - f'(1), [B]."""
        if self.divergence == "forward_kl":
            return -expm1(-h)
        if self.divergence == "js":
            return math.log(2) + log_sigmoid(h)
        if self.alpha is None or self.alpha == 1:
            return h
        return expm1((self.alpha - 1) * h) / (self.alpha - 1)


@register("loss")
@dataclass
class ChiPO(BetaLoss):
    """Chi-squared Preference Optimization, Huang et al. 2024, arXiv:2407.13399: pessimistic where data is thin.

    loss = ls(clip(beta (u_w - u_l), max_margin)), u = e^min(h, max_log_ratio) + h

    The slope of u is 2 at the start, so a first step is twice DPO's. Rewards are beta u.

    beta: as in DPO, though smaller ones hold up better than DPO's do; 0.01 to 0.1.
    max_margin: bound of the margin of rewards on both sides, the paper's 2 R_max; no gradient beyond it. null: none.
    max_log_ratio: bound of the exponent, for finite numbers; beyond it u grows by h alone.
    """

    name: str = "chi_po"
    beta: float = 0.1
    max_margin: float | None = None
    max_log_ratio: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_margin is not None:
            check("max_margin", self.max_margin, self.max_margin > 0, "above 0, or null for no bound")
        check("max_log_ratio", self.max_log_ratio, 0 < self.max_log_ratio <= MAX_EXPONENT, f"in (0, {MAX_EXPONENT}]")

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = log_ratios(policy, reference)
        of_chosen, of_rejected = (h.clamp(max=self.max_log_ratio).exp() for h in (chosen, rejected))
        # Each part by itself: two exponentials at the bound cancel, and would take the digits of h with them.
        margin = self.beta * ((of_chosen - of_rejected) + (chosen - rejected))
        if self.max_margin is not None:
            margin = margin.clamp(-self.max_margin, self.max_margin)
        rewards = scaled(self.beta, (of_chosen + chosen, of_rejected + rejected))
        return LossOutput(-log_sigmoid(margin), *rewards)
