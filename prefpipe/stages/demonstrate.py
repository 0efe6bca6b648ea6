"""scored completions → demonstrations: what stage=pair does with a pairer that makes no pairs."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from prefpipe import artifacts
from prefpipe.artifacts import Plan
from prefpipe.grouping import grouped
from prefpipe.pairers import Demonstrator
from prefpipe.records import Demonstration, ScoredCompletion, Split

PROMPTS_PER_PART = 20_000
RECORDS_PER_PART = 10_000


def demonstrate(scored: Sequence[Path], out: Path, *, pairer: Demonstrator, seed: int, overwrite: bool = False) -> None:
    """Choose completions to imitate among the scored ones of each prompt; counts say where the other prompts went.

    With a cap there are two passes: the first counts, the second writes. Memory is that of one part.
    """
    plan = Plan("pair", Demonstration.schema, uses={"pairer": pairer, "seed": seed}, parents={"scored": scored})
    with artifacts.draft(out, plan, overwrite=overwrite) as draft:
        if draft.is_current:
            return
        cap = None
        if pairer.cap_percentile is not None:
            found = (made for made in _made(scored, pairer, seed) if not isinstance(made, str))
            cap = cap_of(Counter(len(made) for made in found), pairer.cap_percentile)
        num_made = num_kept = num_prompts = 0
        for index, part in enumerate(_parts(_made(scored, pairer, seed), cap)):
            draft.commit(index, part.records, rows_in=part.num_prompts, rows_out=part.num_used, filtered=part.left_out)
            num_made, num_kept = num_made + part.num_made, num_kept + len(part.records)
            num_prompts += part.num_used
        draft.extra["unit"] = "prompts"
        draft.extra["demonstration_stats"] = {
            "num_demonstrations": num_kept,
            "num_over_cap": num_made - num_kept,
            "cap": cap,
            "mean_per_prompt": round(num_kept / num_prompts, 6) if num_prompts else None,
        }


def cap_of(counts: Counter[int], percentile: float) -> int | None:
    """The percentile of how many each prompt has, linear between two counts and rounded down; None without prompts.

    counts: how many → prompts that have so many, at least one each.
    """
    import numpy as np

    if not counts:
        return None
    return int(np.percentile(np.repeat(list(counts), list(counts.values())), percentile))


@dataclass
class Part:
    """Demonstrations, and where their prompts went. num_made: before the cap."""

    records: list[Demonstration] = field(default_factory=list)
    num_made: int = 0
    num_prompts: int = 0
    num_used: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


def _parts(made_of_prompts: Iterator[list[Demonstration] | str], cap: int | None) -> Iterator[Part]:
    part = Part()
    for made in made_of_prompts:
        part.num_prompts += 1
        if isinstance(made, str):
            part.left_out[made] += 1
        else:
            part.num_used += 1
            part.num_made += len(made)
            part.records += made[:cap]
        if part.num_prompts == PROMPTS_PER_PART or len(part.records) >= RECORDS_PER_PART:
            yield part
            part = Part()
    if part.num_prompts:
        yield part


def _made(scored: Sequence[Path], pairer: Demonstrator, seed: int) -> Iterator[list[Demonstration] | str]:
    """What the pairer makes of each prompt."""
    for group in grouped(scored, ScoredCompletion, key="inputs.scored"):
        if any(completion.split == Split.heldout for completion in group):
            yield "heldout"
            continue
        # From the prompt's id, so that a prompt's demonstrations do not depend on which other prompts there are.
        made = pairer.demonstrations(group, random.Random(f"{seed}/{group[0].prompt_id}"))
        rate = None if isinstance(made, str) else pairer.pass_rate(group)
        if rate is not None and not isinstance(made, str):
            made = [replace(record, meta={**record.meta, "pass_rate": rate}) for record in made]
        yield made
