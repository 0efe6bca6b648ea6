"""How likely the end of an answer is, which depends less on its length than the whole."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from prefpipe.components import register
from prefpipe.errors import ConfigError, DataError
from prefpipe.prompts import Encoded
from prefpipe.records import Completion, Message
from prefpipe.scorers import Missing, Score, Scorer, ScoringContext, local_model, model_identity
from prefpipe.settings import ModelConfig


@register("scorer")
@dataclass
class NormalizedLogprob(Scorer):
    """Mean log-probability of an answer's last tokens, nats a token: a(y) of PIC, He et al. 2025.

    pairer=role_by_threshold makes sigma(a(y) - a(y')) of an original answer's and a perturbed one's. The token that
    ends the turn is not among the last ones. There is one BOS, in front of the prompt, and each token is predicted by
    the position before it, alone or in a batch.

    last_tokens: how many; all of an answer that has fewer.
    prompt: the key of meta that holds the prompt's text, PIC's instruction without the claims; null takes the
        completion's own messages.
    path: a folder or a hub name (PIC: an instruction-tuned model); null is the policy. revision: of a hub name.
    chat_template: in place of the tokenizer's own. max_batch_tokens: of a forward pass, which changes no score.
    """

    rows_per_part: ClassVar[int] = 1_000

    name: str = "normalized_logprob"
    last_tokens: int = 20
    prompt: str | None = "instruction"
    path: str | None = None
    revision: str | None = None
    chat_template: str | None = None
    max_batch_tokens: int = 8_192

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.last_tokens < 1:
            raise ConfigError(f"scorer.last_tokens={self.last_tokens} must be at least 1")

    def identity(self, context: ScoringContext) -> dict[str, Any]:
        return {"model": model_identity(context, *self._model(context))}

    def score(self, completions: Sequence[Completion], context: ScoringContext) -> list[Score | Missing]:
        from prefpipe.scoring_models import encoded, language_model

        model = language_model(*self._model(context), context.hardware)
        rows = [encoded(model.template.encode_open, self._messages(c), c.text) for c in completions]
        ends = [row if isinstance(row, Missing) else self._end(row) for row in rows]
        found = model.token_logps(ends, max_tokens=self.max_batch_tokens)
        return [logps if isinstance(logps, Missing) else math.fsum(logps) / len(logps) for logps in found]

    def _end(self, row: Encoded) -> Encoded:
        cut = max(0, len(row.completion) - self.last_tokens)
        return Encoded([*row.prompt, *row.completion[:cut]], row.completion[cut:])

    def _messages(self, completion: Completion) -> list[Message]:
        if self.prompt is None:
            return completion.messages
        text = completion.meta.get(self.prompt)
        if not isinstance(text, str):
            raise DataError(
                f"completion {completion.completion_id} has no text in meta.{self.prompt}, the prompt that "
                f"scorer=normalized_logprob conditions on; data_mixer.columns='{{meta.{self.prompt}: COLUMN}}' takes "
                f"it from a file, scorer.prompt=null conditions on the completion's own prompt"
            )
        return [Message(role="user", content=text)]

    def _model(self, context: ScoringContext) -> tuple[ModelConfig, Path]:
        return local_model(context, self.path, revision=self.revision, chat_template=self.chat_template)
