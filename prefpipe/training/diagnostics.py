"""What a training run reports: metrics of each step, speed and memory, and an alarm."""

import logging
import os
import resource
import sys
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

import orjson
import torch
from torch import Tensor

from prefpipe.errors import DataError
from prefpipe.logps import PairLogps, PairRewards
from prefpipe.losses import Loss, LossOutput

log = logging.getLogger(__name__)

ALARM_WINDOW = 20
ALARM_FALL = 0.25
"""Nats per token: chosen tokens are on average e^-0.25 = 0.78 times as likely as under the reference."""

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
"""Dense bf16 floating-point operations per second, by a part of the device's name; from the vendor's data sheets."""


class Measured(NamedTuple):
    """Of a batch of B pairs, all [B] float64, detached. reference_*: 0 where the loss needs none.

    chosen, rejected: log-probabilities; of a reward model its rewards.
    """

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @classmethod
    def of(cls, out: LossOutput, policy: PairLogps | PairRewards, reference: PairLogps | None) -> "Measured":
        """The results of a micro-batch; they stay on their device."""
        zeros = torch.zeros_like(policy.chosen)
        frozen = (zeros, zeros) if reference is None else (reference.chosen, reference.rejected)
        parts = (*out, policy.chosen, policy.rejected, *frozen, policy.chosen_tokens, policy.rejected_tokens)
        return cls(*(part.detach().double() for part in parts))

    @classmethod
    def joined(cls, micro_batches: "list[Measured]") -> "Measured":
        """All micro-batches of an interval, on the CPU: the only transfer of its steps."""
        if not micro_batches:
            return cls(*torch.empty(len(cls._fields), 0, dtype=torch.float64))
        return cls(*torch.cat([torch.stack(part) for part in micro_batches], dim=1).cpu())


class Interval:
    """The optimizer steps since the last row of metrics.jsonl: training.log_every_steps of them, or fewer at the end.

    measured: micro-batches of this process, on their device. rows: of the data, one for each value in measured.
    divisor, tokens: of the global batches. started: of the clock time.perf_counter.
    """

    def __init__(self) -> None:
        self.measured: list[Measured] = []
        self.rows: list[int] = []
        self.steps = self.divisor = self.tokens = 0
        self.started = time.perf_counter()

    def add_step(self, divisor: int, tokens: int, *, rows: list[int]) -> None:
        """Count one step."""
        self.steps += 1
        self.divisor += divisor
        self.tokens += tokens
        self.rows += rows

    def speed(self, parameters: int, device: torch.device, num_devices: int) -> dict[str, float]:
        """`speed` of a step, on average."""
        seconds = (time.perf_counter() - self.started) / self.steps
        return speed(seconds, self.tokens / self.steps, parameters, device, num_devices)


class LogFiles:
    """metrics.jsonl, which a resumed run continues, and timing.jsonl, which no two runs have alike."""

    def __init__(self, work: Path, *, written: bool) -> None:
        """written: False in all processes but the first."""
        self._written = written
        self._files = [
            (work / name if written else Path(os.devnull)).open("ab") for name in ("metrics.jsonl", "timing.jsonl")
        ]

    def write(self, *rows: dict[str, float]) -> None:
        """A row of metrics and one of timing."""
        for file, row in zip(self._files, rows, strict=True):
            file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
            file.flush()

    def synced(self) -> int:
        """Bytes of metrics.jsonl, which are on disk when this returns. Raises OSError where they cannot be."""
        metrics_file = self._files[0]
        if self._written:
            os.fsync(metrics_file.fileno())
        return metrics_file.tell()

    def close(self) -> None:
        for file in self._files:
            file.close()


def metrics(values: Measured, divisor: int, *, loss: Loss, with_reference: bool) -> dict[str, float]:
    """Means over the global batches of an interval; divisor is the sum of theirs.

    rewards/accuracy_longer, accuracy_shorter: over the pairs whose chosen side has more, or fewer, tokens than the
    rejected one; where they are far apart, the model has learnt length. log_ratio: policy - reference, nats per token.
    """
    found = {"train/loss": float(values.loss.sum()) / divisor}
    if not loss.of_rewards:
        found["train/logps/chosen"] = float(values.chosen.mean())
    if not loss.pairwise:
        return found
    if not loss.of_rewards:
        found["train/logps/rejected"] = float(values.rejected.mean())
    margin = values.chosen_rewards - values.rejected_rewards
    right = (margin > 0).double()
    found |= {
        "train/rewards/chosen": float(values.chosen_rewards.mean()),
        "train/rewards/rejected": float(values.rejected_rewards.mean()),
        "train/rewards/margin": float(margin.mean()),
        "train/rewards/accuracy": float(right.mean()),
    }
    longer = values.chosen_tokens - values.rejected_tokens
    for name, part in (("longer", longer > 0), ("shorter", longer < 0)):
        if part.any():
            found[f"train/rewards/accuracy_{name}"] = float(right[part].mean())
    if with_reference:
        found["train/log_ratio/chosen"] = float(
            _per_token(values.chosen, values.reference_chosen, values.chosen_tokens)
        )
        found["train/log_ratio/rejected"] = float(
            _per_token(values.rejected, values.reference_rejected, values.rejected_tokens)
        )
    return found


def _per_token(policy: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
    return (policy - reference).sum() / tokens.sum()


class FallingChosen:
    """Warns once when chosen completions have become much less likely, which a falling loss hides."""

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=ALARM_WINDOW)
        self.warned = False

    def see(self, row: dict[str, float]) -> None:
        """Takes the metrics of a step."""
        self.recent.append(row.get("train/log_ratio/chosen", 0.0))
        mean = sum(self.recent) / ALARM_WINDOW
        if mean < -ALARM_FALL and not self.warned:
            self.warned = True
            log.warning(
                "chosen completions have become less likely than under the reference, by %.2f nats a token over the "
                "last %d rows of metrics.jsonl; a loss that holds them up is loss=dpop, or any with "
                "loss.nll_weight=1; a lower training.learning_rate or a higher loss.beta helps too",
                -mean,
                len(self.recent),
            )


def refuse_non_finite(loss: Tensor, rows: list[int], last: int, steps: int) -> None:
    """Raise DataError with the rows whose loss, [B], is not finite. last: of so many steps, counted from 1."""
    bad = [row for row, finite in zip(rows, torch.isfinite(loss).tolist(), strict=True) if not finite]
    if bad:
        which = f"step {last}" if steps == 1 else f"steps {last - steps + 1} to {last}"
        raise DataError(
            f"the loss of {which} is not finite for rows {bad[:8]} of inputs.pairs ({len(bad)} in all); look "
            f"at those rows, lower training.learning_rate, or use hardware.precision=fp32"
        )


def speed(
    seconds: float, tokens: float, parameters: int, device: torch.device, num_devices: int = 1
) -> dict[str, float]:
    """Speed of one step, in the tokens that padding-free batching without sharing computes, and this process's memory.

    mfu: model FLOPs utilization, 6 x parameters x tokens per second over the device's bf16 peak; only on a known
    GPU. Prefix sharing computes fewer tokens than are counted, so it may exceed 1.
    """
    flops = 6.0 * parameters * tokens / seconds
    row = {
        "seconds": round(seconds, 4),
        "tokens_per_second": round(tokens / seconds, 1),
        "tflops": round(flops / 1e12, 4),
        "peak_memory_gb": round(_peak_bytes(device) / 1e9, 3),
    }
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = next((value for part, value in PEAK_FLOPS.items() if part in name), None)
        if peak:
            row["mfu"] = round(flops / peak / num_devices, 4)
    return row


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
