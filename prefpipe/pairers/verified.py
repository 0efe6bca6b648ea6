"""Pairs of right and wrong completions."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from prefpipe.components import register
from prefpipe.errors import ConfigError
from prefpipe.pairers.base import Pairer, check_at_least, distinct
from prefpipe.records import Pair, ScoredCompletion
from prefpipe.settings import check_choice
from prefpipe.words import jaccard, words


@register("pairer")
@dataclass
class CorrectIncorrect(Pairer):
    """A right completion against a wrong one, for verifiers that say 1 or 0.

    threshold: right is a score of at least this; pass rates are taken at it too.
    max_pairs: of one prompt.
    order: "random" draws pairs so that each right and each wrong completion is used as evenly as possible;
        "least_similar" takes the pairs whose word sets have the lowest Jaccard similarity, as DPO-ST does with
        max_pairs=3 (Wang et al. 2024, arXiv:2407.18248; there by token sets).
    max_similarity: before that, leave out a right (wrong) completion whose word set is more similar than this to one
        of the right (wrong) ones kept before it, written first or of a shuffled order for random; DPO-ST has 0.7;
        null leaves out only repeats.
    """

    name: str = "correct_incorrect"
    threshold: float = 0.5
    max_pairs: int = 1
    order: str = "random"
    max_similarity: float | None = None

    def __post_init__(self) -> None:
        check_at_least("max_pairs", self.max_pairs, 1)
        check_choice("pairer.order", self.order, ("random", "least_similar"))
        if self.max_similarity is not None and not 0 <= self.max_similarity < 1:
            raise ConfigError(f"pairer.max_similarity={self.max_similarity} must be in [0, 1), or null")
        if self.pass_threshold is not None and self.pass_threshold != self.threshold:
            raise ConfigError(
                f"pairer.pass_threshold={self.pass_threshold} would differ from pairer.threshold={self.threshold}, "
                f"at which pairer={self.name} takes pass rates; drop it"
            )

    def pair(self, group: Sequence[ScoredCompletion], rng: random.Random) -> list[Pair] | str:
        texts = distinct(group)
        right = [c for c in texts if self.value(c) >= self.threshold]
        wrong = [c for c in texts if self.value(c) < self.threshold]
        if not right or not wrong:
            return "all_wrong" if not right else "all_right"
        if self.order == "random":
            rng.shuffle(right)
            rng.shuffle(wrong)
        if self.max_similarity is not None:
            right, wrong = self._unlike(right), self._unlike(wrong)
        if self.order == "random":
            places = _spread(len(right), len(wrong), self.max_pairs)
        else:
            places = _least_similar(right, wrong, self.max_pairs)
        return [self.make(right[i], wrong[j]) for i, j in places]

    def pass_rate(self, group: Sequence[ScoredCompletion]) -> float:
        return sum(self.value(completion) >= self.threshold for completion in group) / len(group)

    def _unlike(self, completions: Sequence[ScoredCompletion]) -> list[ScoredCompletion]:
        """Those that are not too similar to one kept before."""
        assert self.max_similarity is not None
        kept: list[ScoredCompletion] = []
        sets: list[frozenset[str]] = []
        for completion in completions:
            found = frozenset(words(completion.text))
            if all(jaccard(found, other) <= self.max_similarity for other in sets):
                kept.append(completion)
                sets.append(found)
        return kept


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


def _least_similar(
    right: Sequence[ScoredCompletion], wrong: Sequence[ScoredCompletion], max_pairs: int
) -> list[tuple[int, int]]:
    """The (right, wrong) index pairs of lowest Jaccard similarity, those written first on equal ones."""
    right_sets, wrong_sets = ([frozenset(words(c.text)) for c in side] for side in (right, wrong))
    ranked = sorted((jaccard(good, bad), i, j) for i, good in enumerate(right_sets) for j, bad in enumerate(wrong_sets))
    return [(i, j) for _, i, j in ranked[:max_pairs]]
