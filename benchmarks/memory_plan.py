"""What prefpipe/memory predicts of training against what processes take, each setting in a process of its own.

Bytes are of resident sets (Linux). Compared is the peak from the first forward pass with gradients to the last
optimizer step (VmHWM, see benchmarks/memory.py) less what the process held before it loaded the weights: Python and its
packages, which the prediction leaves out and which would hide its error. They have trained the built-in tiny model by
then, so that their libraries are in memory.

Each block of 64 KiB and more is mapped by itself (mallopt), so that the resident set is what is in use. With --heap it
is glibc's as it comes, which also holds freed blocks that it found no use for.
"""

import argparse
import ctypes
import gc
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson

from benchmarks.harness import all_versions, machine, print_table
from benchmarks.memory import Watch, resident
from benchmarks.profiles import LENGTHS_HH, SHAPES, Profile, build_model, make_pairs
from benchmarks.sides import SEED
from prefpipe import models
from prefpipe.losses import DPO, Loss, SimPO
from prefpipe.memory import Lengths, Memory, Setting, estimate, read_shape, resolved
from prefpipe.prompts import ChatTemplate
from prefpipe.records import Pair
from prefpipe.settings import HardwareConfig, ModelConfig, TrainingConfig
from prefpipe.training.batches import data_order, encode, micro_batches
from prefpipe.training.loop import Job, train

NUM_STEPS = 2
"""The first makes the optimizer's state."""

M_MMAP_THRESHOLD = -3
"""Of mallopt(3)."""

TOLERANCE = 0.15


@dataclass(frozen=True)
class Case:
    """One setting. training, model: what differs from the defaults. what: for the table."""

    what: str
    profile: Profile
    training: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    shape: str = "7m_v32k"
    loss: type[Loss] = DPO


LONG = Profile(64, 256, batch_size=4)
CASES = {
    "plain": Case("4 pairs of 192 + 64 tokens, DPO, cached reference, AdamW", Profile(192, 64, batch_size=4)),
    "chunked": Case("4 pairs of 64 + 256, head=chunked", LONG, {"head": "chunked"}),
    "recomputed": Case("the same, gradient checkpointing", LONG, {"head": "chunked", "gradient_checkpointing": True}),
    "lora": Case("8 pairs of 192 + 64, LoRA", Profile(192, 64, batch_size=8), model={"adapter": "lora"}),
    "online": Case(
        "2 x 4 pairs as in HH-RLHF, reference online, SGD",
        Profile(**LENGTHS_HH, batch_size=8),
        {"micro_batch_size": 4, "reference": "online", "optimizer": "sgd"},
    ),
    "padded": Case(
        "4 pairs as in HH-RLHF, padded, SimPO", Profile(**LENGTHS_HH, batch_size=4), {"batching": "padded"}, loss=SimPO
    ),
}


def job(case: Case, folder: Path, work: Path, *, gpu: bool) -> Job:
    """The training run of a case."""
    profile = case.profile
    vocabulary = read_shape(folder).vocabulary
    training = {
        "micro_batch_size": profile.batch_size,
        "max_tokens": profile.max_tokens,
        "max_prompt_tokens": profile.max_tokens - 1,
    }
    return Job(
        pairs=make_pairs(profile, NUM_STEPS * profile.batch_size, vocabulary),
        model=ModelConfig(name="benchmark", path=str(folder), **case.model),
        policy=folder,
        reference=folder,
        loss=case.loss(),
        training=TrainingConfig(
            max_steps=NUM_STEPS, global_batch_size=profile.batch_size, **(training | case.training)
        ),
        hardware=HardwareConfig(
            name="benchmark", device="cuda" if gpu else "cpu", precision="bf16" if gpu else "fp32", num_threads=1
        ),
        seed=SEED,
        work=work,
        cache=work / "cache",
    )


def predicted(task: Job, folder: Path) -> Memory:
    """Of the micro-batch of the run that takes most; before the first of a step there are no gradients yet."""
    tokenizer = models.load_tokenizer(task.model, folder)
    template = ChatTemplate(tokenizer, models.stop_token_ids(tokenizer, folder))
    pairs: list[Pair] = list(task.pairs)  # type: ignore[arg-type]
    examples, _ = encode(pairs, template, task.training, pairwise=task.loss.pairwise)
    size = task.training.global_batch_size
    order = list(data_order(len(examples), NUM_STEPS * size, task.seed))
    found = []
    for step in range(NUM_STEPS):
        batches = micro_batches(examples, order[step * size : (step + 1) * size], task.training)
        for number, batch in enumerate(batches):
            lengths = [Lengths(*map(len, examples[i][1:4])) for i in batch]
            training = task.training if number else replace(task.training, global_batch_size=len(batch))
            hardware = resolved(task.hardware, num_gpus=1)
            found.append(Setting(read_shape(folder), hardware, training, task.loss, task.model, lengths))
    return max(map(estimate, found), key=lambda memory: memory.total)


def measure(name: str, folder: Path, *, gpu: bool, heap: bool) -> int:
    """Bytes that training a case adds, at its peak, to what this process held before."""
    if not gpu and not heap:
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 2**16)
    with tempfile.TemporaryDirectory() as scratch:
        task = job(CASES[name], folder, Path(scratch) / "work", gpu=gpu)
        tiny = models.ASSETS / "tiny"
        warm = replace(
            task,
            pairs=make_pairs(Profile(16, 8, batch_size=2), 4, 1000),
            model=replace(task.model, path="builtin:tiny"),
            policy=tiny,
            reference=tiny,
            training=replace(task.training, max_steps=2, global_batch_size=2, micro_batch_size=2),
            work=Path(scratch) / "warm",
        )
        for made in (warm, task):
            made.work.mkdir()
        train(warm)
        return _peak(task, gpu=gpu)


def _peak(task: Job, *, gpu: bool) -> int:
    import torch

    gc.collect()
    if gpu:
        torch.cuda.empty_cache()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    base = torch.cuda.memory_allocated() if gpu else resident("VmRSS")
    watch = Watch(gpu=gpu)
    train(task)
    return watch.peak - base


def compare(name: str, folder: Path, *, gpu: bool, heap: bool) -> dict[str, Any]:
    """One row: what a process of its own took, and what was predicted. SystemExit with its error where it fails."""
    command = [sys.executable, "-m", "benchmarks.memory_plan", "--measure", name, "--folder", str(folder)]
    command += ["--gpu"] * gpu + ["--heap"] * heap
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise SystemExit(f"the memory of {name} could not be measured:\n{done.stderr[-2000:]}")
    measured = int(done.stdout.splitlines()[-1])
    memory = predicted(job(CASES[name], folder, Path(), gpu=gpu), folder)
    return {
        "case": name,
        "what": CASES[name].what,
        "predicted_mib": _mib(memory.total),
        "measured_mib": _mib(measured),
        "error": round(memory.total / measured - 1, 4),
        "parts_mib": {part: _mib(value) for part, value in memory.parts().items()},
    }


def _mib(num_bytes: int) -> float:
    return round(num_bytes / 2**20, 1)


def run(names: list[str], out: Path | None, *, gpu: bool = False, heap: bool = False, shape: str | None = None) -> None:
    """Print a table of all rows; `out` is written anew after each."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-memory-plan-") as scratch:
        for name in names:
            chosen = shape or CASES[name].shape
            folder = Path(scratch) / chosen
            if not folder.is_dir():
                build_model(SHAPES[chosen], folder)
            rows.append(compare(name, folder, gpu=gpu, heap=heap) | {"shape": chosen})
            if out:
                _write(rows, out)
    head = ("setting", "predicted MiB", "measured MiB", "error", "")
    lines = [
        (
            row["what"],
            f"{row['predicted_mib']:.0f}",
            f"{row['measured_mib']:.0f}",
            f"{row['error']:+.1%}",
            "met" if abs(row["error"]) <= TOLERANCE else "missed",
        )
        for row in rows
    ]
    print_table([head, *lines])


def _write(rows: list[dict[str, Any]], out: Path) -> None:
    """The rows as JSON, with machine and versions."""
    data = {"rows": rows, "tolerance": TOLERANCE, "machine": machine(), "versions": all_versions()}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(orjson.dumps(data, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def main() -> None:
    """Command line; with --measure of one setting's process, whose last line is JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory_plan", description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--shape", choices=sorted(SHAPES))
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--heap", action="store_true", help="with glibc's heap as it comes")
    parser.add_argument("--measure", choices=sorted(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(measure(args.measure, args.folder, gpu=args.gpu, heap=args.heap))
        return
    run(args.cases, args.json, gpu=args.gpu, heap=args.heap, shape=args.shape)


if __name__ == "__main__":
    main()
