"""Shards of stage=generate: jobs that sample a fixed share of the prompts each, and the merge of what they leave.

A prompt's shard is a hash of its id, so it stays the same whatever becomes of the other prompts. The merged artifact is
the one that a single job would have written: the same rows in the same order and parts, under the same plan.
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from prefpipe import artifacts
from prefpipe.artifacts import Plan
from prefpipe.errors import ArtifactError
from prefpipe.files import chunks
from prefpipe.generators import Generator
from prefpipe.records import Completion, Prompt, Split


def shard_of(prompt_id: str, num_shards: int) -> int:
    """The shard of a prompt, from 0 to num_shards - 1."""
    digest = hashlib.sha256(f"shard/{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % num_shards


def members(prompts: Iterable[Prompt], shard: int, num_shards: int) -> Iterator[Prompt]:
    """The prompts of one shard, in their order."""
    return (prompt for prompt in prompts if shard_of(prompt.prompt_id, num_shards) == shard)


def shard_folder(out: Path, shard: int, num_shards: int) -> Path:
    """Where the artifact of one shard lies: completions.shard-3-of-8."""
    return out.with_name(f"{out.name}.shard-{shard}-of-{num_shards}")


def shard_plan(plan: Plan, shard: int, num_shards: int) -> Plan:
    """The plan of one shard of the artifact of a plan."""
    return dataclasses.replace(plan, uses={**plan.uses, "shard": f"{shard} of {num_shards}"})


def merge(
    rows: Iterator[Prompt],
    out: Path,
    plan: Plan,
    *,
    generator: Generator,
    rows_per_prompt: int | None,
    overwrite: bool = False,
) -> None:
    """Merge all shards of `out` into it.

    Args:
        rows: all prompts. plan: of `out`, as a single job would write it.
        rows_per_prompt: the most completions that one can have; None: as many as have ids of their own.
    Raises:
        ArtifactError: a shard is missing, damaged, of other settings or prompts, or another than its folder says; or
            its rows are not those of its prompts.
    """
    with artifacts.draft(out, plan, overwrite=overwrite) as draft:
        if draft.is_current:
            return
        shards = [_Shard(folder, rows_per_prompt) for folder in _checked(out, plan, generator.num_shards)]
        kept = sum((shard.kept for shard in shards), Counter[str]())
        # Parts of a killed merge are written again, as the shards may be others by now.
        for index, group in enumerate(chunks(rows, generator.prompts_per_part)):
            wanted = [prompt for prompt in group if prompt.split == Split.train]
            left_out = Counter({"heldout": len(group) - len(wanted)} if len(wanted) < len(group) else {})
            completions: list[Completion] = []
            for prompt in wanted:
                shard = shards[shard_of(prompt.prompt_id, generator.num_shards)]
                taken = shard.take(prompt)
                if not taken:
                    left_out[shard.reason()] += 1
                completions += taken
            draft.commit(
                index,
                completions,
                rows_in=len(group),
                rows_out=len(group) - left_out.total(),
                filtered=left_out,
                kept=kept if index == 0 else None,
            )
        for shard in shards:
            shard.check_end()


def _checked(out: Path, plan: Plan, num_shards: int) -> list[Path]:
    """The folders of all shards, each with its own plan and undamaged."""
    folders = [shard_folder(out, shard, num_shards) for shard in range(num_shards)]
    missing = [shard for shard, folder in enumerate(folders) if not artifacts.is_complete(folder)]
    if missing:
        wanted = ",".join(map(str, missing))
        raise ArtifactError(
            f"{out}: {len(missing)} of {num_shards} shards are missing: {wanted}; run stage=generate "
            f"generator.num_shards={num_shards} generator.shard={wanted}{' with -m' if len(missing) > 1 else ''}"
        )
    for shard, folder in enumerate(folders):
        changes = artifacts.changes(folder, shard_plan(plan, shard, num_shards))
        if changes:
            raise ArtifactError(
                f"{folder} is not shard {shard} of these completions: {'; '.join(changes)}. Run it again, with "
                f"generator.shard={shard} overwrite=true, or merge with the settings and inputs that it was made with"
            )
        artifacts.verify(folder)
    return folders


class _Shard:
    """The completions of one shard, taken prompt by prompt. kept: what prompts lack that are in all the same."""

    def __init__(self, folder: Path, rows_per_prompt: int | None) -> None:
        self.folder, self.rows_per_prompt = folder, rows_per_prompt
        counts = artifacts.manifest(folder)["counts"]
        # A shard counts its reasons as a whole, so which prompt gets which is arbitrary; the sums are exact.
        self._reasons: list[str] = [
            code for code, n in counts["filtered"].items() if code != "heldout" for _ in range(n)
        ]
        self.kept = Counter[str](counts.get("kept", {}))
        self._rows = artifacts.read(folder, Completion, key="shard")
        self._next: Completion | None = next(self._rows, None)

    def take(self, prompt: Prompt) -> list[Completion]:
        """The completions of the next prompt; none where it was left out."""
        taken: dict[str, Completion] = {}
        while (
            self._next is not None and self._next.prompt_id == prompt.prompt_id and len(taken) != self.rows_per_prompt
        ):
            if self._next.completion_id in taken:  # of the same prompt's next turn, or doubled
                break
            taken[self._next.completion_id] = self._next
            self._next = next(self._rows, None)
        return list(taken.values())

    def reason(self) -> str:
        """Why a prompt was left out. Raises ArtifactError when there are fewer reasons than such prompts."""
        if not self._reasons:
            raise ArtifactError(
                f"{self.folder}: rows are lost, as there are fewer completions, or reasons for having none, than "
                f"prompts; run this shard again with overwrite=true"
            )
        return self._reasons.pop()

    def check_end(self) -> None:
        """Raise ArtifactError unless every row and every reason was taken."""
        if self._next is not None:
            raise ArtifactError(
                f"{self.folder}: completion {self._next.completion_id} of prompt {self._next.prompt_id} is doubled, "
                f"out of order, or of a prompt that is not in this shard; run it again with overwrite=true"
            )
        if self._reasons:
            raise ArtifactError(
                f"{self.folder} counts more prompts as left out ({', '.join(sorted(set(self._reasons)))}) than have no "
                f"completions; run this shard again with overwrite=true"
            )
