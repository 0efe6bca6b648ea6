"""From logits to log-probabilities of completions."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

IGNORE_INDEX = -100


class PairLogps(NamedTuple):
    """Log-probabilities of a batch of B preference pairs under one model.

    chosen, rejected: [B] float, nats, SUMMED over completion tokens.
    chosen_tokens, rejected_tokens: [B] int, how many tokens were summed (>= 1).
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    def per_token(self) -> tuple[Tensor, Tensor]:
        """Mean log-probability per completion token, ([B], [B]), nats per token."""
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens


def completion_logps(
    logits: Tensor, targets: Tensor, *, rows: Tensor | None = None, places: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Summed log-probability of each completion, and the number of tokens summed.

    Sum and count come from one mask, so that a mean can never disagree with its sum.

    Args:
        logits: [R, K, V], any float dtype; normalised in float32 (float64 stays float64).
        targets: [S, C], token ids, IGNORE_INDEX behind the end of a completion.
        rows: [S, 1], the row of logits that each completion reads; places: [S, C], which of the K positions predicts
            each target. Without them logits[s, c] predicts targets[s, c].

    Returns:
        (sums [S] float64, nats: adding 2,000 tokens in float32 would cost DPO's first loss its fifth digit;
        tokens [S] int64).
    """
    import torch

    if rows is None or places is None:
        rows = torch.arange(len(targets), device=targets.device)[:, None]
        places = torch.arange(targets.shape[1], device=targets.device)
    scores = logits if logits.dtype == torch.float64 else logits.float()
    mask = targets != IGNORE_INDEX
    logps = scores[rows, places, targets.clamp(min=0)] - scores.logsumexp(dim=-1)[rows, places]
    return logps.double().masked_fill(~mask, 0.0).sum(dim=-1), mask.sum(dim=-1)
