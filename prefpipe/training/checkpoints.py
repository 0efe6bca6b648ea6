"""Resumable training state: weights, optimizer, random numbers, position; safetensors and JSON, no pickle.

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


def save(
    folder: Path,
    step: int,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    extra: dict[str, Any],
) -> None:
    """Write the state after `step` optimizer steps, then drop all but the newest two.

    parameters: by name, those that training changes.
    """
    target = folder / f"step-{step:06d}"
    aside = folder / f"{target.name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in parameters.items()}
    save_file(tensors, aside / "model.safetensors")
    save_file(_optimizer_tensors(optimizer), aside / "optimizer.safetensors")
    save_file(_random_state(), aside / "random.safetensors")
    files = {}
    for file in sorted(aside.iterdir()):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        files[file.name] = sha256_of(file)
    write_json(aside / "state.json", {"step": step, "files": files, **extra})
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    fsync_folder(folder)
    for old in sorted(folder.glob("step-??????"))[:-KEPT]:
        shutil.rmtree(old)


def load_newest(
    folder: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Any] | None:
    """Restore the newest undamaged state; its state.json, or None when there is none."""
    for candidate in sorted(folder.glob("step-??????"), reverse=True):
        state = _checked(candidate)
        if state is None:
            log.warning("%s is damaged; taking the state before it", candidate)
            continue
        saved = load_file(candidate / "model.safetensors")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])
        _restore_optimizer(optimizer, load_file(candidate / "optimizer.safetensors"))
        _restore_random(load_file(candidate / "random.safetensors"))
        return state
    return None


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
