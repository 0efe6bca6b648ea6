"""An adapter and the model that it was trained on → a checkpoint with the sum of both, which needs neither."""

from pathlib import Path

import orjson

from prefpipe import artifacts, models
from prefpipe.artifacts import Plan
from prefpipe.errors import ConfigError
from prefpipe.files import sha256_of
from prefpipe.settings import HardwareConfig, ModelConfig
from prefpipe.stages.train import SCHEMA, SCRATCH

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def merge(
    adapter: Path, out: Path, *, model: ModelConfig, base: Path, hardware: HardwareConfig, overwrite: bool = False
) -> None:
    """Add an adapter to the weights of its model, in float32, and publish the checkpoint.

    Args:
        adapter: the folder `adapter` of a checkpoint, or what peft's save_pretrained wrote.
        base: the folder of the model that it was trained on.

    Raises:
        ConfigError: the adapter is of another model, or of a kind that is not merged.
    """
    if out.resolve() in adapter.resolve().parents:
        raise ConfigError(
            f"inputs.checkpoint={adapter} lies in {out}, which has it merged in already; to merge it anew, choose "
            f"another exp_name"
        )
    four_bit = _four_bit(adapter, model, base)
    uses = {
        "model": models.model_uses(model, base),
        "adapter": {name: sha256_of(adapter / name) for name in ADAPTER_FILES if (adapter / name).is_file()},
        "four_bit": four_bit,
    }
    with artifacts.draft(out, Plan("merge", SCHEMA, uses=uses), overwrite=overwrite) as draft:
        if draft.is_current:
            return
        _write(adapter, draft.work, model=model, base=base, hardware=hardware, four_bit=four_bit)
        files = (str(file.relative_to(draft.work)) for file in draft.work.rglob("*") if file.is_file())
        draft.add_files(name for name in files if Path(name).parts[0] not in SCRATCH)


def _four_bit(adapter: Path, model: ModelConfig, base: Path) -> bool:
    """Whether the adapter was trained on 4-bit weights: as its folder says, or else model.adapter=qlora."""
    note = adapter / "base.json"
    if model.adapter not in ("none", "qlora"):
        raise ConfigError(
            f"model.adapter={model.adapter} would be ignored by stage=merge, as the adapter says what it is; drop it"
        )
    if not note.is_file():
        return model.adapter == "qlora"
    known = orjson.loads(note.read_bytes())
    if model.adapter == "qlora" and not known["four_bit"]:
        raise ConfigError(f"model.adapter=qlora, but inputs.checkpoint={adapter} was not trained so; drop it")
    digest = models.weights_digest(base)
    if known["weights"] != digest:
        raise ConfigError(
            f"inputs.checkpoint={adapter} was trained on the model {known['weights']}, and model={model.name} "
            f"({base}) is {digest}; name that one by model= or model.path="
        )
    return bool(known["four_bit"])


def _write(
    adapter: Path, work: Path, *, model: ModelConfig, base: Path, hardware: HardwareConfig, four_bit: bool
) -> None:
    import torch

    from prefpipe.training import adapters

    device = models.device_of(hardware)
    policy = models.load_weights(model, base, dtype=torch.float32, device=device, four_bit=four_bit)
    whole = adapters.merged(adapters.load(policy, adapter))
    tokenizer = models.load_tokenizer(model, base)
    models.save_weights(whole, work, like=base, padding=tokenizer.pad_token_id)
    tokenizer.save_pretrained(work)
