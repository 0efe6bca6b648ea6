"""Frozen linear layers in 16 bits: the numbers of float32 weights under autocast, bit for bit."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_oracle import random_pairs
from safetensors.torch import load_file, save_file
from test_loop import LORA, TRAINING, job, metrics, weights
from torch import nn
from transformers import PreTrainedModel

from prefpipe.losses import DPO, TDPO, BradleyTerry, Loss, SimPO
from prefpipe.settings import ModelConfig
from prefpipe.training.adapters import with_adapter
from prefpipe.training.engine import Engine
from prefpipe.training.loop import train
from prefpipe.training.rewards import pair_rewards
from prefpipe.training.weights import in_float32, load

pytestmark = pytest.mark.usefixtures("any_precision")

CPU, HALF = torch.device("cpu"), torch.bfloat16
TINY = ModelConfig(name="tiny", path="builtin:tiny")


@pytest.fixture
def folder(tmp_path: Path, tiny_folder: Path) -> Path:
    """The tiny model with weights that 16 bits cannot hold."""
    folder = tmp_path / "uneven"
    shutil.copytree(tiny_folder, folder)
    torch.manual_seed(0)
    uneven = {
        k: v.float() * (1 + 1e-3 * torch.rand(v.shape)) for k, v in load_file(folder / "model.safetensors").items()
    }
    assert not any(torch.equal(v, v.bfloat16().float()) for v in uneven.values())
    save_file(uneven, folder / "model.safetensors", {"format": "pt"})
    return folder


def halved_names(model: PreTrainedModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.dtype == HALF}


def adapted(model: PreTrainedModel) -> nn.Module:
    """With an adapter that is not zero."""
    found = with_adapter(model, LORA)
    torch.manual_seed(1)
    for parameter in found.parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            nn.init.normal_(parameter, std=0.05)
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rewards", [False, True])
@pytest.mark.parametrize("batching", ["padded", "packed", "shared"])
def test_an_adapter_learns_the_same_bits_on_half_the_bytes(
    folder: Path, batching: str, rewards: bool, checkpointing: bool
) -> None:
    found, rows = [], random_pairs(0, 4, longest=9)
    for half in (None, HALF):
        base = load(LORA, folder, CPU, rewards=rewards, seed=0, half=half)
        assert bool(halved_names(base)) == (half is not None)
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        engine = Engine(CPU, batching)
        engine.prepare(base)
        model = adapted(base).train()
        with torch.autocast("cpu", dtype=HALF):
            sums = pair_rewards(engine, model, rows) if rewards else engine.logps(model, rows, pairwise=True)
        loss = nn.functional.softplus(sums.rejected - sums.chosen).mean()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found.append([sums.chosen, sums.rejected, *torch.autograd.grad(loss, trained)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_what_autocast_does_not_convert_stays(folder: Path, t5_folder: Path) -> None:
    model = load(LORA, folder, CPU, rewards=False, seed=0, half=HALF)
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert halved_names(model) == linear - ({"lm_head.weight"} if tied else set())
    rewards = load(LORA, folder, CPU, rewards=True, seed=0, half=HALF)
    assert halved_names(rewards) == linear - {"lm_head.weight"}
    assert rewards.score.weight.dtype == torch.float32
    t5 = load(ModelConfig(name="t5", path="t5"), t5_folder, CPU, rewards=False, seed=0, half=HALF)
    assert halved_names(t5)
    assert not any(".wo." in name for name in halved_names(t5))


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_a_halved_model_is_called_without_autocast_as_the_rounded_one_is(
    folder: Path, t5_folder: Path, kind: str
) -> None:
    source, ids = folder if kind == "decoder" else t5_folder, torch.arange(3, 15)[None]
    inputs = {"input_ids": ids} if kind == "decoder" else {"input_ids": ids, "decoder_input_ids": ids}
    config = ModelConfig(name="m", path="m")
    halved, whole = (load(config, source, CPU, rewards=False, seed=0, half=half) for half in (HALF, None))
    names = halved_names(halved)
    for name, parameter in whole.named_parameters():
        if name in names:
            parameter.data = parameter.data.bfloat16().float()
    with torch.no_grad():
        with in_float32(halved):
            assert torch.equal(halved(**inputs).logits, whole(**inputs).logits)
            with pytest.raises(IndexError):
                halved(**{key: value + 10**6 for key, value in inputs.items()})
        assert halved_names(halved) == names
        with pytest.raises(RuntimeError, match="dtype"):
            halved(**inputs)


@pytest.mark.parametrize(
    ("loss", "reference"),
    [
        (DPO(), "cached"),
        (DPO(), "online"),
        (DPO(), "moving"),
        (TDPO(), "online"),
        (SimPO(), "cached"),
        (BradleyTerry(), "cached"),
    ],
)
def test_an_adapter_is_merged_into_weights_that_were_never_rounded(
    tmp_path: Path, folder: Path, loss: Loss, reference: str
) -> None:
    moving = {"reference_alpha": 0.5, "reference_steps": 1} if reference == "moving" else {}
    training = replace(TRAINING, max_steps=2, reference=reference, **moving)
    run = job(tmp_path / "run", folder, loss, training)
    train(replace(run, model=LORA, hardware=replace(run.hardware, precision="bf16")))
    assert len(metrics(tmp_path / "run")) == 2
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    before, after = load_file(folder / "model.safetensors"), weights(tmp_path / "run")
    changed = 0
    for name in before.keys() & after.keys():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in adapter:
            added = 2.0 * adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"]
            torch.testing.assert_close(after[name], before[name] + added, rtol=0, atol=1e-6)
            changed += 1
        else:
            assert torch.equal(after[name], before[name]), name
        assert after[name].dtype == torch.float32
    assert changed


@pytest.mark.parametrize("model", [TINY, LORA], ids=["full", "lora"])
def test_a_second_model_as_reference_gives_the_metrics_of_the_policy_as_its_own(
    tmp_path: Path, folder: Path, model: ModelConfig
) -> None:
    """The copy is held in 16 bits, and the policy that is its own reference, without an adapter, is not."""
    rows = []
    shutil.copytree(folder, tmp_path / "copy")
    for name, reference in (("own", folder), ("copy", tmp_path / "copy")):
        run = job(tmp_path / name, folder, DPO(), replace(TRAINING, max_steps=3, reference="online"))
        hardware = replace(run.hardware, precision="bf16")
        train(replace(run, reference=reference, model=model, hardware=hardware))
        rows.append(metrics(tmp_path / name))
    assert rows[0] == rows[1]
    cached = job(tmp_path / "cached", folder, DPO(), replace(TRAINING, max_steps=3))
    train(replace(cached, model=model, hardware=replace(cached.hardware, precision="bf16")))
    for row, other in zip(metrics(tmp_path / "cached"), rows[0], strict=True):
        assert row["train/loss"] == pytest.approx(other["train/loss"], abs=2e-2)
