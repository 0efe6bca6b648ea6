"""What Slurm says: the state of jobs, and how large an array may be. No accounting database is needed."""

import os
import re
import subprocess
from typing import NamedTuple

TIMEOUT_SECONDS = 60
WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "SUSPENDED", "RESV_DEL_HOLD"}
AT_WORK = {"RUNNING", "CONFIGURING", "COMPLETING", "SIGNALING", "STAGE_OUT", "RESIZING", "STOPPED"}
KINDS = {
    "OUT_OF_MEMORY": "oom",
    "TIMEOUT": "timeout",
    "DEADLINE": "timeout",
    "CANCELLED": "cancelled",
    "NODE_FAIL": "node",
    "BOOT_FAIL": "node",
}
"""The class of failure of a job that ended in this state without saying why."""

MAX_ARRAY_SIZE = 1001
"""Slurm's own default."""


class Job(NamedTuple):
    """state: e.g. PENDING, RUNNING, or how it ended, which Slurm remembers for some minutes. reason: of its waiting."""

    state: str
    reason: str

    @property
    def waits(self) -> bool:
        return self.state in WAITING

    @property
    def works(self) -> bool:
        return self.state in AT_WORK


def jobs() -> dict[str, Job] | None:
    """This user's jobs by their id, elements of arrays as 12_3; None where no Slurm answers."""
    form = "%i|%T|%r"
    found = _ask("squeue", "--array", "--noheader", "--states=all", f"--user={os.getuid()}", f"--format={form}")
    if found is None:
        return None
    rows = (line.split("|", 2) for line in found.splitlines() if line.count("|") >= 2)
    return {number.strip(): Job(state.strip(), reason.strip()) for number, state, reason in rows}


def max_array_size() -> int:
    """How many jobs fit into one array: Slurm's MaxArraySize, whose largest index is one less."""
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", _ask("scontrol", "show", "config") or "", re.M)
    return max(1, int(match[1])) if match else MAX_ARRAY_SIZE


def _ask(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
