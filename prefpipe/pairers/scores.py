"""Pairs by score alone."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from prefpipe.components import register
from prefpipe.errors import ConfigError
from prefpipe.pairers.base import Pairer, check_at_least, distinct
from prefpipe.records import Pair, ScoredCompletion


@dataclass
class ByScore(Pairer):
    """Base of the pairers that look at nothing but scores."""

    def pair(self, group: Sequence[ScoredCompletion], rng: random.Random) -> list[Pair] | str:
        texts = distinct(group)
        if len(texts) < 2:
            return "single_completion"
        return self.choose(texts, [self.value(completion) for completion in texts], rng)

    def choose(
        self, texts: Sequence[ScoredCompletion], values: Sequence[float], rng: random.Random
    ) -> list[Pair] | str:
        """As `pair`, of two or more different texts and their scores."""
        raise NotImplementedError(f"{type(self).__name__} chooses nothing")


@register("pairer")
@dataclass
class BestWorst(ByScore):
    """The highest score against the lowest; on equal scores the completion written first counts.

    With pairer.score naming a ranker's score it takes the best and the worst of its ranking, as LION does online.

    min_margin: leave the prompt out when the two scores are not further apart than this; 0 leaves out only ties.
    """

    draws: ClassVar[bool] = False

    name: str = "best_worst"
    min_margin: float = 0.0

    def __post_init__(self) -> None:
        check_at_least("min_margin", self.min_margin, 0)

    def choose(
        self, texts: Sequence[ScoredCompletion], values: Sequence[float], rng: random.Random
    ) -> list[Pair] | str:
        high, low = max(values), min(values)
        if high == low:
            return "tie"
        if high - low <= self.min_margin:
            return "too_close"
        return [self.make(texts[values.index(high)], texts[values.index(low)])]


@register("pairer")
@dataclass
class MaxMin(ByScore):
    """The highest against the lowest score after a penalty for length, as RLHFlow's online DPO does (`max_min_p`).

    Pairs carry the penalized scores, by which chosen is above rejected.

    length_penalty: taken from a score for each character of the completion; in the scorer's unit.
    """

    draws: ClassVar[bool] = False

    name: str = "max_min"
    length_penalty: float = 0.001

    def __post_init__(self) -> None:
        check_at_least("length_penalty", self.length_penalty, 0)

    def choose(
        self, texts: Sequence[ScoredCompletion], values: Sequence[float], rng: random.Random
    ) -> list[Pair] | str:
        values = [value - self.length_penalty * len(text.text) for value, text in zip(values, texts, strict=True)]
        high, low = max(values), min(values)
        if high == low:
            return "tie"
        made = self.make(texts[values.index(high)], texts[values.index(low)])
        return [replace(made, chosen_score=high, rejected_score=low)]


@register("pairer")
@dataclass
class MarginThreshold(ByScore):
    """Every two completions whose scores are at least min_margin apart, widest margin first, at most max_pairs."""

    draws: ClassVar[bool] = False

    name: str = "margin_threshold"
    min_margin: float = 1.0
    max_pairs: int = 4

    def __post_init__(self) -> None:
        if not self.min_margin > 0:
            raise ConfigError(f"pairer.min_margin={self.min_margin} must be above 0; a tie is no preference")
        check_at_least("max_pairs", self.max_pairs, 1)

    def choose(
        self, texts: Sequence[ScoredCompletion], values: Sequence[float], rng: random.Random
    ) -> list[Pair] | str:
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
class AllPairs(ByScore):
    """Every two completions of different scores, at most max_pairs, drawn at random where there are more."""

    name: str = "all_pairs"
    max_pairs: int = 8

    def __post_init__(self) -> None:
        check_at_least("max_pairs", self.max_pairs, 1)

    def choose(
        self, texts: Sequence[ScoredCompletion], values: Sequence[float], rng: random.Random
    ) -> list[Pair] | str:
        places = range(len(texts))
        ordered = [(i, j) for i in places for j in places if values[i] > values[j]]
        if not ordered:
            return "tie"
        taken = rng.sample(ordered, self.max_pairs) if len(ordered) > self.max_pairs else ordered
        return [self.make(texts[i], texts[j]) for i, j in taken]


@register("pairer")
@dataclass
class RandomPair(ByScore):
    """Two completions drawn at random, the higher score chosen: the baseline that a cleverer pairer must beat."""

    name: str = "random_pair"

    def choose(
        self, texts: Sequence[ScoredCompletion], values: Sequence[float], rng: random.Random
    ) -> list[Pair] | str:
        first, second = rng.sample(range(len(texts)), 2)
        if values[first] == values[second]:
            return "tie"
        better, worse = (first, second) if values[first] > values[second] else (second, first)
        return [self.make(texts[better], texts[worse])]
