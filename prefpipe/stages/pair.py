"""scored completions → preference pairs."""

import itertools
import random
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prefpipe import artifacts
from prefpipe.artifacts import Account, Plan
from prefpipe.grouping import grouped
from prefpipe.pairers import Pairer, distinct
from prefpipe.records import Pair, ScoredCompletion, Split


class NoRandom(random.Random):
    """For pairers that say that they draw nothing."""

    def random(self) -> float:
        raise AssertionError("a pairer with draws=False asked for a random number")

    def getrandbits(self, k: int, /) -> int:
        return int(self.random())


NO_RANDOM = NoRandom()
PROMPTS_PER_PART = 20_000


def pair(scored: Sequence[Path], out: Path, *, pairer: Pairer, seed: int, overwrite: bool = False) -> None:
    """Choose preference pairs among the scored completions of each prompt; counts say where the other prompts went.

    Memory is that of one prompt, and some 24 bytes for each prompt and pair, as long as the completions of a prompt
    stand together; see prefpipe/grouping.py for those that do not.
    """
    plan = Plan("pair", Pair.schema, uses={"pairer": pairer, "seed": seed}, parents={"scored": scored})
    with artifacts.draft(out, plan, overwrite=overwrite) as draft:
        if draft.is_current:
            return
        statistics = PairStatistics()
        groups = grouped(scored, ScoredCompletion, key="inputs.scored")
        index = 0
        while (first := next(groups, None)) is not None:
            part = Part()
            chunk = itertools.chain([first], itertools.islice(groups, PROMPTS_PER_PART - 1))
            draft.commit_counted(index, _pairs(chunk, pairer, seed, part, statistics), part.account)
            index += 1
        draft.extra["unit"] = "prompts"
        draft.extra["pair_stats"] = statistics.as_data()


@dataclass
class Part:
    """Where the prompts of a part went."""

    num_prompts: int = 0
    num_used: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    def account(self) -> Account:
        """For Draft.commit_counted."""
        return Account(self.num_prompts, self.num_used, self.left_out)


def _pairs(
    groups: Iterable[list[ScoredCompletion]], pairer: Pairer, seed: int, part: Part, statistics: "PairStatistics"
) -> Iterator[Pair]:
    """The pairs of some prompts, one prompt's in memory at a time; counted in `part` and `statistics`."""
    for group in groups:
        part.num_prompts += 1
        if any(completion.split == Split.heldout for completion in group):
            part.left_out["heldout"] += 1
            continue
        rate = pairer.pass_rate(group)
        statistics.add_group(group, pairer.score, rate)
        # From the prompt's id, so that a prompt's pairs do not depend on which other prompts there are.
        rng = random.Random(f"{seed}/{group[0].prompt_id}") if pairer.draws else NO_RANDOM
        made = pairer.pair(group, rng)
        if isinstance(made, str):
            part.left_out[made] += 1
            continue
        if rate is not None:
            made = [replace(record, meta={**record.meta, "pass_rate": rate}) for record in made]
        part.num_used += 1
        statistics.add(made)
        yield from made


@dataclass
class PairStatistics:
    """What completions were like, and lengths and score margins of chosen against rejected.

    Lengths are in characters, margins in the scorer's unit. differences: chosen's length less rejected's.
    """

    num_completions: int = 0
    completions: Counter[str] = field(default_factory=Counter)
    num_pairs: int = 0
    chosen_characters: int = 0
    rejected_characters: int = 0
    chosen_longer: int = 0
    differences: "array[int]" = field(default_factory=lambda: array("q"))
    num_margins: int = 0
    margins: list[float] = field(default_factory=lambda: [0.0, float("inf"), float("-inf")])
    pass_rates: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def add_group(self, group: Sequence[ScoredCompletion], key: str | None, pass_rate: float | None) -> None:
        """Count one prompt's completions in: how many there are, blank, repeated, and tied with one before.

        key: of the score that decides; None where they have no other.
        """
        texts = distinct(group)
        self.num_completions += len(group)
        if len(texts) < len(group):
            blank = sum(not completion.text.strip() for completion in group)
            self.completions["blank"] += blank
            self.completions["duplicate"] += len(group) - blank - len(texts)
        scores = [
            c.scores[key] if key is not None else next(iter(c.scores.values()))
            for c in texts
            if (key in c.scores if key is not None else len(c.scores) == 1)
        ]
        self.completions["tied"] += len(scores) - len(set(scores))
        if pass_rate is not None:
            self.pass_rates = [self.pass_rates[0] + pass_rate, self.pass_rates[1] + 1]

    def add(self, pairs: Sequence[Pair]) -> None:
        """Count some pairs in."""
        for made in pairs:
            chosen, rejected = len(made.chosen), len(made.rejected)
            self.num_pairs += 1
            self.chosen_characters += chosen
            self.rejected_characters += rejected
            self.chosen_longer += chosen > rejected
            self.differences.append(chosen - rejected)
            if made.chosen_score is not None and made.rejected_score is not None:
                margin = made.chosen_score - made.rejected_score
                total, low, high = self.margins
                self.margins = [total + margin, min(low, margin), max(high, margin)]
                self.num_margins += 1

    def as_data(self) -> dict[str, Any]:
        """For the manifest."""
        found: dict[str, Any] = {
            "completions": self.num_completions,
            "blank": self.completions["blank"],
            "duplicate": self.completions["duplicate"],
            "tied": self.completions["tied"],
            "num_pairs": self.num_pairs,
        }
        if self.pass_rates[1]:
            found["mean_pass_rate"] = round(self.pass_rates[0] / self.pass_rates[1], 6)
        if not self.num_pairs:
            return found
        total, low, high = self.margins
        return found | {
            "mean_chosen_characters": round(self.chosen_characters / self.num_pairs, 2),
            "mean_rejected_characters": round(self.rejected_characters / self.num_pairs, 2),
            "chosen_longer": round(self.chosen_longer / self.num_pairs, 4),
            "length_difference": self._quantiles(),
            "margin": {"mean": round(total / self.num_margins, 6), "min": low, "max": high}
            if self.num_margins
            else None,
        }

    def _quantiles(self) -> dict[str, float]:
        """Of the differences in length."""
        import numpy as np

        shares = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}
        values = np.quantile(np.frombuffer(self.differences, np.int64), list(shares.values()))
        return {name: round(float(value), 2) for name, value in zip(shares, values, strict=True)}
