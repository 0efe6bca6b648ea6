"""How a completion does against the others of its prompt, compared two by two."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, permutations
from pathlib import Path
from typing import Any, ClassVar

from prefpipe.components import register
from prefpipe.errors import ConfigError
from prefpipe.records import Completion, Message
from prefpipe.scorers import Missing, Score, Scorer, ScoringContext, local_model, model_identity
from prefpipe.settings import ModelConfig, check_choice


@register("scorer")
@dataclass
class PairRanker(Scorer):
    """PairRM, Jiang et al. 2023, arXiv:2306.02561: a model reads a prompt and two completions and says which is better.

    Every two are compared in both places, and the two answers are averaged, so that no completion gains from standing
    first. The row is <|source|> prompt <|candidate1|> a <|candidate2|> b, each part with the tokenizer's own special
    tokens around it. Nothing is cut: a part that is too long has no score, nor has one that is alone with its prompt.

    path: a folder or a hub name of a model in PairRM's layout (llm-blender/PairRM-hf), or of a sequence classifier that
        reads that row. revision: of a hub name.
    aggregate: "win_share" is the mean probability of being better than another, in [0, 1]; "mean_logit" the mean logit.
    max_source_tokens, max_candidate_tokens: of the prompt, and of a completion when the prompt is that long; what the
        prompt leaves goes to the completions.
    max_batch_tokens: of a forward pass, which changes no score.
    """

    whole_prompts: ClassVar[bool] = True
    rows_per_part: ClassVar[int] = 100

    name: str = "pair_ranker"
    path: str | None = None
    revision: str | None = None
    aggregate: str = "win_share"
    max_source_tokens: int = 1224
    max_candidate_tokens: int = 412
    max_batch_tokens: int = 8_192

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("scorer.aggregate", self.aggregate, ("win_share", "mean_logit"))
        for key in ("max_source_tokens", "max_candidate_tokens"):
            if getattr(self, key) < 1:
                raise ConfigError(f"scorer.{key}={getattr(self, key)} must be at least 1")

    def identity(self, context: ScoringContext) -> dict[str, Any]:
        return {"pair_ranker": model_identity(context, *self._model(context))}

    def score(self, completions: Sequence[Completion], context: ScoringContext) -> list[Score | Missing]:
        from prefpipe.pair_rankers import pair_ranker

        ranker = pair_ranker(self._model(context)[1], context.hardware)
        longest = self.max_source_tokens + 2 * self.max_candidate_tokens
        scores: list[Score | Missing] = [Missing("single_completion")] * len(completions)
        rows: list[list[int]] = []
        compared: list[tuple[int, int]] = []
        for _, group in groupby(range(len(completions)), key=lambda place: completions[place].prompt_id):
            places = list(group)
            source = ranker.source(_text(completions[places[0]].messages), longest=self.max_source_tokens)
            sides = {}
            for place in places:
                if isinstance(source, Missing):
                    scores[place] = source
                    continue
                found = ranker.candidate(completions[place].text, longest=(longest - len(source)) // 2)
                if isinstance(found, Missing):
                    scores[place] = found
                else:
                    sides[place] = found
            for a, b in permutations(sides, 2):
                assert not isinstance(source, Missing)
                rows.append([*source, *sides[a][0], *sides[b][1]])
                compared.append((a, b))
        logits = dict(zip(compared, ranker.logits(rows, max_tokens=self.max_batch_tokens), strict=True))
        gains: dict[int, list[float]] = {}
        for (a, b), logit in logits.items():
            gains.setdefault(a, []).append(self._gain(logit, -logits[b, a]))
        for place, values in gains.items():
            scores[place] = math.fsum(values) / len(values)
        return scores

    def _gain(self, first: float, second: float) -> float:
        """Of a completion over another: its logit where it stands first, and where it stands second."""
        if self.aggregate == "mean_logit":
            return (first + second) / 2
        return (_sigmoid(first) + _sigmoid(second)) / 2

    def _model(self, context: ScoringContext) -> tuple[ModelConfig, Path]:
        if self.path is None:
            raise ConfigError(
                "scorer.path=null must name the ranker, e.g. scorer.path=llm-blender/PairRM-hf or a folder"
            )
        return local_model(context, self.path, revision=self.revision)


def _text(messages: Sequence[Message]) -> str:
    """A single turn as it is, a conversation with its roles."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{message['role'].upper()}: {message['content']}" for message in messages)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
