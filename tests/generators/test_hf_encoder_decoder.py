"""Sampling from encoder-decoder models: as transformers decodes, whatever the batch, with true log-probabilities."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

from prefpipe import models
from prefpipe.errors import ConfigError
from prefpipe.generators import Skipped
from prefpipe.generators.hf import HF, Engine, Request
from prefpipe.records import Completion, Prompt, prompt_id
from prefpipe.settings import HardwareConfig, ModelConfig
from prefpipe.training.batches import Example, collate
from prefpipe.training.engine import Engine as LogpEngine

T5 = ModelConfig(name="t5", path="t5")
CPU = HardwareConfig(name="cpu", device="cpu", precision="fp32")
QUESTIONS = ["Tom has 3 apples. How many?", "Hi", "a shop sells 5 pens a day. " * 4, "1, 2, 3", "Tom"]


@pytest.fixture
def livelier(t5_folder, tmp_path) -> Path:
    """The same with a sharper head that likes to end: samples differ in length, and most of them stop."""
    net = models.load_weights(T5, t5_folder, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        net.lm_head.weight.mul_(3.0)
        net.lm_head.weight[1] += net.decoder.final_layer_norm.weight * 0.1
    models.save_weights(net, tmp_path, like=t5_folder, padding=None)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((t5_folder / file).read_bytes())
    return tmp_path


def prompts(texts: list[str] = QUESTIONS) -> list[Prompt]:
    messages = [[{"role": "user", "content": text}] for text in texts]
    return [Prompt(prompt_id=prompt_id(m), messages=m, source="test") for m in messages]


def sample(folder: Path, rows: list[Prompt], **knobs: object) -> list[Completion]:
    generator = HF(**{"num_samples": 3, "max_new_tokens": 24, **knobs})  # type: ignore[arg-type]
    answers = list(generator.generate(rows, model=T5, folder=folder, hardware=CPU, seed=7, round_=0))
    assert all(isinstance(answer, Completion) for answer in answers)
    return answers  # type: ignore[return-value]


def test_the_answer_does_not_depend_on_the_batch(livelier):
    together = sample(livelier, prompts())
    assert len({a.finish_reason for a in together}) == 2  # rows leave the batch at different steps
    alone = [answer for prompt in prompts() for answer in sample(livelier, [prompt])]
    one_row_at_a_time = sample(livelier, prompts(), max_batch_tokens=1)
    assert [a.token_ids for a in alone] == [a.token_ids for a in together]
    assert [a.token_ids for a in one_row_at_a_time] == [a.token_ids for a in together]
    assert len({tuple(a.token_ids) for a in together}) > 10


def test_greedy_is_what_transformers_generates(livelier):
    engine = Engine(T5, livelier, CPU)
    for prompt, answer in zip(prompts(), sample(livelier, prompts(), num_samples=1, temperature=0.0), strict=True):
        ids = torch.tensor([engine.template.prompt(prompt.messages)])
        theirs = engine.model.generate(ids, do_sample=False, max_new_tokens=24)[0].tolist()
        assert theirs[0] == engine.model.config.decoder_start_token_id
        assert answer.token_ids == theirs[1:]


def test_logp_is_that_of_the_training_engine(livelier):
    """And of the model's own forward pass with the sampled ids as labels."""
    engine = Engine(T5, livelier, CPU)
    answers = sample(livelier, prompts(), temperature=0.7, top_p=0.9)
    rows = []
    for number, answer in enumerate(answers):
        ids = engine.template.prompt(answer.messages)
        with torch.no_grad():
            loss = engine.model(input_ids=torch.tensor([ids]), labels=torch.tensor([answer.token_ids])).loss
        assert answer.logp == pytest.approx(-loss.item() * len(answer.token_ids), abs=1e-3)
        sides = [np.array(side, np.int32) for side in (ids, answer.token_ids, [])]
        rows.append(Example(number, *sides, decoder_start=engine.template.decoder_start))
    found = LogpEngine(torch.device("cpu")).each_token(engine.model, collate(rows, "padded", pairwise=False))
    assert [a.logp for a in answers] == pytest.approx([float(values.sum()) for values in found], abs=1e-3)


def test_the_encoder_runs_once_for_each_prompt(livelier):
    engine, seen = Engine(T5, livelier, CPU), []
    engine.model.encoder.register_forward_hook(lambda *args: seen.append(args[2].last_hidden_state.shape[0]))
    requests = [Request(i, engine.template.prompt(p.messages), [1, 2, 3, 4]) for i, p in enumerate(prompts())]
    answers = engine.sample(requests, HF(num_samples=4, max_new_tokens=8))
    assert sorted(answers) == [0, 1, 2, 3, 4]
    assert seen == [5]


def test_an_encoder_with_positions_limits_prompt_and_completion_each(tmp_path, t5_folder):
    """BART counts positions from each text's own start, up to max_position_embeddings."""
    torch.manual_seed(0)
    knobs = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in SIZES.items()}
    config = BartConfig(vocab_size=64, d_model=32, max_position_embeddings=16, decoder_start_token_id=2, **knobs)
    config.bos_token_id, config.pad_token_id, config.eos_token_id, config.forced_eos_token_id = None, 0, 1, None
    BartForConditionalGeneration(config).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((t5_folder / file).read_bytes())
    rows = prompts(["Tom has 3", "Tom has 3 apples 5", "Tom has 3 apples. How many?"])
    knobs = {"model": T5, "folder": tmp_path, "hardware": CPU, "seed": 0, "round_": 0}
    answers = list(HF(num_samples=1, max_new_tokens=99, temperature=0.0).generate(rows, **knobs))
    assert [type(a) for a in answers] == [Completion, Completion, Skipped]
    assert answers[2].reason == "prompt_too_long"
    net = Engine(T5, tmp_path, CPU)
    for prompt, answer in zip(rows[:2], answers[:2], strict=True):
        ids = torch.tensor([net.template.prompt(prompt.messages)])
        assert ids.shape[1] <= 16
        theirs = net.model.generate(ids, do_sample=False, num_beams=1, max_new_tokens=16)[0].tolist()
        assert answer.token_ids == theirs[1:]


SIZES = {"layers": 1, "attention_heads": 4, "ffn_dim": 48}


def test_a_folder_that_names_no_start_is_refused(tmp_path, t5_folder):
    for file in t5_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for name in ("config.json", "generation_config.json"):
        text = (tmp_path / name).read_text().replace('"decoder_start_token_id"', '"another_key"')
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=r"no decoder_start_token_id in config\.json; add the one"):
        sample(tmp_path, prompts())
