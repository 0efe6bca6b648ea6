"""Log-probabilities of pairs under a model: what the loop, the reference and the evaluation share."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from prefpipe.logps import PairLogps, completion_logps
from prefpipe.training.batches import Batch, Example, collate


def batch_logps(model: nn.Module, batch: Batch, *, pairwise: bool) -> PairLogps:
    """PairLogps of B pairs from one forward pass over 2 B sequences (SFT: B, with rejected = 0 nats of 1 token)."""
    logits = model(input_ids=batch.input_ids, use_cache=False).logits
    logps, tokens = completion_logps(logits, batch.labels)
    if not pairwise:
        return PairLogps(logps, torch.zeros_like(logps), tokens, torch.ones_like(tokens))
    (chosen, rejected), (chosen_tokens, rejected_tokens) = logps.chunk(2), tokens.chunk(2)
    return PairLogps(chosen, rejected, chosen_tokens, rejected_tokens)


@torch.no_grad()
def all_logps(
    model: nn.Module, examples: Sequence[Example], *, batch_size: int, device: torch.device, pairwise: bool = True
) -> PairLogps:
    """PairLogps of every example, [N] each on the CPU, without gradients; batches of similar length, longest first."""
    order = sorted(range(len(examples)), key=lambda index: (-examples[index].length, index))
    logps, tokens = torch.zeros(2, len(examples), dtype=torch.float64), torch.zeros(2, len(examples), dtype=torch.long)
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        out = batch_logps(
            model, collate([examples[i] for i in chunk], pairwise=pairwise, device=device), pairwise=pairwise
        )
        logps[:, chunk] = torch.stack([out.chosen, out.rejected]).cpu()
        tokens[:, chunk] = torch.stack([out.chosen_tokens, out.rejected_tokens]).cpu()
    return PairLogps(logps[0], logps[1], tokens[0], tokens[1])


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
