"""One process of several that train: started by torchrun in test_parallel.py with a list of jobs as JSON."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import orjson
from test_loop import job

from prefpipe.components import COMPONENTS
from prefpipe.settings import HardwareConfig, ModelConfig, TrainingConfig
from prefpipe.training import loop


def main() -> None:
    """argv: the model's folder, the jobs. kill_after: process 1 ends itself after so many states were saved."""
    folder = Path(sys.argv[1])
    for spec in orjson.loads(sys.argv[2]):
        loss = COMPONENTS["loss"][spec["loss"]](**spec.get("knobs", {}))
        work = job(Path(spec["work"]), folder, loss, TrainingConfig(**spec["training"]))
        work = replace(
            work,
            hardware=HardwareConfig(name="test", device="cpu", precision="fp32", num_threads=1, **spec["hardware"]),
            model=ModelConfig(name="tiny", path="builtin:tiny", **spec.get("model", {})),
            world_size=int(os.environ["WORLD_SIZE"]),
        )
        if "kill_after" in spec:
            kill_after(int(spec["kill_after"]))
        loop.train(work)


def kill_after(step: int) -> None:
    saved = loop._save_state

    def save_then_die(work: Path, done: int, *rest: object) -> None:
        saved(work, done, *rest)
        if done == step and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    loop._save_state = save_then_die


if __name__ == "__main__":
    main()
