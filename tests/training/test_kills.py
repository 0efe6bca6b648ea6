"""SIGKILL at 60 distinct points of training: the same command again ends with the very same bits."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prefpipe.losses import DPO, IPO, Loss, SimPO
from prefpipe.records import Pair, prompt_id
from prefpipe.settings import HardwareConfig, ModelConfig, TrainingConfig
from prefpipe.training import checkpoints
from prefpipe.training.engine import Engine
from prefpipe.training.loop import Job, train

LOSSES: dict[str, type[Loss]] = {"dpo": DPO, "simpo": SimPO, "ipo": IPO}
MODELS = {
    "full": ModelConfig(name="tiny", path="builtin:tiny"),
    "lora": ModelConfig(name="tiny", path="builtin:tiny", adapter="lora", adapter_rank=4),
}
TRAINING = TrainingConfig(
    learning_rate=1e-3,
    global_batch_size=4,
    micro_batch_size=2,
    num_epochs=2.0,
    max_tokens=128,
    max_prompt_tokens=96,
    save_every_steps=1,
)
"""7 pairs, twice: 4 steps of 2, 2, 2 and 1 micro-batches; step 2 goes over the epoch's edge."""

POINTS = [("forward", n) for n in (1, 2, 3, 4, 6, 7)] + [("file", n) for n in (2, 5, 9)] + [("rename", 2)]
"""Before the n-th forward pass, before the n-th file of a state is written, before its n-th renaming into place."""

COMBINATIONS = [(loss, kind, point) for loss in LOSSES for kind in MODELS for point in POINTS]


def job(work: Path, folder: Path, loss: str, kind: str) -> Job:
    work.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(7):
        messages = [{"role": "user", "content": f"Tom has {i} apples and buys {i + 2} more. " * (1 + i % 3)}]
        answer = f"{i} + {i + 2} = {2 * i + 2}\n#### {2 * i + 2}"
        pair = {"prompt_id": prompt_id(messages), "messages": messages, "source": "t"}
        rows.append(Pair(**pair, chosen=answer, rejected=f"#### {i}"))
    return Job(
        pairs=rows,
        model=MODELS[kind],
        policy=folder,
        reference=folder,
        loss=LOSSES[loss](),
        training=TRAINING,
        hardware=HardwareConfig(name="cpu", device="cpu", precision="fp32", num_threads=1),
        seed=0,
        work=work,
        cache=work.parent / "cache",
    )


def killed(work: Job, what: str, number: int) -> None:
    """Runs in a process of its own, which kills itself."""
    seen = 0

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*args: object, **kwargs: object) -> object:
            nonlocal seen
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return wrapper

    if what == "forward":
        Engine.logps = counted(Engine.logps)
    elif what == "file":
        checkpoints.save_file = counted(checkpoints.save_file)
    else:
        checkpoints.fsync_folder = counted(checkpoints.fsync_folder)
    train(work)


def check(tmp_path: Path, folder: Path, loss: str, kind: str, point: tuple[str, int]) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=killed, args=(job(tmp_path / "killed", folder, loss, kind), *point)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    for name in ("killed", "whole"):
        train(job(tmp_path / name, folder, loss, kind))
    whole, again = tmp_path / "whole", tmp_path / "killed"
    assert (again / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    weights = load_file(whole / "model.safetensors")
    found = load_file(again / "model.safetensors")
    assert weights.keys() == found.keys()
    for key, value in weights.items():
        assert torch.equal(value, found[key]), key
    last = sorted((whole / "state").iterdir())[-1].name
    for name in ("model", "optimizer", "random"):
        files = [(run / "state" / last / f"{name}.safetensors").read_bytes() for run in (whole, again)]
        assert files[0] == files[1], name


@pytest.fixture(autouse=True)
def _one_thread():
    """A fork of a process whose OpenMP threads run would hang."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("loss", "kind", "point"), COMBINATIONS[::11], ids=str)
def test_a_killed_run_ends_with_the_same_bits(tmp_path, tiny_folder, loss, kind, point):
    check(tmp_path, tiny_folder, loss, kind, point)


@pytest.mark.soak
@pytest.mark.parametrize(("loss", "kind", "point"), COMBINATIONS, ids=str)
def test_sixty_killed_runs_end_with_the_same_bits(tmp_path, tiny_folder, loss, kind, point):
    check(tmp_path, tiny_folder, loss, kind, point)
