"""Starts the processes of a training run: alone, or through torchrun on one node or several."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence

from prefpipe.errors import ConfigError
from prefpipe.settings import HardwareConfig

NOT_PASSED_ON = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE|WORLD_RANK)$|MASTER_(ADDR|PORT)$|TORCHELASTIC_|PMI_|PMIX_|OMPI_|ACCELERATE_"
)
"""Variables by which a library takes a process for part of somebody else's run."""

FIRST_PORT, PORTS = 20_000, 10_000
"""The rendezvous of a Slurm job is at a port that follows from its number, so that two jobs on a node differ."""


def processes_per_node(hardware: HardwareConfig) -> int:
    """hardware.gpus_per_node, or how many GPUs are visible here. Raises ConfigError where there are none."""
    if hardware.gpus_per_node is not None:
        return hardware.gpus_per_node
    found = 0 if hardware.device == "cpu" else visible_gpus()
    if not found:
        raise ConfigError(
            f"hardware.gpus_per_node=null (hardware={hardware.name}) takes every GPU of the node, and there is none "
            f"here; with a number, so many processes train together on the CPU"
        )
    return found


def visible_gpus() -> int:
    """Without torch, whose import takes seconds."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return len([name for name in listed.split(",") if name.strip() not in ("", "-1")])
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return len(re.findall(r"^GPU \d+:", found, re.M))


def node_rank(hardware: HardwareConfig) -> int:
    """Which of hardware.num_nodes this is: hardware.node_rank, or Slurm's number. Raises ConfigError without either."""
    if hardware.num_nodes == 1:
        return 0
    found = os.environ.get("SLURM_NODEID") if hardware.node_rank is None else hardware.node_rank
    if found is None:
        raise ConfigError(
            f"hardware.num_nodes={hardware.num_nodes}, and nothing says which of them this is: start the command "
            f"through Slurm (hydra/launcher=slurm_2x8), or on each node with hardware.node_rank and hardware.rendezvous"
        )
    return int(found)


def command(hardware: HardwareConfig, module: str, arguments: Sequence[str]) -> list[str]:
    """The command that runs `python -m module *arguments` as every training process of this node."""
    here = processes_per_node(hardware)
    if hardware.num_nodes == here == 1 and not hardware.zero_stage:
        return [sys.executable, "-m", module, *arguments]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(here), "--max-restarts", "0"]
    if hardware.num_nodes == 1:
        meeting = ["--standalone"]
    else:
        meeting = [
            "--nnodes",
            str(hardware.num_nodes),
            "--node-rank",
            str(node_rank(hardware)),
            "--rdzv-backend",
            "c10d",
        ]
        meeting += ["--rdzv-endpoint", _rendezvous(hardware), "--rdzv-id", os.environ.get("SLURM_JOB_ID", "prefpipe")]
    return [*torchrun, *meeting, "-m", module, *arguments]


def environment(hardware: HardwareConfig) -> dict[str, str]:
    """This process's environment for a training process: nothing of another distributed run, and enough threads."""
    variables = {name: value for name, value in os.environ.items() if not NOT_PASSED_ON.match(name)}
    if hardware.num_threads is not None:
        variables["OMP_NUM_THREADS"] = str(hardware.num_threads)
    if hardware.zero_stage:
        # DeepSpeed compiles what it needs by ninja, which stands beside this Python.
        variables["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), variables.get("PATH", "")])
    if hardware.device == "cpu" or not visible_gpus():
        variables["DS_ACCELERATOR"] = "cpu"  # other libraries import it where it is installed, and it would warn
    return variables


def _rendezvous(hardware: HardwareConfig) -> str:
    if hardware.rendezvous is not None:
        return hardware.rendezvous
    nodes, job = os.environ.get("SLURM_JOB_NODELIST"), os.environ.get("SLURM_JOB_ID")
    if not nodes or not job:
        raise ConfigError(
            f"hardware.num_nodes={hardware.num_nodes} needs a place where the nodes meet: start the command through "
            f"Slurm, or give hardware.rendezvous=HOST:PORT, the same on each, HOST being one of them"
        )
    hosts = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True).stdout
    return f"{hosts.split()[0]}:{FIRST_PORT + int(job) % PORTS}"
