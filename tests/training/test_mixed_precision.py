"""Under autocast no matrix is multiplied in 32 bits, which would take a GPU ten times as long."""

from typing import Any

import pytest
import torch
from engine_oracle import COMMON, CPU, random_pairs
from test_loop import LORA
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen3Config

from prefpipe.training.adapters import with_adapter
from prefpipe.training.engine import Engine

FAMILIES = {
    "llama": LlamaConfig(**COMMON),
    "qwen3": Qwen3Config(**COMMON, head_dim=8),
    "gemma2": Gemma2Config(**COMMON, head_dim=8, attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
}
PRODUCTS = ("mm", "attention", "linear")


class Products(TorchDispatchMode):
    """Names of the kernels that multiply matrices, and those of them that got one in more than 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.wide: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = str(function)
        of_sums = "attention" in name and "backward" in name  # it gets the logarithms of the rows' sums, too
        if any(part in name for part in PRODUCTS) and not of_sums:
            factors = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.is_floating_point()]
            self.seen.append(name)
            self.wide += [f"{name} of {f.dtype} {tuple(f.shape)}" for f in factors[-2:] if f.dtype != torch.bfloat16]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("head", ["plain", "chunked"])
@pytest.mark.parametrize("batching", ["padded", "shared"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_product_of_a_step_is_of_16_bits(family: str, batching: str, head: str, adapted: bool) -> None:
    torch.manual_seed(0)
    kernel = "eager" if family == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation=kernel)
    engine = Engine(CPU, batching, head)
    engine.prepare(model)
    policy = with_adapter(model, LORA) if adapted else model
    with Products() as products:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = engine.logps(policy, random_pairs(0, 3, longest=9), pairwise=True)
        (found.chosen - found.rejected).sum().backward()
    assert len(products.seen) > 20
    assert products.wide == []
