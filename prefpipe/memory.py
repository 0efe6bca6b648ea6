"""How much memory and disk training takes: sums over a model's shape and a batch's lengths, without weights or torch.

The sums follow the tensors that this project's own loop, engine and head keep (training/loop.py, engine.py, head.py),
layer by layer through the forward and the backward pass; benchmarks/memory_plan.py compares them with what processes
took. They are bytes in use: gaps between blocks come on top, on a GPU also the CUDA context, and on a CPU what glibc's
heap keeps of blocks below 32 MiB that were freed.
"""

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from prefpipe.errors import ConfigError
from prefpipe.losses import Loss
from prefpipe.settings import HardwareConfig, ModelConfig, TrainingConfig

FLOAT = 4
"""Bytes of a float32."""

KEPT_LOGITS = 2**30
TILE = 2**24
QUERY_BLOCK = 256
STATES_ON_DISK = 3
"""What head.py, attention.py and checkpoints.py call KEPT_BYTES, TILE_BYTES, QUERY_BLOCK and KEPT, with the state that
is being written; a test compares them."""

LIVE_WEIGHTS = 10**9
"""ZeRO-3 lets go of gathered weights beyond so many (stage3_max_live_parameters of training/deepspeed.py)."""

REDUCE_BUCKET = 5 * 10**8
"""Gradients that ZeRO exchanges at a time (DeepSpeed's reduce_bucket_size); overlapping it with the backward pass takes
two such buckets."""

MIXTURES = ("num_local_experts", "num_experts", "n_routed_experts")
TIED_BY_DEFAULT = ("gemma", "gemma2", "gemma3", "gemma3_text", "gpt2", "t5", "bart", "opt", "bloom", "falcon")
UNGATED = ("gpt2", "gpt_neox", "gptj", "opt", "bloom", "falcon", "phi", "starcoder2", "bart")
FOUR_NORMS = ("gemma2", "gemma3", "gemma3_text")
NORMED_QUERIES = ("qwen3", "gemma3", "gemma3_text")


@dataclass(frozen=True)
class ModelShape:
    """What of a config.json decides about memory.

    attention, key_value: widths of queries, and of keys, all heads together. matrices: of an MLP, 3 where it is gated.
    norms: vectors as wide as the hidden state of each layer. biases: further numbers of each layer.
    encoder_layers: of an encoder-decoder model, whose decoder's layers are `layers`; else 0.
    positions: learnt position embeddings. scored: attention keeps its scores for the backward pass, as no fused kernel
    has the family's soft-capping or position bias.
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
        """Of one layer of a decoder without an encoder, or of an encoder's layer."""
        linear = self.hidden * (2 * self.attention + 2 * self.key_value + self.matrices * self.intermediate)
        return linear + self.norms * self.hidden + self.biases

    @property
    def embedding(self) -> int:
        """Numbers of the embedding, and of a head."""
        return self.vocabulary * self.hidden

    @property
    def num_parameters(self) -> int:
        """All of them."""
        num_layers = self.layers + self.encoder_layers
        cross = self.layers * (4 * self.hidden * self.attention + self.hidden) if self.encoder_layers else 0
        ends = self.embedding * (1 if self.tied else 2) + self.positions * self.hidden
        last_norms = self.hidden * (2 if self.encoder_layers or self.positions else 1)  # two, or one with a bias
        return num_layers * self.layer_parameters + cross + ends + last_norms

    @property
    def linear_widths(self) -> dict[str, tuple[int, int]]:
        """(input, output) of the linear layers of one layer, by the names that most families give them."""
        h, a, k, i = self.hidden, self.attention, self.key_value, self.intermediate
        widths = {"q_proj": (h, a), "k_proj": (h, k), "v_proj": (h, k), "o_proj": (a, h)}
        widths |= {"gate_proj": (h, i)} if self.matrices == 3 else {}
        return widths | {"up_proj": (h, i), "down_proj": (i, h)}


class Lengths(NamedTuple):
    """Tokens of one pair; without a rejected side 0."""

    prompt: int
    chosen: int
    rejected: int


@dataclass(frozen=True)
class Setting:
    """What the estimate reads. hardware: as `resolved` leaves it.

    lengths: of the pairs of one micro-batch. reference_is_policy: the reference starts where the policy does.
    reference_given: its sums are read from a file.
    """

    shape: ModelShape
    hardware: HardwareConfig
    training: TrainingConfig
    loss: Loss
    model: ModelConfig
    lengths: Sequence[Lengths]
    reference_is_policy: bool = True
    reference_given: bool = False

    @property
    def world_size(self) -> int:
        """Processes of the run, on all nodes."""
        return self.hardware.num_nodes * (self.hardware.gpus_per_node or 1)

    @property
    def adapted(self) -> bool:
        """Whether an adapter is trained and the weights are frozen."""
        return self.model.adapter != "none"

    @property
    def half(self) -> bool:
        """Whether matrices are multiplied in 16 bits."""
        return self.hardware.precision != "fp32"

    @property
    def batching(self) -> str:
        """What "auto" comes to for a family that our attention knows."""
        automatic = "padded" if self.shape.encoder_layers else "shared"
        return automatic if self.training.batching == "auto" else self.training.batching

    @property
    def reference_online(self) -> bool:
        """Whether the reference is asked in each step."""
        if not self.loss.needs_reference or self.reference_given:
            return False
        return self.training.reference in ("online", "moving") or "kl" in self.loss.reads


@dataclass(frozen=True)
class Memory:
    """Bytes of one process.

    weights, gradients, optimizer, reference: what is held of each through a step. activations: what the backward pass
    needs of the forward pass. logits: of the head, or of a tile of it. workspace: what a layer's backward pass and
    16-bit copies take for a while. Each of these is at its own largest; total is the most at one moment, and less than
    their sum where activations go while gradients come. host: of a node, what is offloaded to it.
    """

    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    logits: int
    workspace: int
    total: int
    host: int = 0

    def parts(self) -> dict[str, int]:
        """Name → bytes of what makes up the total."""
        names = ("weights", "gradients", "optimizer", "activations", "logits", "reference", "workspace")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Disk:
    """Bytes. states: all that lie there at once while training runs. reference_cache: at most."""

    states: int
    checkpoint: int
    reference_cache: int


# ------------------------------------------------------------------------------------------------ the model's shape


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


# ------------------------------------------------------------------------------------------------ a micro-batch


def longest_allowed(training: TrainingConfig, *, pairwise: bool = True) -> list[Lengths]:
    """The micro-batch of pairs as long as they may be: prompts of max_prompt_tokens, completions that fill max_tokens.

    Shorter prompts with longer completions take more logits, and are possible; this is what truncation leaves.
    """
    completion = training.max_tokens - training.max_prompt_tokens
    pair = Lengths(training.max_prompt_tokens, completion, completion if pairwise else 0)
    return micro_batch([pair] * training.micro_batch_size, training)


def micro_batch(lengths: Iterable[Sequence[int]], training: TrainingConfig) -> list[Lengths]:
    """The longest pairs, as many as fit into one micro-batch: no batch of training takes more."""
    longest = heapq.nsmallest(
        training.micro_batch_size,
        (Lengths(*pair) for pair in lengths),
        key=lambda pair: (-pair.prompt - max(pair.chosen, pair.rejected), pair),
    )
    taken: list[Lengths] = []
    tokens = 0
    for pair in longest:
        tokens += 2 * pair.prompt + pair.chosen + pair.rejected
        if taken and training.micro_batch_tokens is not None and tokens > training.micro_batch_tokens:
            break
        taken.append(pair)
    return taken


class _Layout(NamedTuple):
    """Tokens of a micro-batch as they pass the layers.

    tokens: in all rows. read: those that the last layer computes. scored: that the head sees. copied: tokens of shared
    prompts whose keys and values are laid out again, with those that follow them. masked, masked_last: numbers of the
    masks of one layer. cells: pairs of a query and a key of one head. encoded: tokens of the encoder.
    """

    tokens: int
    read: int
    scored: int
    copied: int = 0
    masked: int = 0
    masked_last: int = 0
    cells: int = 0
    encoded: int = 0


def _layout(setting: Setting) -> _Layout:
    lengths, pairwise = setting.lengths, setting.loss.pairwise
    scored = sum(p.chosen + p.rejected for p in lengths)
    sides = 2 if pairwise else 1
    if setting.shape.encoder_layers:
        width = max(max(p.chosen, p.rejected) for p in lengths)
        encoded = len(lengths) * max(p.prompt for p in lengths)
        rows = sides * len(lengths)
        cells = rows * width * (width + max(p.prompt for p in lengths)) + encoded * max(p.prompt for p in lengths)
        return _Layout(rows * width, rows * width, scored, cells=cells, encoded=encoded)
    if setting.batching == "padded":
        width = max(p.prompt + max(p.chosen, p.rejected) for p in lengths)
        tokens = sides * len(lengths) * width
        return _Layout(tokens, tokens, scored, cells=tokens * width)
    shared = setting.batching == "shared"
    # (tokens of the document, of the shared prompt that it sees before them, read of it)
    documents = [(p.prompt + p.chosen, 0, p.chosen + 1) for p in lengths]
    if pairwise:
        documents += [(p.rejected, p.prompt, p.rejected) for p in lengths if shared]
        documents += [(p.prompt + p.rejected, 0, p.rejected + 1) for p in lengths if not shared]
    return _Layout(
        tokens=sum(own for own, _, _ in documents),
        read=sum(read for _, _, read in documents),
        scored=scored,
        copied=sum(own + before for own, before, _ in documents if before),
        masked=sum(_mask(own, own + before) for own, before, _ in documents if before),
        masked_last=sum(_mask(read, own + before) for own, before, read in documents),
        cells=sum(own * (own + before) for own, before, _ in documents),
    )


def _mask(queries: int, keys: int) -> int:
    """Numbers of the masks of a document's blocks of queries (attention._in_blocks)."""
    before = keys - queries
    starts = range(0, queries, QUERY_BLOCK)
    return sum(min(QUERY_BLOCK, queries - start) * (before + min(start + QUERY_BLOCK, queries)) for start in starts)


# ------------------------------------------------------------------------------------------------ the estimate


def resolved(hardware: HardwareConfig, *, num_gpus: int) -> HardwareConfig:
    """The hardware with "auto" and null filled in, for a machine with so many GPUs."""
    device = hardware.device if hardware.device != "auto" else "cuda" if num_gpus else "cpu"
    precision = hardware.precision if hardware.precision != "auto" else "bf16" if device == "cuda" else "fp32"
    processes = hardware.gpus_per_node or max(1, num_gpus)
    return replace(hardware, device=device, precision=precision, gpus_per_node=processes)


def estimate(setting: Setting) -> Memory:
    """Bytes that one process takes at the fullest moment of a step.

    Weights in float32, gradients and Adam's two moments, 4 + 4 + 8 bytes for each trained number, are what mixed
    precision keeps with autocast; ZeRO shards them as Rajbhandari et al. 2019 (arXiv:1910.02054, section 5) and
    DeepSpeed's estimate_zero2_model_states_mem_needs and estimate_zero3_... count them. Activations are those tensors
    that autograd keeps of each layer (compare Korthikanti et al. 2022, arXiv:2205.05198, eq. 1, for another set of
    kernels).
    """
    held = _held(setting)
    layers = _Layers(setting)
    logits, kept = _logits(setting)
    fixed = held.weights + held.optimizer + held.reference + layers.copies
    return replace(
        held,
        activations=layers.saved_in_all,
        logits=logits,
        workspace=max(layer.work for layer in layers.each) + layers.copies,
        total=fixed + _fullest(setting, held.gradients, layers, logits if kept else 0, logits),
    )


def trained_parameters(setting: Setting) -> int:
    """Numbers that the optimizer changes."""
    shape = setting.shape
    if not setting.adapted:
        return shape.num_parameters
    rank, targets = setting.model.adapter_rank or 16, setting.model.adapter_targets
    chosen = [widths for name, widths in shape.linear_widths.items() if name in targets]
    of_layer = sum(
        rank * (a + b) + (b if setting.model.adapter == "dora" else 0)
        for a, b in chosen or shape.linear_widths.values()
    )
    return (shape.layers + shape.encoder_layers) * of_layer


def _held(setting: Setting) -> Memory:
    """What is there before a forward pass begins; gradients as they are at the end of a step."""
    shape, hardware, n = setting.shape, setting.hardware, setting.world_size
    all_of_them, trained = shape.num_parameters, trained_parameters(setting)
    frozen = all_of_them if setting.adapted else 0
    moments = 2 if setting.training.optimizer == "adamw" else 0
    second = setting.reference_online and not (setting.adapted and setting.reference_is_policy)
    if not hardware.zero_stage:
        weights = _frozen_bytes(setting, frozen) + FLOAT * trained
        return Memory(
            weights=weights,
            gradients=FLOAT * trained,
            optimizer=FLOAT * moments * trained,
            reference=FLOAT * all_of_them if second else _moving_adapter(setting, trained),
            activations=0,
            logits=0,
            workspace=0,
            total=0,
        )
    size = 2 if setting.half else FLOAT
    of_weights = size * (frozen + trained)
    states = FLOAT * (1 + 1 + moments) * trained // n  # a copy of the weights, the gradients, and the moments
    gradients = size * trained // (n if hardware.zero_stage >= 2 else 1)
    gradients += 2 * size * min(trained, REDUCE_BUCKET) if n > 1 else 0
    gathered = size * min(all_of_them, LIVE_WEIGHTS) if hardware.zero_stage == 3 else 0
    own_weights = of_weights // n if hardware.zero_stage == 3 else of_weights
    host = (states if hardware.offload_optimizer else 0) + (own_weights if hardware.offload_params else 0)
    return Memory(
        weights=(0 if hardware.offload_params else own_weights) + gathered,
        gradients=gradients,
        optimizer=0 if hardware.offload_optimizer else states,
        reference=size * all_of_them if second else _moving_adapter(setting, trained),
        activations=0,
        logits=0,
        workspace=0,
        total=0,
        host=host * (hardware.gpus_per_node or 1),
    )


def _frozen_bytes(setting: Setting, frozen: int) -> int:
    """QLoRA holds the layers in 4 bits and a scale for each 64 of them (Dettmers et al. 2023, arXiv:2305.14314)."""
    if setting.model.adapter != "qlora":
        return FLOAT * frozen
    shape = setting.shape
    linear = (shape.layers + shape.encoder_layers) * sum(a * b for a, b in shape.linear_widths.values())
    return round(linear * (0.5 + 1 / 64)) + FLOAT * (frozen - linear)


def _moving_adapter(setting: Setting, trained: int) -> int:
    return FLOAT * trained if setting.training.reference == "moving" and setting.adapted else 0


class _Layer(NamedTuple):
    """Bytes. saved: of the forward pass until the backward pass. work: for a while in the backward pass, what is
    computed again included. parameters: trained ones."""

    saved: int
    work: int
    parameters: int


class _Layers:
    """What the layers keep for the backward pass, in the order of the forward pass."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.shape, self.at = setting, setting.shape, _layout(setting)
        self.small = 2 if setting.half else FLOAT
        narrow = setting.batching != "padded"
        shape = self.shape
        of_layer = trained_parameters(setting) // (shape.layers + shape.encoder_layers)
        of_layer = of_layer if setting.adapted else shape.layer_parameters
        encoder = [self._layer(of_layer, tokens=self.at.encoded) for _ in range(shape.encoder_layers)]
        decoder = [self._layer(of_layer, tokens=self.at.tokens) for _ in range(shape.layers - narrow)]
        if narrow:
            decoder.append(self._last(of_layer))
        self.each = [*encoder, *decoder]

    @property
    def final(self) -> int:
        """Of the last norm, the hidden states that the head reads, and the rotations of each place in a packed row."""
        rotations = 2 * self.shape.attention // self.shape.heads if self.setting.batching != "padded" else 0
        return self._norm(self.at.tokens) + FLOAT * (self.shape.hidden * self.at.scored + rotations * self.at.tokens)

    @property
    def saved_in_all(self) -> int:
        """At the end of the forward pass."""
        return sum(layer.saved for layer in self.each) + self.final

    @property
    def copies(self) -> int:
        """16-bit copies of the layers' weights, which autocast keeps as long as the backward pass needs them."""
        if not self.setting.half or self.setting.hardware.zero_stage:
            return 0
        return 2 * len(self.each) * sum(a * b for a, b in self.shape.linear_widths.values())

    def _layer(self, parameters: int, *, tokens: int) -> _Layer:
        saved = self._attended(tokens, tokens, self.at.masked) + self._mlp(tokens, tokens)
        work = self._work(tokens, tokens)
        return self._checkpointed(_Layer(saved, work, parameters), tokens)

    def _last(self, parameters: int) -> _Layer:
        """Which computes only what is read (training/last_layer.py)."""
        tokens, read = self.at.tokens, self.at.read
        scattered = self.small * (self.shape.attention + 2 * self.shape.hidden) * read  # kept by index_copy
        saved = self._attended(tokens, read, self.at.masked_last) + self._mlp(tokens, read) + scattered
        return self._checkpointed(_Layer(saved, self._work(tokens, read), parameters), tokens)

    def _checkpointed(self, layer: _Layer, tokens: int) -> _Layer:
        if not self.setting.training.gradient_checkpointing:
            return layer
        return _Layer(FLOAT * self.shape.hidden * tokens, layer.saved + layer.work, layer.parameters)

    def _norm(self, tokens: int) -> int:
        """Its input, and, for the gradient of its weight, the input divided by its size."""
        return FLOAT * self.shape.hidden * tokens * (1 if self.setting.adapted else 2)

    def _attended(self, tokens: int, read: int, masked: int) -> int:
        """Norm, projections, queries, keys and values as attention saw them, and what came out."""
        shape, at, small = self.shape, self.at, self.small
        keys = shape.key_value if self.setting.batching == "padded" else shape.attention
        projected = shape.hidden * tokens + (shape.hidden * read if read < tokens else 0)
        # Where each row is a document, what comes out of attention is what the projection behind it gets.
        outputs = 1 if self.setting.batching == "padded" else 2
        attended = shape.attention * tokens + 2 * keys * (tokens + at.copied) + outputs * shape.attention * read
        scores = shape.heads * (2 * FLOAT + 1) * at.cells if shape.scored else 0
        sums = FLOAT * shape.heads * read
        cross = self._norm(tokens) + small * 3 * shape.attention * tokens if shape.encoder_layers else 0
        return (
            self._norm(tokens)
            + small * (projected + attended + masked)
            + scores
            + sums
            + cross
            + self._adapter(tokens, read, in_mlp=False)
        )

    def _mlp(self, tokens: int, read: int) -> int:
        """Norm, its output, and what the activation function took and gave."""
        shape = self.shape
        inner = (2 * shape.matrices - 2) * shape.intermediate
        return (
            self._norm(tokens) + self.small * (shape.hidden + inner) * read + self._adapter(tokens, read, in_mlp=True)
        )

    def _adapter(self, tokens: int, read: int, *, in_mlp: bool) -> int:
        if not self.setting.adapted:
            return 0
        rank = self.setting.model.adapter_rank or 16
        return FLOAT * rank * (self.shape.matrices * read if in_mlp else 2 * tokens + 2 * read)

    def _work(self, tokens: int, read: int) -> int:
        """Gradients of an MLP's two widest tensors and of the hidden states."""
        return self.small * 2 * self.shape.intermediate * read + FLOAT * 3 * self.shape.hidden * tokens


def _logits(setting: Setting) -> tuple[int, bool]:
    """(bytes of logits, whether they are kept for the backward pass): training/head.py, _LinearLogps."""
    if setting.loss.of_rewards:
        return 0, False
    whole = FLOAT * sum(p.chosen + p.rejected for p in setting.lengths) * setting.shape.vocabulary
    head = setting.training.head
    kept = not setting.adapted and (head == "plain" or (head == "auto" and whole <= KEPT_LOGITS))
    return (whole if kept else min(whole, TILE)), kept


def _fullest(setting: Setting, gradients: int, layers: _Layers, kept: int, logits: int) -> int:
    """The most of gradients, activations and logits at one moment: after the forward pass, in the head's backward pass,
    in that of each layer, and when the embedding's gradient comes.
    """
    frozen_ends = setting.adapted or setting.loss.of_rewards
    of_head = 0 if frozen_ends else FLOAT * setting.shape.embedding
    # From the second micro-batch on, and always where processes exchange them, gradients are there from the start.
    there = setting.world_size > 1 or setting.training.global_batch_size > len(setting.lengths) * setting.world_size
    before = gradients if there else 0
    moments = [before + layers.saved_in_all + logits + of_head]
    saved = layers.saved_in_all - layers.final
    new = 0 if there else of_head
    for layer in reversed(layers.each):
        moments.append(before + new + saved + layer.work)
        saved -= layer.saved
        new += 0 if there else FLOAT * layer.parameters
    # A tied gradient waits as two halves; one that is there already gets a dense one added.
    again = of_head * (2 if there and setting.shape.tied else 1 if there or setting.shape.tied else 0)
    moments.append(gradients + again)
    return max(moments)


def disk(setting: Setting, *, num_pairs: int) -> Disk:
    """Bytes that training writes: states (weights that change, and the optimizer), the checkpoint in float32, and the
    reference's log-probabilities, 4 bytes for each token of a completion.
    """
    trained = trained_parameters(setting)
    moments = 2 if setting.training.optimizer == "adamw" else 0
    saves = setting.training.save_every_steps is not None
    completion = max((max(p.chosen, p.rejected) for p in setting.lengths), default=0)
    cached = setting.loss.needs_reference and not setting.reference_online and not setting.reference_given
    adapter = FLOAT * trained if setting.adapted else 0
    return Disk(
        states=STATES_ON_DISK * FLOAT * (1 + moments) * trained if saves else 0,
        checkpoint=FLOAT * setting.shape.num_parameters + adapter,
        reference_cache=num_pairs * 2 * (FLOAT * completion + 44) if cached else 0,
    )


def size(num_bytes: float) -> str:
    """Bytes as people read them: 512 MiB, 12.3 GiB."""
    if num_bytes < 2**30:
        return f"{math.ceil(num_bytes / 2**20)} MiB"
    return f"{num_bytes / 2**30:.1f} GiB"
