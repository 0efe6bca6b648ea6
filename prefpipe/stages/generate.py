"""prompts → completions, at once or in shards (prefpipe/stages/shards.py)."""

import contextlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prefpipe import artifacts, models
from prefpipe.artifacts import Plan
from prefpipe.files import chunks
from prefpipe.generators import Generator, Skipped
from prefpipe.records import Completion, Prompt, Split
from prefpipe.sampling import Answers, Sampling
from prefpipe.sampling.plain import Plain
from prefpipe.settings import HardwareConfig, ModelConfig
from prefpipe.stages.shards import members, merge, shard_folder, shard_plan

log = logging.getLogger(__name__)

PLAIN = Plain()


def generate(
    prompts: Sequence[Path],
    out: Path,
    *,
    generator: Generator,
    model: ModelConfig,
    folder: Path | None,
    hardware: HardwareConfig,
    seed: int,
    round_: int,
    sampling: Sampling = PLAIN,
    overwrite: bool = False,
) -> None:
    """Sample completions for every training prompt; held-out prompts are left out and counted.

    Prompts are committed in fixed groups of generator.prompts_per_part, so a killed run goes on after its last group.
    With generator.shard the completions of one shard go to a folder beside `out`; with generator.num_shards alone, what
    lies in those folders is merged into `out`.

    Args:
        folder: of the policy's weights; None for a generator that does not sample the policy.
    """
    sampling.check(generator)
    uses: dict[str, Any] = {"generator": generator, "sampling": sampling, "seed": seed, "round": round_}
    if folder is not None:
        uses["model"] = models.model_uses(model, folder)
    plan = Plan("generate", Completion.schema, uses=uses, parents={"prompts": prompts})
    rows: Iterator[Prompt] = itertools.chain.from_iterable(
        artifacts.read(path, Prompt, key="inputs.prompts") for path in prompts
    )
    if generator.num_shards > 1:
        if generator.shard is None:
            most = sampling.rows_per_prompt(generator)
            merge(rows, out, plan, generator=generator, rows_per_prompt=most, overwrite=overwrite)
            return
        rows = members(rows, generator.shard, generator.num_shards)
        out = shard_folder(out, generator.shard, generator.num_shards)
        plan = shard_plan(plan, generator.shard, generator.num_shards)
    with artifacts.draft(out, plan, overwrite=overwrite) as draft, contextlib.closing(generator):
        if draft.is_current:
            return

        def ask(asked: Generator, prompts: Sequence[Prompt]) -> Answers:
            return asked.generate(
                prompts, model=model, folder=folder or Path(), hardware=hardware, seed=seed, round_=round_
            )

        for index, group in enumerate(chunks(rows, generator.prompts_per_part)):
            if draft.has(index):
                continue
            wanted = [prompt for prompt in group if prompt.split == Split.train]
            left_out = Counter({"heldout": len(group) - len(wanted)}) if len(wanted) < len(group) else Counter[str]()
            completions: list[Completion] = []
            skipped: list[Skipped] = []
            for answer in sampling.sample(wanted, generator, ask, seed=seed, round_=round_):
                if isinstance(answer, Skipped):
                    skipped.append(answer)
                else:
                    completions.append(answer)
            answered = {completion.prompt_id for completion in completions}
            left_out.update(s.reason for s in skipped if s.prompt_id not in answered)
            used = len(group) - left_out.total()
            kept = _without_results(completions) if generator.calculator else Counter[str]()
            kept.update(s.reason for s in skipped if s.prompt_id in answered)
            draft.commit(index, completions, rows_in=len(group), rows_out=used, filtered=left_out, kept=kept)
            log.info("generate: %d completions of %d prompts in part %d", len(completions), used, index)


def _without_results(completions: Sequence[Completion]) -> Counter[str]:
    """Why the calculator left an annotation to the model → prompts with a completion where it did."""
    found = {(c.prompt_id, f"calculator_{code}") for c in completions for code in c.meta["calculator"]["refused"]}
    return Counter(reason for _, reason in found)
