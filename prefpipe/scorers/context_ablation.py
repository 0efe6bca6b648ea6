"""How much a statement depends on the sentences that it cites."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from prefpipe.citations import CITE, Range, cited
from prefpipe.components import register
from prefpipe.documents import TAG, merged_ranges, sentence_spans
from prefpipe.errors import ConfigError
from prefpipe.records import Completion, Message
from prefpipe.scorers import Missing, Score, Scorer, ScoringContext, local_model, model_identity
from prefpipe.settings import ModelConfig, check_choice

END_OF_STATEMENT = "</statement>"
TOO_LONG_PENALTY = 1000.0
"""Nats; SelfCite's, far below any other reward."""


class _Statement(NamedTuple):
    """answer[start:end] is a statement; sentences: the numbers that it cites, in order."""

    start: int
    end: int
    sentences: list[int]


@register("scorer")
@dataclass
class ContextAblation(Scorer):
    """The reward of a citation by context ablation, SelfCite, Chuang et al. 2025, arXiv:2502.09604, section 3.

    With C the sentences of the document, E those that a statement cites, and l(D) the mean log-probability of the
    statement's tokens behind the prompt that holds only the sentences D, and behind the answer before the statement:

        drop = l(C) - l(C without E)     hold = l(E) - l(C)     drop_and_hold = l(E) - l(C without E)

    An answer's score is the mean over its statements that cite something; one that cites nothing has none
    ("no_citation"). Sentences keep their numbers where others are gone. Of an answer
    `<statement>S<cite>[a-b][c-d]</cite></statement>…` ranges beyond the document are cut off, touching ones merged, and
    the first three count. Prompts of candidates are computed once up to the first sentence that one of them lacks.

    Reads meta.sentence_spans, [[start, end], …] in characters of the last user turn; where it is absent the sentences
    are those behind the tags <C0>, <C1>, … up to document_end. Reads meta.statement, the number of the one <cite> to be
    scored; where it is absent all count.

    method: "drop_and_hold", "drop", "hold", or "all" for the three as context_ablation.drop and so on.
    max_cited_tokens: several sentences of more tokens together lose 1,000; null sets no limit. SelfCite has 384 when it
        evaluates, and none for training data.
    document_end: what stands behind the last sentence.
    path: a folder or a hub name; null is the policy. revision: of a hub name. chat_template: in place of the
        tokenizer's own. max_batch_tokens: of a forward pass, which changes no score.
    """

    rows_per_part: ClassVar[int] = 200

    name: str = "context_ablation"
    method: str = "drop_and_hold"
    max_cited_tokens: int | None = None
    document_end: str = "[Document End]"
    path: str | None = None
    revision: str | None = None
    chat_template: str | None = None
    max_batch_tokens: int = 8_192

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("scorer.method", self.method, ("drop_and_hold", "drop", "hold", "all"))
        if self.max_cited_tokens is not None and self.max_cited_tokens < 1:
            raise ConfigError(
                f"scorer.max_cited_tokens={self.max_cited_tokens} must be at least 1, or null for no limit"
            )

    def identity(self, context: ScoringContext) -> dict[str, Any]:
        return {"model": model_identity(context, *self._model(context))}

    def score(self, completions: Sequence[Completion], context: ScoringContext) -> list[Score | Missing]:
        from prefpipe.scoring_models import encoded, language_model

        model = language_model(*self._model(context), context.hardware)
        kinds = {"drop_and_hold": ("dropped", "held"), "drop": ("whole", "dropped"), "hold": ("whole", "held")}
        wanted = kinds.get(self.method, ("whole", "dropped", "held"))
        plans = [self._plan(completion) for completion in completions]
        rows = [
            encoded(
                model.template.encode_open,
                _only(completion, spans, _kept(kind, statement, spans)),
                completion.text[: statement.end],
                statement.start,
            )
            for completion, (spans, statements) in zip(completions, plans, strict=True)
            for statement in statements
            for kind in wanted
        ]
        found = iter(model.token_logps(rows, max_tokens=self.max_batch_tokens))
        scores: list[Score | Missing] = []
        for completion, (spans, statements) in zip(completions, plans, strict=True):
            if not spans or not statements:
                scores.append(Missing("no_citation" if spans else "no_sentences"))
                continue
            rewards: list[dict[str, float]] = []
            missing: Missing | None = None
            for statement in statements:
                logps = {kind: next(found) for kind in wanted}
                missing = next((value for value in logps.values() if isinstance(value, Missing)), missing)
                if missing is None:
                    means = {kind: float(value.mean()) for kind, value in logps.items()}  # type: ignore[union-attr]
                    penalty = self._penalty(completion, spans, statement, model.template.tokenizer)
                    rewards.append({key: reward - penalty for key, reward in _rewards(means).items()})
            scores.append(missing or self._mean(rewards))
        return scores

    def _mean(self, rewards: Sequence[dict[str, float]]) -> Score:
        means = {key: sum(reward[key] for reward in rewards) / len(rewards) for key in rewards[0]}
        return means if self.method == "all" else means[self.method]

    def _plan(self, completion: Completion) -> tuple[list[Range], list[_Statement]]:
        """The sentences of the prompt, and the statements to be scored."""
        spans = sentence_spans(completion, self.document_end)
        statements = _statements(completion.text, len(spans))
        only = completion.meta.get("statement")
        if only is not None:
            statements = statements[only : only + 1]
        return spans, [statement for statement in statements if statement.sentences]

    def _penalty(self, completion: Completion, spans: Sequence[Range], statement: _Statement, tokenizer: Any) -> float:
        if self.max_cited_tokens is None or len(statement.sentences) < 2:
            return 0.0
        text = completion.messages[-1]["content"]
        said = "".join(TAG.sub("", text[slice(*spans[i])]) for i in statement.sentences)
        tokens = len(tokenizer(said, add_special_tokens=False)["input_ids"])
        return TOO_LONG_PENALTY if tokens > self.max_cited_tokens else 0.0

    def _model(self, context: ScoringContext) -> tuple[ModelConfig, Path]:
        return local_model(context, self.path, revision=self.revision, chat_template=self.chat_template)


def _statements(answer: str, num_sentences: int) -> list[_Statement]:
    """One for each <cite>, from behind the statement before it."""
    places = [found.start() for found in CITE.finditer(answer)]
    found = []
    for place, ranges in zip(places, cited(answer), strict=True):
        before = answer.rfind(END_OF_STATEMENT, 0, place)
        start = 0 if before < 0 else before + len(END_OF_STATEMENT)
        found.append(_Statement(start, place, _sentences(ranges, num_sentences)))
    return found


def _sentences(ranges: Sequence[Range], num_sentences: int) -> list[int]:
    merged = merged_ranges(ranges, num_sentences)
    return sorted({number for start, end in merged for number in range(start, end + 1)})


def _kept(kind: str, statement: _Statement, spans: Sequence[Range]) -> set[int]:
    every = set(range(len(spans)))
    return {"whole": every, "dropped": every - set(statement.sentences), "held": set(statement.sentences)}[kind]


def _only(completion: Completion, spans: Sequence[Range], kept: set[int]) -> list[Message]:
    """The prompt without the other sentences."""
    *before, last = completion.messages
    text, parts, place = last["content"], [], 0
    for number, (start, end) in enumerate(spans):
        if number not in kept:
            parts.append(text[place:start])
            place = end
    return [*before, Message(role=last["role"], content="".join([*parts, text[place:]]))]


def _rewards(means: dict[str, float]) -> dict[str, float]:
    """By the means that are there."""
    sides = {"drop": ("whole", "dropped"), "hold": ("held", "whole"), "drop_and_hold": ("held", "dropped")}
    return {name: means[a] - means[b] for name, (a, b) in sides.items() if a in means and b in means}
