"""The shape of a model, read from its config.json: what decides how much memory it takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from prefpipe.errors import ConfigError

MIXTURES = ("num_local_experts", "num_experts", "n_routed_experts")
TIED_BY_DEFAULT = ("gemma", "gemma2", "gemma3", "gemma3_text", "gpt2", "t5", "bart", "opt", "bloom", "falcon")
UNGATED = ("gpt2", "gpt_neox", "gptj", "opt", "bloom", "falcon", "phi", "starcoder2", "bart")
FOUR_NORMS = ("gemma2", "gemma3", "gemma3_text")
NORMED_QUERIES = ("qwen3", "gemma3", "gemma3_text")


@dataclass(frozen=True)
class ModelShape:
    """The part of a config.json that decides about memory.

    attention, key_value: widths of the queries and of the keys, all heads together. matrices: of an MLP, 3 if gated.
    norms: vectors of width `hidden` in each layer. biases: other parameters of each layer.
    encoder_layers: of an encoder-decoder model, whose decoder has `layers`; else 0.
    positions: learned position embeddings. scored: attention keeps its scores for the backward pass, because no fused
    kernel supports the family's soft-capping or position bias.
    """

    family: str
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    attention: int
    key_value: int
    intermediate: int
    matrices: int = 3
    tied: bool = False
    norms: int = 2
    biases: int = 0
    encoder_layers: int = 0
    positions: int = 0
    scored: bool = False

    @property
    def layer_parameters(self) -> int:
        """Parameters of a layer without cross-attention: of a decoder-only model, or of an encoder."""
        linear = self.hidden * (2 * self.attention + 2 * self.key_value + self.matrices * self.intermediate)
        return linear + self.norms * self.hidden + self.biases

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and of a head."""
        return self.vocabulary * self.hidden

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model."""
        num_layers = self.layers + self.encoder_layers
        cross = self.layers * (4 * self.hidden * self.attention + self.hidden) if self.encoder_layers else 0
        ends = self.embedding * (1 if self.tied else 2) + self.positions * self.hidden
        last_norms = self.hidden * (2 if self.encoder_layers or self.positions else 1)  # two, or one with a bias
        return num_layers * self.layer_parameters + cross + ends + last_norms

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers of all layers."""
        return (self.layers + self.encoder_layers) * sum(a * b for a, b in self.linear_widths.values())

    @property
    def linear_widths(self) -> dict[str, tuple[int, int]]:
        """(input, output) of the linear layers of one layer, by the names that most families give them."""
        h, a, k, i = self.hidden, self.attention, self.key_value, self.intermediate
        widths = {"q_proj": (h, a), "k_proj": (h, k), "v_proj": (h, k), "o_proj": (a, h)}
        widths |= {"gate_proj": (h, i)} if self.matrices == 3 else {}
        return widths | {"up_proj": (h, i), "down_proj": (i, h)}


def read_shape(folder: Path) -> ModelShape:
    """The shape of a folder's model. Raises ConfigError where config.json is missing, or not of a kind known here."""
    file = folder / "config.json"
    try:
        return shape_of(orjson.loads(file.read_bytes()))
    except (OSError, orjson.JSONDecodeError) as error:
        raise ConfigError(f"{file} cannot be read ({error}), so the model's shape is not known") from None


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a config.json describes. Raises ConfigError for a mixture of experts, or unknown names."""
    config = {**config, **(config.get("text_config") or {})}
    family = str(config.get("model_type", ""))
    experts = [key for key in MIXTURES if (config.get(key) or 1) > 1]
    if experts:
        raise ConfigError(f"config.json: {experts[0]}={config[experts[0]]}: mixtures of experts are not estimated")
    try:
        if "d_model" in config:
            return _encoder_decoder(config, family)
        return _gpt2(config) if family == "gpt2" else _decoder(config, family)
    except KeyError as missing:
        raise ConfigError(f"config.json of model_type={family} has no {missing}, so its shape is not known") from None


def _decoder(config: Mapping[str, Any], family: str) -> ModelShape:
    heads = config["num_attention_heads"]
    key_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    attention, key_value = heads * head_dim, key_heads * head_dim
    biases = 0
    if family == "qwen2" or config.get("attention_bias"):
        biases = attention + 2 * key_value + (0 if family == "qwen2" else config["hidden_size"])
    if family in NORMED_QUERIES:
        biases += 2 * head_dim
    return ModelShape(
        family,
        config["vocab_size"],
        config["hidden_size"],
        config["num_hidden_layers"],
        heads,
        attention,
        key_value,
        config["intermediate_size"],
        matrices=2 if family in UNGATED else 3,
        tied=bool(config.get("tie_word_embeddings", family in TIED_BY_DEFAULT)),
        norms=4 if family in FOUR_NORMS else 2,
        biases=biases,
        scored=config.get("attn_logit_softcapping") is not None,
    )


def _gpt2(config: Mapping[str, Any]) -> ModelShape:
    hidden = config["n_embd"]
    inner = config.get("n_inner") or 4 * hidden
    return ModelShape(
        "gpt2",
        config["vocab_size"],
        hidden,
        config["n_layer"],
        config["n_head"],
        hidden,
        hidden,
        inner,
        matrices=2,
        tied=bool(config.get("tie_word_embeddings", True)),
        norms=4,  # each with its bias
        biases=5 * hidden + inner,
        positions=config.get("n_positions", 1024),
    )


def _encoder_decoder(config: Mapping[str, Any], family: str) -> ModelShape:
    heads = config.get("num_heads") or config["encoder_attention_heads"]
    attention = heads * (config.get("d_kv") or config["d_model"] // heads)
    gated = config.get("is_gated_act") or "gated" in str(config.get("feed_forward_proj", ""))
    encoder_layers = config.get("num_layers") or config["encoder_layers"]
    return ModelShape(
        family,
        config["vocab_size"],
        config["d_model"],
        config.get("num_decoder_layers") or config.get("decoder_layers") or encoder_layers,
        heads,
        attention,
        attention,
        config.get("d_ff") or config["encoder_ffn_dim"],
        matrices=3 if gated else 2,
        tied=bool(config.get("tie_word_embeddings", True)),
        encoder_layers=encoder_layers,
        scored=True,
    )
