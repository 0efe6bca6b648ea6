"""The weights that training starts from, and what is held of them in 16 bits.

Frozen linear layers can be: it is what autocast makes of them anyway, in half the memory and without a copy for each
forward pass. Embeddings, norms, and a head that shares the embeddings' weights autocast does not convert.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from prefpipe import models
from prefpipe.reward_models import new_reward_model
from prefpipe.settings import ModelConfig
from prefpipe.training.engine import without_dropout


def load(
    model: ModelConfig, folder: Path, device: torch.device, *, rewards: bool, seed: int, half: torch.dtype | None = None
) -> PreTrainedModel:
    """A model without dropout, in float32: an optimizer's updates at a learning rate of 5e-7 vanish in bfloat16.

    rewards: a reward model; its head is drawn with the seed where the folder has none.
    half: the type of the linear layers instead, where none is trained; the device never holds them in more. QLoRA's are
        in 4 bits.
    """
    four_bit = model.adapter == "qlora"
    at_first = device if half is None or four_bit else torch.device("cpu")
    if rewards:
        loaded = new_reward_model(model, folder, seed=seed, device=at_first)
    else:
        loaded = models.load_weights(model, folder, dtype=torch.float32, device=at_first, four_bit=four_bit)
    if half is not None and not four_bit:
        _halve(loaded, half)
        loaded.to(device)  # type: ignore[arg-type]
    without_dropout(loaded)
    return loaded


def _halve(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Not the head of a reward model, which is computed without autocast, and trained beside an adapter."""
    embeddings = model.get_input_embeddings().weight
    kept = {"score", *(model._keep_in_fp32_modules or ())}  # T5 asks the latter for their type
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not kept.intersection(name.split(".")) and module.weight is not embeddings:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Within this context a model can be called without autocast: a layer is in float32 for its own forward pass."""
    held: dict[nn.Parameter, torch.Tensor] = {}

    def before(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            held[parameter] = parameter.data
            parameter.data = parameter.data.float()

    def after(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = held.pop(parameter)

    handles = []
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.dtype in (torch.bfloat16, torch.float16):
            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(after, always_call=True))  # also after an exception
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
