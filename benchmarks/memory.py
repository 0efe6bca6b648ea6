"""Peak memory of training, each side in a process of its own.

Both sides are watched with the same hooks, from their first forward pass with gradients to the end of their last
optimizer step, in bytes:

before: held just before that pass: Python, packages, weights, data. What the allocator can give back is given back.
peak: the most that was held from then on.
training: peak - before: gradients, optimizer state, activations, logits.

peak_memory_ratio is ours / theirs of `training`; peak_rss_ratio is that of `peak`, of which Python, its packages and
the weights are some 600 MiB on either side of a CPU run. On a CPU these are resident sets (Linux: VmHWM, reset before
the first pass), on a GPU what torch.cuda.max_memory_allocated says.
"""

import argparse
import ctypes
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.profiles import named_profile
from benchmarks.sides import SIDES, Race

NUM_STEPS = 2
"""After the first, which makes the optimizer's state."""


def memory_figures(profile: str, folder: Path, **options: Any) -> dict[str, Any]:
    """Both ratios, ours / theirs, and each side's figures in MiB."""
    found = {side: measure(side, profile, folder, **options) for side in ("ours", "trl")}
    figures: dict[str, Any] = {
        "peak_memory_ratio": round(found["ours"]["training"] / found["trl"]["training"], 3),
        "peak_rss_ratio": round(found["ours"]["peak"] / found["trl"]["peak"], 3),
    }
    for side, row in found.items():
        figures |= {f"{side}_{key}_mib": round(value / 2**20) for key, value in row.items()}
    return figures


def measure(
    side: str,
    profile: str,
    folder: Path,
    *,
    batching: str = "auto",
    threads: int | None = None,
    lora_rank: int | None = None,
    gpu: bool = False,
) -> dict[str, int]:
    """before, peak and training of one side. SystemExit with its error where it fails."""
    command = [sys.executable, "-m", "benchmarks.memory", side, profile, str(folder), "--batching", batching]
    command += [] if threads is None else ["--threads", str(threads)]
    command += [] if lora_rank is None else ["--lora-rank", str(lora_rank)]
    command += ["--gpu"] if gpu else []
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise SystemExit(f"the memory of {side} on {profile} could not be measured:\n{done.stderr[-2000:]}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


class Watch:
    """Puts its hooks on every model and optimizer of this process."""

    def __init__(self, *, gpu: bool) -> None:
        from torch.nn.modules.module import register_module_forward_pre_hook
        from torch.optim.optimizer import register_optimizer_step_post_hook
        from transformers import PreTrainedModel

        self.gpu, self.before, self.peak = gpu, 0, 0

        def first(module: Any, _: Any) -> None:
            if isinstance(module, PreTrainedModel) and torch.is_grad_enabled():
                handle.remove()
                self._start()

        handle = register_module_forward_pre_hook(first)
        register_optimizer_step_post_hook(lambda *_: self._look())

    def _start(self) -> None:
        if self.gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self.before = resident("VmRSS")

    def _look(self) -> None:
        self.peak = torch.cuda.max_memory_allocated() if self.gpu else resident("VmHWM")


def resident(key: str) -> int:
    """Bytes of this process, from Linux: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def main() -> None:
    """Command line of one side's process; the last line that it prints is JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("side", choices=sorted(SIDES))
    parser.add_argument("profile")
    parser.add_argument("folder", type=Path, help="weights and tokenizer")
    parser.add_argument("--batching", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--lora-rank", type=int)
    parser.add_argument("--gpu", action="store_true")
    args = parser.parse_args()
    profile = replace(named_profile(args.profile, gpu=args.gpu), num_steps=NUM_STEPS)
    watch = Watch(gpu=args.gpu)
    options = {"threads": args.threads, "batching": args.batching, "lora_rank": args.lora_rank, "gpu": args.gpu}
    SIDES[args.side](Race(profile, args.folder, **options))
    print(json.dumps({"before": watch.before, "peak": watch.peak, "training": watch.peak - watch.before}))


if __name__ == "__main__":
    main()
