"""Whether an answer's statements are supported by what they cite, and cite nothing else, as a judge sees it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from prefpipe import judging, verdicts
from prefpipe.api import ApiConfig
from prefpipe.citations import Range
from prefpipe.components import register
from prefpipe.documents import TAG, Statement, sentence_spans, statements, without_citations
from prefpipe.errors import ConfigError
from prefpipe.files import sha256_of
from prefpipe.judging import ASSETS, Template, f1_scores
from prefpipe.records import Completion
from prefpipe.scorers import Missing, Score, Scorer, ScoringContext
from prefpipe.verdicts import Unclear

TEMPLATES = ASSETS / "citation_f1"
VERDICTS = {
    "support": {"A": 1.0, "B": 0.5, "C": 0.0},
    "citation_needed": {"A": 0.0, "B": 1.0},
    "relevance": {"A": 1.0, "B": 0.0},
}
"""Question → what each letter of the judge is worth."""


class _Call(NamedTuple):
    """kind: a key of VERDICTS, and the template's name. values: of the template."""

    kind: str
    values: dict[str, str]


@register("scorer")
@dataclass
class CitationF1(Scorer):
    """Citation recall, precision and F1 of LongBench-Cite, Zhang et al. 2024, arXiv:2409.02897; SelfCite's metric, too.

    Three scores of an answer `<statement>S<cite>[a-b][c-d]</cite></statement>…`:

        recall     mean over its statements. One that cites something: 1, 0.5 or 0, as the judge finds it fully, partly
                   or not supported by all that it cites together. One that cites nothing: 1 where the judge finds that
                   it needs no citation, else 0.
        precision  mean over its citations, of a range each: 1 where the judge finds it relevant to the statement, else
                   0. An answer that cites nothing has 0.
        f1         2 recall precision / (recall + precision), 0 where both are 0.

    Ranges beyond the document are cut off, touching ones merged, and the first three of a statement count; text of more
    than five characters outside of statements is a statement that cites nothing. An answer without a clear verdict on
    one of its questions has no score (prefpipe/verdicts.py), nor has one without any statement ("no_statement"), or to
    a prompt without numbered sentences ("no_sentences"). The judge sees no document, only what is cited.

    Reads meta.sentence_spans; where it is absent the sentences are those behind the tags <C0>, <C1>, … up to
    document_end. What stands behind the document is the question.

    api: the server that judges. document_end: what stands behind the last sentence. max_new_tokens: of a verdict.
    """

    rows_per_part: ClassVar[int] = 64

    name: str = "citation_f1"
    api: ApiConfig = field(default_factory=ApiConfig)
    document_end: str = "[Document End]"
    max_new_tokens: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        self.api = self.api.with_endpoint()
        if self.max_new_tokens < 1:
            raise ConfigError(f"scorer.max_new_tokens={self.max_new_tokens} must be at least 1")

    def identity(self, context: ScoringContext) -> dict[str, Any]:
        return {"templates": {kind: sha256_of(TEMPLATES / f"{kind}.jinja") for kind in VERDICTS}}

    def score(self, completions: Sequence[Completion], context: ScoringContext) -> list[Score | Missing]:
        templates = {kind: Template(TEMPLATES / f"{kind}.jinja") for kind in VERDICTS}
        plans = [self._plan(completion) for completion in completions]
        calls = [call for plan in plans if not isinstance(plan, Missing) for call in plan]
        texts = judging.ask(
            [templates[call.kind].messages(list(call.values.values()), **call.values) for call in calls],
            self.api,
            component=f"scorer={self.name}",
            max_new_tokens=self.max_new_tokens,
        )
        answers = iter(texts)
        return [
            plan if isinstance(plan, Missing) else _score([(call.kind, next(answers)) for call in plan])
            for plan in plans
        ]

    def _plan(self, completion: Completion) -> list[_Call] | Missing:
        """What to ask about an answer."""
        spans = sentence_spans(completion, self.document_end)
        if not spans:
            return Missing("no_sentences")
        turn = completion.messages[-1]["content"]
        question = turn[spans[-1][1] :].strip().removeprefix(self.document_end).strip()
        found = statements(completion.text, len(spans))
        answer = without_citations(completion.text)
        calls = [call for statement in found for call in _calls(statement, question, answer, turn, spans)]
        return calls or Missing("no_statement")


def _calls(statement: Statement, question: str, answer: str, turn: str, spans: Sequence[Range]) -> Iterator[_Call]:
    values = {"question": question, "statement": statement.text}
    cited = [TAG.sub("", turn[spans[a][0] : spans[b][1]]).strip() for a, b in statement.ranges]
    if cited:
        yield _Call("support", {**values, "snippet": "\n\n".join(cited)})
    else:
        yield _Call("citation_needed", {**values, "answer": answer})
    for snippet in cited:
        yield _Call("relevance", {**values, "snippet": snippet})


def _score(answers: Sequence[tuple[str, str | Missing]]) -> Score | Missing:
    supported: list[float] = []
    relevant: list[float] = []
    for kind, text in answers:
        letter = text if isinstance(text, Missing) else verdicts.choice(text, "".join(VERDICTS[kind]))
        if isinstance(letter, Missing | Unclear):
            return Missing(letter.reason)
        (relevant if kind == "relevance" else supported).append(VERDICTS[kind][letter])
    precision = sum(relevant) / len(relevant) if relevant else 0.0
    return f1_scores(precision, sum(supported) / len(supported))
