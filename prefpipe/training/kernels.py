"""Attention over all documents of a row in one kernel launch, for GPUs, where a launch per document is too slow.

"varlen" is flash-attention over sequences of different lengths: a document's queries, and the keys of its prompt
followed by its own. "flex" is FlexAttention with the same rule as a block mask, for families whose
scores are soft-capped. A kernel is used only if it reproduces, on this device, what the loop over documents gives.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from prefpipe.models import factor_type
from prefpipe.training.attention import DOCUMENTS, Document, documents_attention, refuse_unsupported

log = logging.getLogger(__name__)

HALF_TOLERANCE = 0.02
"""For outputs of order 1 in half precision; a token that sees another document changes them by a tenth or more."""


class Layout(NamedTuple):
    """Documents as sequences of their own.

    queries: [Q] positions in the row. keys: [K] positions, those of a shared prompt before the document's own.
    query_ends, key_ends: [D + 1] int32, cumulative lengths of the documents, from 0. longest_*: the length of the
    longest document.
    """

    queries: Tensor
    keys: Tensor
    query_ends: Tensor
    key_ends: Tensor
    longest_queries: int
    longest_keys: int


@functools.lru_cache(maxsize=16)
def layout(documents: tuple[Document, ...], only_read: bool, device: torch.device) -> Layout:
    """Computed once per batch and used by every layer."""
    queries, keys = [], []
    for document in documents:
        queries.append(torch.arange(max(document.read, document.start) if only_read else document.start, document.end))
        prompt = torch.arange(document.prompt, document.prompt + document.shared)
        keys.append(torch.cat([prompt, torch.arange(document.start, document.end)]))

    def ends(parts: list[Tensor]) -> Tensor:
        lengths = torch.tensor([0, *(len(part) for part in parts)])
        return lengths.cumsum(0).to(device, torch.int32, non_blocking=True)

    return Layout(
        torch.cat(queries).to(device, non_blocking=True),
        torch.cat(keys).to(device, non_blocking=True),
        ends(queries),
        ends(keys),
        max(map(len, queries)),
        max(map(len, keys)),
    )


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    documents: Sequence[Document],
    only_read: bool = False,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    kernel: Callable[..., Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """attention.documents_attention in one call of flash-attention.

    kernel: takes (query, key, value, layout, scale, window), [Q, heads, D] and twice [K, key heads, D]; a query sees
        the keys up to its own, counted from the ends of both. None is torch's.

    Raises:
        ValueError: soft-capped scores, dropout or 32-bit inputs, which the kernel does not support.
    """
    refuse_unsupported(kwargs)
    dtype = _half(query)
    if softcap is not None or dropout > 0:
        raise ValueError("varlen attention knows no soft-capping and no dropout")
    places = layout(tuple(documents), only_read, query.device)
    queries = query.to(dtype)[0].transpose(0, 1)[places.queries]
    keys, values = (tensor.to(dtype)[0].transpose(0, 1)[places.keys] for tensor in (key, value))
    found = (kernel or _torch_varlen)(queries, keys, values, places, scaling, sliding_window)
    whole = found.new_zeros(1, query.shape[2], *found.shape[1:])
    return whole.index_copy(1, places.queries, found[None]), None


def _torch_varlen(
    query: Tensor, key: Tensor, value: Tensor, places: Layout, scale: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    found = varlen_attn(
        query,
        key,
        value,
        places.query_ends,
        places.key_ends,
        places.longest_queries,
        places.longest_keys,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=True,
    )
    assert isinstance(found, Tensor)
    return found


def flex_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    documents: Sequence[Document],
    only_read: bool = False,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """attention.documents_attention by FlexAttention; outputs that are not read are computed all the same.

    Raises:
        ValueError: dropout, which the kernel does not support.
    """
    refuse_unsupported(kwargs)
    if dropout > 0:
        raise ValueError("flex attention knows no dropout")
    mask = _block_mask(tuple(documents), sliding_window, query.device)

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * (score / softcap).tanh()

    dtype = factor_type(query)
    found: Tensor = _flex(query.device.type)(
        query.to(dtype),
        key.to(dtype),
        value.to(dtype),
        score_mod=None if softcap is None else capped,
        block_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return found.transpose(1, 2).contiguous(), None


@functools.cache
def _flex(device: str) -> Callable[..., Any]:
    """Compiled on a GPU. Without compilation it materializes all scores, which only tests on a CPU can afford."""
    from torch.nn.attention import flex_attention as flex

    function: Any = flex.flex_attention
    compiled: Callable[..., Any] = function if device == "cpu" else torch.compile(function, dynamic=True)
    return compiled


@functools.lru_cache(maxsize=16)
def _block_mask(documents: tuple[Document, ...], window: int | None, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    length = documents[-1].end
    columns = torch.zeros(4, length, dtype=torch.long)
    for document in documents:
        own = slice(document.start, document.end)
        columns[0, own] = document.start
        columns[1, own] = document.prompt
        columns[2, own] = document.prompt + document.shared
        columns[3, own] = torch.arange(document.shared, document.shared + document.end - document.start)
    start, prompt, prompt_end, place = columns.to(device, non_blocking=True)

    def visible(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Any:
        own = (start[query] <= key) & (key <= query)
        # Without a shared prompt, prompt .. prompt_end is empty.
        seen = own | ((prompt[query] <= key) & (key < prompt_end[query]))
        if window is not None:  # places count from the start of the prompt, shared or not
            seen = seen & (place[query] - place[key] < window)
        return seen

    return create_block_mask(visible, None, None, length, length, device=device)


KERNELS: dict[str, Callable[..., tuple[Tensor, None]]] = {"varlen": varlen_attention, "flex": flex_attention}


def fastest_attention(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> str:
    """Name, for set_attention, of the first kernel that agrees with the loop on this device; on a CPU, the loop's.

    dtype: the one attention is computed in.
    """
    if device.type == "cpu" or dtype == torch.float32:
        return DOCUMENTS
    for name, kernel in KERNELS.items():
        reason = why_not(kernel, model, device, dtype)
        if reason is None:
            AttentionInterface.register(f"{DOCUMENTS}_{name}", kernel)
            return f"{DOCUMENTS}_{name}"
        log.info("attention kernel %s: %s", name, reason)
    return DOCUMENTS


def why_not(
    kernel: Callable[..., tuple[Tensor, None]], model: PreTrainedModel, device: torch.device, dtype: torch.dtype
) -> str | None:
    """None where the kernel gives the loop's outputs and gradients on random inputs of the model's shape, else why not.

    Two prompts and three completions, one of them longer than a block of any kernel, with and without a sliding window,
    and with and without `only_read`.
    """
    config = model.config.get_text_config()
    heads, key_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    cap = getattr(config, "attn_logit_softcapping", None)
    documents = [Document(0, 90, read=59), Document(90, 247, 0, 60, read=90), Document(247, 300, read=260)]
    generator = torch.Generator(device).manual_seed(0)

    def random(number: int) -> Tensor:
        return torch.randn(1, number, 300, size, generator=generator, device=device, dtype=dtype)

    inputs = [random(heads), random(key_heads or heads), random(key_heads or heads)]
    slope = random(heads).transpose(1, 2)
    for window in (None, 17):
        for only_read in (False, True):
            options: dict[str, Any] = {
                "documents": documents,
                "only_read": only_read,
                "sliding_window": window,
                "softcap": cap,
            }
            results = []
            both: tuple[Callable[..., tuple[Tensor, None]], ...] = (documents_attention, kernel)
            for function in both:
                given = [tensor.clone().requires_grad_() for tensor in inputs]
                try:
                    found = function(model, *given, None, **options)[0]
                    if only_read:
                        found = torch.cat([found[:, document.read : document.end] for document in documents], dim=1)
                    gradients = torch.autograd.grad((found * slope[:, : found.shape[1]]).sum(), given)
                except Exception as error:  # whatever a missing or an older package says
                    return f"{type(error).__name__}: {error}".splitlines()[0]
                results.append([found.detach(), *gradients])
            for mine, expected in zip(*reversed(results), strict=True):
                scale = max(1.0, float(expected.abs().max()))
                if not torch.allclose(mine.float(), expected.float(), rtol=0, atol=HALF_TOLERANCE * scale):
                    return f"differs from the loop by {float((mine.float() - expected.float()).abs().max()):.2g}"
    return None


def _half(query: Tensor) -> torch.dtype:
    """The 16-bit type in use. Under autocast, rotary embeddings hand queries and keys over in 32 bits."""
    dtype = factor_type(query)
    if dtype not in (torch.bfloat16, torch.float16) and query.device.type != "cpu":
        raise ValueError(f"varlen attention needs bf16 or fp16, not {dtype}")
    return dtype
