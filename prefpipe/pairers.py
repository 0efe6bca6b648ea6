"""Pairers choose preference pairs among the scored completions of one prompt. Pure functions of a group and a generator
of random numbers; ties and duplicates never become pairs. To add one: a class here and conf/pairer/<name>.yaml."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from prefpipe.components import register
from prefpipe.errors import ConfigError, DataError
from prefpipe.records import Pair, ScoredCompletion


@dataclass
class Pairer:
    """Base of all pairers.

    score: which of the completions' scores decides; null takes the only one there is.
    """

    name: str = "???"
    score: str | None = None

    def pair(self, group: Sequence[ScoredCompletion], rng: random.Random) -> list[Pair] | str:
        """Pairs of one prompt, or the reason why there is none (counted in the manifest).

        Args:
            group: the completions of one prompt, in the order they were written.
            rng: seeded from the run's seed and the prompt's id.
        """
        raise NotImplementedError(f"{type(self).__name__} makes no pairs")

    def value(self, completion: ScoredCompletion) -> float:
        """The score that decides. Raises DataError when it is absent, or not unique and not named."""
        if self.score is None:
            if len(completion.scores) != 1:
                raise DataError(
                    f"completion {completion.completion_id} has the scores {sorted(completion.scores)}; "
                    f"say which one decides with pairer.score="
                )
            return next(iter(completion.scores.values()))
        if self.score not in completion.scores:
            raise DataError(
                f"completion {completion.completion_id} has no score pairer.score={self.score}; it has "
                f"{sorted(completion.scores)}; run stage=score with that scorer first"
            )
        return completion.scores[self.score]

    def make(self, chosen: ScoredCompletion, rejected: ScoredCompletion) -> Pair:
        """The pair record of two completions of one prompt."""
        return Pair(
            prompt_id=chosen.prompt_id,
            messages=chosen.messages,
            source=chosen.source,
            split=chosen.split,
            chosen=chosen.text,
            rejected=rejected.text,
            chosen_score=self.value(chosen),
            rejected_score=self.value(rejected),
            chosen_id=chosen.completion_id,
            rejected_id=rejected.completion_id,
            meta=chosen.meta,
        )


def distinct(group: Sequence[ScoredCompletion]) -> list[ScoredCompletion]:
    """The group without blank texts and without repeats of a text (white space at the ends does not count)."""
    kept: dict[str, ScoredCompletion] = {}
    for completion in group:
        text = completion.text.strip()
        if text:
            kept.setdefault(text, completion)
    return list(kept.values())


@register("pairer")
@dataclass
class BestWorst(Pairer):
    """The highest score against the lowest; on equal scores the completion written first counts.

    min_margin: leave the prompt out when the two scores are not further apart than this; 0 leaves out only ties.
    """

    name: str = "best_worst"
    min_margin: float = 0.0

    def __post_init__(self) -> None:
        if self.min_margin < 0:
            raise ConfigError(f"pairer.min_margin={self.min_margin} must be at least 0")

    def pair(self, group: Sequence[ScoredCompletion], rng: random.Random) -> list[Pair] | str:
        texts = distinct(group)
        if len(texts) < 2:
            return "single_completion"
        chosen, rejected = max(texts, key=self.value), min(texts, key=self.value)
        margin = self.value(chosen) - self.value(rejected)
        if margin == 0:
            return "tie"
        return [self.make(chosen, rejected)] if margin > self.min_margin else "too_close"


@register("pairer")
@dataclass
class CorrectIncorrect(Pairer):
    """A right completion against a wrong one, for verifiers that say 1 or 0.

    threshold: right is a score of at least this.
    max_pairs: of one prompt. Each right and each wrong completion is used as evenly as possible, order drawn at random.
    """

    name: str = "correct_incorrect"
    threshold: float = 0.5
    max_pairs: int = 1

    def __post_init__(self) -> None:
        if self.max_pairs < 1:
            raise ConfigError(f"pairer.max_pairs={self.max_pairs} must be at least 1")

    def pair(self, group: Sequence[ScoredCompletion], rng: random.Random) -> list[Pair] | str:
        texts = distinct(group)
        right = [c for c in texts if self.value(c) >= self.threshold]
        wrong = [c for c in texts if self.value(c) < self.threshold]
        if not right or not wrong:
            return "all_wrong" if not right else "all_right"
        rng.shuffle(right)
        rng.shuffle(wrong)
        return [self.make(right[i], wrong[j]) for i, j in _spread(len(right), len(wrong), self.max_pairs)]


@register("pairer")
@dataclass
class MarginThreshold(Pairer):
    """Every two completions whose scores are at least min_margin apart, widest margin first, at most max_pairs."""

    name: str = "margin_threshold"
    min_margin: float = 1.0
    max_pairs: int = 4

    def __post_init__(self) -> None:
        if not self.min_margin > 0:
            raise ConfigError(f"pairer.min_margin={self.min_margin} must be above 0; a tie is no preference")
        if self.max_pairs < 1:
            raise ConfigError(f"pairer.max_pairs={self.max_pairs} must be at least 1")

    def pair(self, group: Sequence[ScoredCompletion], rng: random.Random) -> list[Pair] | str:
        texts = distinct(group)
        if len(texts) < 2:
            return "single_completion"
        margins = [
            (self.value(better) - self.value(worse), i, j)
            for i, better in enumerate(texts)
            for j, worse in enumerate(texts)
            if self.value(better) - self.value(worse) >= self.min_margin
        ]
        if not margins:
            return "too_close"
        widest = sorted(margins, key=lambda entry: (-entry[0], entry[1], entry[2]))[: self.max_pairs]
        return [self.make(texts[i], texts[j]) for _, i, j in widest]


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


def _spread(num_right: int, num_wrong: int, max_pairs: int) -> list[tuple[int, int]]:
    """Distinct (right, wrong) index pairs that walk both lists together, then shifted, so that uses stay even."""
    pairs: list[tuple[int, int]] = []
    for shift in range(max(num_right, num_wrong)):
        for step in range(max(num_right, num_wrong)):
            pair = (step % num_right, (step + shift) % num_wrong)
            if pair not in pairs:
                pairs.append(pair)
            if len(pairs) == max_pairs:
                return pairs
    return pairs
