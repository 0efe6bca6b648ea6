"""A language model's verdicts as scores, asked of an OpenAI-compatible server."""

import itertools
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from prefpipe import judging, verdicts
from prefpipe.api import ApiConfig
from prefpipe.components import register
from prefpipe.errors import ConfigError
from prefpipe.files import sha256_of
from prefpipe.judging import TEMPLATES, Template
from prefpipe.records import Completion, Message
from prefpipe.scorers import Missing, Score, Scorer, ScoringContext
from prefpipe.settings import check_choice
from prefpipe.verdicts import Unclear


class Call(NamedTuple):
    """One question to the judge: which texts it sees, in this order."""

    texts: tuple[str, ...]
    completion: Completion


class Comparison(NamedTuple):
    """Two texts of one prompt: a completion's place in its group, and another one's, or None for the baseline."""

    place: int
    other: int | None


@register("scorer")
@dataclass
class Judge(Scorer):
    """LLM-as-a-judge, Zheng et al. 2023, arXiv:2306.05685.

    api: the server. mode: "single" rates one completion a call, from min_score to max_score; "all_in_one" rates all of
        a prompt's completions in one call, in a random order; "pairwise" compares every two of them in both orders,
        where orders that disagree are a tie, and the score is the mean share of wins, from 0 to 1. The modes give other
        results, so compare scores of one mode only.
    baseline: for pairwise, compare with one text of the prompt only: "answer", its reference answer, or "meta.NAME".
    show_reference: let the judge see the prompt's reference answer.
    template: a Jinja file with the blocks `user` and, if wanted, `system`; null takes the one in prefpipe/assets/judge/
        for the mode, which shows what a template may use.

    A completion is without a score when the judge gives no, two different, or a bad verdict (prefpipe/verdicts.py), is
    cut off, refuses, or cannot be reached. In pairwise the comparisons that have a verdict are averaged.
    """

    whole_prompts: ClassVar[bool] = True
    rows_per_part: ClassVar[int] = 64

    name: str = "judge"
    api: ApiConfig = field(default_factory=ApiConfig)
    mode: str = "single"
    baseline: str | None = None
    show_reference: bool = False
    template: str | None = None
    temperature: float = 0.0
    max_new_tokens: int = 2048
    min_score: float = 1.0
    max_score: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.api = self.api.with_endpoint()
        check_choice("scorer.mode", self.mode, ("single", "all_in_one", "pairwise"))
        if self.baseline is not None:
            if self.mode != "pairwise":
                raise ConfigError(
                    f"scorer.baseline={self.baseline} would be ignored with scorer.mode={self.mode}; drop it"
                )
            if self.baseline != "answer" and not self.baseline.startswith("meta."):
                raise ConfigError(f"scorer.baseline={self.baseline} must be answer or meta.NAME")
        if not 0 <= self.min_score < self.max_score:
            raise ConfigError(
                f"scorer.min_score={self.min_score} and scorer.max_score={self.max_score}: 0 <= min < max must hold"
            )
        if self.temperature < 0:
            raise ConfigError(f"scorer.temperature={self.temperature} must be at least 0")
        if self.max_new_tokens < 1:
            raise ConfigError(f"scorer.max_new_tokens={self.max_new_tokens} must be at least 1")

    def identity(self, context: ScoringContext) -> dict[str, Any]:
        return {"template": sha256_of(self._template_file()), "seed": context.seed}

    def score(self, completions: Sequence[Completion], context: ScoringContext) -> list[Score | Missing]:
        groups = [list(group) for _, group in itertools.groupby(completions, key=lambda row: row.prompt_id)]
        asked = [self._calls(group, context.seed) for group in groups]
        outcomes = iter(self._ask([call for calls in asked for call in calls], context.seed))
        scores: list[Score | Missing] = []
        for group, calls in zip(groups, asked, strict=True):
            answers = [next(outcomes) for _ in calls]
            if self._lacks_reference(group):
                scores += [Missing("no_reference")] * len(group)
            elif self.mode == "single":
                scores += [_rating(answer, self.min_score, self.max_score) for answer in answers]
            elif self.mode == "all_in_one":
                scores += self._ratings(group, answers[0], context.seed)
            else:
                scores += self._win_shares(group, answers, context.counts)
        return scores

    def report(self, counts: Mapping[str, int]) -> dict[str, Any]:
        """Pairwise: how often the two orders of a comparison disagree, which a fair judge never does."""
        share = counts["order_disagreements"] / counts["comparisons"] if counts.get("comparisons") else None
        return {**super().report(counts), "order_disagreement_share": share}

    # ------------------------------------------------------------------------------------------------ asking

    def _calls(self, group: Sequence[Completion], seed: int) -> list[Call]:
        """What to ask about the completions of one prompt."""
        if self._lacks_reference(group):
            return []
        if self.mode == "single":
            return [Call((row.text,), row) for row in group]
        if self.mode == "all_in_one":
            return [Call(tuple(group[place].text for place in _order(group, seed)), group[0])]
        calls = []
        for comparison in self._comparisons(group):
            first, second = self._texts(group, comparison)
            if first != second:
                calls += [Call((first, second), group[0]), Call((second, first), group[0])]
        return calls

    def _comparisons(self, group: Sequence[Completion]) -> list[Comparison]:
        if self.baseline is None:
            return [Comparison(*places) for places in itertools.combinations(range(len(group)), 2)]
        return [Comparison(place, None) for place, row in enumerate(group) if self._baseline(row) is not None]

    def _texts(self, group: Sequence[Completion], comparison: Comparison) -> tuple[str, str]:
        row = group[comparison.place]
        other = self._baseline(row) if comparison.other is None else group[comparison.other].text
        assert other is not None
        return row.text, other

    def _baseline(self, row: Completion) -> str | None:
        assert self.baseline is not None
        text = row.answer if self.baseline == "answer" else row.meta.get(self.baseline.removeprefix("meta."))
        return text if isinstance(text, str) else None

    def _ask(self, calls: Sequence[Call], seed: int) -> list[str | Missing]:
        if not calls:
            return []
        template = Template(self._template_file())
        return judging.ask(
            [self._question(template, call) for call in calls],
            self.api,
            component=f"scorer={self.name}",
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=seed,
        )

    def _question(self, template: Template, call: Call) -> list[Message]:
        conversation = call.completion.messages
        reference = call.completion.answer if self.show_reference else None
        return template.messages(
            [*call.texts, reference or "", *(message["content"] for message in conversation)],
            completions=list(call.texts),
            messages=conversation,
            reference=reference,
            low=f"{self.min_score:g}",
            high=f"{self.max_score:g}",
        )

    def _template_file(self) -> Path:
        if self.template is None:
            return TEMPLATES / f"{self.mode}.jinja"
        path = Path(self.template)
        if not path.is_file():
            raise ConfigError(f"scorer.template={path}: no such file")
        return path

    # ------------------------------------------------------------------------------------------------ reading

    def _ratings(self, group: Sequence[Completion], answer: str | Missing, seed: int) -> list[Score | Missing]:
        if isinstance(answer, Missing):
            return [answer] * len(group)
        found = verdicts.ratings(answer, len(group), self.min_score, self.max_score)
        by_place = dict(zip(_order(group, seed), found, strict=True))
        return [_score(by_place[place]) for place in range(len(group))]

    def _win_shares(
        self, group: Sequence[Completion], answers: Sequence[str | Missing], counts: Counter[str]
    ) -> list[Score | Missing]:
        shares: list[list[float]] = [[] for _ in group]
        reasons: list[list[str]] = [[] for _ in group]
        waiting = iter(answers)
        for comparison in self._comparisons(group):
            first, second = self._texts(group, comparison)
            places = [place for place in comparison if place is not None]
            if first == second:
                result: float | Missing = 0.5
                counts["identical_texts"] += 1
            else:
                result = _both_orders(next(waiting), next(waiting), counts)
            for place, share in zip(places, (result, _opposite(result)), strict=False):
                if isinstance(share, Missing):
                    reasons[place].append(share.reason)
                else:
                    shares[place].append(share)
        nothing = "no_baseline" if self.baseline else "no_other_completion"
        return [
            sum(mine) / len(mine) if mine else Missing(lost[0] if lost else nothing)
            for mine, lost in zip(shares, reasons, strict=True)
        ]

    def _lacks_reference(self, group: Sequence[Completion]) -> bool:
        return self.show_reference and group[0].answer is None


def _order(group: Sequence[Completion], seed: int) -> list[int]:
    """In which order all_in_one shows the completions."""
    order = list(range(len(group)))
    random.Random(f"{seed}/{group[0].prompt_id}").shuffle(order)
    return order


def _rating(answer: str | Missing, low: float, high: float) -> float | Missing:
    return answer if isinstance(answer, Missing) else _score(verdicts.rating(answer, low, high))


def _score(found: float | Unclear) -> float | Missing:
    return Missing(found.reason) if isinstance(found, Unclear) else found


def _both_orders(forward: str | Missing, backward: str | Missing, counts: Counter[str]) -> float | Missing:
    """The first text's share of the win: 1, 0, or 0.5 for a tie, which two orders that disagree are too."""
    results, letters = [], Counter[str]()
    for answer, of_letter in ((forward, {"A": 1.0, "B": 0.0, "C": 0.5}), (backward, {"A": 0.0, "B": 1.0, "C": 0.5})):
        found = answer if isinstance(answer, Missing) else verdicts.choice(answer)
        if isinstance(found, Missing | Unclear):
            counts[f"without_verdict/{found.reason}"] += 1
            return Missing(found.reason)
        results.append(of_letter[found])
        letters[{"A": "first_wins", "B": "second_wins", "C": "ties"}[found]] += 1
    counts.update(letters)
    counts["comparisons"] += 1
    if results[0] != results[1]:
        counts["order_disagreements"] += 1
        return 0.5
    return results[0]


def _opposite(share: float | Missing) -> float | Missing:
    return share if isinstance(share, Missing) else 1.0 - share
