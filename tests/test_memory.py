"""The memory model against autograd's own list of saved tensors, transformers' parameter counts, and sums by hand."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from prefpipe.errors import ConfigError
from prefpipe.losses import DPO, Loss, SimPO
from prefpipe.losses.tokens import TDPO
from prefpipe.memory import (
    Lengths,
    ModelShape,
    Setting,
    disk,
    estimate,
    estimates,
    layers,
    longest_allowed,
    micro_batch,
    read_shape,
    shape_of,
    size,
)
from prefpipe.settings import HardwareConfig, ModelConfig, TrainingConfig
from prefpipe.training import attention, checkpoints, head
from prefpipe.training.adapters import with_adapter
from prefpipe.training.batches import Example
from prefpipe.training.engine import Engine

LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14_336,
    "tie_word_embeddings": False,
}
SMALL = {
    "vocab_size": 256,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SMALL | {"tie_word_embeddings": False},
    "llama tied, with biases": SMALL | {"model_type": "llama", "tie_word_embeddings": True, "attention_bias": True},
    "qwen2": SMALL | {"tie_word_embeddings": True},
    "qwen3": SMALL | {"head_dim": 16, "tie_word_embeddings": False},
    "mistral": SMALL | {"tie_word_embeddings": False, "head_dim": 8},
    "gemma2": SMALL | {"head_dim": 16},
    "gpt2": {"vocab_size": 256, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
}


def setting(
    shape: ModelShape | None = None,
    lengths: list[Lengths] | None = None,
    *,
    loss: Loss | None = None,
    adapter: str = "none",
    gpus: int = 1,
    device: str = "cpu",
    precision: str = "fp32",
    zero: dict[str, Any] | None = None,
    **training: Any,
) -> Setting:
    return Setting(
        shape or shape_of(LLAMA_8B),
        HardwareConfig(name="t", device=device, precision=precision, gpus_per_node=gpus, **(zero or {})),
        TrainingConfig(**({"global_batch_size": 8, "micro_batch_size": 8} | training)),
        loss or DPO(),
        ModelConfig(name="t", path="t", adapter=adapter),
        lengths or [Lengths(192, 64, 32)] * 8,
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_are_counted_as_transformers_counts_them(name: str) -> None:
    config = {"model_type": name.partition(" ")[0]} | FAMILIES[name]
    made = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made)
    expected = sum(parameter.numel() for parameter in model.parameters())
    for source in (config, made.to_dict()):
        assert shape_of(source).num_parameters == expected


def test_parameters_of_an_encoder_decoder(t5_folder: Path) -> None:
    """But for its position biases, of 2 x 8 buckets and 4 heads."""
    from safetensors.torch import load_file

    expected = sum(tensor.numel() for tensor in load_file(t5_folder / "model.safetensors").values())
    assert read_shape(t5_folder).num_parameters == expected - 2 * 8 * 4


def test_llama_8b_has_the_number_of_parameters_that_its_authors_name() -> None:
    assert shape_of(LLAMA_8B).num_parameters == 8_030_261_248


def test_a_mixture_of_experts_is_refused_and_a_missing_config_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_local_experts=8: mixtures of experts"):
        shape_of(LLAMA_8B | {"num_local_experts": 8})
    with pytest.raises(ConfigError, match=r"has no 'vocab_size'"):
        shape_of({key: value for key, value in LLAMA_8B.items() if key != "vocab_size"})
    with pytest.raises(ConfigError, match=r"config.json cannot be read"):
        read_shape(tmp_path)


def test_constants_are_those_of_the_code_that_they_describe() -> None:
    assert estimates.KEPT_LOGITS == head.KEPT_BYTES
    assert estimates.TILES == {"cpu": head.TILE_BYTES, "cuda": head.GPU_TILE_BYTES}
    assert layers.QUERY_BLOCK == attention.QUERY_BLOCK
    assert estimates.STATES_ON_DISK == checkpoints.KEPT + 1


# What autograd keeps, counted by itself


def saved_bytes(forward: Callable[[], torch.Tensor], model: nn.Module) -> int:
    """Bytes of the storages that a backward pass would need, but for the model's own weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point():
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(found.values())


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 4, "intermediate_size": 176, "tie_word_embeddings": False}
    return LlamaForCausalLM(LlamaConfig(**(shape | changes))).train()


def examples(lengths: list[Lengths]) -> list[Example]:
    rng = np.random.default_rng(0)
    return [
        Example(row, *(rng.integers(512, size=n).astype(np.int32) for n in pair)) for row, pair in enumerate(lengths)
    ]


PAIRS = [Lengths(90, 40, 30), Lengths(20, 60, 70), Lengths(128, 16, 300)]


@pytest.mark.parametrize("batching", ["shared", "packed", "padded"])
@pytest.mark.parametrize("how", ["plain", "grouped", "chunked", "lora", "recomputed"])
def test_what_the_backward_pass_needs(batching: str, how: str) -> None:
    model = llama(num_key_value_heads=2 if how == "grouped" else 4)
    shape = shape_of(model.config.to_dict())
    adapter = ModelConfig(name="t", path="t", adapter="lora" if how == "lora" else "none")
    engine = Engine(torch.device("cpu"), batching, "chunked" if how == "chunked" else "plain")
    engine.prepare(model)
    trained = with_adapter(model, adapter)
    if how == "recomputed":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    kept = saved_bytes(lambda: engine.logps(trained, examples(PAIRS), pairwise=True).chosen, trained)
    found = estimate(
        setting(
            shape,
            PAIRS,
            adapter=adapter.adapter,
            batching=batching,
            head=engine.head,
            gradient_checkpointing=how == "recomputed",
        )
    )
    logits = found.logits if how in ("plain", "grouped", "recomputed") else 0
    # A checkpointed layer holds the rotations as an argument, which the hooks do not see.
    assert found.activations + logits == pytest.approx(kept, rel=0.05 if how == "recomputed" else 0.02)


# Sums by hand


def test_adam_gradients_and_a_second_model_cost_what_they_hold() -> None:
    """8.03 G parameters: 4 bytes each of weights, gradients and a reference, 8 of Adam's moments."""
    number = 8_030_261_248
    plain = estimate(setting())
    assert (plain.weights, plain.gradients, plain.optimizer, plain.reference) == (4 * number, 4 * number, 8 * number, 0)
    assert plain.total - estimate(setting(optimizer="sgd")).total == 8 * number
    assert estimate(setting(reference="online")).total - plain.total == 4 * number
    assert estimate(setting(loss=SimPO())).total == plain.total


def test_logits_are_those_of_completion_tokens_or_a_tile() -> None:
    """8 pairs of 64 + 32 tokens, 128,256 words, 4 bytes; a tile has 16 MiB."""
    assert estimate(setting(head="plain")).logits == 8 * 96 * 128_256 * 4
    assert estimate(setting(head="chunked")).logits == 2**24
    assert estimate(setting(adapter="lora")).logits == 2**24
    few = estimate(setting(head="auto", lengths=[Lengths(192, 64, 32)])).logits
    assert few == 96 * 128_256 * 4
    assert estimate(setting(head="auto", lengths=[Lengths(192, 64, 32)] * 30)).logits == 2**24


def test_lora_trains_two_thin_matrices_for_each_linear_layer() -> None:
    """Rank 16 on Llama 8B: 16 x (inputs + outputs) of q, k, v, o, gate, up and down, 32 layers: 41.9 M."""
    per_layer = 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14_336))
    found = estimate(setting(adapter="lora"))
    assert found.gradients == 4 * 32 * per_layer == 4 * 41_943_040
    assert found.weights == 4 * 8_030_261_248 + found.gradients
    two = replace(
        setting(), model=ModelConfig(name="t", path="t", adapter="lora", adapter_targets=["q_proj", "v_proj"])
    )
    assert estimate(two).gradients == 4 * 32 * 16 * (8192 + 5120)


def test_frozen_linear_layers_take_two_bytes_under_autocast() -> None:
    """Llama 8B: of its 8.03 G parameters, 6.98 G in 32 layers and a head of 0.53 G; DoRA keeps them in float32."""
    number, linear = 8_030_261_248, 32 * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 14_336) + 128_256 * 4096
    half = {"device": "cuda", "precision": "bf16"}
    found = estimate(setting(adapter="lora", **half))
    assert found.weights == 4 * number - 2 * linear + found.gradients
    assert estimate(setting(adapter="dora", **half)).weights > 4 * number
    assert estimate(setting(reference="online", **half)).reference == 4 * number - 2 * linear
    moving = {"reference": "moving", "reference_alpha": 0.5, "reference_steps": 1}
    assert estimate(setting(**moving, **half)).reference == 4 * number


def test_zero_shards_what_its_stage_says() -> None:
    """Stages 2 and 3 on 8 GPUs in bfloat16: 12 bytes of optimizer and master weights, and 4 of gradients, over 8."""
    number = 8_030_261_248
    two, three = (
        estimate(setting(gpus=8, device="cuda", precision="bf16", zero={"zero_stage": stage}, global_batch_size=64))
        for stage in (2, 3)
    )
    assert two.optimizer == three.optimizer == 16 * number // 8
    assert two.weights == 2 * number
    assert three.weights == 2 * number // 8 + 2 * 10**9
    assert two.gradients == three.gradients == 2 * number // 8 + 2 * 2 * 5 * 10**8
    off = {"zero_stage": 3, "offload_optimizer": True, "offload_params": True}
    away = estimate(setting(gpus=8, device="cuda", precision="bf16", zero=off, global_batch_size=64))
    assert (away.weights, away.optimizer, away.host) == (2 * 10**9, 0, 8 * (16 * number // 8 + 2 * number // 8))


@pytest.mark.parametrize(
    ("stage", "loss", "expected"),
    [
        (2, DPO(), 2 * 8_030_261_248),
        (3, DPO(), 2 * 8_030_261_248 // 8),
        (3, TDPO(), 2 * 8_030_261_248 // 8 + 2 * 128_256 * 4096),
    ],
)
def test_zero_3_shards_a_second_model_but_for_the_head_that_tdpo_reads(stage: int, loss: Loss, expected: int) -> None:
    half = {"device": "cuda", "precision": "bf16", "global_batch_size": 64, "reference": "online"}
    assert estimate(setting(gpus=8, loss=loss, zero={"zero_stage": stage}, **half)).reference == expected


def test_accumulation_keeps_gradients_beside_activations() -> None:
    once, again = (estimate(setting(device="cuda", global_batch_size=size)) for size in (8, 16))
    assert once.parts() == again.parts()
    assert once.total < again.total <= once.total + 4 * 8_030_261_248 + 4 * 128_256 * 4096


def test_a_micro_batch_holds_the_longest_pairs_that_fit() -> None:
    pairs = [(10, 5, 5), (100, 20, 10), (50, 40, 60)]
    training = TrainingConfig(micro_batch_size=2, global_batch_size=2)
    assert micro_batch(pairs, training) == [(100, 20, 10), (50, 40, 60)]
    assert micro_batch(pairs, replace(training, micro_batch_tokens=400)) == [(100, 20, 10)]
    assert micro_batch(pairs, replace(training, micro_batch_tokens=100)) == [(100, 20, 10)]
    demonstrations = [(50, 10, 0), (40, 10, 0)]
    assert micro_batch(demonstrations, replace(training, micro_batch_tokens=110)) == demonstrations
    assert longest_allowed(replace(training, max_tokens=100, max_prompt_tokens=60)) == [(60, 40, 40)] * 2
    assert longest_allowed(training, pairwise=False)[0].rejected == 0


def test_disk_holds_three_states_while_one_is_written() -> None:
    number = 8_030_261_248
    found = disk(setting(save_every_steps=10), num_pairs=1000)
    assert found.states == 3 * 12 * number
    assert found.checkpoint == 4 * number
    assert found.reference_cache == 1000 * 2 * (4 * 64 + 44)
    assert disk(setting(loss=SimPO()), num_pairs=1000).reference_cache == 0
    assert disk(setting(), num_pairs=1000).states == 0


def test_sizes_are_written_for_people() -> None:
    assert [size(1), size(2**20 * 512), size(13.25 * 2**30)] == ["1 MiB", "512 MiB", "13.2 GiB"]
