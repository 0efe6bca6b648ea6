"""Attention over several documents in one row: each sees itself and its prompt, and nothing else.

transformers lets a model's attention be replaced by name. Ours gets the document boundaries as numbers and calls the
kernel once per document. So no work goes into padding or into pairs of tokens that a mask would remove, and nothing
in one document can affect another, not even by a rounding error.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

DOCUMENTS = "prefpipe_documents"
"""Name of this attention in transformers; without a mask function of that name, transformers makes no mask."""

QUERY_BLOCK = 256
"""How many queries of a masked attention are computed together."""

UNSUPPORTED = ("s_aux", "position_bias", "head_mask")
"""Arguments that some families pass to attention and this one would ignore."""


class Document(NamedTuple):
    """Tokens start .. end of a row, with causal attention among themselves.

    With shared > 0 they also see all of prompt .. prompt + shared, the start of an earlier document: they are a further
    completion of that prompt, and their positions continue from its end. Of the last layer's output, read .. end
    is used.
    """

    start: int
    end: int
    prompt: int = 0
    shared: int = 0
    read: int = 0


def documents_attention(
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
    """Causal attention inside each document.

    Args:
        query: [1, heads, T, D]. key, value: [1, key heads, T, D]; key heads divide heads.
        documents: in order; together they cover 0 .. T without a gap.
        only_read: return zeros where a document's output is not read.
        sliding_window: how many tokens a token sees, itself included; None: all before it.
        softcap: scores become softcap * tanh(score / softcap), as in Gemma 2.

    Returns:
        ([1, T, heads, D], None), as transformers expects.

    Raises:
        ValueError: the family passes something that this attention does not support.
    """
    refuse_unsupported(kwargs)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    sizes = [document.end - document.start for document in documents]
    # Split, not sliced: the backward pass of each slice would fill a tensor of the whole row with zeros.
    rows = [tensor.split(sizes, dim=2) for tensor in (query, key, value)]
    number = {document.start: index for index, document in enumerate(documents)}
    parts: list[Tensor] = []
    for document, queries, keys, values in zip(documents, *rows, strict=True):
        if document.shared:
            of_prompt = [tensor[number[document.prompt]][:, :, : document.shared] for tensor in rows[1:]]
            keys, values = torch.cat([of_prompt[0], keys], 2), torch.cat([of_prompt[1], values], 2)
        unread = document.read - document.start if only_read else 0
        if unread > 0:
            parts.append(queries.new_zeros(*queries.shape[:2], unread, values.shape[-1]))
            queries = queries[:, :, unread:]
        window = sliding_window if sliding_window is not None and sliding_window < keys.shape[2] else None
        if softcap is not None:
            parts.append(_capped(queries, keys, values, scaling, softcap, _visible(queries, keys, window), dropout))
            continue
        if document.shared == 0 and window is None and unread <= 0:
            attended = scaled_dot_product_attention(
                queries, keys, values, dropout_p=dropout, is_causal=True, scale=scaling
            )
            parts.append(attended)
        else:
            parts += _in_blocks(queries, keys, values, window, scaling, dropout)
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def refuse_unsupported(kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError for an argument that no attention over documents supports."""
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"attention of several documents in one row knows no {name}")


def _in_blocks(
    queries: Tensor, keys: Tensor, values: Tensor, window: int | None, scaling: float | None, dropout: float
) -> list[Tensor]:
    """Attention where the last query sees the last key, and so on: the outputs of blocks of queries, in order.

    A block is given only the keys that it sees, and masks only its own triangle: one mask for all queries would make
    the kernel compute twice as much. Seen from its last query and key, every block's mask is a corner of the same one.
    """
    before = keys.shape[2] - queries.shape[2]
    visible = _visible(queries[:, :, :QUERY_BLOCK], keys, window)
    parts = []
    for start in range(0, queries.shape[2], QUERY_BLOCK):
        block = queries[:, :, start : start + QUERY_BLOCK]
        end = before + start + block.shape[2]
        first = 0 if window is None else max(0, before + start - window + 1)
        seen, of_them = keys[:, :, first:end], values[:, :, first:end]
        mask = visible[-block.shape[2] :, -seen.shape[2] :]
        parts.append(
            scaled_dot_product_attention(block, seen, of_them, attn_mask=mask, dropout_p=dropout, scale=scaling)
        )
    return parts


def _visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """[Q, K] bool: the last query sees the last key, each one before it one key less; at most `window` keys."""
    num_queries, num_keys = queries.shape[2], keys.shape[2]
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=queries.device)
    visible = visible.tril(num_keys - num_queries)
    return visible if window is None else visible.triu(num_keys - num_queries - window + 1)


def _capped(
    queries: Tensor, keys: Tensor, values: Tensor, scaling: float | None, cap: float, visible: Tensor, dropout: float
) -> Tensor:
    """Attention with soft-capped scores, which no fused CPU kernel supports."""
    scale = queries.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (queries @ keys.transpose(2, 3) * scale / cap).tanh() * cap
    scores = scores.masked_fill(~visible, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype)
    return torch.dropout(weights, dropout, train=dropout > 0) @ values


def set_attention(model: PreTrainedModel, name: str) -> str:
    """Switch the model to DOCUMENTS or another attention of transformers, and return the name of the one before.

    It is not switched back by itself: gradient checkpointing repeats the forward pass during the backward pass.
    """
    AttentionInterface.register(DOCUMENTS, documents_attention)
    before = str(model.config._attn_implementation)
    model.config._attn_implementation_internal = name
    return before
