"""Optimizers and learning-rate schedules: two small dicts of functions."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from prefpipe.settings import TrainingConfig

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter], TrainingConfig], torch.optim.Optimizer]] = {
    "adamw": lambda params, t: torch.optim.AdamW(params, lr=t.learning_rate, weight_decay=t.weight_decay, fused=True),
    "sgd": lambda params, t: torch.optim.SGD(params, lr=t.learning_rate, weight_decay=t.weight_decay),
}

SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}
"""name → factor at progress in [0, 1) after warm-up."""


def learning_rate(step: int, num_steps: int, training: TrainingConfig) -> float:
    """Of optimizer step 0 .. num_steps - 1: linear warm-up from above 0, then the schedule, never quite 0."""
    warmup = math.ceil(training.warmup_fraction * num_steps)
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    return training.learning_rate * SCHEDULES[training.schedule]((step - warmup) / max(1, num_steps - warmup))
