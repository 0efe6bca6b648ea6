"""Losses in which a pair's loss depends on the other pairs of its batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from prefpipe.components import register
from prefpipe.losses.base import (
    BetaLoss,
    LossOutput,
    check,
    check_smoothing,
    log_ratios,
    log_sigmoid,
    scaled,
    smoothed_logistic,
)

if TYPE_CHECKING:
    from torch import Tensor

    from prefpipe.logps import PairLogps


@register("loss")
@dataclass
class BetaDPO(BetaLoss):
    """DPO with a dynamic beta (beta-DPO), Wu et al. 2024, arXiv:2407.08639: easy pairs stay nearer to the reference.

    loss = ls(beta_i D), beta_i = beta max(0.01, 1 + alpha (M - m)), M = beta D without a gradient, m its mean

    The paper's m is a running mean over batches, and its beta that of a batch: beta (1 + alpha (mean of M - m)). A loss
    here is a function of its batch and has no memory, so that a resumed run goes on exactly; m is the mean over the
    global batch, and beta_i that of each pair, the paper's instance level. The floor keeps beta_i above 0; the authors'
    code has it at 0.001 for beta = 0.1, and takes D for M. Rewards are beta h.

    beta: the paper's beta_0, as in DPO; 0.1.
    alpha: the paper's 0.6; 0 is DPO.
    keep_fraction: of the batch, in (0, 1]: the pairs with M nearest to m; the rest lose 0 and the kept ones count
        for them (ties are kept too). The paper's filter draws 0.8 of the batch at random, with a normal density around
        m as weight; this is the deterministic one. The NLL term, if any, stays for all.
    """

    name: str = "beta_dpo"
    beta: float = 0.1
    alpha: float = 0.6
    keep_fraction: float = 1.0
    batch_wise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check("alpha", self.alpha, self.alpha >= 0, "at least 0; 0 is DPO")
        check("keep_fraction", self.keep_fraction, 0 < self.keep_fraction <= 1, "in (0, 1]; 1 keeps every pair")

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = scaled(self.beta, log_ratios(policy, reference))
        margin = chosen - rejected
        above = margin.detach() - margin.detach().mean()
        loss = -log_sigmoid((1 + self.alpha * above).clamp(min=0.01) * margin)
        if self.keep_fraction < 1:
            loss = self.kept(above.abs()) * loss
        return LossOutput(loss, chosen, rejected)

    def kept(self, distance: Tensor) -> Tensor:
        """Weights [B] with mean 1: 0 for the pairs that are left out, equal for the others."""
        count = math.ceil(round(self.keep_fraction * len(distance), 6))
        near = distance <= distance.sort().values[max(count, 1) - 1]
        return near.to(distance) / near.to(distance).mean()


@register("loss")
@dataclass
class AOT(BetaLoss):
    """Alignment via Optimal Transport on pairs, Melnyk et al. 2024, arXiv:2406.05882.

    loss = (1 - epsilon) ls(beta d) + epsilon ls(-beta d), d the k-th smallest of (l_w - l_l) minus the k-th smallest
    of (r_w - r_l)

    The policy's margins as a distribution should exceed the reference's. A pair's loss is that of its rank among
    the policy's margins; rewards are beta h.

    beta: as in DPO, 0.01 to 0.1.
    label_smoothing: epsilon in [0, 0.5), 0 for none.
    """

    name: str = "aot"
    beta: float = 0.1
    label_smoothing: float = 0.0
    batch_wise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_smoothing(self.label_smoothing, "0 is usual")

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        assert reference is not None
        above = against_sorted(policy.chosen - policy.rejected, reference.chosen - reference.rejected)
        rewards = scaled(self.beta, log_ratios(policy, reference))
        return LossOutput(smoothed_logistic(self.beta * above, self.label_smoothing), *rewards)


@register("loss")
@dataclass
class AOTUnpaired(AOT):
    """Alignment via Optimal Transport, chosen and rejected as two samples, Melnyk et al. 2024, arXiv:2406.05882.

    loss = (1 - epsilon) ls(beta d) + epsilon ls(-beta d), d the k-th smallest h_w minus the k-th smallest h_l

    Which completions are a pair does not matter. A pair's loss is that of its chosen completion. Older TRL calls this
    one `aot_pair`.

    beta: as in DPO, 0.01 to 0.1.
    label_smoothing: epsilon in [0, 0.5), 0 for none.
    """

    name: str = "aot_unpaired"

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = scaled(self.beta, log_ratios(policy, reference))
        return LossOutput(smoothed_logistic(against_sorted(chosen, rejected), self.label_smoothing), chosen, rejected)


def against_sorted(values: Tensor, others: Tensor) -> Tensor:
    """Each value minus the one with its rank among the others, [B]."""
    rank = values.argsort(stable=True).argsort()
    return values - others.sort().values[rank]
