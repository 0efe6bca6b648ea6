"""Whether an answer makes the claims that it was given, and no others, as a judge sees it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar, TypeVar

from prefpipe import judging, verdicts
from prefpipe.api import ApiConfig
from prefpipe.components import register
from prefpipe.errors import ConfigError, DataError
from prefpipe.files import sha256_of
from prefpipe.judging import ASSETS, Template, f1_scores
from prefpipe.records import Completion
from prefpipe.scorers import Missing, Score, Scorer, ScoringContext
from prefpipe.verdicts import Unclear

T = TypeVar("T")

TEMPLATES = ASSETS / "claim_f1"
QUESTIONS = ("extract", "verify")


@register("scorer")
@dataclass
class ClaimF1(Scorer):
    """Claim precision, recall and F1 of PIC-Bench, He et al. 2025 (precise information control).

    The judge lists the claims that an answer makes, then says of each which of the K given claims support it. Three
    scores:

        precision  the share of the answer's claims that are supported
        recall     min(1, number of different given claims that support any / K)
        f1         their harmonic mean

    All are 0 for a blank answer, and for one without claims. Where the answer may leave claims out (meta.pic_type
    "partial") only precision says how good it is. An answer without a clear verdict on one of its questions has no
    score (prefpipe/verdicts.py), nor has one that was given no claims ("no_claims"). PIC-Bench asks for the claims
    sentence by sentence, here it is once for the whole answer.

    Reads meta.claims, a list of texts. The manifest's report says how many claims there were, how many without support,
    and how many answers have an f1 of 1 ("perfect").

    api: the server that judges. key: of meta, where the claims are that the answer should make. max_new_tokens: of all
        claims of an answer, and of a verdict.
    """

    rows_per_part: ClassVar[int] = 64

    name: str = "claim_f1"
    api: ApiConfig = field(default_factory=ApiConfig)
    key: str = "claims"
    max_new_tokens: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        self.api = self.api.with_endpoint()
        if self.max_new_tokens < 1:
            raise ConfigError(f"scorer.max_new_tokens={self.max_new_tokens} must be at least 1")

    def identity(self, context: ScoringContext) -> dict[str, Any]:
        return {"templates": {kind: sha256_of(TEMPLATES / f"{kind}.jinja") for kind in QUESTIONS}}

    def score(self, completions: Sequence[Completion], context: ScoringContext) -> list[Score | Missing]:
        given = [self._given(completion) for completion in completions]
        claims = self._extracted(completions, given)
        told = iter(self._supported(claims, given))
        scores: list[Score | Missing] = []
        for found, known in zip(claims, given, strict=True):
            support = found if isinstance(found, Missing) else _all_clear(list(islice(told, len(found))))
            if isinstance(support, Missing):
                scores.append(support)
                continue
            score = _score(support, len(known))
            context.counts["claims"] += len(support)
            context.counts["unsupported_claims"] += support.count([])
            context.counts["perfect"] += score["f1"] == 1
            scores.append(score)
        return scores

    def report(self, counts: Mapping[str, int]) -> dict[str, Any]:
        return {key: counts.get(key, 0) for key in ("claims", "unsupported_claims", "perfect")}

    def _given(self, completion: Completion) -> list[str]:
        claims = completion.meta.get(self.key)
        if not isinstance(claims, list) or not all(isinstance(claim, str) for claim in claims):
            raise DataError(
                f"completion {completion.completion_id} has no list of texts in meta.{self.key}, the claims that "
                f"scorer={self.name} compares with; data_mixer.columns='{{meta.{self.key}: COLUMN}}' takes them from a "
                f"file, scorer.key names another one"
            )
        return claims

    def _extracted(
        self, completions: Sequence[Completion], given: Sequence[Sequence[str]]
    ) -> list[list[str] | Missing]:
        """The claims that each answer makes."""
        asked = [bool(known and completion.text.strip()) for completion, known in zip(completions, given, strict=True)]
        template = Template(TEMPLATES / "extract.jinja")
        texts = iter(
            self._ask(
                [
                    template.messages([completion.text], answer=completion.text)
                    for completion, wanted in zip(completions, asked, strict=True)
                    if wanted
                ]
            )
        )
        found: list[list[str] | Missing] = []
        for known, wanted in zip(given, asked, strict=True):
            if wanted:
                text = next(texts)
                found.append(text if isinstance(text, Missing) else _clear(verdicts.items(text)))
            else:
                found.append([] if known else Missing("no_claims"))
        return found

    def _supported(
        self, claims: Sequence[list[str] | Missing], given: Sequence[Sequence[str]]
    ) -> list[list[int] | Missing]:
        """For each claim of each answer in turn the numbers, from 1, of the given ones that support it."""
        pairs = [
            (claim, known)
            for found, known in zip(claims, given, strict=True)
            if not isinstance(found, Missing)
            for claim in found
        ]
        template = Template(TEMPLATES / "verify.jinja")
        texts = self._ask([template.messages([claim, *known], claim=claim, claims=known) for claim, known in pairs])
        return [
            text if isinstance(text, Missing) else _clear(verdicts.numbers(text, len(known)))
            for text, (_, known) in zip(texts, pairs, strict=True)
        ]

    def _ask(self, questions: Sequence[Sequence[Any]]) -> list[str | Missing]:
        return judging.ask(questions, self.api, component=f"scorer={self.name}", max_new_tokens=self.max_new_tokens)


def _clear(found: T | Unclear) -> T | Missing:
    return Missing(found.reason) if isinstance(found, Unclear) else found


def _all_clear(found: Sequence[T | Missing]) -> list[T] | Missing:
    """The first one that is missing makes all of them so: an average over the others would be another answer's."""
    clear: list[T] = []
    for value in found:
        if isinstance(value, Missing):
            return value
        clear.append(value)
    return clear


def _score(support: Sequence[Sequence[int]], num_given: int) -> dict[str, float]:
    if not support:
        return f1_scores(0.0, 0.0)
    precision = sum(1 for places in support if places) / len(support)
    return f1_scores(precision, min(1.0, len({place for places in support for place in places}) / num_given))
