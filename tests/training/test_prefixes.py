"""Rows with common prefixes in one line give what each gives alone."""

import numpy as np
import pytest
import torch
from engine_oracle import COMMON
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig

from prefpipe.training.engine import Engine
from prefpipe.training.prefixes import LEAST_SHARED, Row, common_prefix, shared_batches

FAMILIES = {
    "llama": LlamaConfig(**COMMON),
    "mistral": MistralConfig(**COMMON, sliding_window=24),
    "gemma2": Gemma2Config(
        **COMMON, head_dim=8, attn_logit_softcapping=5.0, final_logit_softcapping=3.0, sliding_window=24
    ),
}


def rows() -> list[Row]:
    """Prefixes of every kind: none, short, long, of different lengths, a whole row, and twice the same row."""
    rng = np.random.default_rng(0)
    trunk = rng.integers(3, 61, 60)
    made = [Row(trunk, 50), Row(trunk, 20), Row(trunk[:40], 30), Row(rng.integers(3, 61, 9), 1)]
    for shared, start in ((LEAST_SHARED - 1, 20), (LEAST_SHARED, 5), (30, 29), (30, 30), (30, 31), (45, 60), (58, 10)):
        ids = np.concatenate([trunk[:shared], [1], rng.integers(3, 61, 20)])
        made.append(Row(ids, min(start, len(ids) - 1)))
    return [Row(row.ids.astype(np.int32), row.start) for row in [*made, made[0]]]


def alone(model: torch.nn.Module, row: Row) -> np.ndarray:
    ids = torch.tensor(row.ids[None].astype(np.int64))
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0].log_softmax(-1)
    return np.array([logps[t - 1, ids[0, t]].item() for t in range(row.start, len(row.ids))])


@pytest.mark.parametrize("max_tokens", [1, 100, 10_000])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_gives_what_it_gives_alone(family, max_tokens):
    torch.manual_seed(0)
    kernel = "eager" if family == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation=kernel).eval()
    given = rows()
    expected = [alone(model, row) for row in given]
    engine = Engine(torch.device("cpu"), "shared")
    engine.prepare(model)
    seen = []
    for numbers, batch in shared_batches(given, max_tokens=max_tokens):
        assert batch.input_ids.numel() <= max_tokens or len(numbers) == 1
        for number, found in zip(numbers, engine.each_token(model, batch), strict=True):
            assert found == pytest.approx(expected[number], abs=1e-5), number
        seen += numbers
    assert sorted(seen) == list(range(len(given)))


def test_a_common_prefix_is_there_once():
    """Five rows of 100 tokens that part after 90 and a sixth after 50: 100 + 4 x 10 + 50 tokens."""
    rng = np.random.default_rng(0)
    trunk = rng.integers(3, 61, 90)
    ends = [np.concatenate([trunk, [i], rng.integers(3, 61, 9)]) for i in range(5)]
    ends.append(np.concatenate([trunk[:50], [1], rng.integers(3, 61, 49)]))
    ((numbers, batch),) = shared_batches([Row(e.astype(np.int32), 95) for e in ends], max_tokens=10_000)
    assert sorted(numbers) == list(range(6))
    assert batch.input_ids.shape == (1, 190)


def test_common_prefix():
    first = np.array([1, 2, 3])
    assert common_prefix(first, np.array([1, 2, 4, 5])) == 2
    assert common_prefix(first, np.array([1, 2])) == 2
    assert common_prefix(first, first) == 3
    assert common_prefix(first, np.array([2])) == 0
