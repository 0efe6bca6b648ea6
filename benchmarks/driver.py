"""What starting a run costs besides its training: seconds of the command line, against what was promised of them.

`python -m benchmarks.driver [--repeats N] [--json OUT]`. `train` is `prefpipe stage=train` less the training process
alone (`python -m prefpipe.training.worker`), which is given the config that the command froze: a few steps of the
built-in model, so that all else is what counts. All commands take turns, and a repeat's difference is that of its two
runs. `compose` is `prefpipe --cfg job`, `plan` is `prefpipe stage=train plan=true`. A ratio above 1 says that the
promise is kept: allowed seconds over measured ones. CPU seconds tell more where other programs run beside it.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path

import orjson

from benchmarks.harness import Comparison, report, timed

ALLOWED_SECONDS = {"train": 3.0, "compose": 1.5, "plan": 1.5}
NUM_PAIRS = 40
TRAIN = ["stage=train", "training=debug", "training.max_steps=3", "hardware=cpu", "hardware.num_threads=1"]
PAIRS = "inputs.pairs=runs/data/pairs"


def run(repeats: int = 5) -> list[Comparison]:
    """A row for each promise. SystemExit where a command fails."""
    with tempfile.TemporaryDirectory() as folder:
        commands = _Commands(Path(folder))
        commands.prepare()
        sides = {
            "driver": commands.driver,
            "worker": commands.worker,
            "compose": lambda: commands.prefpipe("--cfg", "job"),
            "plan": lambda: commands.prefpipe(*TRAIN, PAIRS, "plan=true"),
        }
        wall: dict[str, list[float]] = {name: [] for name in sides}
        cpu: dict[str, list[float]] = {name: [] for name in sides}
        for repeat in range(repeats + 1):
            for name in list(sides)[:: 1 if repeat % 2 else -1]:
                before = _cpu_seconds()
                seconds = timed(sides[name])()
                if repeat:  # the first round is for caches
                    wall[name].append(seconds)
                    cpu[name].append(_cpu_seconds() - before)
    rows = []
    for name in ALLOWED_SECONDS:
        values, of_cpu = [
            [a - b for a, b in zip(found["driver"], found["worker"], strict=True)] if name == "train" else found[name]
            for found in (wall, cpu)
        ]
        details = {"cpu_seconds": statistics.median(of_cpu)}
        if name == "train":
            details |= {f"{side}_seconds": statistics.median(wall[side]) for side in ("driver", "worker")}
        rows.append(against_allowed(name, values, details))
    for row in rows:
        spread = f"{row.details['min_seconds']:.2f} .. {row.details['max_seconds']:.2f}"
        used = f"{row.details['cpu_seconds']:.2f} s of CPU"
        print(f"{row.profile}: {row.ours_seconds:.2f} s ({spread}), {used}, allowed {row.theirs_seconds:g} s")
    return rows


def _cpu_seconds() -> float:
    """Of the commands so far, with all that they started."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def against_allowed(name: str, seconds: Sequence[float], details: Mapping[str, float]) -> Comparison:
    """A row of seconds against those that are allowed."""
    allowed = ALLOWED_SECONDS[name]
    ratios = [allowed / value for value in seconds]
    extremes = {"min_seconds": min(seconds), "max_seconds": max(seconds)}
    return Comparison(
        name,
        ratio=round(allowed / statistics.median(seconds), 3),
        ratio_min=round(min(ratios), 3),
        ratio_max=round(max(ratios), 3),
        ours_seconds=round(statistics.median(seconds), 4),
        theirs_seconds=allowed,
        repeats=len(seconds),
        peer="allowed",
        target=1.0,
        threads=1,
        details={key: round(value, 4) for key, value in {**details, **extremes}.items()},
    )


class _Commands:
    """Commands in a folder of their own, which holds pairs, and the config of a training run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._numbers = count()
        own = {"PREFPIPE_RUNS": "runs", "PREFPIPE_CACHE": "cache", "OMP_NUM_THREADS": "1"}
        self._environment = {**os.environ, **own, "PYTHONPATH": str(Path(__file__).parents[1])}

    def prepare(self) -> None:
        """Write the pairs, train once, and so freeze the config and fill the cache of the reference."""
        rows = [{"prompt": f"{i} + 1?", "chosen": f"#### {i + 1}", "rejected": f"#### {i}"} for i in range(NUM_PAIRS)]
        (self.folder / "pairs.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
        self.prefpipe("stage=prepare", "data_mixer=files", "data_mixer.spec=pairs.jsonl:1.0", "exp_name=data")
        self.driver("first")

    def prefpipe(self, *arguments: str) -> None:
        self._run("prefpipe", *arguments)

    def driver(self, name: str = "") -> None:
        """The whole command, into a new run."""
        self.prefpipe(*TRAIN, PAIRS, f"exp_name={name or f'driver-{next(self._numbers)}'}")

    def worker(self) -> None:
        """The training process alone, as the command would start it."""
        work = self.folder / f"worker-{next(self._numbers)}"
        work.mkdir()
        self._run("prefpipe.training.worker", "runs/first/round_0/train.yaml", "--work", str(work))
        if not (work / "model.safetensors").is_file():
            raise SystemExit("driver: the training process wrote no weights")
        shutil.rmtree(work)

    def _run(self, module: str, *arguments: str) -> None:
        command = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(command, cwd=self.folder, env=self._environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"driver: {module} {' '.join(arguments)}\n{done.stderr[-2000:]}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.driver", description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    report(run(args.repeats), args.json)


if __name__ == "__main__":
    main()
