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


def completion_logps(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed log-probability of each completion, and the number of tokens summed.

    Sum and count come from one mask, so that a mean can never disagree with its sum.

    Args:
        logits: [B, T, V], any float dtype; the log-softmax is taken in float32 (float64 stays float64).
        labels: [B, T], token ids, with IGNORE_INDEX on prompt and padding.

    Returns:
        (logps [B] float64, nats: sums of 2,000 tokens in float32 would cost DPO's first loss its fifth digit;
        tokens [B] int64).
    """
    import torch
    from torch.nn.functional import cross_entropy

    targets = labels[:, 1:]
    scores = logits[:, :-1].transpose(1, 2)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    nll = cross_entropy(scores, targets, ignore_index=IGNORE_INDEX, reduction="none")
    return -nll.double().sum(dim=-1), (targets != IGNORE_INDEX).sum(dim=-1)
