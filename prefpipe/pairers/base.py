"""What pairers share. Ties, duplicates and blank texts never become pairs."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from prefpipe.errors import ConfigError, DataError
from prefpipe.records import Demonstration, Pair, ScoredCompletion


@dataclass
class Pairer:
    """Base of all pairers.

    draws: whether `pair` asks for random numbers. Seeding takes as long as reading a row, so it is done where needed.
    score: which of the completions' scores decides; null takes the only one there is.
    pass_threshold: write the prompt's pass rate, the share of its completions that score at least this, into each of
        its pairs as meta.pass_rate (training.order_column=pass_rate makes a curriculum of it); null writes none.
    """

    draws: ClassVar[bool] = True

    name: str = "???"
    score: str | None = None
    pass_threshold: float | None = None

    def pair(self, group: Sequence[ScoredCompletion], rng: random.Random) -> list[Pair] | str:
        """Pairs of one prompt, or the reason why there is none (counted in the manifest).

        Args:
            group: the completions of one prompt, in the order they were written.
            rng: seeded from the run's seed and the prompt's id; where `draws` is False it must not be asked.
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

    def pass_rate(self, group: Sequence[ScoredCompletion]) -> float | None:
        """Which share of one prompt's completions, repeats included, passes; None without a threshold."""
        if self.pass_threshold is None:
            return None
        return sum(self.value(completion) >= self.pass_threshold for completion in group) / len(group)

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


@dataclass
class Demonstrator(Pairer):
    """Base of pairers that choose completions to imitate, for loss=sft, in place of pairs.

    cap_percentile: keep of one prompt at most as many as this percentile over the prompts that have some, rounded down
        (RFT in DPO-ST: 90), so that easy prompts, with many solutions, do not outweigh the others; null keeps all.
    """

    cap_percentile: float | None = 90.0

    def __post_init__(self) -> None:
        if self.cap_percentile is not None and not 0 < self.cap_percentile <= 100:
            raise ConfigError(f"pairer.cap_percentile={self.cap_percentile} must be in (0, 100], or null")

    def demonstrations(self, group: Sequence[ScoredCompletion], rng: random.Random) -> list[Demonstration] | str:
        """What to imitate of one prompt, best first, or the reason why there is nothing; arguments as of `pair`."""
        raise NotImplementedError(f"{type(self).__name__} makes no demonstrations")


def distinct(group: Sequence[ScoredCompletion]) -> list[ScoredCompletion]:
    """The group without blank texts and without repeats of a text (white space at the ends does not count)."""
    kept: dict[str, ScoredCompletion] = {}
    for completion in group:
        text = completion.text.strip()
        if text:
            kept.setdefault(text, completion)
    return list(kept.values())


def from_meta(completion: ScoredCompletion, key: str, kind: type, *, pairer: str) -> Any:
    """A value of the completion's meta. Raises DataError where it is missing or of another type than `kind`."""
    value = completion.meta.get(key)
    if not isinstance(value, kind):
        found = f"has meta {key}={value!r:.60}" if key in completion.meta else f"has no meta {key}"
        raise DataError(
            f"completion {completion.completion_id} {found}, and pairer={pairer} reads a {kind.__name__} there; the "
            f"stage that wrote the completion must write it, or data_mixer.columns='{{meta.{key}: COLUMN}}' a file's"
        )
    return value


def check_at_least(key: str, value: float, least: float) -> None:
    """Raise ConfigError below `least`."""
    if not value >= least:
        raise ConfigError(f"pairer.{key}={value} must be at least {least}")
