"""SIGKILL at random moments, the same command again: byte-identical artifacts, weights included."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest

from prefpipe import artifacts

COMMAND = [sys.executable, "-m", "prefpipe", "stage=loop", "debug=tiny", "data_mixer.sources.arithmetic.num=40"]
ARTIFACTS = ["prompts", "base/evals", "base/eval_samples"] + [
    f"round_0/{name}" for name in ("completions", "scored", "pairs", "checkpoint", "evals", "eval_samples")
]


def start(runs: Path) -> "subprocess.Popen[bytes]":
    with (runs.parent / f"{runs.name}.log").open("ab") as log:
        return subprocess.Popen([*COMMAND, f"paths.runs={runs}"], stdout=log, stderr=log, env=dict(os.environ))


def finish(runs: Path) -> None:
    assert start(runs).wait(600) == 0, (runs.parent / f"{runs.name}.log").read_text()[-3000:]


def contents(runs: Path) -> dict[str, bytes]:
    """Every file of every artifact but when and where it was made, and the state of the checkout, which may go on."""
    found = {}
    for name in ARTIFACTS:
        folder = runs / "default" / name
        artifacts.verify(folder)
        for file in sorted(folder.rglob("*")):
            if file.is_file() and file.name not in ("provenance.json", "timing.jsonl"):
                found[f"{name}/{file.relative_to(folder)}"] = file.read_bytes()
        manifest = orjson.loads(found[f"{name}/manifest.json"])
        kept = {key: value for key, value in manifest.items() if key not in ("git", "git_dirty")}
        found[f"{name}/manifest.json"] = orjson.dumps(kept)
    return found


def processes_of(runs: Path) -> list[str]:
    """Command lines of what still works on a run's folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if str(runs) in line:
                found.append(line)
    return found


def kill_and_repeat(folder: Path, whole: dict[str, bytes], length: float, seed: int, kills: int) -> None:
    """Kill one run at `kills` moments spread over its length, finish it, compare it with an uninterrupted one."""
    rng = random.Random(seed)
    runs = folder / f"killed_{seed}"
    for _ in range(kills):
        child = start(runs)
        time.sleep(rng.uniform(0.3, 1.5 * length / kills))
        child.send_signal(signal.SIGKILL)
        child.wait()
        deadline = time.time() + 10
        while processes_of(runs) and time.time() < deadline:
            time.sleep(0.05)
        assert processes_of(runs) == []
    finish(runs)
    assert contents(runs) == whole


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[dict[str, bytes], float]:
    """What an uninterrupted run leaves, and the seconds it takes."""
    runs = tmp_path_factory.mktemp("whole") / "runs"
    started = time.time()
    finish(runs)
    return contents(runs), time.time() - started


def test_5_kills(tmp_path, uninterrupted):
    whole, length = uninterrupted
    kill_and_repeat(tmp_path, whole, length, seed=0, kills=5)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1, 7))
def test_30_kills(tmp_path, uninterrupted, seed):
    """6 runs with 5 kills each."""
    whole, length = uninterrupted
    kill_and_repeat(tmp_path, whole, length, seed=seed, kills=5)
