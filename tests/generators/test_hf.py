"""Sampling: the same answer whatever the batch, that of transformers when greedy, and true log-probabilities."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe import models
from prefpipe.errors import ConfigError
from prefpipe.generators import Skipped, request_seed
from prefpipe.generators.hf import HF, Engine, _draw
from prefpipe.records import Completion, Prompt, prompt_id
from prefpipe.settings import HardwareConfig, ModelConfig

TINY = ModelConfig(name="tiny", path="builtin:tiny")
CPU = HardwareConfig(name="cpu", device="cpu", precision="fp32")
QUESTIONS = [
    "Tom has 3 apples. He buys 4 more. How many apples does Tom have?",
    "Hi",
    "A shop sells 5 pens a day. How many pens does it sell in 6 days? " * 3,
    "Count: 1, 2, 3",
    "漢字 🙂",
]


def prompts(texts: list[str] = QUESTIONS) -> list[Prompt]:
    messages = [[{"role": "user", "content": text}] for text in texts]
    return [Prompt(prompt_id=prompt_id(m), messages=m, source="test") for m in messages]


def sample(folder: Path, rows: list[Prompt], **knobs: object) -> list[Completion]:
    generator = HF(**{"num_samples": 3, "max_new_tokens": 24, **knobs})  # type: ignore[arg-type]
    answers = list(generator.generate(rows, model=TINY, folder=folder, hardware=CPU, seed=7, round_=0))
    assert all(isinstance(answer, Completion) for answer in answers)
    return answers  # type: ignore[return-value]


def test_the_answer_does_not_depend_on_the_batch(tiny_folder):
    together = sample(tiny_folder, prompts())
    alone = [answer for prompt in prompts() for answer in sample(tiny_folder, [prompt])]
    backwards = sample(tiny_folder, prompts()[::-1])
    one_row_at_a_time = sample(tiny_folder, prompts(), max_batch_tokens=1)
    assert [a.token_ids for a in alone] == [a.token_ids for a in together]
    assert [a.token_ids for a in one_row_at_a_time] == [a.token_ids for a in together]
    assert {a.completion_id for a in backwards} == {a.completion_id for a in together}


def test_answers_come_in_the_order_of_the_prompts(tiny_folder):
    answers = sample(tiny_folder, prompts())
    assert [a.prompt_id for a in answers] == [p.prompt_id for p in prompts() for _ in range(3)]
    assert len({a.seed for a in answers}) == len(answers)


def test_samples_differ_and_another_seed_gives_others(tiny_folder):
    first = sample(tiny_folder, prompts()[:1], num_samples=8)
    assert len({tuple(a.token_ids) for a in first}) > 4
    assert request_seed(7, 0, "a", 0) != request_seed(8, 0, "a", 0) != request_seed(8, 1, "a", 0)


def test_greedy_is_what_transformers_generates(tiny_folder):
    engine = Engine(TINY, tiny_folder, CPU)
    for prompt, answer in zip(prompts(), sample(tiny_folder, prompts(), num_samples=1, temperature=0.0), strict=True):
        ids = torch.tensor([engine.template.prompt(prompt.messages)])
        theirs = engine.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=sorted(engine.template.stop_ids),
            pad_token_id=engine.tokenizer.pad_token_id,
        )
        assert answer.token_ids == theirs[0, ids.shape[1] :].tolist()


def test_logp_is_that_of_one_forward_over_the_whole(tiny_folder):
    engine = Engine(TINY, tiny_folder, CPU)
    for answer in sample(tiny_folder, prompts(), temperature=0.7, top_p=0.9):
        prompt_ids = engine.template.prompt(answer.messages)
        ids = torch.tensor([prompt_ids + answer.token_ids])
        with torch.no_grad():
            logps = engine.model(ids).logits[0, :-1].double().log_softmax(-1)
        expected = sum(logps[len(prompt_ids) - 1 + i, token].item() for i, token in enumerate(answer.token_ids))
        assert answer.logp == pytest.approx(expected, abs=1e-3)


def test_a_completion_ends_in_a_stop_token_or_at_the_limit(tiny_folder):
    engine = Engine(TINY, tiny_folder, CPU)
    for answer in sample(tiny_folder, prompts(), num_samples=8, max_new_tokens=40):
        ended = answer.token_ids[-1] in engine.template.stop_ids
        assert answer.finish_reason == ("stop" if ended else "length")
        assert not set(answer.token_ids[:-1]) & engine.template.stop_ids
        assert ended or len(answer.token_ids) == 40
        assert "<" not in answer.text or "<|" not in answer.text


def test_prompts_that_cannot_be_answered_are_named(tiny_folder):
    engine = Engine(TINY, tiny_folder, CPU)
    token = engine.tokenizer.eos_token
    rows = prompts(["fine", f"forged {token}", "far too long " * 4000])
    answers = list(
        HF(num_samples=1, max_new_tokens=4).generate(
            rows, model=TINY, folder=tiny_folder, hardware=CPU, seed=0, round_=0
        )
    )
    assert [type(a) for a in answers] == [Completion, Skipped, Skipped]
    assert [a.reason for a in answers if isinstance(a, Skipped)] == ["special_token", "prompt_too_long"]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.3, 2.0), st.sampled_from([(1.0, 0), (0.9, 0), (0.5, 0), (1.0, 3), (0.8, 5)]))
def test_a_draw_keeps_to_top_p_and_top_k(seed, temperature, limits):
    """Against a plain loop: the k likeliest, of them the smallest set of mass top_p (vLLM's order), then inversion."""
    top_p, top_k = limits
    logits = torch.randn(4, 12, generator=torch.Generator().manual_seed(seed))
    uniform = torch.rand(4, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    generator = HF(temperature=temperature, top_p=top_p, top_k=top_k)
    tokens, _ = _draw(logits, uniform, generator)
    for row in range(4):
        p = (logits[row].double() / temperature).softmax(-1)
        order = sorted(range(12), key=lambda i: -p[i].item())[: top_k or 12]
        whole = sum(p[token].item() for token in order)
        kept, mass = [], 0.0
        for token in order:
            if mass >= (top_p - 1e-9) * whole:
                break
            kept.append(token)
            mass += p[token].item()
        assert tokens[row].item() in kept
        running, target = 0.0, uniform[row].item() * mass
        for token in range(12):
            running += p[token].item() if token in kept else 0.0
            if running > target + 1e-6:
                assert tokens[row].item() <= token
                break


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).repeat(20_000, 1)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens, _ = _draw(logits, uniform, HF())
    frequencies = torch.bincount(tokens, minlength=3) / 20_000
    assert frequencies.tolist() == pytest.approx(torch.tensor([0.0, 1.0, 2.0]).softmax(-1).tolist(), abs=0.015)


def test_greedy_with_several_samples_is_refused():
    with pytest.raises(ConfigError, match=r"generator\.temperature=0 with generator\.num_samples=4"):
        HF(temperature=0.0)


def test_a_gpu_that_is_not_there_is_said_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=r"hardware\.device=cuda, but torch sees no GPU"):
        models.device_of(HardwareConfig(name="x", device="cuda"))
