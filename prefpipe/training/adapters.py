"""Low-rank adapters, by peft: a small trainable addition to frozen weights."""

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import torch
from torch import nn
from transformers import PreTrainedModel

from prefpipe.errors import ConfigError
from prefpipe.files import write_json
from prefpipe.models import weights_digest
from prefpipe.settings import ModelConfig

log = logging.getLogger(__name__)


def with_adapter(policy: PreTrainedModel, model: ModelConfig) -> nn.Module:
    """The policy with model.adapter on it, all else frozen; the policy itself where there is none.

    Its first output is the policy's: one half of an adapter starts at 0. Raises ConfigError without peft, or when
    model.adapter_targets names a layer that the model does not have.
    """
    if model.adapter == "none":
        return policy
    _require_peft(f"model.adapter={model.adapter}")
    from peft import LoraConfig, PeftModel, get_peft_model

    if model.adapter == "qlora" and not is_four_bit(policy):
        raise ConfigError(
            f"model.adapter=qlora rounds language models alone, not a {type(policy).__name__}; use model.adapter=lora"
        )
    assert model.adapter_rank
    assert model.adapter_alpha
    config = LoraConfig(
        r=model.adapter_rank,
        lora_alpha=model.adapter_alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        use_dora=model.adapter == "dora",
        target_modules=list(model.adapter_targets) or "all-linear",
        task_type=_task_type(policy),
    )
    try:
        adapted: PeftModel = get_peft_model(policy, config)
    except ValueError as error:
        linear = sorted({name.rsplit(".", 1)[-1] for name, m in policy.named_modules() if isinstance(m, nn.Linear)})
        raise ConfigError(
            f"model.adapter_targets={list(model.adapter_targets)}: {error} The linear layers are {', '.join(linear)}"
        ) from None
    _refuse_tied_head(policy, f"model.adapter_targets={list(model.adapter_targets)}")
    trained, of = adapted.get_nb_trainable_parameters()
    log.info("%s: %d of %d parameters are trained", model.adapter, trained, of)
    return adapted


def _require_peft(what: str) -> None:
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(f"{what} needs peft: pip install 'prefpipe[lora]'")


def _refuse_tied_head(policy: PreTrainedModel, what: str) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    head = policy.get_output_embeddings()
    if isinstance(head, BaseTunerLayer) and head.weight is policy.get_input_embeddings().weight:
        raise ConfigError(
            f"{what}: the head shares its weights with the embeddings, which merging would change too; leave it out"
        )


def is_four_bit(policy: PreTrainedModel) -> bool:
    """Whether models.load_weights has rounded it."""
    return bool(getattr(policy, "is_loaded_in_4bit", False))


def _task_type(policy: PreTrainedModel) -> str:
    if hasattr(policy, "score"):
        return "SEQ_CLS"  # the head of a reward model is trained whole
    return "SEQ_2_SEQ_LM" if policy.config.is_encoder_decoder else "CAUSAL_LM"


BASE_FILE = "base.json"
"""In an adapter's folder: what it is for. peft reads no file of that name."""

POLICY, REFERENCE = "default", "reference"
"""peft's names of the adapter that is trained, and of the frozen copy that a moving reference is."""


def add_reference(policy: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Put a frozen copy of the policy's adapter beside it; name → (a parameter of the copy, the policy's own).

    It shares all other weights with the policy, so a moving reference costs an adapter, not a second model. What moves
    then are the factors of the addition: with alpha = 1 that is the policy's model, with a smaller one their mean is
    not quite the mean of both models, as an addition is their product.
    """
    policy.add_adapter(REFERENCE, policy.peft_config[POLICY])  # type: ignore[operator, index]
    policy.set_adapter(POLICY)  # type: ignore[operator]
    parameters = dict(policy.named_parameters())
    of_policy = {
        name: ".".join(POLICY if part == REFERENCE else part for part in name.split(".")) for name in parameters
    }
    pairs = {name: (parameters[name], parameters[other]) for name, other in of_policy.items() if name != other}
    with torch.no_grad():
        for mine, theirs in pairs.values():
            mine.copy_(theirs)
    return pairs


@contextmanager
def reference_on(policy: nn.Module) -> Iterator[None]:
    """Within it the policy is the reference: its own adapter is exchanged for the copy of `add_reference`."""
    policy.set_adapter(REFERENCE, inference_mode=True)  # type: ignore[operator]
    try:
        yield
    finally:
        policy.set_adapter(POLICY)  # type: ignore[operator]


def save(policy: nn.Module, folder: Path) -> PreTrainedModel:
    """Write the adapter into folder/adapter, where there is one, and give back the policy with it merged in.

    Beside it stands `base.json`: the digest of the weights that it is for, and whether they were rounded to 4 bits.
    """
    if isinstance(policy, PreTrainedModel):
        return policy
    base: PreTrainedModel = policy.get_base_model()  # type: ignore[operator]
    policy.save_pretrained(folder / "adapter", selected_adapters=[POLICY])  # type: ignore[operator]
    source = Path(base.config._name_or_path)
    write_json(folder / "adapter" / BASE_FILE, {"weights": weights_digest(source), "four_bit": is_four_bit(base)})
    return merged(policy)


def load(policy: PreTrainedModel, folder: Path) -> nn.Module:
    """The policy with the adapter of a folder on it, as `save` or peft itself wrote it.

    Raises ConfigError for another kind of adapter than LoRA and DoRA, one that is no safetensors file, and one that
    does not fit the policy.
    """
    _require_peft(f"inputs.checkpoint={folder}")
    from peft import PeftModel

    found = orjson.loads((folder / "adapter_config.json").read_bytes())
    if found.get("peft_type") != "LORA":
        raise ConfigError(f"inputs.checkpoint={folder} is {found.get('peft_type')}; only LoRA and DoRA are merged")
    if found.get("task_type") == "SEQ_CLS":
        raise ConfigError(
            f"inputs.checkpoint={folder} is of a reward model, and only adapters of language models are merged; the "
            f"checkpoint that it was trained with has it merged in"
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise ConfigError(f"inputs.checkpoint={folder} has no adapter_model.safetensors; other files are not read")
    unknown = [key for key in ("use_dora", "lora_bias", "modules_to_save") if found.get(key)]
    if unknown and is_four_bit(policy):
        raise ConfigError(f"inputs.checkpoint={folder}: {unknown[0]} is not merged into 4-bit weights")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*Found missing adapter keys")
            adapted: nn.Module = PeftModel.from_pretrained(policy, folder, adapter_name=POLICY, use_safetensors=True)
    except (RuntimeError, ValueError, UserWarning) as error:
        raise ConfigError(
            f"inputs.checkpoint={folder} does not fit the model ({error}); name the one that it was trained on by "
            f"model= or model.path="
        ) from None
    _refuse_tied_head(policy, f"inputs.checkpoint={folder}")
    return adapted


def merged(policy: nn.Module) -> PreTrainedModel:
    """The policy with the addition of its adapter added to its weights; 4-bit ones as the numbers that they stand for.

    peft would round the sum of those to 4 bits again, which loses most of what a short training has added. On the CPU
    then: unrounded, the weights may not fit where they were trained.
    """
    base: Any = policy.get_base_model()  # type: ignore[operator]
    if not is_four_bit(base):
        whole: PreTrainedModel = policy.merge_and_unload(adapter_names=[POLICY])  # type: ignore[operator]
        return whole
    from peft.tuners.tuners_utils import BaseTunerLayer

    with torch.no_grad():
        adapted: list[tuple[str, Any]] = [(n, m) for n, m in base.named_modules() if isinstance(m, BaseTunerLayer)]
        for name, module in adapted:
            layer = module.get_base_layer()
            if _is_rounded(layer):
                layer = _unrounded(layer, module.get_delta_weight(POLICY))
            else:
                module.merge(adapter_names=[POLICY])
            base.set_submodule(name, layer)
        for name, module in list(base.named_modules()):
            if _is_rounded(module):
                base.set_submodule(name, _unrounded(module, 0.0))
    base.hf_quantizer.remove_quantization_config(base)
    base.is_loaded_in_4bit = False
    plain: PreTrainedModel = base.to("cpu")
    return plain


def _is_rounded(layer: nn.Module) -> bool:
    return getattr(getattr(layer, "weight", None), "quant_state", None) is not None


def _unrounded(layer: Any, addition: torch.Tensor | float) -> nn.Linear:
    """A linear layer on the CPU with the weights that 4 bits stand for, plus an addition."""
    from bitsandbytes.functional import dequantize_4bit

    weight = (dequantize_4bit(layer.weight.data, layer.weight.quant_state).float() + addition).cpu()
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().float().cpu(), requires_grad=False)
    return plain
