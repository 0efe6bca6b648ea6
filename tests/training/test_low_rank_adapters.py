"""Adapters on 4-bit weights, saved ones, and what stage=merge makes of them."""

import math
import shutil
from dataclasses import replace

import orjson
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from test_loop import LORA, TRAINING, job, metrics, weights
from transformers import AutoModelForCausalLM

from prefpipe import artifacts, models
from prefpipe.errors import ConfigError
from prefpipe.losses import DPO
from prefpipe.settings import HardwareConfig, ModelConfig
from prefpipe.stages.merge import merge
from prefpipe.training import adapters
from prefpipe.training.loop import train

CPU = torch.device("cpu")
HARDWARE = HardwareConfig(name="cpu", device="cpu", precision="fp32", num_threads=1)
QLORA = replace(LORA, adapter="qlora")
TINY = ModelConfig(name="tiny", path="builtin:tiny")
IDS = torch.arange(5, 45).view(2, 20)

NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
NF4 += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
NF4 += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
"""Dettmers et al. 2023, arXiv:2305.14314, appendix E."""


def needs_four_bit() -> None:
    pytest.importorskip("bitsandbytes")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """The nearest NF4 value in blocks of 64 with their largest number as scale, which is not rounded here."""
    blocks = weight.flatten().view(-1, 64)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    table = torch.tensor(NF4)
    nearest = (blocks / scale).unsqueeze(-1).sub(table).abs().argmin(-1)
    return (table[nearest] * scale).view_as(weight)


def test_weights_are_rounded_to_nf4_and_their_scales_once_more(tiny_folder):
    needs_four_bit()
    from bitsandbytes.functional import dequantize_4bit

    policy = models.load_weights(QLORA, tiny_folder, dtype=torch.float32, device=CPU, four_bit=True)
    plain = models.load_weights(TINY, tiny_folder, dtype=torch.float32, device=CPU)
    assert type(policy.lm_head) is torch.nn.Linear
    assert torch.equal(policy.lm_head.weight, plain.lm_head.weight)
    for name, module in policy.named_modules():
        if hasattr(getattr(module, "weight", None), "quant_state"):
            state, exact = module.weight.quant_state, plain.get_submodule(name).weight
            assert state.nested
            found = dequantize_4bit(module.weight.data, state)
            # The scales have 8 bits of their own.
            assert torch.allclose(found, rounded(exact), atol=0.03 * exact.abs().max().item())
            assert module.weight.numel() * 2 == exact.numel()


def test_qlora_starts_at_ln_2_learns_and_its_checkpoint_says_what_it_said(tmp_path, tiny_folder):
    needs_four_bit()
    training = replace(TRAINING, max_steps=8, learning_rate=1e-2)
    start = replace(job(tmp_path / "run", tiny_folder, DPO(), training), model=QLORA)
    train(start)
    losses = [row["train/loss"] for row in metrics(tmp_path / "run")]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < 0.9 * losses[0]

    base = models.load_weights(QLORA, tiny_folder, dtype=torch.float32, device=CPU, four_bit=True)
    trained = logits(PeftModel.from_pretrained(base, tmp_path / "run" / "adapter"))
    checkpoint = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype=torch.float32))
    assert torch.allclose(checkpoint, trained, atol=1e-3)
    # Added to the weights before rounding, or rounded once more, it would be another model.
    unrounded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path / "run/adapter")
    assert not torch.allclose(checkpoint, logits(unrounded), atol=0.1)
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "run").values())
    config = orjson.loads((tmp_path / "run" / "config.json").read_bytes())
    assert "quantization_config" not in config

    # A reference computed with 4-bit weights is no other run's.
    (of_four_bit,) = (tmp_path / "cache" / "reference_logps").iterdir()
    train(replace(job(tmp_path / "plain", tiny_folder, DPO(), training), model=LORA))
    assert len(list((tmp_path / "cache" / "reference_logps").iterdir())) == 2
    assert of_four_bit.name.endswith("-nf4-fp32")


def test_the_reference_is_the_policy_with_its_adapter_off_bit_for_bit(tiny_folder):
    """Whether gradients are on or not, and in mixed precision too."""
    needs_four_bit()
    policy = models.load_weights(QLORA, tiny_folder, dtype=torch.float32, device=CPU, four_bit=True)
    adapted = adapters.with_adapter(policy, QLORA)
    for mixed in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            learning = adapted.train()(IDS).logits
            with torch.no_grad(), adapted.disable_adapter():
                reference = adapted.eval()(IDS).logits
        assert learning.requires_grad
        assert torch.equal(learning.detach(), reference)


def test_qlora_says_why_it_cannot_run(tmp_path, tiny_folder, monkeypatch):
    needs_four_bit()
    from bitsandbytes import functional

    def no_kernel(*_: object, **__: object) -> None:
        raise NotImplementedError("quantize_4bit is not implemented for this device")

    monkeypatch.setattr(functional, "quantize_4bit", no_kernel)
    message = (
        r"model.adapter=qlora cannot run on cpu here: .*is not implemented for this device.*use model.adapter=lora"
    )
    with pytest.raises(ConfigError, match=message):
        train(replace(job(tmp_path, tiny_folder, DPO()), model=QLORA))


@pytest.mark.parametrize("adapter", ["lora", "dora", "qlora"])
def test_merging_a_saved_adapter_makes_the_checkpoint_that_training_made(tmp_path, tiny_folder, adapter):
    if adapter == "qlora":
        needs_four_bit()
    model = replace(LORA, adapter=adapter)
    train(replace(job(tmp_path / "run", tiny_folder, DPO(), replace(TRAINING, max_steps=2)), model=model))
    moved = tmp_path / "elsewhere"
    shutil.move(tmp_path / "run" / "adapter", moved)
    merge(moved, tmp_path / "out" / "checkpoint", model=TINY, base=tiny_folder, hardware=HARDWARE)
    out = tmp_path / "out" / "checkpoint"
    assert artifacts.manifest(out)["schema"] == "checkpoint/1"
    artifacts.verify(out)
    for key, value in weights(tmp_path / "run").items():
        assert torch.equal(value, weights(out)[key]), key
    # Once more: it is there already.
    before = (out / "model.safetensors").stat().st_mtime_ns
    merge(moved, out, model=TINY, base=tiny_folder, hardware=HARDWARE)
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def peft_adapter(folder, tiny_folder, **options):
    """As peft saves one by itself, with both factors drawn at random."""
    torch.manual_seed(1)
    net = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), LoraConfig(r=3, **options))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    net.save_pretrained(folder)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_an_adapter_of_pefts_own_is_merged_as_peft_merges_it(tmp_path, tiny_folder, options):
    peft_adapter(tmp_path / "adapter", tiny_folder, target_modules=["q_proj", "down_proj"], lora_alpha=7, **options)
    merge(tmp_path / "adapter", tmp_path / "out", model=TINY, base=tiny_folder, hardware=HARDWARE)
    apart = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path / "adapter")
    scored, base = logits(apart.eval()), logits(AutoModelForCausalLM.from_pretrained(tiny_folder))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32))
    assert torch.allclose(found, scored, atol=1e-3)
    assert not torch.allclose(found, base, atol=1.0)
    theirs = apart.merge_and_unload()
    for key, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.allclose(value, theirs.state_dict()[key], atol=1e-6), key


def test_an_adapter_that_cannot_be_merged_is_refused(tmp_path, tiny_folder):
    def refused(adapter, message, model=TINY, base=tiny_folder, out=tmp_path / "out"):
        with pytest.raises(ConfigError, match=message):
            merge(adapter, out, model=model, base=base, hardware=HARDWARE)
        assert not artifacts.is_complete(tmp_path / "out")

    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), prompt).save_pretrained(tmp_path / "prompt")
    refused(tmp_path / "prompt", "is PROMPT_TUNING; only LoRA and DoRA are merged")

    peft_adapter(tmp_path / "other", tiny_folder, target_modules=["q_proj"])
    file = tmp_path / "other" / "adapter_config.json"
    config = orjson.loads(file.read_bytes())
    file.write_bytes(orjson.dumps({**config, "target_modules": ["k_proj"]}))
    refused(tmp_path / "other", "does not fit the model .*name the one that it was trained on")
    (tmp_path / "other" / "adapter_model.safetensors").rename(tmp_path / "other" / "adapter_model.bin")
    refused(tmp_path / "other", "has no adapter_model.safetensors; other files are not read")

    train(replace(job(tmp_path / "run", tiny_folder, DPO(), replace(TRAINING, max_steps=1)), model=LORA))
    mine = tmp_path / "run" / "adapter"
    refused(mine, "was trained on the model .*, and model=tiny .* is ", base=tmp_path / "run")
    refused(mine, "model.adapter=lora would be ignored by stage=merge", model=LORA)
    refused(mine, "model.adapter=qlora, but inputs.checkpoint=.* was not trained so", model=QLORA)
    refused(mine, "has it merged in already", out=tmp_path / "run")


def test_merge_is_a_stage_whose_checkpoint_is_the_runs(tmp_path, tiny_folder, monkeypatch, capfd):
    from prefpipe.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFPIPE_RUNS", str(tmp_path / "runs"))
    train(replace(job(tmp_path / "run", tiny_folder, DPO(), replace(TRAINING, max_steps=1)), model=LORA))
    main(["stage=merge", "exp_name=whole", "inputs.checkpoint=run", "hardware=cpu", "hardware.num_threads=1"])
    checkpoint = tmp_path / "runs" / "whole" / "round_0" / "checkpoint"
    for key, value in weights(tmp_path / "run").items():
        assert torch.equal(value, weights(checkpoint)[key]), key
    models.load_template(TINY, checkpoint)
    with pytest.raises(SystemExit):
        main(["stage=merge", "exp_name=whole", f"inputs.checkpoint={tiny_folder}"])
    assert "holds no adapter (adapter_config.json)" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        main(["stage=evaluate", "inputs.checkpoint=run/adapter"])
    assert "prefpipe stage=merge exp_name=NAME inputs.checkpoint=run/adapter" in capfd.readouterr().err
