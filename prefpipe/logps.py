"""Log-probabilities of preference pairs: what every loss is a function of."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class PairRewards(NamedTuple):
    """Rewards of a batch of B preference pairs under one reward model.

    chosen, rejected: [B] float, in the model's own unit. chosen_tokens, rejected_tokens: [B] int, of the completions.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor


class PairLogps(NamedTuple):
    """Log-probabilities of a batch of B preference pairs under one model.

    chosen, rejected: [B] float, nats, SUMMED over completion tokens.
    chosen_tokens, rejected_tokens: [B] int, how many tokens were summed (>= 1).

    The rest is there for losses that ask for it (Loss.reads), else None:

    chosen_token_logps, rejected_token_logps: [B, C] float, nats, of each completion token; 0 behind the end.
    chosen_collision, rejected_collision: [B] float, sum over tokens of log sum_v p(v)^2, nats, detached.
    chosen_kl, rejected_kl: [B] float, sum over tokens of KL(reference || this model), nats; of the policy only.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    chosen_token_logps: Tensor | None = None
    rejected_token_logps: Tensor | None = None
    chosen_collision: Tensor | None = None
    rejected_collision: Tensor | None = None
    chosen_kl: Tensor | None = None
    rejected_kl: Tensor | None = None

    def per_token(self) -> tuple[Tensor, Tensor]:
        """Mean log-probability per completion token, ([B], [B]), nats per token."""
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens
