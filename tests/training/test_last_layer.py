"""The last layer computes what is read of it and nothing else; that its numbers stay is test_engine's matter."""

import copy
import functools

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3Config

from prefpipe.training.batches import Example, collate
from prefpipe.training.engine import Engine
from prefpipe.training.last_layer import tokens_read

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ENGINES = {batching: Engine(torch.device("cpu"), batching) for batching in ("padded", "packed", "shared")}


def model(config=LlamaConfig, **kwargs):
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(config(**SIZES, **kwargs), dtype=torch.float64, attn_implementation="sdpa")
    for module in net.modules():
        if "Norm" in type(module).__name__:  # transformers' own rounds to float32
            module.forward = functools.partial(_norm, module.weight, module.variance_epsilon)
    return net


def _norm(weight, eps, hidden):
    return torch.nn.functional.rms_norm(hidden, hidden.shape[-1:], weight, eps)


def examples():
    rng = np.random.default_rng(0)
    sides = [[rng.integers(40, size=n).astype(np.int32) for n in sizes] for sizes in ((9, 3, 4), (1, 2, 1), (6, 1, 5))]
    return [Example(row, *side) for row, side in enumerate(sides)]


def tokens_seen(net, batching):
    """How many tokens each layer's MLP and each projection of queries and keys is given."""
    seen = {}
    handles = []
    for index, layer in enumerate(net.model.layers):
        parts = {"mlp": layer.mlp.down_proj, "q": layer.self_attn.q_proj, "k": layer.self_attn.k_proj}
        for name, part in parts.items():
            # Of what comes out: hooks run in the order of their registration, and the narrowing ones came first.
            handles.append(
                part.register_forward_hook(
                    lambda _, args, __, key=(index, name): seen.__setitem__(key, args[0].shape[1])
                )
            )
    ENGINES[batching].logps(net, examples(), pairwise=True)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config])
@pytest.mark.parametrize("batching", ["packed", "shared"])
def test_the_last_layer_is_given_the_tokens_that_are_read(config, batching):
    net = model(config, **({"head_dim": 4} if config is Qwen3Config else {}))
    ENGINES[batching].prepare(net)
    batch = collate(examples(), batching, pairwise=True)
    total, read = batch.input_ids.shape[1], len(tokens_read(batch.documents))
    # Of each pair the chosen completion with its prompt's last token, and the rejected one (packed: with that too).
    assert read == sum(len(e.chosen) + 1 + len(e.rejected) + (batching == "packed") for e in examples())
    assert set(batch.positions.tolist()) <= set(tokens_read(batch.documents).tolist())
    seen = tokens_seen(net, batching)
    for layer in range(3):
        expected = read if layer == 2 else total
        assert (seen[layer, "mlp"], seen[layer, "q"], seen[layer, "k"]) == (expected, expected, total)


def test_nothing_is_narrowed_without_documents():
    """The padded engine, and the model's own users, once it was prepared."""
    net = model()
    ids = torch.arange(12)[None]
    before = net(ids).logits
    ENGINES["packed"].prepare(net)
    net.config._attn_implementation_internal = "sdpa"
    assert torch.equal(net(ids).logits, before)
    assert set(tokens_seen(net, "padded").values()) == {max(len(e.prompt) + len(e.rejected) for e in examples())}


@pytest.mark.parametrize("batching", ["packed", "shared"])
def test_gradients_stay_with_checkpointing_and_through_two_forward_passes(batching):
    """The second pass of checkpointing sees the tokens of its own batch, though another batch came in between."""
    whole, narrowed = model(), model()
    narrowed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    narrowed.train()
    ENGINES[batching].prepare(narrowed)
    gradients = []
    for net, engine in ((whole, ENGINES["padded"]), (narrowed, ENGINES[batching])):
        losses = [engine.logps(net, part, pairwise=True) for part in (examples()[:2], examples()[1:])]
        sum((logps.chosen - 2 * logps.rejected).sum() for logps in losses).backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_mixture_of_experts_is_left_whole_and_a_copy_is_narrowed_by_itself():
    experts = model(MixtralConfig, num_local_experts=2, num_experts_per_tok=1)
    ENGINES["packed"].prepare(experts)
    assert not hasattr(experts.model.layers[-1], "narrowed")
    first = model()
    ENGINES["packed"].prepare(first)
    second = copy.deepcopy(first)
    expected = ENGINES["packed"].logps(first, examples(), pairwise=True)
    found = ENGINES["packed"].logps(second, examples(), pairwise=True)
    assert torch.equal(found.chosen, expected.chosen)
    assert torch.equal(found.rejected, expected.rejected)
