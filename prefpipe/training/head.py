"""From hidden states to log-probabilities of target tokens, with a bound on the logits held in memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from prefpipe.models import factor_type

KEPT_BYTES = 2**30
"""head="auto" keeps the logits of a micro-batch for the backward pass up to this size; above it, it is "chunked"."""

TILE_BYTES = 2**24
"""Logits worked on at a time on a CPU; from 32 MiB on, glibc would ask the kernel for fresh pages each time."""

GPU_TILE_BYTES = 2**28
"""The same on a GPU, where every tile reads the whole weight of the head: with few rows that would be the cost."""


@dataclass(frozen=True)
class Head:
    """The last layer of a model, from hidden states [N, H] to logits [N, V].

    module: computes it; a plain nn.Linear is handled by `_LinearLogps`, anything else (such as an adapter) is called.
    softcap: logits become softcap * tanh(logits / softcap), as in Gemma 2. scale: a factor of them, as in Cohere, T5.
    """

    module: nn.Module
    softcap: float | None = None
    scale: float = 1.0

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Head":
        """The head of a causal or an encoder-decoder language model."""
        config = model.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        if getattr(config, "scale_decoder_outputs", False):
            scale *= config.hidden_size**-0.5  # T5 with tied embeddings
        return cls(model.get_output_embeddings(), getattr(config, "final_logit_softcapping", None), scale)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [N, V], in float32 at least."""
        logits: Tensor = self.module(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.scale
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap

    @property
    def vocabulary(self) -> int:
        """V, or a guess where the module does not tell."""
        return int(getattr(self.module, "out_features", 32_768))


class TokenLogps(NamedTuple):
    """Of N tokens. logps: [N], nats, float32 or float64. collision: [N], log sum_v p(v)^2, detached, or None."""

    logps: Tensor
    collision: Tensor | None


def token_logps(
    head: Head, hidden: Tensor, targets: Tensor, *, mode: str = "auto", collision: bool = False
) -> TokenLogps:
    """Log-probability of each target, given the hidden state that predicts it.

    Args:
        hidden: [N, H]. targets: [N] token ids.
        mode: "plain" keeps all logits [N, V] for the backward pass; "chunked" works tile by tile and computes a tile's
            logits again in the backward pass, or, where the head is frozen, forms the gradient in the forward pass and
            keeps no logits at all (the gradient of a token's log-probability is known up to the factor that the loss
            gives it). "auto" is "plain" up to KEPT_BYTES.
    """
    if type(head.module) is nn.Linear:
        weight, bias = head.module.weight, head.module.bias
        keep = mode == "plain" or (mode == "auto" and len(hidden) * len(weight) * 4 <= KEPT_BYTES)
        apply: Callable[..., tuple[Tensor, Tensor]] = _LinearLogps.apply
        logps, squares = apply(hidden, weight, bias, targets, head.softcap, head.scale, keep, collision)
        return TokenLogps(logps, squares if collision else None)

    def of_tile(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(hidden)
        total = logits.logsumexp(-1)
        logps = logits.gather(-1, targets[:, None])[:, 0] - total
        return logps, ((2 * logits.detach()).logsumexp(-1) - 2 * total.detach() if collision else logps.detach())

    parts = _in_tiles(
        of_tile, (hidden, targets), rows=_tile_rows(head.vocabulary, hidden.device), again=mode != "plain"
    )
    logps, squares = (torch.cat(part) for part in zip(*parts, strict=True))
    return TokenLogps(logps, squares if collision else None)


def token_kl(
    head: Head, hidden: Tensor, reference_head: Callable[[Tensor], Tensor], reference_hidden: Tensor
) -> Tensor:
    """KL(reference || model) at each of N positions, nats [N]; gradients reach the model alone (TDPO).

    It needs the hidden states of both models at once, so a cache cannot replace the reference.
    """

    def of_tile(hidden: Tensor, reference_hidden: Tensor) -> Tensor:
        logps = head(hidden).log_softmax(-1)
        with torch.no_grad():
            reference = reference_head(reference_hidden).log_softmax(-1)
        return (reference.exp() * (reference - logps)).sum(-1)

    rows = _tile_rows(head.vocabulary, hidden.device)
    return torch.cat(_in_tiles(of_tile, (hidden, reference_hidden.detach()), rows=rows, again=True))


def _tile_rows(vocabulary: int, device: torch.device) -> int:
    tile_bytes = TILE_BYTES if device.type == "cpu" else GPU_TILE_BYTES
    return max(16, tile_bytes // (4 * vocabulary))


def _in_tiles(function: Callable[..., Any], tensors: tuple[Tensor, ...], *, rows: int, again: bool) -> list[Any]:
    """A function applied to `rows` rows at a time; again: computed once more in the backward pass, keeping nothing."""
    parts = zip(*(tensor.split(rows) for tensor in tensors), strict=True)
    if not again:
        return [function(*part) for part in parts]
    return [checkpoint(function, *part, use_reentrant=False) for part in parts]


class _LinearLogps(torch.autograd.Function):
    """token_logps of a linear head with a hand-written backward pass: logits become their own gradient in place.

    Matrices are multiplied in autocast's type, as by any linear layer there; what comes out is float32 on a GPU, where
    logits in 16 bits would be a hundredth of a nat apart.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        scale: float,
        keep: bool,
        collision: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.given = hidden.dtype
        hidden = hidden.to(factor_type(hidden))  # the last norm hands over float32 under autocast
        with torch.autocast(hidden.device.type, enabled=False):
            needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
            needs_head = needs_weight or needs_bias
            form_now = needs_hidden and not needs_head
            keep = keep and needs_head and softcap is None  # a cap's slope needs the logits themselves
            kernel = weight.to(hidden.dtype)
            work = torch.promote_types(hidden.dtype, torch.float32)
            num, rows = len(hidden), _tile_rows(len(weight), hidden.device)
            logps = torch.empty(num, dtype=work, device=hidden.device)
            sums, squares = torch.empty_like(logps), torch.empty_like(logps)
            kept = torch.empty(num if keep else 0, len(weight), dtype=work, device=hidden.device)
            slopes = torch.empty_like(hidden) if form_now else hidden.new_empty(0)
            for start in range(0, num, rows):
                tile = slice(start, start + rows)
                logits = _logits(hidden[tile], kernel, bias, softcap, scale, out=kept[tile] if keep else None)
                bend = _bend(logits, softcap) if form_now else None
                found = logits.gather(-1, targets[tile, None])[:, 0]
                highest, sums[tile] = _exponentiate(logits)
                logps[tile] = found - highest - sums[tile].log()
                if collision:
                    squares[tile] = torch.linalg.vecdot(logits, logits).log() - 2 * sums[tile].log()
                if form_now:
                    slope = _slope(logits, sums[tile], targets[tile], torch.ones_like(found), bend, scale)
                    slopes[tile] = slope.to(hidden.dtype) @ kernel
            ctx.save_for_backward(hidden, weight, bias, targets, sums, kept, slopes)
            ctx.settings = (softcap, scale, keep, form_now, rows)
            ctx.mark_non_differentiable(squares)
            return logps, squares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, sums, kept, slopes = ctx.saved_tensors
        softcap, scale, keep, form_now, rows = ctx.settings
        nothing = (None,) * 5
        with torch.autocast(hidden.device.type, enabled=False):
            if form_now:
                return ((grad[:, None] * slopes).to(ctx.given), None, None, *nothing)
            needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
            kernel = weight.to(hidden.dtype)
            of_hidden = torch.empty_like(hidden) if needs_hidden else None
            of_weight = torch.zeros_like(weight) if needs_weight else None
            of_bias = torch.zeros_like(bias) if needs_bias else None
            for start in range(0, len(hidden), rows):
                tile = slice(start, start + rows)
                if keep:
                    weights, bend = kept[tile], None
                else:
                    weights = _logits(hidden[tile], kernel, bias, softcap, scale)
                    bend = _bend(weights, softcap)
                    _exponentiate(weights)
                slope = _slope(weights, sums[tile], targets[tile], grad[tile], bend, scale)
                if of_bias is not None:
                    of_bias += slope.sum(0)
                slope = slope.to(hidden.dtype)
                if of_hidden is not None:
                    torch.mm(slope, kernel, out=of_hidden[tile])
                if of_weight is not None:
                    _add_product(of_weight, slope.T, hidden[tile])
        return (None if of_hidden is None else of_hidden.to(ctx.given), of_weight, of_bias, *nothing)


def _product(one: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor:
    """[n, m] of [n, k] and [k, m], in float32 at least; out: where it may be put."""
    work = torch.promote_types(one.dtype, torch.float32)
    if one.dtype == work:
        return torch.mm(one, other, out=out)
    if one.is_cuda:
        return torch.mm(one, other, out_dtype=work, out=out)
    found = (one @ other).to(work)
    return found if out is None else out.copy_(found)


def _add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    """Add to [n, m] the product of [n, k] and [k, m]."""
    if total.dtype == one.dtype:
        total.addmm_(one, other)
    elif total.is_cuda:
        torch.addmm(total, one, other, out_dtype=total.dtype, out=total)
    else:
        total += _product(one, other)


def _logits(
    hidden: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """[n, V], in float32 at least."""
    logits = _product(hidden, kernel.T, out=out)
    if bias is not None:
        logits += bias
    if scale != 1.0:
        logits *= scale
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def _exponentiate(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Turn [n, V] logits in place into e^(logit - highest); each row's highest logit and its sum afterwards, [n]."""
    highest = logits.amax(-1)
    logits.sub_(highest[:, None]).exp_()
    return highest, logits.sum(-1)


def _bend(logits: Tensor, softcap: float | None) -> Tensor | None:
    """The slope of the cap at capped logits, [n, V]."""
    return None if softcap is None else 1 - (logits / softcap) ** 2


def _slope(weights: Tensor, sums: Tensor, targets: Tensor, grad: Tensor, bend: Tensor | None, scale: float) -> Tensor:
    """grad times the gradient of log p(target) by the head's own output, [n, V]; written over the weights.

    weights: [n, V], p(v) times the row's sum.
    """
    slope = weights.mul_((-grad / sums)[:, None])
    slope.scatter_add_(1, targets[:, None], grad[:, None])
    if bend is not None:
        slope *= bend
    return slope if scale == 1.0 else slope.mul_(scale)
