"""Rewards of pairs under a reward model, and what a loss reads in its place: rewards or log-probabilities."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefpipe.errors import ConfigError
from prefpipe.logps import PairRewards
from prefpipe.losses import Loss
from prefpipe.settings import TrainingConfig
from prefpipe.training.attention import DOCUMENTS, set_attention
from prefpipe.training.batches import Example, collate, micro_batches
from prefpipe.training.engine import PROBE_TOLERANCE, Engine, Frozen, choose_engine

log = logging.getLogger(__name__)


def engine_for(
    loss: Loss, training: TrainingConfig, model: PreTrainedModel, examples: Sequence[Example], *, device: torch.device
) -> Engine:
    """The engine for what the loss is a function of; see choose_engine and choose_reward_engine."""
    if loss.of_rewards:
        return choose_reward_engine(training, model, examples, device=device)
    return choose_engine(training, model, examples, device=device, pairwise=loss.pairwise)


def measure(engine: Engine, model: nn.Module, examples: Sequence[Example], loss: Loss, reference: Frozen | None) -> Any:
    """What the loss is a function of, of B examples from one forward pass: PairRewards or PairLogps."""
    if loss.of_rewards:
        return pair_rewards(engine, model, examples)
    return engine.logps(model, examples, pairwise=loss.pairwise, reads=loss.reads, reference=reference)


def pair_rewards(engine: Engine, model: nn.Module, examples: Sequence[Example]) -> PairRewards:
    """PairRewards of B examples from one forward pass."""
    batch = collate(examples, engine.batching, pairwise=True)
    chosen, rejected = engine.rewards(model, batch).chunk(2)
    return PairRewards(chosen, rejected, *batch.lengths.to(chosen.device, non_blocking=True).chunk(2))


@torch.no_grad()
def all_rewards(engine: Engine, model: nn.Module, examples: Sequence[Example], training: TrainingConfig) -> PairRewards:
    """PairRewards of every example, [N] each on the CPU, no gradients, in micro-batches as training makes them."""
    sums = torch.zeros(2, len(examples), dtype=torch.float64)
    for chunk in micro_batches(examples, range(len(examples)), training):
        found = pair_rewards(engine, model, [examples[i] for i in chunk])
        sums[:, chunk] = torch.stack([found.chosen, found.rejected]).double().cpu()
    tokens = torch.tensor([[len(e.chosen) for e in examples], [len(e.rejected) for e in examples]])
    return PairRewards(*sums, *tokens)


@torch.no_grad()
def own_rewards(model: PreTrainedModel, rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """What the model's own forward pass gives for B sequences of one length, [B], float32 at least.

    No id counts as padding here, so transformers reads the last token, whichever it is.
    """
    config = model.config.get_text_config()
    padding, config.pad_token_id = config.pad_token_id, -1
    try:
        logits: Tensor = model(input_ids=torch.tensor([list(row) for row in rows], device=device)).logits[:, 0]
    finally:
        config.pad_token_id = padding
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def choose_reward_engine(
    training: TrainingConfig, model: PreTrainedModel, examples: Sequence[Example], *, device: torch.device
) -> Engine:
    """The engine of training.batching, once it gives the rewards that the model's own forward pass gives.

    As `choose_engine`: a batching that is asked for by name and fails raises ConfigError.
    """
    shortest = sorted(examples, key=lambda e: (e.length, e.row))[:2]
    sides = [[*e.prompt, *side] for e in shortest for side in (e.chosen, e.rejected)]
    expected = torch.cat([own_rewards(model, [ids], device) for ids in sides]).double().cpu().view(-1, 2).T
    candidates = ["shared", "packed", "padded"] if training.batching == "auto" else [training.batching]
    own_attention = str(model.config._attn_implementation)
    together = replace(training, micro_batch_size=2, micro_batch_tokens=None)
    for candidate in candidates:
        if candidate != "padded" and own_attention not in ("sdpa", "eager", DOCUMENTS):
            reason = f"model.attention={own_attention} keeps no documents apart in one row"
            continue
        engine = Engine(device, candidate)
        engine.prepare(model)
        try:
            found = torch.stack(all_rewards(engine, model, shortest, together)[:2])
            if torch.allclose(found, expected, rtol=PROBE_TOLERANCE, atol=PROBE_TOLERANCE):
                return engine
            reason = f"its rewards differ from the model's own ({found.tolist()} against {expected.tolist()})"
        except (TypeError, ValueError, AttributeError) as error:
            reason = f"the model's family cannot ({error})"
        set_attention(model, own_attention)
        log.info("batching %s: %s", candidate, reason)
    raise ConfigError(
        f"training.batching={training.batching}: {reason}; use training.batching=auto, or another model.attention"
    )
