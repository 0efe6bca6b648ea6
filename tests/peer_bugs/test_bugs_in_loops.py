"""B18 and B50 to B52: bugs of other programs in the training loop and around it. README.md lists them all."""

import os
import re
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from prefpipe import artifacts
from prefpipe.generators.hf import HF
from prefpipe.losses import DPO, Loss
from prefpipe.records import Pair, Split, prompt_id
from prefpipe.settings import HardwareConfig, ModelConfig, TrainingConfig
from prefpipe.stages.evaluate import PolicyUnderTest
from prefpipe.training import loop
from prefpipe.training.loop import Job, train

TINY = ModelConfig(name="tiny", path="builtin:tiny")


def pairs(count: int) -> list[Pair]:
    made = []
    for i in range(count):
        messages = [{"role": "user", "content": f"Tom has {i} apples and buys {i + 2} more. " * (1 + i % 3)}]
        texts = {"chosen": f"{i} + {i + 2} = {2 * i + 2}\n#### {2 * i + 2}", "rejected": f"#### {i}"}
        made.append(Pair(prompt_id=prompt_id(messages), messages=messages, source="t", **texts))
    return made


def job(work: Path, folder: Path, rows: list[Pair], loss: Loss | None = None, **training: object) -> Job:
    work.mkdir(parents=True, exist_ok=True)
    settings = {"learning_rate": 1e-3, "max_tokens": 128, "max_prompt_tokens": 96, **training}
    return Job(
        pairs=rows,
        model=TINY,
        policy=folder,
        reference=folder,
        loss=DPO() if loss is None else loss,
        training=TrainingConfig(**settings),
        hardware=HardwareConfig(name="cpu", device="cpu", precision="fp32"),
        seed=0,
        work=work,
        cache=work.parent / "cache",
    )


def test_b18_metrics_of_rewards_do_not_hold_the_nll_term(tmp_path: Path, tiny_folder: Path) -> None:
    """The first step of a policy that has left its reference, with the term and without it."""
    size = {"global_batch_size": 4, "micro_batch_size": 2}
    train(job(tmp_path / "policy", tiny_folder, pairs(4), max_steps=3, **size))
    found = []
    for weight in (0.0, 0.5):
        run = job(tmp_path / str(weight), tmp_path / "policy", pairs(4), DPO(nll_weight=weight), max_steps=1, **size)
        train(replace(run, reference=tiny_folder))
        (row,) = (orjson.loads(line) for line in (run.work / "metrics.jsonl").read_bytes().splitlines())
        found.append(row)
    without, with_ = found
    kept = [key for key in without if key.startswith(("train/rewards", "train/logps"))]
    assert len(kept) >= 6
    assert {key: with_[key] for key in kept} == {key: without[key] for key in kept}
    assert abs(without["train/rewards/margin"]) > 1e-3
    assert with_["train/loss"] > without["train/loss"]


class KilledError(RuntimeError):
    """Stands for SIGKILL: nothing after it runs."""


def test_b50_a_run_that_is_killed_after_each_of_its_steps_is_the_same_run(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """13 pairs in batches of 2, one pair at a time: 7 steps, the last of a single pair."""
    settings = {"global_batch_size": 2, "micro_batch_size": 1, "save_every_steps": 1}
    whole, killed = (job(tmp_path / name, tiny_folder, pairs(13), **settings) for name in ("whole", "killed"))
    train(whole)
    real = loop._save_state
    deaths = []

    def save_then_die(work: Path, step: int, *args: object, **kwargs: object) -> None:
        real(work, step, *args, **kwargs)
        deaths.append(step)
        raise KilledError

    monkeypatch.setattr(loop, "_save_state", save_then_die)
    for _ in range(6):
        with pytest.raises(KilledError):
            train(killed)
    monkeypatch.undo()
    train(killed)
    assert deaths == [1, 2, 3, 4, 5, 6]
    rows = [orjson.loads(line) for line in (whole.work / "metrics.jsonl").read_bytes().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["epoch"] for row in rows] == [round(min(2 * step, 13) / 13, 6) for step in range(1, 8)]
    states = [
        f"state/step-{step:06d}/{name}.safetensors" for step in (5, 6) for name in ("model", "optimizer", "random")
    ]
    for name in ("metrics.jsonl", "model.safetensors", *states):
        assert (killed.work / name).read_bytes() == (whole.work / name).read_bytes(), name


def test_b51_evaluation_holds_one_batch_however_many_there_are(tiny_folder: Path) -> None:
    """Outputs of layers that are alive at once."""
    training = TrainingConfig(micro_batch_size=2, max_tokens=128, max_prompt_tokens=96)
    hardware = HardwareConfig(name="cpu", device="cpu", precision="fp32")
    policy = PolicyUnderTest(TINY, tiny_folder, HF(), training, hardware, seed=0)
    outputs: list[weakref.ref[torch.Tensor]] = []
    held: list[int] = []

    def count(module: nn.Module, args: object, out: torch.Tensor) -> None:
        if isinstance(out, torch.Tensor):
            outputs.append(weakref.ref(out))
            held.append(sum(ref() is not None for ref in outputs))

    most, calls = [], []
    with register_module_forward_hook(count):
        for number in (2, 16):
            outputs.clear()
            held.clear()
            rows = [replace(row, split=Split.heldout) for row in pairs(number)]
            assert len(policy.pair_logps(rows)) == number
            most.append(max(held))
            calls.append(len(held))
    assert calls[1] > 2 * calls[0] > most[0]
    assert most[1] == most[0]


COMMAND = [sys.executable, "-m", "prefpipe"]


def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "PREFPIPE_RUNS": str(tmp_path / "runs")}


def test_b52_two_sweeps_at_once_keep_apart_and_a_third_start_finds_what_they_did(tmp_path: Path) -> None:
    """A run's folder follows from its name and what was swept, never from a clock, a job or a rank."""
    words = ["-m", "stage=prepare", "data_mixer.sources.arithmetic.num=20"]
    sweeps = []
    for job_id, seeds in (("1", "1,2"), ("2", "3")):
        requeued = {**environment(tmp_path), "SLURM_JOB_ID": job_id, "SLURM_PROCID": job_id, "RANK": job_id}
        sweeps.append(subprocess.Popen([*COMMAND, *words, f"seed={seeds}"], cwd=tmp_path, env=requeued))
    assert [sweep.wait(120) for sweep in sweeps] == [0, 0]
    points = tmp_path / "runs" / "default" / "points"
    names = [f"data_mixer.sources.arithmetic.num=20,seed={seed}" for seed in (1, 2, 3)]
    assert sorted(path.name for path in points.iterdir()) == names
    prompts = [points / name / "prompts" for name in names]
    made = [(folder / "manifest.json").stat().st_mtime_ns for folder in prompts]
    for folder in prompts:
        artifacts.verify(folder)
    again = {**environment(tmp_path), "SLURM_JOB_ID": "3", "SLURM_RESTART_COUNT": "1"}
    done = subprocess.run([*COMMAND, *words, "seed=1,2,3"], cwd=tmp_path, env=again, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"prompts is up to date", done.stderr + done.stdout)) == 3
    assert [(folder / "manifest.json").stat().st_mtime_ns for folder in prompts] == made


@pytest.mark.parametrize("word", ["--local_rank=0", "--local-rank=0"])
def test_b52_words_that_a_launcher_adds_are_refused_not_run(tmp_path: Path, word: str) -> None:
    command = [*COMMAND, word, "stage=train"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("prefpipe: error: no such flag: --local")
    assert list(tmp_path.iterdir()) == []
