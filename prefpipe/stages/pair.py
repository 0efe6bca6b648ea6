"""scored completions → preference pairs."""

import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefpipe import artifacts
from prefpipe.artifacts import Plan
from prefpipe.files import chunks
from prefpipe.grouping import grouped
from prefpipe.pairers import Pairer
from prefpipe.records import Pair, ScoredCompletion, Split

PROMPTS_PER_PART = 20_000


def pair(scored: Sequence[Path], out: Path, *, pairer: Pairer, seed: int, overwrite: bool = False) -> None:
    """Choose preference pairs among the scored completions of each prompt; counts say where the other prompts went."""
    plan = Plan("pair", Pair.schema, uses={"pairer": pairer, "seed": seed}, parents={"scored": scored})
    with artifacts.draft(out, plan, overwrite=overwrite) as draft:
        if draft.is_current:
            return
        statistics = PairStatistics()
        with tempfile.TemporaryDirectory(dir=draft.scratch) as scratch:
            groups = grouped(scored, ScoredCompletion, Path(scratch), key="inputs.scored")
            for index, chunk in enumerate(chunks(groups, PROMPTS_PER_PART)):
                pairs, left_out, used = [], Counter[str](), 0
                for group in chunk:
                    made = _pairs_of(group, pairer, seed)
                    if isinstance(made, str):
                        left_out[made] += 1
                        continue
                    used += 1
                    pairs += made
                statistics.add(pairs)
                draft.commit(index, pairs, rows_in=len(chunk), rows_out=used, filtered=left_out)
        draft.extra["unit"] = "prompts"
        draft.extra["pair_stats"] = statistics.as_data()


def _pairs_of(group: list[ScoredCompletion], pairer: Pairer, seed: int) -> list[Pair] | str:
    if group[0].split == Split.heldout:
        return "heldout"
    # From the prompt's id, so that a prompt's pairs do not depend on which other prompts there are.
    return pairer.pair(group, random.Random(f"{seed}/{group[0].prompt_id}"))


@dataclass
class PairStatistics:
    """Lengths and score margins of chosen against rejected, in characters and in the scorer's unit."""

    num_pairs: int = 0
    chosen_characters: int = 0
    rejected_characters: int = 0
    chosen_longer: int = 0
    margins: list[float] = field(default_factory=lambda: [0.0, float("inf"), float("-inf")])

    def add(self, pairs: Sequence[Pair]) -> None:
        """Count some pairs in."""
        for made in pairs:
            self.num_pairs += 1
            self.chosen_characters += len(made.chosen)
            self.rejected_characters += len(made.rejected)
            self.chosen_longer += len(made.chosen) > len(made.rejected)
            if made.chosen_score is not None and made.rejected_score is not None:
                margin = made.chosen_score - made.rejected_score
                total, low, high = self.margins
                self.margins = [total + margin, min(low, margin), max(high, margin)]

    def as_data(self) -> dict[str, Any]:
        """For the manifest; empty when there are no pairs."""
        if not self.num_pairs:
            return {}
        total, low, high = self.margins
        return {
            "num_pairs": self.num_pairs,
            "mean_chosen_characters": round(self.chosen_characters / self.num_pairs, 2),
            "mean_rejected_characters": round(self.rejected_characters / self.num_pairs, 2),
            "chosen_longer": round(self.chosen_longer / self.num_pairs, 4),
            "margin": {"mean": round(total / self.num_pairs, 6), "min": low, "max": high} if low <= high else None,
        }
