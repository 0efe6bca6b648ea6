"""prompts → completions."""

import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from prefpipe import artifacts, models
from prefpipe.artifacts import Plan
from prefpipe.files import chunks
from prefpipe.generators import Generator, Skipped
from prefpipe.records import Completion, Prompt, Split
from prefpipe.settings import HardwareConfig, ModelConfig

log = logging.getLogger(__name__)


def generate(
    prompts: Sequence[Path],
    out: Path,
    *,
    generator: Generator,
    model: ModelConfig,
    folder: Path,
    hardware: HardwareConfig,
    seed: int,
    round_: int,
    overwrite: bool = False,
) -> None:
    """Sample completions for every training prompt; held-out prompts are left out and counted.

    Prompts are committed in fixed groups of generator.prompts_per_part, so a killed run goes on after its last group.
    """
    plan = Plan(
        "generate",
        Completion.schema,
        uses={"generator": generator, "model": models.model_uses(model, folder), "seed": seed, "round": round_},
        parents={"prompts": prompts},
    )
    with artifacts.draft(out, plan, overwrite=overwrite) as draft:
        if draft.is_current:
            return
        rows = itertools.chain.from_iterable(artifacts.read(path, Prompt, key="inputs.prompts") for path in prompts)
        for index, group in enumerate(chunks(rows, generator.prompts_per_part)):
            if draft.has(index):
                continue
            wanted = [prompt for prompt in group if prompt.split == Split.train]
            left_out = Counter({"heldout": len(group) - len(wanted)}) if len(wanted) < len(group) else Counter[str]()
            completions: list[Completion] = []
            answers = generator.generate(
                wanted, model=model, folder=folder, hardware=hardware, seed=seed, round_=round_
            )
            for answer in answers:
                if isinstance(answer, Skipped):
                    left_out[answer.reason] += 1
                else:
                    completions.append(answer)
            used = len(group) - left_out.total()
            draft.commit(index, completions, rows_in=len(group), rows_out=used, filtered=left_out)
            log.info("generate: %d completions of %d prompts in part %d", len(completions), used, index)
