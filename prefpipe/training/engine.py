"""Log-probabilities of pairs under a model: what the loop, the reference and the evaluation share."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from prefpipe.errors import ConfigError
from prefpipe.logps import PairLogps, completion_logps
from prefpipe.training.batches import Example, collate, collate_shared

log = logging.getLogger(__name__)

PROBE_TOLERANCE = 2e-2
"""Of log-probabilities in nats, relative and absolute: far above bf16's noise, far below what a wrong mask does."""


@dataclass(frozen=True)
class Engine:
    """How log-probabilities are computed; every choice gives the same numbers.

    shared: whether a pair's prompt is computed once for both completions (prefix sharing).
    additive_mask: whether the attention kernel adds its mask (eager) instead of reading it as a bool (SDPA).
    """

    device: torch.device
    shared: bool = False
    additive_mask: bool = False

    def logps(self, model: nn.Module, examples: Sequence[Example], *, pairwise: bool) -> PairLogps:
        """PairLogps of B examples from one forward pass, [B] each; SFT: rejected = 0 nats of 1 token."""
        shared = self.shared and pairwise
        batch = (collate_shared(examples) if shared else collate(examples, pairwise=pairwise)).to(self.device)
        mask = batch.mask
        if mask is not None and self.additive_mask:
            mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, torch.finfo(torch.float32).min)
        logits = model(
            input_ids=batch.input_ids,
            attention_mask=mask,
            position_ids=batch.position_ids,
            use_cache=False,
            logits_to_keep=batch.columns,
        ).logits
        sums, tokens = completion_logps(logits, batch.targets, rows=batch.rows, places=batch.places)
        if not pairwise:
            return PairLogps(sums, torch.zeros_like(sums), tokens, torch.ones_like(tokens))
        (chosen, rejected), (chosen_tokens, rejected_tokens) = sums.chunk(2), tokens.chunk(2)
        return PairLogps(chosen, rejected, chosen_tokens, rejected_tokens)

    @torch.no_grad()
    def all_logps(
        self, model: nn.Module, examples: Sequence[Example], *, batch_size: int, pairwise: bool = True
    ) -> PairLogps:
        """PairLogps of every example, [N] each on the CPU, no gradients; similar lengths together, longest first."""
        order = sorted(range(len(examples)), key=lambda index: (-examples[index].length, index))
        sums, tokens = (
            torch.zeros(2, len(examples), dtype=torch.float64),
            torch.zeros(2, len(examples), dtype=torch.long),
        )
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            out = self.logps(model, [examples[i] for i in chunk], pairwise=pairwise)
            sums[:, chunk] = torch.stack([out.chosen, out.rejected]).cpu()
            tokens[:, chunk] = torch.stack([out.chosen_tokens, out.rejected_tokens]).cpu()
        return PairLogps(sums[0], sums[1], tokens[0], tokens[1])


def choose_engine(
    batching: str, model: PreTrainedModel, examples: Sequence[Example], *, device: torch.device, pairwise: bool
) -> Engine:
    """The engine of training.batching, tried on the shortest pairs before it is trusted.

    A family that overlooks our mask (a sliding window, a kernel of its own) would let one completion see the other, and
    the loss would still look fine. So prefix sharing must reproduce plain batching first: "auto" falls back and says
    so, "shared" raises ConfigError.
    """
    attention = str(getattr(model.config, "_attn_implementation", ""))
    plain = Engine(device)
    if batching == "padded" or not pairwise:
        return plain
    shared = Engine(device, shared=True, additive_mask=attention == "eager")
    reason = _why_not_shared(attention, model, examples, plain, shared)
    if reason is None:
        return shared
    if batching == "shared":
        raise ConfigError(
            f"training.batching=shared: {reason}; use training.batching=padded, or another model.attention"
        )
    log.info("prompts are not shared: %s", reason)
    return plain


def _why_not_shared(
    attention: str, model: PreTrainedModel, examples: Sequence[Example], plain: Engine, shared: Engine
) -> str | None:
    if attention not in ("sdpa", "eager"):
        return f"model.attention={attention} takes no mask for each pair"
    window = getattr(model.config, "sliding_window", None)
    longest = max(len(e.prompt) + len(e.chosen) + len(e.rejected) for e in examples)
    if window is not None and longest > window:
        return f"the model's sliding window of {window} tokens is shorter than the longest pair ({longest})"
    shortest = sorted(examples, key=lambda e: (e.length, e.row))[:2]
    found, expected = (engine.all_logps(model, shortest, batch_size=2) for engine in (shared, plain))
    for mine, theirs in ((found.chosen, expected.chosen), (found.rejected, expected.rejected)):
        if not torch.allclose(mine, theirs, rtol=PROBE_TOLERANCE, atol=PROBE_TOLERANCE):
            return f"its log-probabilities differ from plain batching ({mine.tolist()} against {theirs.tolist()})"
    return None


def select(logps: PairLogps, indices: Sequence[int], device: torch.device) -> PairLogps:
    """Some rows of a PairLogps, on a device."""
    rows = torch.tensor(indices)
    return PairLogps(*(tensor[rows].to(device) for tensor in logps))


def without_dropout(model: PreTrainedModel) -> None:
    """Switch every dropout off for good: a preference loss compares log-probabilities, noise would be part of them."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name in (
        "attention_dropout",
        "attn_pdrop",
        "resid_pdrop",
        "embd_pdrop",
        "hidden_dropout",
        "attention_probs_dropout_prob",
    ):
        if getattr(model.config, name, None):
            setattr(model.config, name, 0.0)
    for module in model.modules():
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
