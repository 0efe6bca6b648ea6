"""Parameters under ZeRO-3: every process holds a shard of each, and gathers them when they are read.

DeepSpeed's engine does that for the model that it trains. For everything else (loading, the engine's trial forward
passes, a reference model) it is done here. Gathering is collective: all processes have to do it in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@contextmanager
def sharded_loading(config: dict[str, Any]) -> Iterator[None]:
    """Within this context, transformers' from_pretrained keeps only this process's shard of each parameter.

    Only the module that is being filled is whole; weight files are memory-mapped. peft follows the same switch.
    config: what deepspeed.initialize gets; its precision becomes that of the shards.
    """
    from transformers import PreTrainedModel
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    tie_weights = PreTrainedModel.tie_weights

    def tie_gathered(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        # Where a file has both of two tied parameters (Flan-T5), transformers 5.19 ties them if torch.equal says so,
        # which it does of any two shards: outside of a gathering context they look empty.
        names = {name for pair in model.all_tied_weights_keys.items() for name in pair}
        with gathered([model.get_parameter_or_buffer(name) for name in sorted(names)]):
            tie_weights(model, *args, **kwargs)

    switch = HfDeepSpeedConfig(config)  # transformers keeps a weak reference to it
    PreTrainedModel.tie_weights = tie_gathered  # type: ignore[assignment]
    try:
        yield
    finally:
        PreTrainedModel.tie_weights = tie_weights  # type: ignore[method-assign]
        unset_hf_deepspeed_config()
        del switch


def is_sharded(parameter: Tensor) -> bool:
    """Whether this process holds only a shard of it."""
    return hasattr(parameter, "ds_id")


def num_elements(parameter: Tensor) -> int:
    """Number of elements of the whole parameter."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def local_shard(parameter: Tensor) -> Tensor:
    """This process's shard, flat and padded at the end; the parameter itself if it is not sharded."""
    return parameter.ds_tensor if is_sharded(parameter) else parameter  # type: ignore[attr-defined]


def drop_gathered(parameter: Tensor) -> None:
    """Free a gathered copy, because the shards have changed."""
    if is_sharded(parameter):
        parameter.partition(has_been_updated=False)  # type: ignore[attr-defined]


def gathered(parameters: Iterable[Tensor], *, writable: bool = False) -> AbstractContextManager[Any]:
    """Within this context the parameters are whole. Does nothing for those that are whole already.

    writable: they may be changed; the first process's values are then given to all.
    """
    sharded: list[Any] = [parameter for parameter in parameters if is_sharded(parameter)]
    missing = [parameter for parameter in sharded if parameter.ds_status.name == "NOT_AVAILABLE"]
    if not missing:
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
        missing, modifier_rank=0 if writable else None
    )
    return context


def keep_gathered(parameters: Iterable[Tensor]) -> None:
    """Gather the parameters until `drop_gathered`."""
    for parameter in parameters:
        if is_sharded(parameter):
            parameter.all_gather()  # type: ignore[attr-defined]


def gather_in_forward(model: nn.Module) -> Callable[[], None]:
    """Gather each module's own parameters for the duration of its forward pass; returns what removes the hooks.

    Unlike DeepSpeed's engine this prefetches nothing, so a forward pass may also end in an exception. Parameters that
    are read outside the forward pass of their module need `gathered`.
    """
    open_contexts: dict[nn.Module, AbstractContextManager[Any]] = {}

    def before(module: nn.Module, *_: Any) -> None:
        open_contexts[module] = gathered(module.parameters(recurse=False))
        open_contexts[module].__enter__()

    def after(module: nn.Module, *_: Any) -> None:
        open_contexts.pop(module, nullcontext()).__exit__(None, None, None)

    handles = []
    for module in model.modules():
        if any(is_sharded(parameter) for parameter in module.parameters(recurse=False)):
            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(after, always_call=True))  # also after an exception

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


@contextmanager
def gathering_in_forward(model: nn.Module) -> Iterator[None]:
    """`gather_in_forward` within this context."""
    remove = gather_in_forward(model)
    try:
        yield
    finally:
        remove()


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert the parameters, not the buffers: rotary frequencies in 16 bits would shift positions."""
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        parameter.data = parameter.data.to(dtype)
        if is_sharded(parameter):
            shard = local_shard(parameter)
            converted = shard.data.to(dtype)
            shard.data = converted.pin_memory() if shard.is_pinned() else converted
