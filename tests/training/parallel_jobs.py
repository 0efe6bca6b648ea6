"""One process of several that train: started by torchrun in test_parallel.py with a list of jobs as JSON."""

import os
import signal
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path

import orjson
import test_encoder_decoder
import torch
from test_loop import job
from torch.utils._python_dispatch import TorchDispatchMode

from prefpipe import models, sharding
from prefpipe.components import COMPONENTS
from prefpipe.launch import notice
from prefpipe.settings import HardwareConfig, ModelConfig, TrainingConfig
from prefpipe.training import loop
from prefpipe.training.parallel import connect

MODEL = ModelConfig(name="tiny", path="builtin:tiny")


def main() -> None:
    """argv: the model's folder, the jobs.

    folder, reference: other models. measure: only load the model, and write what that took to such files.
    kill_after: process 1 ends itself after the state of this step. notice_in: Slurm's notice is given in this one.
    """
    for spec in orjson.loads(sys.argv[2]):
        folder = Path(spec.get("folder", sys.argv[1]))
        if "measure" in spec:
            measure_loading(folder, spec["measure"])
            continue
        loss = COMPONENTS["loss"][spec["loss"]](**spec.get("knobs", {}))
        made = test_encoder_decoder.job if spec.get("encoder_decoder") else job
        work = made(Path(spec["work"]), folder, loss, TrainingConfig(**spec["training"]))
        work = replace(
            work,
            reference=Path(spec.get("reference", folder)),
            hardware=HardwareConfig(name="test", device="cpu", precision="fp32", num_threads=1, **spec["hardware"]),
            model=replace(MODEL, **spec.get("model", {})),
            world_size=int(os.environ["WORLD_SIZE"]),
        )
        if "kill_after" in spec:
            kill_after(int(spec["kill_after"]))
        if "notice_in" in spec:
            notice_in(int(spec["notice_in"]))
        loop.train(work)


def kill_after(step: int) -> None:
    saved = loop._save_state

    def save_then_die(work: Path, done: int, *rest: object) -> None:
        saved(work, done, *rest)
        if done == step and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    loop._save_state = save_then_die


def notice_in(step: int) -> None:
    heard, looks = notice.Listener.heard, count(1)

    def give_then_look(listener: notice.Listener) -> bool:
        if next(looks) == step and os.environ["RANK"] == "0":
            notice.give(Path(os.environ[notice.VARIABLE]), 0)
        return heard(listener)

    notice.Listener.heard = give_then_look


class PeakMemory(TorchDispatchMode):
    """Measures this process's anonymous memory after each operation: what is not a mapped file, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.before = self.highest = self.now()

    def now(self) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = function(*args, **(kwargs or {}))
        self.highest = max(self.highest, self.now())
        return out


def measure_loading(folder: Path, file: str) -> None:
    """Load a model under ZeRO-3 and call it; write memory in bytes, and logits, into FILE.RANK.json."""
    hardware = HardwareConfig(name="test", device="cpu", precision="fp32", num_threads=1, zero_stage=3)
    device = torch.device("cpu")
    parallel = connect(hardware, TrainingConfig(global_batch_size=4, micro_batch_size=2), device, world_size=2)
    with PeakMemory() as memory:
        model = parallel.build(lambda: models.load_weights(MODEL, folder, dtype=torch.float32, device=device))
        loaded = memory.now() - memory.before
        with parallel.evaluating(model), torch.no_grad():
            logits = model(torch.arange(20)[None]).logits
    parameters = list(model.parameters())
    found = {
        "whole": 4 * sum(map(sharding.num_elements, parameters)),
        "held": 4 * sum(parameter.numel() + sharding.local_shard(parameter).numel() for parameter in parameters),
        "loaded": loaded,
        "peak": memory.highest - memory.before,
        "logits": logits[0, -1].tolist(),
    }
    Path(f"{file}.{parallel.rank}.json").write_bytes(orjson.dumps(found))


if __name__ == "__main__":
    main()
