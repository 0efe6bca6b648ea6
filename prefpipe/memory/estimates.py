"""Bytes that training takes: of memory at the peak of a step, and of disk."""

import math
from dataclasses import dataclass, replace

from prefpipe.memory.layers import Layers
from prefpipe.memory.setting import FLOAT, Setting, trained_parameters

KEPT_LOGITS = 2**30
TILES = {"cpu": 2**24, "cuda": 2**28}
STATES_ON_DISK = 3
"""What training/head.py and checkpoints.py call KEPT_BYTES, TILE_BYTES, GPU_TILE_BYTES and KEPT, with the state that is
being written; a test compares them."""

LIVE_WEIGHTS = 10**9
"""ZeRO-3 lets go of gathered weights beyond so many (stage3_max_live_parameters of training/deepspeed.py)."""

REDUCE_BUCKET = 5 * 10**8
"""Gradients that ZeRO exchanges at a time (DeepSpeed's reduce_bucket_size); overlapping it with the backward pass takes
two such buckets."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one process.

    weights, gradients, optimizer, reference: held through a step. activations: kept from the forward for the backward
    pass. logits: of the head, or of one tile. workspace: needed for a while by a layer's backward pass and by 16-bit
    copies. Each of these is its own maximum. total: the maximum at one moment, which is less than their sum where
    activations are freed while gradients appear. host: what is offloaded, per node.
    """

    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int = 0
    logits: int = 0
    workspace: int = 0
    total: int = 0
    host: int = 0

    def parts(self) -> dict[str, int]:
        """Name → bytes of what makes up the total."""
        names = ("weights", "gradients", "optimizer", "activations", "logits", "reference", "workspace")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Disk:
    """Bytes. states: all that exist at once while training runs. reference_cache: an upper bound."""

    states: int
    checkpoint: int
    reference_cache: int


def estimate(setting: Setting) -> Memory:
    """Bytes that one process takes at the peak of a step.

    Weights in float32, gradients and Adam's two moments, 4 + 4 + 8 bytes for each trained number, are what mixed
    precision keeps with autocast; ZeRO shards them as Rajbhandari et al. 2019 (arXiv:1910.02054, section 5) and
    DeepSpeed's estimate_zero2_model_states_mem_needs and estimate_zero3_... count them. Activations are those tensors
    that autograd keeps of each layer (compare Korthikanti et al. 2022, arXiv:2205.05198, eq. 1, for another set of
    kernels).
    """
    held = _held(setting)
    layers = Layers(setting)
    logits, kept = _logits(setting)
    fixed = held.weights + held.optimizer + held.reference + layers.copies
    return replace(
        held,
        activations=layers.saved_in_all,
        logits=logits,
        workspace=max(layer.work for layer in layers.each) + layers.copies,
        total=fixed + _fullest(setting, held.gradients, layers, logits if kept else 0, logits),
    )


def _held(setting: Setting) -> Memory:
    """What is held before a forward pass begins; gradients as they are at the end of a step. The rest is left at 0."""
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
            reference=_second(setting) if second else _moving_adapter(setting, trained),
        )
    size = 2 if setting.half else FLOAT
    of_weights = size * (frozen + trained)
    states = FLOAT * (1 + 1 + moments) * trained // n  # a copy of the weights, the gradients, and the moments
    gradients = size * trained // (n if hardware.zero_stage >= 2 else 1)
    gradients += 2 * size * min(trained, REDUCE_BUCKET) if n > 1 else 0
    gathered = size * min(all_of_them, LIVE_WEIGHTS) if hardware.zero_stage == 3 else 0
    own_weights = of_weights // n if hardware.zero_stage == 3 else of_weights
    of_second = size * all_of_them // (n if hardware.zero_stage == 3 else 1) if second else 0
    # Only "kl" calls the second model's head in each tile of the logits, and keeps it whole for that.
    head = size * setting.shape.embedding if second and hardware.zero_stage == 3 and "kl" in setting.loss.reads else 0
    host = (states if hardware.offload_optimizer else 0) + (own_weights + of_second) * hardware.offload_params
    return Memory(
        weights=(0 if hardware.offload_params else own_weights) + gathered,
        gradients=gradients,
        optimizer=0 if hardware.offload_optimizer else states,
        reference=of_second * (not hardware.offload_params) + head if second else _moving_adapter(setting, trained),
        host=host * (hardware.gpus_per_node or 1),
    )


def _frozen_bytes(setting: Setting, frozen: int) -> int:
    """QLoRA holds the layers in 4 bits and a scale for each 64 of them (Dettmers et al. 2023, arXiv:2305.14314)."""
    linear = setting.shape.linear_parameters
    if setting.model.adapter == "qlora":
        return round(linear * (0.5 + 1 / 64)) + FLOAT * (frozen - linear)
    return _halved(setting, frozen) if setting.model.adapter == "lora" else FLOAT * frozen


def _halved(setting: Setting, frozen: int) -> int:
    """Frozen weights outside of ZeRO: linear layers are in 16 bits under autocast (training/frozen.py)."""
    head = 0 if setting.shape.tied or setting.loss.of_rewards else setting.shape.embedding
    return FLOAT * frozen - (FLOAT - 2) * (setting.shape.linear_parameters + head) * setting.half


def _second(setting: Setting) -> int:
    frozen = setting.shape.num_parameters
    return FLOAT * frozen if setting.training.reference == "moving" else _halved(setting, frozen)


def _moving_adapter(setting: Setting, trained: int) -> int:
    return FLOAT * trained if setting.training.reference == "moving" and setting.adapted else 0


def _logits(setting: Setting) -> tuple[int, bool]:
    """(bytes of logits, whether they are kept for the backward pass): training/head.py, _LinearLogps."""
    if setting.loss.of_rewards:
        return 0, False
    whole = FLOAT * sum(p.chosen + p.rejected for p in setting.lengths) * setting.shape.vocabulary
    head = setting.training.head
    kept = not setting.adapted and (head == "plain" or (head == "auto" and whole <= KEPT_LOGITS))
    return (whole if kept else min(whole, TILES[setting.hardware.device])), kept


def _fullest(setting: Setting, gradients: int, layers: Layers, kept: int, logits: int) -> int:
    """The maximum of gradients, activations and logits together: after the forward pass, in the head's backward pass,
    in that of each layer, and when the embedding's gradient appears.
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
