"""Low-rank adapters, by peft: a small trainable addition to frozen weights."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from prefpipe.errors import ConfigError
from prefpipe.settings import ModelConfig

log = logging.getLogger(__name__)


def with_adapter(policy: PreTrainedModel, model: ModelConfig) -> nn.Module:
    """The policy with model.adapter on it, all else frozen; the policy itself where there is none.

    Its first output is the policy's: one half of an adapter starts at 0. Raises ConfigError without peft, or when
    model.adapter_targets names a layer that the model does not have.
    """
    if model.adapter == "none":
        return policy
    try:
        from peft import LoraConfig, PeftModel, get_peft_model
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        raise ConfigError(f"model.adapter={model.adapter} needs peft: pip install 'prefpipe[lora]'") from None
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
    head = policy.get_output_embeddings()
    if isinstance(head, BaseTunerLayer) and head.weight is policy.get_input_embeddings().weight:
        raise ConfigError(
            f"model.adapter_targets={list(model.adapter_targets)}: the head shares its weights with the embeddings, "
            f"which merging would change too; leave it out"
        )
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    log.info("%s: %d of %d parameters are trained", model.adapter, trained, sum(p.numel() for p in policy.parameters()))
    return adapted


def _task_type(policy: PreTrainedModel) -> str:
    if hasattr(policy, "score"):
        return "SEQ_CLS"  # the head of a reward model is trained whole
    return "SEQ_2_SEQ_LM" if policy.config.is_encoder_decoder else "CAUSAL_LM"


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
    """Write the adapter into folder/adapter, where there is one, and give back the policy with it merged in."""
    if isinstance(policy, PreTrainedModel):
        return policy
    policy.save_pretrained(folder / "adapter", selected_adapters=[POLICY])  # type: ignore[operator]
    merged: PreTrainedModel = policy.merge_and_unload(adapter_names=[POLICY])  # type: ignore[operator]
    return merged
