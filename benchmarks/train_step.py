"""Seconds of an optimizer step, ours against TRL's: `python -m benchmarks.train_step --peer trl [--json OUT]`.

Both sides run their own training loops on the same weights, token ids, batches, optimizer, schedule, clipping and
precision; see benchmarks/sides.py for what is timed and benchmarks/profiles.py for what is trained on. A row's ratio is
TRL's time per step / ours, the median over repeats in which both sides run in turn.

Nothing is reported unless both sides agree first, on a small profile: the loss of step 0 (ln 2 for dpo, to 1e-5) and of
each of 20 steps (to 1e-3 of it). Every timed run is held to the same: token ids, and the mean loss of its steps.

peak_memory_ratio (ours / TRL's, so below 1 is less) is measured with a vocabulary of 32,000; see benchmarks/memory.py.

--sweep adds what a sweep saves by sharing its reference cache, without TRL.

--gpu needs a CUDA machine: Llama-3.2-1B's shape with random weights, bf16 autocast, peak memory of the same shape, and
`mfu`, what our side executes of the GPU's peak FLOPs. --shape 8b_lora trains adapters on Llama-3.1-8B's shape.
"""

import argparse
import contextlib
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Comparison, compare, report, timed
from benchmarks.memory import memory_figures
from benchmarks.profiles import GATES, PROFILES, SHAPES, Shape, build_model, named_profile, padding
from benchmarks.sides import REFERENCES, Race, Run, our_ids, ours, trl

GATE_LEARNING_RATE = 1e-3
"""High enough to change the loss by a tenth in 20 steps."""
FIRST_LOSS_TOLERANCE = 1e-5
"""Absolute, fp32. In bf16 5e-3."""
LOSS_TOLERANCE = 1e-3
"""Relative to the larger of the loss and 0.1, at every step. In bf16 2e-2."""
SWEEP_RUNS, SWEEP_STEPS, SWEEP_TARGET = 8, 8, 1.25
"""A sweep that shares its reference cache costs at most 0.8 of what its runs cost with an online reference."""
GPU_PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense bf16, of the name that torch gives."""


def gate(race: Race) -> float:
    """The largest relative difference of the sides' losses over the gate's steps. SystemExit above the tolerance."""
    mine, theirs = ours(race).losses, trl(replace(race, every_loss=True)).losses
    first = FIRST_LOSS_TOLERANCE if not race.gpu else 5e-3
    expected = math.log(2) if race.loss.needs_reference else theirs[0]
    for side, loss in (("ours", mine[0]), ("TRL", theirs[0])):
        if abs(loss - expected) > first:
            raise SystemExit(f"gate {race.profile.loss}: the loss of step 0 is {loss} ({side}), not {expected:.6f}")
    return refuse_other_losses(f"gate {race.profile.loss}", mine, theirs, gpu=race.gpu)


def refuse_other_losses(what: str, mine: Sequence[float], theirs: Sequence[float], *, gpu: bool) -> float:
    """The largest relative difference. SystemExit above the tolerance."""
    apart = [abs(a - b) / max(abs(b), 0.1) for a, b in zip(mine, theirs, strict=True)]
    if not all(difference <= (2e-2 if gpu else LOSS_TOLERANCE) for difference in apart):  # a NaN is refused too
        raise SystemExit(f"{what}: the sides' losses differ by {max(apart):.1e}: {mine} against {theirs}")
    return max(apart)


def against_trl(name: str, race: Race, *, repeats: int, warm_up: bool) -> Comparison:
    """The row of one profile."""
    lengths = [tuple(map(len, ids)) for ids in our_ids(race)]
    means: list[float] = []

    def side(run: Run) -> float:
        means.append(sum(run.losses) / len(run.losses))
        refuse_other_losses(name, means[-1:], means[:1], gpu=race.gpu)
        return run.per_step

    return compare(
        name,
        ours=lambda: side(ours(race)),
        theirs=lambda: side(trl(race)),
        repeats=repeats,
        warm_up=warm_up,
        peer=f"trl {race.reference}" if race.loss.needs_reference else "trl",
        target=race.profile.target if race.reference == "cached" else None,
        threads=race.threads,
        details={"batching": race.batching, "steps": race.profile.num_steps, "pairs": race.profile.batch_size}
        | ({} if race.lora_rank is None else {"lora_rank": race.lora_rank})
        | padding(lengths, race.profile.batch_size),
    )


def against_unshared(name: str, race: Race, batching: str, *, repeats: int, warm_up: bool) -> Comparison:
    """The row of one profile in our own mode without prefix sharing, in the place of TRL."""
    unshared = replace(race, batching=batching)
    return compare(
        name,
        ours=lambda: ours(race).per_step,
        theirs=lambda: ours(unshared).per_step,
        repeats=repeats,
        warm_up=warm_up,
        peer=f"own {batching}",
        target=race.profile.target_unshared,
        threads=race.threads,
        details={"batching": race.batching, "steps": race.profile.num_steps, "pairs": race.profile.batch_size},
    )


def model_flops(race: Race) -> float:
    """FLOPs that our side executes in a step, on average over the measured ones, forward and backward."""
    from torch.nn.modules.module import register_module_forward_pre_hook
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import PreTrainedModel

    counter, counted = FlopCounterMode(display=False), [0, 0]

    def start(module: Any, _: Any) -> None:
        if isinstance(module, PreTrainedModel) and torch.is_grad_enabled() and not counted[1]:
            counted[1] = 1
            counter.__enter__()

    def stop(*_: Any) -> None:
        counter.__exit__(None, None, None)
        counted[0] += counter.get_total_flops()
        counted[1] = 0

    with register_module_forward_pre_hook(start), register_optimizer_step_post_hook(stop):
        run = ours(race)
    return counted[0] / len(run.losses)


def with_mfu(row: Comparison, race: Race) -> Comparison:
    """The row with the share of the GPU's peak that our side reaches; without, where the peak is unknown."""
    name = torch.cuda.get_device_name(0)
    peak = next((flops for key, flops in GPU_PEAK_FLOPS.items() if key in name), None)
    if peak is None:
        return row
    flops = model_flops(race)
    return replace(row, details=row.details | {"flops": flops, "mfu": round(flops / row.ours_seconds / peak, 3)})


def sweep(race: Race, *, runs: int = SWEEP_RUNS, repeats: int) -> Comparison:
    """Seconds of `runs` whole runs of our side, from texts to checkpoints, that differ in their learning rate.

    ours: all with one reference cache, empty at first. theirs: each with an online reference.
    """

    def all_runs(reference: str) -> None:
        with tempfile.TemporaryDirectory(prefix="bench-cache-") as cache:
            for number in range(runs):
                ours(replace(race, reference=reference, cache=Path(cache), learning_rate=1e-5 * (number + 1)))

    return compare(
        f"sweep_of_{runs}",
        ours=timed(lambda: all_runs("cached")),
        theirs=timed(lambda: all_runs("online")),
        repeats=repeats,
        warm_up=False,
        peer="own online",
        target=SWEEP_TARGET,
        threads=race.threads,
        details={"steps": race.num_steps, "pairs": race.profile.batch_size},
    )


def run(
    profiles: Sequence[str] = tuple(PROFILES),
    *,
    threads: Sequence[int | None] = (1, 2),
    repeats: int = 5,
    references: Sequence[str] = ("cached",),
    shape: str = "7m",
    memory_shape: str | None = "7m_v32k",
    batching: str = "auto",
    unshared: str = "packed",
    micro_batch_size: int | None = None,
    warm_up: bool = True,
    sweep_profile: str | None = None,
    gpu: bool = False,
) -> list[Comparison]:
    """The gates, then every profile with every reference and number of threads, and the sweep where it is asked for.

    memory_shape: None measures no memory.
    """
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    rows: list[Comparison] = []
    lora_rank = SHAPES[shape].lora_rank
    with built(SHAPES["tiny"]) as tiny, built(SHAPES[shape]) as folder:
        for loss in dict.fromkeys(named_profile(name, gpu=gpu).loss for name in profiles):
            worst = gate(
                Race(
                    GATES[loss],
                    tiny,
                    threads[0],
                    batching=batching,
                    lora_rank=lora_rank,
                    gpu=gpu,
                    learning_rate=GATE_LEARNING_RATE,
                )
            )
            print(f"gate {loss}: {GATES[loss].num_steps + 1} losses agree, the largest relative difference {worst:.1e}")
        for name in profiles:
            profile = named_profile(name, gpu=gpu)
            figures = _memory(name, memory_shape, threads[0], batching=batching, gpu=gpu)
            for number in threads:
                race = Race(
                    profile,
                    folder,
                    number,
                    batching=batching,
                    micro_batch_size=micro_batch_size,
                    lora_rank=lora_rank,
                    gpu=gpu,
                )
                for reference in references if race.loss.needs_reference else ("cached",):
                    row = against_trl(name, replace(race, reference=reference), repeats=repeats, warm_up=warm_up)
                    if reference == "cached":
                        row = replace(
                            row,
                            peak_memory_ratio=figures.get("peak_memory_ratio"),
                            details=row.details | {"memory": figures},
                        )
                    rows.append(with_mfu(row, race) if gpu else row)
                if profile.target_unshared:
                    rows.append(against_unshared(name, race, unshared, repeats=repeats, warm_up=warm_up))
        if sweep_profile:
            profile = replace(named_profile(sweep_profile, gpu=gpu), num_steps=SWEEP_STEPS - 1)
            race = Race(profile, folder, threads[0], batching=batching, lora_rank=lora_rank, gpu=gpu)
            rows.append(sweep(race, repeats=repeats))
    return rows


def _memory(name: str, shape: str | None, threads: int | None, *, batching: str, gpu: bool) -> dict[str, Any]:
    if shape is None:
        return {}
    with built(SHAPES[shape]) as folder:
        options = {"batching": batching, "threads": threads, "lora_rank": SHAPES[shape].lora_rank, "gpu": gpu}
        return {"shape": shape} | memory_figures(name, folder, **options)


@contextlib.contextmanager
def built(shape: Shape) -> Iterator[Path]:
    """A folder with a model of that shape, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="bench-model-") as scratch:
        yield build_model(shape, Path(scratch))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--peer", choices=["trl"], default="trl")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profiles", help="comma-separated; all of them where absent")
    parser.add_argument("--threads", help="comma-separated numbers of threads; 1,2 on a CPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--reference", choices=[*REFERENCES, "both"], default="cached")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="7m on a CPU, 1b on a GPU")
    parser.add_argument("--memory-shape", choices=[*sorted(SHAPES), "none"], help="7m_v32k on a CPU, --shape on a GPU")
    parser.add_argument("--batching", default="auto", help="training.batching of our side")
    parser.add_argument("--unshared", default="packed", help="training.batching of our own mode without prefix sharing")
    parser.add_argument("--micro-batch-size", type=int, help="of our side; the whole batch where absent")
    parser.add_argument("--no-warm-up", action="store_true", help="do without the round that counts for nothing")
    parser.add_argument("--sweep", metavar="PROFILE", help=f"add a row: {SWEEP_RUNS} runs that share a reference cache")
    parser.add_argument("--gpu", action="store_true", help="needs a CUDA machine")
    args = parser.parse_args()
    shape = args.shape or ("1b" if args.gpu else "7m")
    memory_shape = args.memory_shape or (shape if args.gpu else "7m_v32k")
    rows = run(
        args.profiles.split(",") if args.profiles else ("hh", "ultrafeedback") if args.gpu else tuple(PROFILES),
        threads=[None] if args.gpu else [int(number) for number in (args.threads or "1,2").split(",")],
        repeats=args.repeats,
        references=REFERENCES if args.reference == "both" else (args.reference,),
        shape=shape,
        memory_shape=None if memory_shape == "none" else memory_shape,
        batching=args.batching,
        unshared=args.unshared,
        micro_batch_size=args.micro_batch_size,
        warm_up=not args.no_warm_up,
        sweep_profile=args.sweep,
        gpu=args.gpu,
    )
    report(rows, args.json)


if __name__ == "__main__":
    main()
