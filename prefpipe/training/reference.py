"""Where the reference's log-probabilities come from: a cache, a file, a model in memory, or one that follows."""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import nn

from prefpipe.errors import ConfigError
from prefpipe.logps import PairLogps
from prefpipe.progress import progress
from prefpipe.records import Split
from prefpipe.settings import TrainingConfig
from prefpipe.sharding import drop_gathered, local_shard
from prefpipe.training.batches import Example, collate, micro_batches
from prefpipe.training.engine import Engine, Frozen
from prefpipe.training.parallel import Parallel
from prefpipe.training.reference_cache import ReferenceCache
from prefpipe.training.reference_csv import PairNames, PairSums, match_sums, read_csv, write_csv
from prefpipe.training.reference_parts import Logps

log = logging.getLogger(__name__)

BLOCK = 64
"""Micro-batches after which new values are published: what a killed pass loses."""


class Reference:
    """Gives the reference's log-probabilities of some examples."""

    def logps(self, indices: Sequence[int], reads: frozenset[str]) -> PairLogps:
        """PairLogps of B examples by number, [B] each, no gradients."""
        raise NotImplementedError

    def follow(self, step: int) -> None:
        """Called after each optimizer step; only a moving reference moves."""


class FixedReference(Reference):
    """Numbers known beforehand, so that no second model stays in memory.

    sums: [2, N] nats, summed over the tokens of each chosen and each rejected completion. tokens: [2, N], how many.
    values: chosen and rejected of example 0, of example 1, … [tokens] each, nats; None where only sums are known.
    """

    def __init__(
        self,
        sums: NDArray[np.float64],
        tokens: NDArray[np.int64],
        device: torch.device,
        values: Sequence[Logps] | None = None,
    ) -> None:
        self.sums, self.tokens, self.device, self.values = sums, tokens, device, values

    @classmethod
    def of_values(cls, values: Sequence[Logps], device: torch.device) -> "FixedReference":
        """Of values per token, in the order of `values` above."""
        sums = np.array([row.sum(dtype=np.float64) for row in values]).reshape(-1, 2).T
        tokens = np.array([len(row) for row in values], dtype=np.int64).reshape(-1, 2).T
        return cls(sums, tokens, device, values)

    def logps(self, indices: Sequence[int], reads: frozenset[str]) -> PairLogps:
        sums = torch.from_numpy(self.sums[:, indices]).to(self.device, non_blocking=True)
        tokens = torch.from_numpy(self.tokens[:, indices]).to(self.device, non_blocking=True)
        if "token_logps" not in reads:
            return PairLogps(*sums, *tokens)
        assert self.values is not None
        sides = [[self.values[2 * index + side] for index in indices] for side in (0, 1)]
        width = max(len(row) for side in sides for row in side)
        tables = [torch.from_numpy(np.stack([np.pad(row, (0, width - len(row))) for row in side])) for side in sides]
        return PairLogps(*sums, *tokens, *(table.double().to(self.device, non_blocking=True) for table in tables))


class OnlineReference(Reference):
    """Asked at each step: a second model in memory, or the policy with its adapter switched off or exchanged.

    TDPO needs it, for its distributions. With `following` it moves, to alpha * policy + (1 - alpha) * reference after
    every `every` steps: TR-DPO, Gorbatovski et al. 2024, arXiv:2404.09656; alpha = 1 is its hard update.

    following: name → (a parameter of the reference, the policy's that it follows).
    """

    def __init__(
        self,
        frozen: Frozen,
        examples: Sequence[Example],
        engine: Engine,
        *,
        following: Mapping[str, tuple[nn.Parameter, nn.Parameter]] | None = None,
        alpha: float = 0.0,
        every: int = 1,
    ) -> None:
        self.frozen = frozen
        self.examples = examples
        self.engine = engine
        self.following = following or {}
        self.alpha = alpha
        self.every = every

    @torch.no_grad()
    def logps(self, indices: Sequence[int], reads: frozenset[str]) -> PairLogps:
        rows = [self.examples[index] for index in indices]
        with self.frozen.off():
            return self.engine.logps(self.frozen.model, rows, pairwise=True, reads=reads & {"token_logps"})

    @torch.no_grad()
    def follow(self, step: int) -> None:
        if step % self.every == 0:
            for mine, theirs in self.following.values():
                shard = local_shard(mine)  # both are sharded alike
                shard.lerp_(local_shard(theirs).to(shard.device, shard.dtype), self.alpha)
                drop_gathered(mine)

    def moving(self) -> dict[str, nn.Parameter]:
        """What training changes of it, by name: a resumable state holds it too."""
        return {f"reference.{name}": mine for name, (mine, _) in self.following.items()}


def whole_model(reference: nn.Module, policy: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """OnlineReference.following of a second model: every parameter follows that of the same name.

    Raises ConfigError when the two do not have the same parameters.
    """
    theirs = dict(policy.named_parameters())
    if apart := sorted({name for name, _ in reference.named_parameters()} ^ theirs.keys()):
        raise ConfigError(
            f"training.reference=moving: inputs.reference and the policy do not have the same parameters: only one of "
            f"them has {', '.join(apart[:3])}; start both from the same model, or use training.reference=cached"
        )
    return {name: (mine, theirs[name]) for name, mine in reference.named_parameters()}


def from_csv(path: Path, names: PairNames, examples: Sequence[Example], device: torch.device) -> FixedReference:
    """The sums of inputs.reference_logps for some examples. Raises DataError, with file and line, where they differ."""
    tokens = _tokens(examples)
    pairs = [(names.by_row[e.row], *counts) for e, counts in zip(examples, tokens.T.tolist(), strict=True)]
    sums = match_sums(path, read_csv(path), pairs, known=set(names.by_row))
    return FixedReference(sums, tokens, device)


def to_csv(path: Path, reference: FixedReference, names: PairNames, examples: Sequence[Example]) -> None:
    """Write what `from_csv` reads; a pair that stands there several times gets one row."""
    index_of: dict[str, int] = {}
    for index, example in enumerate(examples):
        index_of.setdefault(names.by_row[example.row], index)
    sums, tokens, split = reference.sums, reference.tokens, Split.train.value
    write_csv(
        path, (PairSums(name, split, *sums[:, i].tolist(), *tokens[:, i].tolist()) for name, i in index_of.items())
    )


def _tokens(examples: Sequence[Example]) -> NDArray[np.int64]:
    """[2, N], tokens of the chosen and of the rejected completions."""
    return np.array([[len(e.chosen) for e in examples], [len(e.rejected) for e in examples]], dtype=np.int64)


def in_memory(reference: Reference | None) -> Frozen | None:
    """The reference's model, where it is in memory."""
    return reference.frozen if isinstance(reference, OnlineReference) else None


def cached_values(
    model: nn.Module,
    examples: Sequence[Example],
    engine: Engine,
    *,
    cache: ReferenceCache,
    training: TrainingConfig,
    snapshot: Path,
    parallel: Parallel,
) -> list[Logps]:
    """Values for FixedReference, out of the snapshot, out of the cache, or computed now.

    snapshot: the values that this run uses, in its own work folder: what other runs add to the cache meanwhile differs
    in its last digits, and a resumed run must go on with the very same numbers.
    Each process of the run computes a part; the first one holds the lock, and writes the snapshot.
    """
    lengths = [len(side) for e in examples for side in (e.chosen, e.rejected)]
    if not parallel.all_of(snapshot.is_file())[0]:
        keys = [key for e in examples for key in e.keys]
        with cache.lock() if parallel.is_first else nullcontext():
            parallel.wait()
            _fill(model, examples, engine, cache=cache, keys=keys, lengths=lengths, training=training, among=parallel)
            parallel.wait()
        if parallel.is_first:
            values = [value for value in cache.get(keys, lengths) if value is not None]
            assert len(values) == len(keys)
            aside = snapshot.with_suffix(".tmp")
            save_file({"logps": np.concatenate(values), "lengths": np.array(lengths)}, aside)
            aside.rename(snapshot)
        parallel.wait()
    saved = load_file(snapshot)
    return np.split(saved["logps"], np.cumsum(saved["lengths"])[:-1])


def _fill(
    model: nn.Module,
    examples: Sequence[Example],
    engine: Engine,
    *,
    cache: ReferenceCache,
    keys: Sequence[bytes],
    lengths: Sequence[int],
    training: TrainingConfig,
    among: Parallel,
) -> None:
    known = [value is not None for value in cache.get(keys, lengths)]
    chunks = micro_batches(examples, range(len(examples)), training)
    wanted = [chunk for chunk in chunks if not all(known[2 * i] and known[2 * i + 1] for i in chunk)]
    among.wait()  # all have to see the same as known, to agree on who does what
    mine = wanted[among.rank :: among.world_size]
    log.info("reference: %d of %d completions are in the cache", sum(known), len(known))
    with progress("reference", unit="batch", total=len(mine), show=among.is_first) as shown:
        for start in range(0, len(mine), BLOCK):
            found: dict[bytes, Logps] = {}
            for chunk in mine[start : start + BLOCK]:
                batch = collate([examples[i] for i in chunk], engine.batching, pairwise=True)
                sides = [2 * i for i in chunk] + [2 * i + 1 for i in chunk]
                found |= zip((keys[side] for side in sides), engine.each_token(model, batch), strict=True)
                shown.update()
            cache.add(list(found), list(found.values()))
    if len(mine) < math.ceil(len(wanted) / among.world_size):
        # With ZeRO-3, processes gather weights together, so each makes as many forward passes as any other.
        engine.each_token(model, collate([examples[i] for i in wanted[0]], engine.batching, pairwise=True))
