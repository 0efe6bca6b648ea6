"""Where the log-probabilities of the frozen reference come from: a cache, a second model, or a moving average."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from prefpipe.logps import PairLogps
from prefpipe.progress import progress
from prefpipe.settings import TrainingConfig
from prefpipe.training.batches import Example, collate, micro_batches
from prefpipe.training.engine import Engine, Frozen
from prefpipe.training.reference_cache import ReferenceCache

log = logging.getLogger(__name__)

BLOCK = 64
"""Micro-batches after which new values are published: what a killed pass loses."""


class Reference:
    """Gives the reference's log-probabilities of some examples."""

    def logps(self, indices: Sequence[int], reads: frozenset[str]) -> PairLogps:
        """PairLogps of B examples by number, [B] each, no gradients."""
        raise NotImplementedError

    def follow(self, policy: nn.Module, step: int) -> None:
        """Called after each optimizer step; only a moving reference moves."""


class CachedReference(Reference):
    """Values per token, computed once, so that no second model stays in memory.

    values: chosen and rejected of example 0, of example 1, … float32 [tokens] each, nats.
    """

    def __init__(self, values: Sequence[np.ndarray], device: torch.device) -> None:
        self.values = values
        self.device = device

    def logps(self, indices: Sequence[int], reads: frozenset[str]) -> PairLogps:
        sides = [[self.values[2 * index + side] for index in indices] for side in (0, 1)]
        sums = [
            torch.tensor([row.sum(dtype=np.float64) for row in side], dtype=torch.float64, device=self.device)
            for side in sides
        ]
        tokens = [torch.tensor([len(row) for row in side], device=self.device) for side in sides]
        if "token_logps" not in reads:
            return PairLogps(*sums, *tokens)
        width = max(len(row) for side in sides for row in side)
        tables = [torch.from_numpy(np.stack([np.pad(row, (0, width - len(row))) for row in side])) for side in sides]
        return PairLogps(*sums, *tokens, *(table.double().to(self.device) for table in tables))


class OnlineReference(Reference):
    """Asked at each step: a second model in memory, or the policy with its adapter switched off.

    TDPO needs it, for its distributions. With alpha it moves to alpha * policy + (1 - alpha) * reference after every
    `every` steps: TR-DPO, Gorbatovski et al. 2024, arXiv:2404.09656; alpha = 1 is its hard update.
    """

    def __init__(
        self, frozen: Frozen, examples: Sequence[Example], engine: Engine, *, alpha: float = 0.0, every: int = 1
    ) -> None:
        self.frozen = frozen
        self.examples = examples
        self.engine = engine
        self.alpha = alpha
        self.every = every

    @torch.no_grad()
    def logps(self, indices: Sequence[int], reads: frozenset[str]) -> PairLogps:
        rows = [self.examples[index] for index in indices]
        with self.frozen.off():
            return self.engine.logps(self.frozen.model, rows, pairwise=True, reads=reads & {"token_logps"})

    @torch.no_grad()
    def follow(self, policy: nn.Module, step: int) -> None:
        if self.alpha and step % self.every == 0:
            for mine, theirs in zip(self.frozen.model.parameters(), policy.parameters(), strict=True):
                mine.lerp_(theirs.to(mine.dtype), self.alpha)


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
) -> list[np.ndarray]:
    """Values for CachedReference, out of the snapshot, out of the cache, or computed now.

    snapshot: the values that this run uses, in its own work folder: what other runs add to the cache meanwhile differs
    in its last digits, and a resumed run must go on with the very same numbers.
    """
    lengths = [len(side) for e in examples for side in (e.chosen, e.rejected)]
    if not snapshot.is_file():
        keys = [key for e in examples for key in e.keys]
        with cache.lock():
            values = _filled(model, examples, engine, cache=cache, keys=keys, lengths=lengths, training=training)
        aside = snapshot.with_suffix(".tmp")
        save_file({"logps": np.concatenate(values), "lengths": np.array(lengths)}, aside)
        aside.rename(snapshot)
    saved = load_file(snapshot)
    return np.split(saved["logps"], np.cumsum(saved["lengths"])[:-1])


def _filled(
    model: nn.Module,
    examples: Sequence[Example],
    engine: Engine,
    *,
    cache: ReferenceCache,
    keys: Sequence[bytes],
    lengths: Sequence[int],
    training: TrainingConfig,
) -> list[np.ndarray]:
    known = [value is not None for value in cache.get(keys, lengths)]
    chunks = micro_batches(examples, range(len(examples)), training)
    wanted = [chunk for chunk in chunks if not all(known[2 * i] and known[2 * i + 1] for i in chunk)]
    log.info("reference: %d of %d completions are in the cache", sum(known), len(known))
    with progress("reference", unit="batch", total=len(wanted)) as shown:
        for start in range(0, len(wanted), BLOCK):
            found: dict[bytes, np.ndarray] = {}
            for chunk in wanted[start : start + BLOCK]:
                batch = collate([examples[i] for i in chunk], engine.batching, pairwise=True)
                sides = [2 * i for i in chunk] + [2 * i + 1 for i in chunk]
                found |= zip((keys[side] for side in sides), engine.each_token(model, batch), strict=True)
                shown.update()
            cache.add(list(found), list(found.values()))
    values = cache.get(keys, lengths)
    assert all(value is not None for value in values)
    return [value for value in values if value is not None]
