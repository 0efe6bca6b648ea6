"""Reward models: sequence classifiers of one label on the body of a language model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from prefpipe.errors import ConfigError
from prefpipe.models import import_transformers, is_classifier
from prefpipe.settings import ModelConfig
from prefpipe.sharding import gathered

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load_reward_model(
    model: ModelConfig, folder: Path, *, dtype: torch.dtype, device: torch.device, key: str = "model.path"
) -> PreTrainedModel:
    """A sequence classifier of one label on a device, its head in float32 at least.

    Raises ConfigError for a language model, to which transformers would give a head of random numbers, and for several
    labels. key: of the config, for that message.
    """
    import_transformers()
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(folder)
    if not is_classifier(config):
        raise ConfigError(
            f"{key}={folder} is no reward model ({', '.join(config.architectures or ['no architecture'])}); train one "
            f"with stage=train loss=bradley_terry, or name one that ends in ForSequenceClassification"
        )
    if config.num_labels != 1:
        raise ConfigError(f"{key}={folder} is a classifier of {config.num_labels} labels; a reward model has one")
    kernel = None if model.attention == "auto" else model.attention
    loaded: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=dtype, attn_implementation=kernel, use_safetensors=True
    )
    head = getattr(loaded, "score", None)
    if head is not None:
        head.float()  # rewards in bfloat16 would tie
    loaded.to(device)  # type: ignore[arg-type]
    return loaded


def new_reward_model(model: ModelConfig, folder: Path, *, seed: int, device: torch.device) -> PreTrainedModel:
    """A language model's body with a new head of one output, float32; a reward model as it is.

    The head's weights are drawn from N(0, 1 / (H + 1)), Stiennon et al. 2020, arXiv:2009.01325: rewards are of size 1.
    Raises ConfigError for an encoder-decoder model, and for a family without such a head on its last token.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification
    from transformers.utils import logging as transformers_logging

    config = AutoConfig.from_pretrained(folder)
    if config.is_encoder_decoder:
        raise ConfigError(f"model={model.name} is an encoder-decoder model; reward models are trained on decoders")
    if is_classifier(config):
        return load_reward_model(model, folder, dtype=torch.float32, device=device)
    kernel = None if model.attention == "auto" else model.attention
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # or it advises to train the head
    try:
        loaded = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=kernel, use_safetensors=True, num_labels=1
        )
    except ValueError as error:
        raise ConfigError(f"model={model.name}: transformers knows no reward model of this family ({error})") from None
    finally:
        transformers_logging.set_verbosity(verbosity)
    head = getattr(loaded, "score", None)
    if not isinstance(head, torch.nn.Linear):
        raise ConfigError(f"model={model.name}: transformers puts no linear head on the last token of this family")
    shape = head.out_features, head.in_features
    draws = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad(), gathered(head.parameters(), writable=True):
        head.weight.copy_(draws * (head.in_features + 1) ** -0.5)
    loaded.to(device)
    return loaded  # type: ignore[no-any-return]
