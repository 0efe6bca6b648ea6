"""Every way to compute log-probabilities gives the same numbers and gradients, family by family."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from prefpipe.training.batches import Example
from prefpipe.training.engine import Engine

COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
FAMILIES = {
    "llama": LlamaConfig(**COMMON),
    "llama_tied": LlamaConfig(**COMMON, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**COMMON),
    "qwen3": Qwen3Config(**COMMON, head_dim=8),
    "mistral": MistralConfig(**COMMON, sliding_window=None),
    "gemma2": Gemma2Config(
        **COMMON, head_dim=8, attn_logit_softcapping=5.0, final_logit_softcapping=3.0, sliding_window=256
    ),
}
CPU = torch.device("cpu")
EAGER_TOLERANCE = 1e-6
"""transformers' eager attention takes its softmax in float32 whatever the model's dtype; so do its norms, which is why
gradients, summed over other orders, are compared to 1e-5."""


def model(family: str, attention: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation=attention, dtype=torch.float64).eval()


def examples(seed: int = 0, count: int = 5, longest: int = 12) -> list[Example]:
    rng = np.random.default_rng(seed)
    made = []
    for row in range(count):
        sizes = rng.integers(1, longest, 3)
        made.append(Example(row, *(rng.integers(1, 61, size).astype(np.int32) for size in sizes)))
    return made


def by_hand(net: PreTrainedModel, rows: list[Example]) -> list[tuple[float, float]]:
    """One completion at a time, the whole sequence through the model, summed in a loop."""
    found = []
    for e in rows:
        sums = []
        for completion in (e.chosen, e.rejected):
            ids = torch.tensor([[*e.prompt.tolist(), *completion.tolist()]])
            with torch.no_grad():
                logps = net(input_ids=ids).logits[0].double().log_softmax(-1)
            start = len(e.prompt)
            sums.append(sum(logps[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1])))
        found.append((sums[0], sums[1]))
    return found


def engine(shared: bool, attention: str = "sdpa") -> Engine:
    return Engine(CPU, shared=shared, additive_mask=attention == "eager")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shared", [False, True], ids=["padded", "shared"])
def test_logps_are_those_of_one_completion_at_a_time(family, attention, shared):
    attention = "eager" if family == "gemma2" else attention
    net, rows = model(family, attention), examples()
    out = engine(shared, attention).logps(net, rows, pairwise=True)
    expected = by_hand(net, rows)
    tolerance = EAGER_TOLERANCE if attention == "eager" else 1e-9
    assert out.chosen.tolist() == pytest.approx([c for c, _ in expected], abs=tolerance)
    assert out.rejected.tolist() == pytest.approx([r for _, r in expected], abs=tolerance)
    assert out.chosen_tokens.tolist() == [len(e.chosen) for e in rows]
    assert out.rejected_tokens.tolist() == [len(e.rejected) for e in rows]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_shared_and_padded_are_the_same(family):
    attention = "eager" if family == "gemma2" else "sdpa"
    net, rows = model(family, attention), examples(1)
    weights = torch.linspace(-1, 1, len(rows), dtype=torch.float64)
    gradients = []
    for shared in (False, True):
        net.zero_grad()
        out = engine(shared, attention).logps(net, rows, pairwise=True)
        (weights * out.chosen + weights.flip(0) * out.rejected).sum().backward()
        gradients.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    for padded, shared_ in zip(*gradients, strict=True):
        assert torch.allclose(padded, shared_, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shared", [False, True], ids=["padded", "shared"])
def test_a_pair_does_not_depend_on_its_neighbours(shared):
    net, rows = model("llama"), examples(2)
    together = engine(shared).logps(net, rows, pairwise=True)
    for i, row in enumerate(rows):
        alone = engine(shared).logps(net, [row], pairwise=True)
        assert alone.chosen.item() == pytest.approx(together.chosen[i].item(), abs=1e-10)
        assert alone.rejected.item() == pytest.approx(together.rejected[i].item(), abs=1e-10)


@pytest.mark.parametrize("shared", [False, True], ids=["padded", "shared"])
def test_one_side_cannot_see_the_other(shared):
    """Changing every token of the rejected side leaves the chosen log-probability bit for bit (trl#2834)."""
    net, rows = model("llama"), examples(3)
    other = [e._replace(rejected=(e.rejected + 7) % 61) for e in rows]
    before, after = (engine(shared).logps(net, batch, pairwise=True) for batch in (rows, other))
    assert torch.equal(before.chosen, after.chosen)
    assert not torch.equal(before.rejected, after.rejected)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 5, 1), (1, 1, 5), (9, 1, 1)])
def test_shortest_prompts_and_completions(sizes):
    net = model("llama")
    row = Example(0, *(np.arange(1, n + 1, dtype=np.int32) for n in sizes))
    ((chosen, rejected),) = by_hand(net, [row])
    for shared in (False, True):
        out = engine(shared).logps(net, [row], pairwise=True)
        assert (out.chosen.item(), out.rejected.item()) == pytest.approx((chosen, rejected), abs=1e-10)


def test_all_logps_keep_the_order_of_the_examples():
    net, rows = model("llama"), examples(4, count=9)
    expected = by_hand(net, rows)
    for shared in (False, True):
        out = engine(shared).all_logps(net, rows, batch_size=2)
        assert out.chosen.tolist() == pytest.approx([c for c, _ in expected], abs=1e-9)
        assert out.rejected.tolist() == pytest.approx([r for _, r in expected], abs=1e-9)


def test_sft_reads_only_the_chosen_side():
    net, rows = model("llama"), examples(5)
    out = engine(shared=True).logps(net, [e._replace(rejected=e.rejected[:0]) for e in rows], pairwise=False)
    assert out.chosen.tolist() == pytest.approx([c for c, _ in by_hand(net, rows)], abs=1e-9)
    assert out.rejected.tolist() == [0.0] * len(rows)


@pytest.mark.parametrize("shared", [False, True], ids=["padded", "shared"])
def test_float32_keeps_five_digits(shared):
    rows = examples(6)
    exact = by_hand(model("llama"), rows)
    out = engine(shared).logps(model("llama").float(), rows, pairwise=True)
    assert out.chosen.tolist() == pytest.approx([c for c, _ in exact], rel=1e-5)
