"""Low-rank adapters, by peft: a small trainable addition to frozen weights."""

import logging
from pathlib import Path

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
        task_type="CAUSAL_LM",
    )
    try:
        adapted: PeftModel = get_peft_model(policy, config)
    except ValueError as error:
        linear = sorted({name.rsplit(".", 1)[-1] for name, m in policy.named_modules() if isinstance(m, nn.Linear)})
        raise ConfigError(
            f"model.adapter_targets={list(model.adapter_targets)}: {error} The linear layers are {', '.join(linear)}"
        ) from None
    head = policy.get_output_embeddings()
    if policy.config.get_text_config().tie_word_embeddings and isinstance(head, BaseTunerLayer):
        raise ConfigError(
            f"model.adapter_targets={list(model.adapter_targets)}: the head shares its weights with the embeddings, "
            f"which merging would change too; leave it out"
        )
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    log.info("%s: %d of %d parameters are trained", model.adapter, trained, sum(p.numel() for p in policy.parameters()))
    return adapted


def save(policy: nn.Module, folder: Path) -> PreTrainedModel:
    """Write the adapter into folder/adapter, where there is one, and give back the policy with it merged in."""
    if isinstance(policy, PreTrainedModel):
        return policy
    policy.save_pretrained(folder / "adapter")  # type: ignore[operator]
    merged: PreTrainedModel = policy.merge_and_unload()  # type: ignore[operator]
    return merged
