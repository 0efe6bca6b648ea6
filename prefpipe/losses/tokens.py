"""DPO on single tokens or whole next-token distributions, not only on sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from prefpipe.components import register
from prefpipe.errors import ConfigError
from prefpipe.losses.base import BetaLoss, LossOutput, check, check_choice, log_ratios, log_sigmoid, scaled

if TYPE_CHECKING:
    from torch import Tensor

    from prefpipe.logps import PairLogps


@register("loss")
@dataclass
class LDDPO(BetaLoss):
    """Length-desensitized DPO (LD-DPO), Liu et al. 2024, arXiv:2409.06411.

    loss = ls(beta D'), where in l' (and r') the tokens beyond the first min(n_w, n_l) count alpha

    The longer completion's tail, which has no counterpart, has less weight. Rewards are beta h'.

    beta: as in DPO, 0.01 to 0.1.
    alpha: weight of the tail, in [0, 1] (`ld_alpha` in TRL and ms-swift): 1 is DPO, 0 leaves the tail out.
    reference: `both` weights the reference's tokens too, so that the first loss is ln 2 at any alpha, as TRL since
        0.29; `policy` leaves the reference's sum whole, as LLaMA-Factory, ms-swift and TRL before.
    """

    name: str = "ld_dpo"
    beta: float = 0.1
    alpha: float = 0.5
    reference: str = "both"
    reads: ClassVar[frozenset[str]] = frozenset({"token_logps"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check("alpha", self.alpha, 0 <= self.alpha <= 1, "in [0, 1]; 1 is DPO")
        check_choice("reference", self.reference, ["both", "policy"])

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        assert reference is not None
        weighted = self.weighted(policy)
        base = self.weighted(reference) if self.reference == "both" else reference
        chosen, rejected = scaled(self.beta, log_ratios(weighted, base))
        return LossOutput(-log_sigmoid(chosen - rejected), chosen, rejected)

    def weighted(self, logps: PairLogps) -> PairLogps:
        """With l' in place of l."""
        import torch

        shared = torch.minimum(logps.chosen_tokens, logps.rejected_tokens)[:, None]

        def sums(tokens: Tensor) -> Tensor:
            beyond = torch.arange(tokens.shape[1], device=tokens.device) >= shared
            return torch.where(beyond, self.alpha * tokens, tokens).sum(dim=-1, dtype=logps.chosen.dtype)

        chosen, rejected = given(logps.chosen_token_logps, logps.rejected_token_logps)
        return logps._replace(chosen=sums(chosen), rejected=sums(rejected))


@register("loss")
@dataclass
class WPO(BetaLoss):
    """Weighted Preference Optimization, Zhou et al. 2024, arXiv:2406.11827: off-policy pairs count less.

    loss = w ls(beta D), w = min(1, e^(m_w + m_l)), m = (l - c) / n, c the sum over tokens of log sum_v p(v)^2

    m compares a completion's tokens with what the policy would sample, p being its next-token distribution. No gradient
    flows through w. TRL's `use_weighting` does not clamp w (releases 1.12 and 1.16); open-instruct weights by summed
    log-probabilities, where w is 0 for any completion of usual length. The NLL term is not weighted.

    beta: as in DPO, 0.01 to 0.1.
    """

    name: str = "wpo"
    beta: float = 0.1
    reads: ClassVar[frozenset[str]] = frozenset({"collision"})

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = scaled(self.beta, log_ratios(policy, reference))
        of_chosen, of_rejected = given(policy.chosen_collision, policy.rejected_collision)
        aligned = (policy.chosen - of_chosen) / policy.chosen_tokens
        aligned = aligned + (policy.rejected - of_rejected) / policy.rejected_tokens
        weight = aligned.detach().clamp(max=0).exp()
        return LossOutput(-weight * log_sigmoid(chosen - rejected), chosen, rejected)


@register("loss")
@dataclass
class TDPO(BetaLoss):
    """Token-level DPO, Zeng et al. 2024, arXiv:2404.11999.

    loss = ls(beta (D - (k_l - k_w))) (TDPO1), or ls(beta (D - alpha (k_l - k_w))), k_w without a gradient (TDPO2)

    k is the sum over a completion's tokens of KL(reference || policy) of the next-token distributions. Rewards are
    beta h; the authors log beta (h + k).

    beta: as in DPO, 0.1 to 0.5.
    version: 1 or 2; 2 holds the KL of chosen where it is and does better in the paper.
    alpha: weight of the KL in version 2, at least 0; 0.5 by default, as the authors; 0 is DPO.
    """

    name: str = "tdpo"
    beta: float = 0.1
    version: int = 2
    alpha: float | None = None
    reads: ClassVar[frozenset[str]] = frozenset({"kl"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("version", self.version, [1, 2])
        if self.version == 2:
            self.alpha = 0.5 if self.alpha is None else self.alpha
            check("alpha", self.alpha, self.alpha >= 0, "at least 0; 0 is DPO")
        elif self.alpha is not None:
            raise ConfigError(
                f"loss.alpha={self.alpha} would be ignored with loss.version=1; drop it, or use loss.version=2"
            )

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = scaled(self.beta, log_ratios(policy, reference))
        of_chosen, of_rejected = given(policy.chosen_kl, policy.rejected_kl)
        kl = of_rejected - of_chosen if self.alpha is None else self.alpha * (of_rejected - of_chosen.detach())
        return LossOutput(-log_sigmoid(chosen - rejected - self.beta * kl), chosen, rejected)


def given(chosen: Tensor | None, rejected: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both sides of an optional part of PairLogps, which a loss that reads it is given."""
    assert chosen is not None
    assert rejected is not None
    return chosen, rejected
