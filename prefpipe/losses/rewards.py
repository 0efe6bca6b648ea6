"""Losses of reward models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from prefpipe.components import register
from prefpipe.losses.base import Loss, LossOutput, PairScores, check, log_sigmoid, score_margins

if TYPE_CHECKING:
    from prefpipe.logps import PairLogps, PairRewards


@register("loss")
@dataclass
class BradleyTerry(Loss):
    """Trains a reward model on pairs, Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, Eq. 1.

    loss = ls(R_w - R_l - margin - margin_per_score (s_w - s_l)) + center_rewards_coefficient (R_w + R_l)^2

    R is the output of a linear head of one number on the last token of the conversation. The checkpoint is a
    transformers sequence classifier, for scorer=reward_model and task=reward_accuracy; it generates no text. A learning
    rate of 1e-5 is usual, at least ten times DPO's, for one epoch.

    margin: by how much rewards should differ, at least 0; 0 is none.
    margin_per_score: margin per unit of the pair's score difference, Llama 2 (Touvron et al. 2023,
        arXiv:2307.09288, Eq. 2); 0 is none, and reads no scores.
    center_rewards_coefficient: keeps rewards around 0, Eisenstein et al. 2023, arXiv:2312.09244; TRL's name, who
        suggest 0.01. The loss alone leaves their offset open.
    """

    name: str = "bradley_terry"
    margin: float = 0.0
    margin_per_score: float = 0.0
    center_rewards_coefficient: float = 0.0
    needs_reference: ClassVar[bool] = False
    of_rewards: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for key in ("margin", "margin_per_score", "center_rewards_coefficient"):
            check(key, getattr(self, key), getattr(self, key) >= 0, "at least 0; 0 is none")

    @property
    def needs_scores(self) -> bool:
        return self.margin_per_score > 0

    def __call__(
        self, policy: PairLogps | PairRewards, reference: PairLogps | None, scores: PairScores | None = None
    ) -> LossOutput:
        margin = policy.chosen - policy.rejected - self.margin
        if self.needs_scores:
            margin = margin - self.margin_per_score * score_margins(scores, policy.chosen)
        centre = self.center_rewards_coefficient * (policy.chosen + policy.rejected) ** 2
        return LossOutput(-log_sigmoid(margin) + centre, policy.chosen.detach(), policy.rejected.detach())
