"""Reward-model training: its loss by hand, the batchings, resume, adapters, and what transformers reads of it."""

import math
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from prefpipe.errors import ConfigError, DataError
from prefpipe.generators.hf import HF
from prefpipe.logps import PairRewards
from prefpipe.losses import BradleyTerry, PairScores, SimPO
from prefpipe.models import load_template
from prefpipe.records import Completion, Pair, Prompt, Split, prompt_id
from prefpipe.reward_models import load_reward_model, new_reward_model
from prefpipe.scorers.reward_model import RewardModel
from prefpipe.settings import HardwareConfig, ModelConfig, TrainingConfig
from prefpipe.stages.evaluate import PolicyUnderTest
from prefpipe.training import loop
from prefpipe.training.batches import encode
from prefpipe.training.engine import Engine
from prefpipe.training.loop import Job, train
from prefpipe.training.rewards import pair_rewards

CPU = torch.device("cpu")
MODEL = ModelConfig(name="tiny", path="builtin:tiny")
TRAINING = TrainingConfig(
    learning_rate=1e-3, global_batch_size=4, micro_batch_size=2, max_steps=4, max_tokens=128, max_prompt_tokens=96
)


def pairs(count: int = 8) -> list[Pair]:
    """The longer side is right in half of them; the first two share their prompt and one completion."""
    made = []
    for i in range(count):
        messages = [{"role": "user", "content": f"Tom has {max(i, 1)} apples and buys 2 more. " * (1 + max(i, 1) % 3)}]
        sides = [f"{i} + 2 = <<{i}+2={i + 2}>>{i + 2}\n#### {i + 2}", f"#### {max(i, 1)}"]
        chosen, rejected = sides if i % 2 == 0 else sides[::-1]
        made.append(
            Pair(
                prompt_id=prompt_id(messages),
                messages=messages,
                source="t",
                chosen=chosen,
                rejected=rejected,
                chosen_score=2.0 + i,
                rejected_score=1.0,
            )
        )
    return made


def job(work: Path, folder: Path, loss: BradleyTerry | None = None, **changes: object) -> Job:
    work.mkdir(parents=True, exist_ok=True)
    settings = {
        "pairs": pairs(),
        "model": MODEL,
        "policy": folder,
        "reference": folder,
        "loss": loss or BradleyTerry(),
        "training": TRAINING,
        "hardware": HardwareConfig(name="cpu", device="cpu", precision="fp32", num_threads=1),
        "seed": 0,
        "work": work,
        "cache": work.parent / "cache",
    }
    return Job(**(settings | changes))


def metrics(work: Path) -> list[dict[str, float]]:
    return [orjson.loads(line) for line in (work / "metrics.jsonl").read_bytes().splitlines()]


def weights(work: Path) -> dict[str, torch.Tensor]:
    return load_file(work / "model.safetensors")


def official_reward(folder: Path, pair: Pair, text: str) -> float:
    """As a stranger would ask: the tokenizer's own template, transformers' own class and forward pass, one row."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    turns = [*pair.messages, {"role": "assistant", "content": text}]
    ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        return model(**ids).logits.item()


def test_loss_by_hand():
    """R_w - R_l = 1.5: log(1 + e^-1.5); with a margin of 0.5 + 0.25 (4 - 2) = 1: log(1 + e^-0.5); 0.01 (2 + 0.5)^2."""
    one = torch.tensor([1])
    rewards = PairRewards(torch.tensor([2.0]), torch.tensor([0.5]), one, one)
    scores = PairScores(torch.tensor([4.0]), torch.tensor([2.0]))
    assert BradleyTerry()(rewards, None).loss.item() == pytest.approx(math.log1p(math.exp(-1.5)), abs=1e-6)
    loss = BradleyTerry(margin=0.5, margin_per_score=0.25, center_rewards_coefficient=0.01)
    out = loss(rewards, None, scores)
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(-0.5)) + 0.0625, abs=1e-6)
    assert (out.chosen_rewards.item(), out.rejected_rewards.item()) == (2.0, 0.5)
    assert loss.needs_scores
    with pytest.raises(ConfigError, match=r"loss\.margin=-1.* must be at least 0"):
        BradleyTerry(margin=-1.0)


@pytest.mark.parametrize("batching", ["padded", "packed", "shared"])
def test_every_batching_gives_the_rewards_and_gradients_of_one_row_at_a_time(tiny_folder, batching):
    template = load_template(MODEL, tiny_folder, rewards=True)
    rows, _ = encode(pairs(), template, TRAINING, pairwise=True)
    model = new_reward_model(MODEL, tiny_folder, seed=1, device=CPU).double()
    sides = [[*e.prompt, *e.chosen] for e in rows] + [[*e.prompt, *e.rejected] for e in rows]
    expected = torch.stack([model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1])[0] for ids in sides])
    chosen, rejected = expected.chunk(2)
    (torch.nn.functional.softplus(rejected - chosen)).sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    engine = Engine(CPU, batching)
    engine.prepare(model)
    found = pair_rewards(engine, model, rows)
    BradleyTerry()(found, None).loss.sum().backward()
    # transformers' norms and softmax compute in float32 whatever the weights are
    assert torch.allclose(torch.cat([found.chosen, found.rejected]), expected, atol=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, wanted[name], atol=1e-5), name


def test_the_loss_starts_where_transformers_says_and_falls(tmp_path, tiny_folder):
    train(job(tmp_path / "run", tiny_folder, training=replace(TRAINING, global_batch_size=8, max_steps=25)))
    rows = metrics(tmp_path / "run")
    start = new_reward_model(MODEL, tiny_folder, seed=0, device=CPU)
    start.save_pretrained(tmp_path / "start")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "start")
    margins = [
        official_reward(tmp_path / "start", p, p.chosen) - official_reward(tmp_path / "start", p, p.rejected)
        for p in pairs()
    ]
    expected = sum(math.log1p(math.exp(-m)) for m in margins) / len(margins)
    assert rows[0]["train/loss"] == pytest.approx(expected, abs=1e-5)
    assert rows[-1]["train/loss"] < 0.5 * rows[0]["train/loss"]
    assert rows[-1]["train/rewards/accuracy"] == 1.0
    assert not any(key.startswith(("train/logps", "train/log_ratio")) for row in rows for key in row)


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_transformers_loads_the_checkpoint_and_gives_the_same_rewards(tmp_path, tiny_folder, adapter):
    model = replace(MODEL, adapter=adapter)
    train(job(tmp_path, tiny_folder, model=model))
    reward_model = load_reward_model(MODEL, tmp_path, dtype=torch.float32, device=CPU)
    template = load_template(MODEL, tmp_path, rewards=True)
    rows, _ = encode(pairs(), template, TRAINING, pairwise=True)
    with torch.no_grad():
        found = pair_rewards(Engine(CPU, "padded"), reward_model, rows)
    for i, pair in enumerate(pairs()):
        assert found.chosen[i].item() == pytest.approx(official_reward(tmp_path, pair, pair.chosen), abs=1e-5)
        assert found.rejected[i].item() == pytest.approx(official_reward(tmp_path, pair, pair.rejected), abs=1e-5)
    config = orjson.loads((tmp_path / "config.json").read_bytes())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    before = new_reward_model(MODEL, tiny_folder, seed=0, device=CPU).state_dict()
    moved = {name for name, value in weights(tmp_path).items() if not torch.equal(value, before[name])}
    assert "score.weight" in moved
    assert any("q_proj" in name for name in moved)
    assert ("model.embed_tokens.weight" in moved) is (adapter == "none")


def test_a_row_padded_by_its_tokenizer_scores_the_same(tmp_path, tiny_folder):
    """What is saved says which token is padding, and no conversation ends in it."""
    train(job(tmp_path, tiny_folder))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    turns = [[*p.messages, {"role": "assistant", "content": p.chosen}] for p in pairs()]
    texts = [tokenizer.apply_chat_template(t, tokenize=False) for t in turns]
    for side in ("left", "right"):
        ids = tokenizer(texts, add_special_tokens=False, padding=True, padding_side=side, return_tensors="pt")
        with torch.no_grad():
            together = model(**ids).logits[:, 0].tolist()
        assert together == pytest.approx([official_reward(tmp_path, p, p.chosen) for p in pairs()], abs=1e-5)


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_killed_run_ends_with_the_same_bits(tmp_path, tiny_folder, monkeypatch, adapter):
    training, model = replace(TRAINING, save_every_steps=2, max_steps=5), replace(MODEL, adapter=adapter)
    train(job(tmp_path / "whole", tiny_folder, training=training, model=model))
    saved = loop._save_state

    def die(*args: object, **kwargs: object) -> None:
        saved(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_save_state", die)
    with pytest.raises(KeyboardInterrupt):
        train(job(tmp_path / "killed", tiny_folder, training=training, model=model))
    monkeypatch.undo()
    train(job(tmp_path / "killed", tiny_folder, training=training, model=model))
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "killed")[name]), name


def test_a_reward_model_is_trained_further_from_where_it_is(tmp_path, tiny_folder):
    train(job(tmp_path / "first", tiny_folder))
    train(job(tmp_path / "second", tmp_path / "first", training=replace(TRAINING, max_steps=1, learning_rate=1e-12)))
    for name, value in weights(tmp_path / "first").items():
        assert torch.allclose(value, weights(tmp_path / "second")[name], atol=1e-9), name


def test_a_margin_by_score_needs_scores(tmp_path, tiny_folder):
    rows = [replace(pair, chosen_score=None) for pair in pairs()]
    with pytest.raises(DataError, match="has no scores, and the loss needs them"):
        train(job(tmp_path, tiny_folder, BradleyTerry(margin_per_score=1.0), pairs=rows))


def test_a_reward_model_is_no_policy_and_a_policy_no_reward_model(tmp_path, tiny_folder):
    train(job(tmp_path / "rewards", tiny_folder, training=replace(TRAINING, max_steps=1)))
    hardware = HardwareConfig(name="cpu", device="cpu", precision="fp32", num_threads=1)
    messages = pairs(1)[0].messages
    prompt = Prompt(prompt_id=prompt_id(messages), messages=messages, source="t")
    refused = r"rewards is a reward model \(LlamaForSequenceClassification\), which .* writes no text"
    with pytest.raises(ConfigError, match=refused):
        list(HF().generate([prompt], model=MODEL, folder=tmp_path / "rewards", hardware=hardware, seed=0, round_=0))
    with pytest.raises(ConfigError, match=refused):
        train(job(tmp_path / "policy", tmp_path / "rewards", loss=SimPO()))
    with pytest.raises(ConfigError, match=r"model\.path=.*tiny is no reward model \(LlamaForCausalLM\)"):
        load_reward_model(MODEL, tiny_folder, dtype=torch.float32, device=CPU)


def test_evaluation_and_scorer_give_the_rewards_of_training(tmp_path, tiny_folder, context):
    """Held-out pairs through the evaluation's policy, and the same texts through scorer=reward_model."""
    train(job(tmp_path / "rewards", tiny_folder))
    heldout = [replace(pair, split=Split.heldout) for pair in pairs()]
    refused = replace(heldout[0], chosen="<|user|>")
    hardware = HardwareConfig(name="cpu", device="cpu", precision="fp32", num_threads=1)
    policy = PolicyUnderTest(MODEL, tmp_path / "rewards", HF(), TRAINING, hardware, seed=0)
    found = policy.pair_rewards([*heldout, refused])
    expected = [
        (official_reward(tmp_path / "rewards", p, p.chosen), official_reward(tmp_path / "rewards", p, p.rejected))
        for p in heldout
    ]
    assert found[-1] is None
    for mine, theirs in zip(found, expected, strict=False):
        assert mine == pytest.approx(theirs, abs=1e-5)
    completions = [
        Completion(prompt_id=p.prompt_id, completion_id=f"{i}", messages=p.messages, source="t", text=p.chosen)
        for i, p in enumerate(heldout)
    ]
    scores = RewardModel(path=str(tmp_path / "rewards")).score(completions, context)
    assert scores == pytest.approx([chosen for chosen, _ in expected], abs=1e-5)
