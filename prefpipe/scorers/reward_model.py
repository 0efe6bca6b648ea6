"""What a reward model says of a completion."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from prefpipe.components import register
from prefpipe.errors import ConfigError
from prefpipe.records import Completion
from prefpipe.scorers import Missing, Score, Scorer, ScoringContext, local_model, model_identity
from prefpipe.settings import ModelConfig


@register("scorer")
@dataclass
class RewardModel(Scorer):
    """The reward of the whole conversation under a sequence classifier of one label, read at its last token.

    The conversation is rendered by the model's own chat template, up to where `apply_chat_template` ends. A row that is
    longer than the model's context, or than max_tokens, has no score ("too_long"); nothing is cut. On a GPU
    hardware.precision=auto computes the body in bfloat16; the head is float32 always, so that rewards do not tie.

    path: a folder (the checkpoint of stage=train loss=bradley_terry) or a hub name. revision: of a hub name.
    chat_template: in place of the tokenizer's own, as model.chat_template.
    max_tokens: of a row; null is the model's context. max_batch_tokens: of a forward pass, which changes no score.
    """

    rows_per_part: ClassVar[int] = 1_000

    name: str = "reward_model"
    path: str | None = None
    revision: str | None = None
    chat_template: str | None = None
    max_tokens: int | None = None
    max_batch_tokens: int = 8_192

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(
                f"scorer.max_tokens={self.max_tokens} must be at least 1, or null for the model's context"
            )

    def identity(self, context: ScoringContext) -> dict[str, Any]:
        return {"reward_model": model_identity(context, *self._model(context))}

    def score(self, completions: Sequence[Completion], context: ScoringContext) -> list[Score | Missing]:
        from prefpipe.scoring_models import encoded, reward_model

        model = reward_model(*self._model(context), context.hardware, key="scorer.path")
        rows = [encoded(model.template.encode, c.messages, c.text) for c in completions]
        return list(model.rewards(rows, max_tokens=self.max_batch_tokens, longest=self.max_tokens))

    def _model(self, context: ScoringContext) -> tuple[ModelConfig, Path]:
        if self.path is None:
            raise ConfigError(
                "scorer.path=null must name the reward model: the checkpoint of stage=train loss=bradley_terry, or a "
                "hub name"
            )
        return local_model(context, self.path, revision=self.revision, chat_template=self.chat_template)
