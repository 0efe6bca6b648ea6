"""Child processes that die with their parent, as a group, and tell why they ended."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from prefpipe.errors import PrefpipeError

PR_SET_PDEATHSIG = 1
GRACE_SECONDS = 10.0


class ChildError(PrefpipeError, RuntimeError):
    """A child process failed; its own message stands above."""


def run_process(command: Sequence[str], what: str) -> None:
    """Run a command to its end, its output passed through.

    The child gets its own process group, which is ended with this process: on an error, on Ctrl-C, and, on Linux, even
    when this process is killed outright, so that no orphan goes on writing.
    Raises ChildError when it fails.
    """
    parent = os.getpid()

    def die_with_parent() -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)

    child = subprocess.Popen(list(command), start_new_session=True, preexec_fn=die_with_parent)
    try:
        code = child.wait()
    except BaseException:
        _end_group(child)
        raise
    if code:
        raise ChildError(f"{what} {_why(code)}")


def _why(code: int) -> str:
    if code > 0:
        return f"failed with exit code {code}; its message stands above"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}; the same command again goes on from its last commit"


def _end_group(child: subprocess.Popen[bytes]) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, sign)
            child.wait(GRACE_SECONDS)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
