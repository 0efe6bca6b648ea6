"""What an estimate is made for: a model, the hardware, the settings of training, and the lengths of one micro-batch."""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from prefpipe.losses import Loss
from prefpipe.memory.shapes import ModelShape
from prefpipe.settings import HardwareConfig, ModelConfig, TrainingConfig

FLOAT = 4
"""Bytes of a float32."""


class Lengths(NamedTuple):
    """Tokens of one pair; rejected is 0 where there is no rejected side."""

    prompt: int
    chosen: int
    rejected: int


@dataclass(frozen=True)
class Setting:
    """The input of an estimate. hardware: as returned by `resolved`.

    lengths: of the pairs of one micro-batch. reference_is_policy: the reference is the policy's starting point.
    reference_given: its log-probabilities are read from a file.
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
        """Whether matrix products are computed in 16 bits."""
        return self.hardware.precision != "fp32"

    @property
    def batching(self) -> str:
        """training.batching; "auto" as it is resolved for a family that our attention supports."""
        automatic = "padded" if self.shape.encoder_layers else "shared"
        return automatic if self.training.batching == "auto" else self.training.batching

    @property
    def reference_online(self) -> bool:
        """Whether the reference is evaluated in each step."""
        if not self.loss.needs_reference or self.reference_given:
            return False
        return self.training.reference in ("online", "moving") or "kl" in self.loss.reads


def trained_parameters(setting: Setting) -> int:
    """How many parameters the optimizer updates."""
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


def resolved(hardware: HardwareConfig, *, num_gpus: int) -> HardwareConfig:
    """The hardware with "auto" and null replaced, for a machine with num_gpus GPUs."""
    device = hardware.device if hardware.device != "auto" else "cuda" if num_gpus else "cpu"
    precision = hardware.precision if hardware.precision != "auto" else "bf16" if device == "cuda" else "fp32"
    processes = hardware.gpus_per_node or max(1, num_gpus)
    return replace(hardware, device=device, precision=precision, gpus_per_node=processes)


def longest_allowed(training: TrainingConfig, *, pairwise: bool = True) -> list[Lengths]:
    """A micro-batch of pairs of the greatest length: prompts of max_prompt_tokens, completions that fill max_tokens.

    These are the lengths that truncation leaves. Shorter prompts with longer completions are possible, and take more
    logits.
    """
    completion = training.max_tokens - training.max_prompt_tokens
    pair = Lengths(training.max_prompt_tokens, completion, completion if pairwise else 0)
    return micro_batch([pair] * training.micro_batch_size, training)


def micro_batch(lengths: Iterable[Sequence[int]], training: TrainingConfig) -> list[Lengths]:
    """The longest pairs, as many as fit into one micro-batch; no micro-batch of training takes more memory."""
    longest = heapq.nsmallest(
        training.micro_batch_size,
        (Lengths(*pair) for pair in lengths),
        key=lambda pair: (-pair.prompt - max(pair.chosen, pair.rejected), pair),
    )
    taken: list[Lengths] = []
    tokens = 0
    for pair in longest:
        tokens += pair.prompt * (2 if pair.rejected else 1) + pair.chosen + pair.rejected
        if taken and training.micro_batch_tokens is not None and tokens > training.micro_batch_tokens:
            break
        taken.append(pair)
    return taken
