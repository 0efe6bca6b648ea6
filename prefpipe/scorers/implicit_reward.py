"""The reward that a policy is optimal for, by its own log-probabilities."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from prefpipe import models
from prefpipe.components import register
from prefpipe.errors import ConfigError
from prefpipe.records import Completion
from prefpipe.scorers import Missing, Score, Scorer, ScoringContext, local_model, model_identity
from prefpipe.settings import ModelConfig


@register("scorer")
@dataclass
class ImplicitReward(Scorer):
    """beta (log pi(y | x) - log pi_ref(y | x)), Rafailov et al. 2023, arXiv:2305.18290, Eq. 5.

    Each model renders and encodes the conversation with its own tokenizer; log-probabilities as for scorer=logprob.

    policy: a folder or a hub name; null is the policy of this round. reference: likewise; null is model.path, the
        weights before any training.
    beta: DPO's, above 0. per_token: divide each side by its tokens, as IPO and SimPO rank.
    max_batch_tokens: of a forward pass, which changes no score.
    """

    rows_per_part: ClassVar[int] = 1_000

    name: str = "implicit_reward"
    policy: str | None = None
    reference: str | None = None
    beta: float = 0.1
    per_token: bool = False
    max_batch_tokens: int = 8_192

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta < math.inf:
            raise ConfigError(f"scorer.beta={self.beta} must be above 0")

    def identity(self, context: ScoringContext) -> dict[str, Any]:
        policy, reference = (model_identity(context, *model) for model in self._models(context))
        if policy["weights"] == reference["weights"]:
            raise ConfigError(
                f"scorer.policy={self.policy} and scorer.reference={self.reference} are the same weights, so every "
                f"reward would be 0; name the checkpoint by scorer.policy or inputs.checkpoint, or another reference"
            )
        return {"policy": policy, "reference": reference}

    def score(self, completions: Sequence[Completion], context: ScoringContext) -> list[Score | Missing]:
        policy, reference = (self._values(completions, context, *model) for model in self._models(context))
        scores: list[Score | Missing] = []
        for mine, theirs in zip(policy, reference, strict=True):
            if isinstance(mine, Missing) or isinstance(theirs, Missing):
                scores.append(mine if isinstance(mine, Missing) else theirs)
            else:
                scores.append(self.beta * (mine - theirs))
        return scores

    def _values(
        self, completions: Sequence[Completion], context: ScoringContext, model: ModelConfig, folder: Path
    ) -> list[float | Missing]:
        from prefpipe.scoring_models import language_model

        loaded = language_model(model, folder, context.hardware)
        rows = [loaded.encoded(completion) for completion in completions]
        found = loaded.token_logps(rows, max_tokens=self.max_batch_tokens)
        return [
            logps if isinstance(logps, Missing) else math.fsum(logps) / (len(logps) if self.per_token else 1)
            for logps in found
        ]

    def _models(self, context: ScoringContext) -> list[tuple[ModelConfig, Path]]:
        reference = (context.model, models.model_folder(context.model, cache=context.cache))
        return [
            local_model(context, self.policy),
            reference if self.reference is None else local_model(context, self.reference),
        ]
