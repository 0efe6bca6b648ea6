"""How likely a completion is under a model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from prefpipe.components import register
from prefpipe.records import Completion
from prefpipe.scorers import Missing, Score, Scorer, ScoringContext, local_model, model_identity
from prefpipe.settings import ModelConfig


@register("scorer")
@dataclass
class Logprob(Scorer):
    """Three scores: logprob.sum and logprob.mean (per token), nats, and logprob.perplexity, e^-mean, lower is likelier.

    The token that ends the turn counts, as in training, but not where the completion was cut at
    generator.max_new_tokens. A row that is longer than the model's context has no score ("too_long").

    path: a folder or a hub name; null is the policy. revision: of a hub name. chat_template: in place of the
        tokenizer's own, as model.chat_template. max_batch_tokens: of a forward pass, which changes no score.
    """

    rows_per_part: ClassVar[int] = 1_000

    name: str = "logprob"
    path: str | None = None
    revision: str | None = None
    chat_template: str | None = None
    max_batch_tokens: int = 8_192

    def identity(self, context: ScoringContext) -> dict[str, Any]:
        return {"model": model_identity(context, *self._model(context))}

    def score(self, completions: Sequence[Completion], context: ScoringContext) -> list[Score | Missing]:
        from prefpipe.scoring_models import language_model

        model = language_model(*self._model(context), context.hardware)
        rows = [model.encoded(completion) for completion in completions]
        found = model.token_logps(rows, max_tokens=self.max_batch_tokens)
        return [logps if isinstance(logps, Missing) else _scores(logps.tolist()) for logps in found]

    def _model(self, context: ScoringContext) -> tuple[ModelConfig, Path]:
        return local_model(context, self.path, revision=self.revision, chat_template=self.chat_template)


def _scores(logps: Sequence[float]) -> dict[str, float]:
    total = math.fsum(logps)
    return {"sum": total, "mean": total / len(logps), "perplexity": math.exp(-total / len(logps))}
