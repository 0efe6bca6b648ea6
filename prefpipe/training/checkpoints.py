"""Resumable training state: weights, optimizer, random numbers, position; safetensors and JSON.

(DeepSpeed writes the parts of a sharded state itself, pickled; they are read only where their digests are still those
that this run has noted.)

A state is a folder `step-000010`, renamed into place once all of it is on disk; its `state.json` lists the digest of
each file, so a damaged one is recognised and the one before is taken.
"""

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prefpipe.files import fsync_folder, sha256_of, write_json

log = logging.getLogger(__name__)
KEPT = 2
"""One state could be the damaged one."""


def aside(folder: Path, step: int) -> Path:
    """Where the state after `step` optimizer steps is written, before it is renamed into place."""
    return folder / f"{_name(step)}.tmp"


def _name(step: int) -> str:
    return f"step-{step:06d}"


def begin(folder: Path, step: int) -> None:
    """Make an empty folder for a state."""
    shutil.rmtree(aside(folder, step), ignore_errors=True)
    aside(folder, step).mkdir(parents=True)


def save_tensors(aside: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None = None) -> None:
    """Write parameters by name, and what an optimizer keeps of them."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in parameters.items()}
    save_file(tensors, aside / "model.safetensors")
    if optimizer is not None:
        save_file(_optimizer_tensors(optimizer), aside / "optimizer.safetensors")


def load_tensors(path: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None = None) -> None:
    """Go back to what `save_tensors` has written."""
    saved = load_file(path / "model.safetensors")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    if optimizer is not None:
        _restore_optimizer(optimizer, load_file(path / "optimizer.safetensors"))


def publish(folder: Path, step: int, extra: dict[str, Any]) -> None:
    """Add the random state and the digests, rename the folder into place, then drop all but the newest two."""
    written, target = aside(folder, step), folder / _name(step)
    save_file(_random_state(), written / "random.safetensors")
    files = {}
    for file in sorted(path for path in written.rglob("*") if path.is_file()):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        files[str(file.relative_to(written))] = sha256_of(file)
    write_json(written / "state.json", {"step": step, "files": files, **extra})
    shutil.rmtree(target, ignore_errors=True)
    written.rename(target)
    fsync_folder(folder)
    for old in sorted(folder.glob("step-??????"))[:-KEPT]:
        shutil.rmtree(old)


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest undamaged state with its state.json, or None when there is none."""
    for candidate in sorted(folder.glob("step-??????"), reverse=True):
        state = _checked(candidate)
        if state is not None:
            return candidate, state
        log.warning("%s is damaged; taking the state before it", candidate)
    return None


def load_random(path: Path) -> None:
    """Go back to the random numbers of a state."""
    _restore_random(load_file(path / "random.safetensors"))


def _checked(candidate: Path) -> dict[str, Any] | None:
    try:
        state: dict[str, Any] = orjson.loads((candidate / "state.json").read_bytes())
        intact = all(sha256_of(candidate / name) == sha for name, sha in state["files"].items())
    except (OSError, orjson.JSONDecodeError, KeyError):
        return None
    return state if intact else None


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value.detach().contiguous()
        for index, values in state.items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
