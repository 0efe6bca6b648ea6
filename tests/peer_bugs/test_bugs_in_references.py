"""B42 to B47: bugs of other programs around the reference model. README.md lists them all."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    Starcoder2Config,
)

from prefpipe import artifacts, models
from prefpipe.artifacts import Plan
from prefpipe.errors import ArtifactError
from prefpipe.losses import DPO
from prefpipe.records import Pair, prompt_id
from prefpipe.settings import HardwareConfig, ModelConfig, TrainingConfig
from prefpipe.training import loop
from prefpipe.training.batches import Example
from prefpipe.training.engine import Engine, without_dropout
from prefpipe.training.loop import Job, train

CPU = torch.device("cpu")
TRAINING = TrainingConfig(
    learning_rate=1e-3,
    warmup_fraction=0.0,
    schedule="constant",
    global_batch_size=4,
    micro_batch_size=4,
    max_steps=5,
    max_tokens=96,
    max_prompt_tokens=64,
)
TINY = ModelConfig(name="tiny", path="builtin:tiny")
ADAPTER = replace(TINY, adapter="lora")

pytestmark = pytest.mark.usefixtures("any_precision")


def pairs(count: int = 4) -> list[Pair]:
    made = []
    for i in range(count):
        messages = [{"role": "user", "content": f"Tom has {i} apples and buys {i + 2} more. " * (1 + i % 2)}]
        texts = {"chosen": f"{i} + {i + 2} = {2 * i + 2}\n#### {2 * i + 2}", "rejected": f"#### {i}"}
        made.append(Pair(prompt_id=prompt_id(messages), messages=messages, source="t", **texts))
    return made


def job(work: Path, policy: Path, *, precision: str = "fp32", model: ModelConfig = TINY, **training: object) -> Job:
    work.mkdir(parents=True, exist_ok=True)
    return Job(
        pairs=pairs(),
        model=model,
        policy=policy,
        reference=policy,
        loss=DPO(beta=0.1),
        training=replace(TRAINING, **training),
        hardware=HardwareConfig(name="cpu", device="cpu", precision=precision),
        seed=0,
        work=work,
        cache=work.parent / "cache",
    )


def metrics(work: Path) -> list[dict[str, float]]:
    return [orjson.loads(line) for line in (work / "metrics.jsonl").read_bytes().splitlines()]


def mean_logps(folder: Path) -> tuple[float, float]:
    """Of all chosen and of all rejected completions, by transformers' own loss, one completion at a time."""
    net, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    sums = []
    for row in pairs():
        prompt = tokenizer.apply_chat_template(row.messages, add_generation_prompt=True, return_dict=False)
        for text in (row.chosen, row.rejected):
            completion = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            labels = torch.tensor([[-100] * len(prompt) + completion])
            with torch.no_grad():
                loss = net(torch.tensor([prompt + completion]), labels=labels).loss
            sums.append(-loss.item() * len(completion))
    return sum(sums[::2]) / 4, sum(sums[1::2]) / 4


@pytest.mark.parametrize("model", [TINY, ADAPTER], ids=["full", "lora"])
@pytest.mark.parametrize("reference", ["cached", "online"])
def test_b42_the_reference_of_every_step_is_the_start(
    tmp_path: Path, tiny_folder: Path, reference: str, model: ModelConfig
) -> None:
    """A reward is beta (l - r): what a run logs gives r away, here the mean over all pairs at each step."""
    train(job(tmp_path / "run", tiny_folder, model=model, reference=reference))
    rows = metrics(tmp_path / "run")
    assert abs(rows[-1]["train/rewards/margin"]) > 1e-2, "the policy has moved"
    for side, start in zip(("chosen", "rejected"), mean_logps(tiny_folder), strict=True):
        found = [row[f"train/logps/{side}"] - row[f"train/rewards/{side}"] / 0.1 for row in rows]
        assert found == pytest.approx([found[0]] * 5, abs=1e-9)
        assert found[0] == pytest.approx(start, abs=1e-3)


SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**SIZES, "intermediate_size": 48}
OLD = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
NOISY: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(**OLD, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5),
    "gpt_neox": GPTNeoXConfig(**WIDE, hidden_dropout=0.5, attention_dropout=0.5),
    "llama": LlamaConfig(**WIDE, attention_dropout=0.5),
    "phi": PhiConfig(**WIDE, resid_pdrop=0.5, embd_pdrop=0.5, attention_dropout=0.5),
    "bloom": BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.5, attention_dropout=0.5),
    "gpt_bigcode": GPTBigCodeConfig(**OLD, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5),
    "mixtral": MixtralConfig(**WIDE, num_key_value_heads=2, router_jitter_noise=0.5, attention_dropout=0.5),
    "opt": OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, dropout=0.5, attention_dropout=0.5, layerdrop=0.5),
    "starcoder2": Starcoder2Config(**WIDE, residual_dropout=0.5, embedding_dropout=0.5, attention_dropout=0.5),
}


@pytest.mark.parametrize("family", NOISY)
def test_b44_no_dropout_is_left_in_training_mode(family: str) -> None:
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(NOISY[family])
    for parameter in net.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.2)
    without_dropout(net)
    ids = np.arange(3, 23, dtype=np.int32)
    rows = [Example(0, ids[:4], ids[4:12], ids[12:])]
    with torch.no_grad():
        quiet, first, second = (
            Engine(CPU).logps(net.train(training), rows, pairwise=True).chosen.item()
            for training in (False, True, True)
        )
    assert first == second == pytest.approx(quiet, abs=1e-5)


@pytest.mark.parametrize("reference", ["cached", "online"])
def test_b44_a_policy_with_dropout_starts_at_ln_2(tmp_path: Path, tiny_folder: Path, reference: str) -> None:
    folder = tmp_path / "noisy"
    shutil.copytree(tiny_folder, folder)
    config = orjson.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_bytes(orjson.dumps(config | {"attention_dropout": 0.5}))
    runs = []
    for name in ("a", "b"):
        train(job(tmp_path / name, folder, reference=reference))
        runs.append(metrics(tmp_path / name))
    assert runs[0][0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert runs[0] == runs[1]
    assert orjson.loads((tmp_path / "a" / "config.json").read_bytes())["attention_dropout"] == 0.5


@pytest.mark.parametrize("model", [TINY, ADAPTER], ids=["full", "lora"])
@pytest.mark.parametrize("own", [True, False], ids=["policy as reference", "copy as reference"])
@pytest.mark.parametrize("reference", ["cached", "online"])
def test_b45_the_first_loss_in_bf16_is_ln_2(
    tmp_path: Path, tiny_folder: Path, reference: str, own: bool, model: ModelConfig
) -> None:
    run = job(tmp_path / "run", tiny_folder, precision="bf16", model=model, reference=reference, max_steps=1)
    if not own:
        shutil.copytree(tiny_folder, tmp_path / "copy")
        run = replace(run, reference=tmp_path / "copy")
    train(run)
    assert metrics(tmp_path / "run")[0]["train/loss"] == pytest.approx(math.log(2), abs=5e-3)


@pytest.mark.parametrize("batching", ["padded", "shared"])
def test_b46_cached_values_follow_their_rows_through_shuffles_and_filters(
    tmp_path: Path, tiny_folder: Path, batching: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One batch of all rows: were two values exchanged, the mean of the losses would be above ln 2."""
    caplog.set_level("INFO")
    orders = [[7, 0, 3, 11], list(range(12)), [9, 2, 10, 4, 5, 1], list(range(12))[::-1]]
    for seed, order in enumerate(orders):
        run = job(
            tmp_path / str(seed),
            tiny_folder,
            reference="cached",
            batching=batching,
            max_steps=1,
            global_batch_size=len(order),
            micro_batch_size=seed + 1,
        )
        rows = pairs(12)
        train(replace(run, pairs=[rows[i] for i in order], seed=seed, loss=DPO(beta=1.0)))
        assert metrics(run.work)[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    said = [line for line in caplog.messages if "completions are in the cache" in line]
    assert [line.split()[1] for line in said] == ["0", "8", "12", "24"]


def shift_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def test_b46_a_folder_whose_weights_are_overwritten_is_another_reference(tmp_path: Path, tiny_folder: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    train(job(tmp_path / "a", folder, max_steps=1))
    shift_weights(folder)
    train(job(tmp_path / "b", folder, max_steps=1))
    assert metrics(tmp_path / "b")[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_b46_a_published_checkpoint_whose_weights_are_overwritten_is_refused_or_another_reference(
    tmp_path: Path, tiny_folder: Path
) -> None:
    folder = tmp_path / "checkpoint"
    with artifacts.draft(folder, Plan("train", "checkpoint/1", uses={})) as draft:
        names = [file.name for file in tiny_folder.iterdir()]
        for name in names:
            shutil.copy(tiny_folder / name, draft.work / name)
        draft.add_files(names)
    before = models.weights_digest(folder)
    shift_weights(folder)
    try:
        after = models.weights_digest(folder)
    except ArtifactError:
        return
    assert after != before


class KilledError(RuntimeError):
    """Stands for SIGKILL: nothing after it runs."""


def test_b47_a_reference_that_is_computed_late_is_still_the_start(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed run has lost its reference values when it goes on, with trained weights in memory."""
    run = job(tmp_path / "killed", tiny_folder, save_every_steps=1)
    train(job(tmp_path / "whole", tiny_folder, save_every_steps=1))
    real = loop._save_state

    def save_then_die(work: Path, step: int, *args: object, **kwargs: object) -> None:
        real(work, step, *args, **kwargs)
        if step == 3:
            raise KilledError

    monkeypatch.setattr(loop, "_save_state", save_then_die)
    with pytest.raises(KilledError):
        train(run)
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "killed" / "reference_logps.safetensors").unlink()
    train(run)
    assert metrics(tmp_path / "killed")[3:] == [pytest.approx(row) for row in metrics(tmp_path / "whole")[3:]]
