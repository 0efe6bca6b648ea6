"""What a result was made with and by whom: versions, the state of the checkout, this process."""

import os
import platform
import socket
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from prefpipe.files import now

RECORDED_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "numpy", "hydra-core", "vllm", "deepspeed")


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result."""
    found = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def git_state() -> dict[str, Any]:
    """Commit of the checkout that prefpipe runs from, and whether it has changes; None outside of a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return {"git": None, "git_dirty": None}

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {"git": git("rev-parse", "HEAD"), "git_dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"git": None, "git_dirty": None}


def lock_holder() -> dict[str, Any]:
    """This process, as the file beside a lock names it to those who wait."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": now(), "job": os.environ.get("SLURM_JOB_ID")}


def describe_holder(holder: Mapping[str, Any]) -> str:
    """A `lock_holder` in words."""
    job = f", Slurm job {holder['job']}" if holder["job"] else ""
    return f"process {holder['pid']} on {holder['host']} since {holder['since']}{job}"
