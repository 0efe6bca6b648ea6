"""Sampling with generator.calculator=true: right results whatever the model thinks, the same answer in every batch."""

import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizer_makes import BRACKETS, MAKES, unigram
from tokenizers.processors import TemplateProcessing
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from prefpipe import artifacts
from prefpipe.artifacts import Plan
from prefpipe.errors import ConfigError
from prefpipe.generators.hf import HF, Engine
from prefpipe.generators.replay import Replay
from prefpipe.records import Completion, Prompt, prompt_id
from prefpipe.settings import HardwareConfig, ModelConfig
from prefpipe.sources.arithmetic import arithmetic_problems
from prefpipe.stages.generate import generate

TINY = ModelConfig(name="tiny", path="builtin:tiny")
CPU = HardwareConfig(name="cpu", device="cpu", precision="fp32")
ANNOTATION = re.compile(r"<<([0-9]+)([-+*/])([0-9]+)=(.*?)>>")
CHAT = "{% for message in messages %}{{ message['content'] + ':' }}{% endfor %}"

LEARNT = {
    "Tom has 3": "<<12+30=41>>41 pens.",
    "Tom has 12": "Tom has <<7-9=2>>2",
    "pens": "3 * 3 = <<3*3=8",
    "Tom": "<<1/0=7>>7.",
}
"""Question → what a model learns to say: wrong, wrong, cut off, and without a right result."""
RIGHT = {"Tom has 3": "<<12+30=42>>", "Tom has 12": "Tom has <<7-9=-2>>", "pens": "3 * 3 = <<3*3=9>>"}


def prompts(texts: Sequence[str]) -> list[Prompt]:
    messages = [[{"role": "user", "content": text}] for text in texts]
    return [Prompt(prompt_id=prompt_id(m), messages=m, source="test") for m in messages]


def sample(folder: Path, rows: list[Prompt], **knobs: Any) -> list[Completion]:
    generator = HF(**{"num_samples": 1, "max_new_tokens": 64, "calculator": True, **knobs})
    answers = list(generator.generate(rows, model=TINY, folder=folder, hardware=CPU, seed=7, round_=0))
    assert all(isinstance(answer, Completion) for answer in answers)
    return answers  # type: ignore[return-value]


def problems(number: int) -> list[str]:
    return [row["question"] for row, _ in zip(arithmetic_problems(0), range(number), strict=False)]


def learn(model: Any, batches: list[dict[str, torch.Tensor]], steps: int) -> None:
    """Learn a few texts by heart."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(steps):
        sum(model(**batch).loss for batch in batches).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def save(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path, **start: int) -> Path:
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=0, **start)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["byte-level", "unigram", "byte fallback"])
def learnt(request, tmp_path_factory) -> Path:
    """A Llama that says what LEARNT says, with a tokenizer of another make than the built-in model's."""
    torch.manual_seed(0)
    tokenizer = MAKES[request.param]()
    tokenizer.chat_template = CHAT
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    batches = []
    for question, answer in LEARNT.items():
        prompt = tokenizer(f"{question}:", add_special_tokens=False)["input_ids"]
        completion = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        labels = [-100] * len(prompt) + completion
        batches.append({"input_ids": torch.tensor([prompt + completion]), "labels": torch.tensor([labels])})
    learn(model, batches, steps=60)
    return save(model, tokenizer, tmp_path_factory.mktemp("learnt"))


def test_a_model_that_is_wrong_by_heart_is_put_right(learnt):
    plain = sample(learnt, prompts(list(LEARNT)), temperature=0.0, calculator=False)
    assert [answer.text for answer in plain] == list(LEARNT.values())
    assert all("calculator" not in answer.meta for answer in plain)
    engine = Engine(TINY, learnt, CPU)
    *right, left = sample(learnt, prompts(list(LEARNT)), temperature=0.0)
    for answer, text in zip(right, RIGHT.values(), strict=True):
        # What comes behind a result that it has never seen is the model's own business.
        (start, end), *_ = answer.meta["calculator"]["forced"]
        assert engine.tokenizer.decode(answer.token_ids[:end]) == text
        assert engine.tokenizer.decode(answer.token_ids[:start]).endswith("=")
    assert left.text == LEARNT["Tom"]
    assert left.meta["calculator"] == {"forced": [], "forced_logp": 0.0, "refused": ["division_by_zero"]}


def test_t5_writes_brackets(tmp_path):
    torch.manual_seed(0)
    tokenizer = unigram(BRACKETS)
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    config = T5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, eos_token_id=end, pad_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    question, answer = "Tom has 12 + 30 pens", "12 + 30 = [ 12 + 30 = 41"
    batch = {"input_ids": tokenizer(question, return_tensors="pt").input_ids,
             "labels": tokenizer(answer, return_tensors="pt").input_ids}  # fmt: skip
    learn(model, [batch], steps=60)
    save(model, tokenizer, tmp_path / "t5", decoder_start_token_id=0)
    (plain,) = sample(tmp_path / "t5", prompts([question]), temperature=0.0, calculator=False)
    assert plain.text == answer
    (right,) = sample(tmp_path / "t5", prompts([question]), temperature=0.0)
    assert right.text.startswith("12 + 30 = [ 12 + 30 = 42]")


def check_results(answer: Completion) -> int:
    """Every annotation of a text is right, by Python's own arithmetic; returns how many there are."""
    found = ANNOTATION.findall(answer.text)
    for left, operator, right, result in found:
        a, b = Fraction(left), Fraction(right)
        if operator == "/" and b == 0:
            continue
        value = {"+": a + b, "-": a - b, "*": a * b}[operator] if operator != "/" else a / b
        assert abs(Fraction(result) - value) <= Fraction(1, 200), answer.text
    return len(found)


def test_all_results_of_a_batch_are_right(tiny_folder):
    """At temperature 1.3 the built-in model often miscalculates."""
    answers = sample(tiny_folder, prompts(problems(32)), temperature=1.3, num_samples=2)
    assert sum(check_results(answer) for answer in answers) > 20
    plain = sample(tiny_folder, prompts(problems(32)), temperature=1.3, num_samples=2, calculator=False)
    with pytest.raises(AssertionError):
        for answer in plain:
            check_results(answer)


def test_the_answer_does_not_depend_on_the_batch(tiny_folder):
    rows = prompts(problems(32))
    together = sample(tiny_folder, rows, temperature=1.3)
    alone = [answer for row in rows for answer in sample(tiny_folder, [row], temperature=1.3)]
    assert [a.token_ids for a in alone] == [a.token_ids for a in together]
    notes = [[a.meta["calculator"][key] for a in answers] for answers in (alone, together) for key in ("forced",)]
    assert notes[0] == notes[1]
    assert sum(map(len, notes[0])) > 10


def test_a_row_without_annotations_is_what_it_is_without_the_calculator(tiny_folder):
    rows = prompts(problems(32))
    on, off = (sample(tiny_folder, rows, temperature=1.0, calculator=c) for c in (True, False))
    same = [a.token_ids == b.token_ids for a, b in zip(on, off, strict=True) if not a.meta["calculator"]["forced"]]
    assert same
    assert all(same)
    assert len(same) < 32


def test_logp_counts_all_tokens_and_says_what_the_forced_ones_add(tiny_folder):
    engine = Engine(TINY, tiny_folder, CPU)
    forced_ones = 0
    for answer in sample(tiny_folder, prompts(problems(16)), temperature=1.3, max_new_tokens=40):
        prompt_ids = engine.template.prompt(answer.messages)
        with torch.no_grad():
            logits = engine.model(torch.tensor([prompt_ids + answer.token_ids])).logits[0, len(prompt_ids) - 1 : -1]
        logps = logits.double().log_softmax(-1).gather(-1, torch.tensor(answer.token_ids)[:, None]).squeeze(-1)
        note = answer.meta["calculator"]
        assert answer.logp == pytest.approx(logps.sum().item(), abs=1e-3)
        assert note["forced_logp"] == pytest.approx(sum(logps[a:b].sum().item() for a, b in note["forced"]), abs=1e-3)
        forced_ones += len(note["forced"])
    assert forced_ones > 5


def test_a_completion_may_be_cut_inside_of_a_result(tiny_folder):
    rows = prompts(problems(32))
    for answer in sample(tiny_folder, rows, temperature=0.0, max_new_tokens=14):
        spans = answer.meta["calculator"]["forced"]
        assert all(0 < start < end <= len(answer.token_ids) for start, end in spans)


def test_prompts_with_a_refused_expression_are_counted(learnt, tmp_path):
    rows = prompts(list(LEARNT))
    with artifacts.draft(tmp_path / "prompts", Plan("prepare", Prompt.schema, uses={})) as draft:
        draft.commit(0, rows, rows_in=len(rows), rows_out=len(rows))
    generator = HF(num_samples=1, temperature=0.0, max_new_tokens=64, calculator=True)
    generate(
        [tmp_path / "prompts"], tmp_path / "out", generator=generator, model=TINY, folder=learnt, hardware=CPU, seed=0,
        round_=0,
    )  # fmt: skip
    counts = artifacts.manifest(tmp_path / "out")["counts"]
    assert (counts["rows_in"], counts["rows_out"]) == (4, 4)
    assert counts["kept"]["calculator_division_by_zero"] == 1


def test_a_generator_without_a_calculator_refuses_it():
    with pytest.raises(ConfigError, match=r"generator\.calculator=true, but generator=replay has none"):
        Replay(path="x.jsonl", calculator=True)
