"""The last layer, computed only where its output is read: at completion tokens, not at prompt tokens.

In the last layer, prompts are needed only as keys and values. Everything else that works token by token (queries, the
output projection, the MLP) gets only the tokens that are read; the others are zeros.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefpipe.training.attention import Document

TOKEN_WISE = ("self_attn.q_proj", "self_attn.o_proj", "mlp")
"""Parts of a layer that can run on a subset of tokens; not a mixture of experts, whose output is not a tensor."""


def narrow_last_layer(model: PreTrainedModel) -> None:
    """Let the model's last layer compute only what is read of the `documents` it is given.

    Nothing changes for a forward pass without documents, or for a family whose layers have other names.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    last = layers[-1] if layers else None
    if last is None or hasattr(last, "narrowed") or not hasattr(getattr(last, "mlp", None), "down_proj"):
        return
    if not hasattr(getattr(last, "self_attn", None), "q_proj") or not hasattr(last.self_attn, "o_proj"):
        return
    last.narrowed = _Narrowed(last)


class _Narrowed:
    """Hooks on a layer and its token-wise parts, and the tokens of the current row that are read."""

    def __init__(self, layer: nn.Module) -> None:
        self.tokens: Tensor | None = None
        self.length = 0
        # Before the layer, so that the second pass of gradient checkpointing sets the tokens again.
        layer.register_forward_pre_hook(self._enter, with_kwargs=True)
        layer.register_forward_hook(self._leave)
        for name in TOKEN_WISE:
            part = layer.get_submodule(name)
            part.register_forward_pre_hook(self._select)
            part.register_forward_hook(self._scatter)

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        documents = kwargs.get("documents")
        if documents is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        # Not blocking: the host would wait here for all that the GPU still has to do.
        self.tokens = tokens_read(documents).to(hidden.device, non_blocking=True)
        self.length = hidden.shape[1]
        return args, {**kwargs, "only_read": True}

    def _leave(self, *_: Any) -> None:
        self.tokens = None

    def _select(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return None if self.tokens is None else (args[0].index_select(1, self.tokens), *args[1:])

    def _scatter(self, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self.tokens is None:
            return None
        whole = output.new_zeros(output.shape[0], self.length, *output.shape[2:])
        return whole.index_copy(1, self.tokens, output)


def tokens_read(documents: Sequence[Document]) -> Tensor:
    """[K] positions in the row, in order, whose hidden states are read."""
    return torch.cat([torch.arange(document.read, document.end) for document in documents])
