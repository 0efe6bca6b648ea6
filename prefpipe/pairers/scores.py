"""Pairs by score alone."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from prefpipe.components import register
from prefpipe.errors import ConfigError
from prefpipe.pairers.base import Pairer, check_at_least, distinct
from prefpipe.records import Pair, ScoredCompletion


@register("pairer")
@dataclass
class BestWorst(Pairer):
    """The highest score against the lowest; on equal scores the completion written first counts.

    With pairer.score naming a ranker's score it takes the best and the worst of its ranking, as LION does online.

    min_margin: leave the prompt out when the two scores are not further apart than this; 0 leaves out only ties.
    """

    draws: ClassVar[bool] = False

    name: str = "best_worst"
    min_margin: float = 0.0

    def __post_init__(self) -> None:
        check_at_least("min_margin", self.min_margin, 0)

    def pair(self, group: Sequence[ScoredCompletion], rng: random.Random) -> list[Pair] | str:
        texts = distinct(group)
        if len(texts) < 2:
            return "single_completion"
        values = [self.value(completion) for completion in texts]
        high, low = max(values), min(values)
        if high == low:
            return "tie"
        if high - low <= self.min_margin:
            return "too_close"
        return [self.make(texts[values.index(high)], texts[values.index(low)])]


@register("pairer")
@dataclass
class MaxMin(Pairer):
    """The highest against the lowest score after a penalty for length, as RLHFlow's online DPO does (`max_min_p`).

    Pairs carry the penalized scores, by which chosen is above rejected.

    length_penalty: taken from a score for each character of the completion; in the scorer's unit.
    """

    draws: ClassVar[bool] = False

    name: str = "max_min"
    length_penalty: float = 0.001

    def __post_init__(self) -> None:
        check_at_least("length_penalty", self.length_penalty, 0)

    def pair(self, group: Sequence[ScoredCompletion], rng: random.Random) -> list[Pair] | str:
        texts = distinct(group)
        if len(texts) < 2:
            return "single_completion"
        values = [self.value(completion) - self.length_penalty * len(completion.text) for completion in texts]
        high, low = max(values), min(values)
        if high == low:
            return "tie"
        made = self.make(texts[values.index(high)], texts[values.index(low)])
        return [replace(made, chosen_score=high, rejected_score=low)]


@register("pairer")
@dataclass
class MarginThreshold(Pairer):
    """Every two completions whose scores are at least min_margin apart, widest margin first, at most max_pairs."""

    draws: ClassVar[bool] = False

    name: str = "margin_threshold"
    min_margin: float = 1.0
    max_pairs: int = 4

    def __post_init__(self) -> None:
        if not self.min_margin > 0:
            raise ConfigError(f"pairer.min_margin={self.min_margin} must be above 0; a tie is no preference")
        check_at_least("max_pairs", self.max_pairs, 1)

    def pair(self, group: Sequence[ScoredCompletion], rng: random.Random) -> list[Pair] | str:
        texts = distinct(group)
        if len(texts) < 2:
            return "single_completion"
        values = [self.value(completion) for completion in texts]
        margins = [
            (better - worse, i, j)
            for i, better in enumerate(values)
            for j, worse in enumerate(values)
            if better - worse >= self.min_margin
        ]
        if not margins:
            return "too_close"
        widest = sorted(margins, key=lambda entry: (-entry[0], entry[1], entry[2]))[: self.max_pairs]
        return [self.make(texts[i], texts[j]) for _, i, j in widest]


@register("pairer")
@dataclass
class AllPairs(Pairer):
    """Every two completions of different scores, at most max_pairs, drawn at random where there are more."""

    name: str = "all_pairs"
    max_pairs: int = 8

    def __post_init__(self) -> None:
        check_at_least("max_pairs", self.max_pairs, 1)

    def pair(self, group: Sequence[ScoredCompletion], rng: random.Random) -> list[Pair] | str:
        texts = distinct(group)
        if len(texts) < 2:
            return "single_completion"
        values = [self.value(completion) for completion in texts]
        places = range(len(texts))
        ordered = [(i, j) for i in places for j in places if values[i] > values[j]]
        if not ordered:
            return "tie"
        taken = rng.sample(ordered, self.max_pairs) if len(ordered) > self.max_pairs else ordered
        return [self.make(texts[i], texts[j]) for i, j in taken]


@register("pairer")
@dataclass
class RandomPair(Pairer):
    """Two completions drawn at random, the higher score chosen: the baseline that a cleverer pairer must beat."""

    name: str = "random_pair"

    def pair(self, group: Sequence[ScoredCompletion], rng: random.Random) -> list[Pair] | str:
        texts = distinct(group)
        if len(texts) < 2:
            return "single_completion"
        first, second = rng.sample(texts, 2)
        if self.value(first) == self.value(second):
            return "tie"
        return [self.make(first, second) if self.value(first) > self.value(second) else self.make(second, first)]
