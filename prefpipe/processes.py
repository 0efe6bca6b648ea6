"""Child processes that die with their parent, as a group, and tell why they ended."""

import contextlib
import ctypes
import logging
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import orjson

from prefpipe.errors import HangError, PrefpipeError, kind_of

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
GRACE_SECONDS = 10.0
LINES_KEPT = 400
"""Of a Talker's log, for the error that tells of its end."""


CHECK_SECONDS, CHECKS = 5.0, 3
"""So often in a row, and so far apart, a child of a group is found stopped before it counts as hung."""

KILLED = "killed"
"""The class of failure of a process that a signal ended."""

ERROR_FILE = "PREFPIPE_ERROR_FILE"
"""Names the file in which a child says why it failed."""


class ChildError(PrefpipeError, RuntimeError):
    """A child process failed; its own message stands above. kind, reason: of that message, where it left one."""

    def __init__(self, message: str, kind: str = PrefpipeError.kind, reason: str = "") -> None:
        super().__init__(message)
        self.kind, self.reason = kind, reason


def tell_parent(error: BaseException) -> None:
    """Leave why this process fails for the run_process that started it; of several that fail, the first one's."""
    name = os.environ.get(ERROR_FILE)
    if name is None:
        return
    reason = str(error) if isinstance(error, PrefpipeError) else f"{type(error).__name__}: {error}"
    if isinstance(error, ChildError) and error.reason:
        reason = error.reason
    with contextlib.suppress(OSError), open(name, "xb") as file:
        file.write(orjson.dumps({"kind": kind_of(error), "reason": reason}))


def die_with_parent(parent: int | None = None) -> None:
    """Have this process killed when its parent ends, however that ends; where that has happened already, now. Linux."""
    expected = os.getppid() if parent is None else parent
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != expected:
            os._exit(1)


def run_process(
    command: Sequence[str], what: str, *, environment: Mapping[str, str] | None = None, in_step: bool = False
) -> None:
    """Run a command to its end, its output passed through.

    The child gets its own process group, which is ended with this process: on an error, on Ctrl-C, and, on Linux, even
    when this process is killed outright, so that no orphan goes on writing.
    in_step: the processes that it starts wait for each other, so one that is stopped (SIGSTOP) alone is killed.
    Raises ChildError when it fails.
    """
    with tempfile.TemporaryDirectory(prefix="prefpipe-") as folder:
        told = Path(folder) / "error.json"
        child = subprocess.Popen(
            list(command),
            start_new_session=True,
            preexec_fn=partial(_begin, os.getpid()),
            env={**(os.environ if environment is None else environment), ERROR_FILE: str(told)},
        )
        try:
            code, hung = _wait_in_step(child) if in_step else (child.wait(), None)
        except BaseException:
            _end_group(child)
            raise
        if code and hung:
            reason = (
                f"process {hung} of {what} was stopped by a signal for {CHECKS * CHECK_SECONDS:.0f} s, while others "
                f"waited for it; all were ended, and the same command again goes on from the last state"
            )
            raise ChildError(reason, HangError.kind, reason)
        if code:
            raise ChildError(f"{what} {_why(code)}", **(_told(told) or _kind(code)))


def _wait_in_step(child: subprocess.Popen[bytes]) -> tuple[int, int | None]:
    """(exit code, which process was killed because it was stopped)."""
    found, hung = Counter[int](), None
    while True:
        try:
            return child.wait(CHECK_SECONDS), hung
        except subprocess.TimeoutExpired:
            stopped = _stopped_alone(child.pid)
            found = Counter({pid: found[pid] + 1 for pid in stopped})
            for pid in (pid for pid, times in found.items() if times == CHECKS):
                hung = pid
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _stopped_alone(parent: int) -> list[int]:
    """Its children that are stopped, where others are not: all of them are when somebody wants a pause."""
    import psutil

    states = {}
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(parent).children():
            with contextlib.suppress(psutil.Error):
                states[process.pid] = process.status() == psutil.STATUS_STOPPED
    return [] if all(states.values()) else [pid for pid, stopped in states.items() if stopped]


def _ignore_notice() -> None:
    """In a child, before its command: Slurm tells all processes of a job by SIGUSR2 that it will be stopped.

    The first one answers to that and ends its children; one that died of the signal before would look like a failure.
    """
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _begin(parent: int) -> None:
    _ignore_notice()
    die_with_parent(parent)


def _kind(code: int) -> dict[str, str]:
    """A child that is killed outright most often took more memory than there is."""
    return {"kind": "oom" if code == -signal.SIGKILL else KILLED if code < 0 else PrefpipeError.kind}


def _told(file: Path) -> dict[str, str]:
    try:
        found = orjson.loads(file.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return {"kind": str(found["kind"]), "reason": str(found["reason"])}


class Talker:
    """A child in a process group of its own that is asked, and answers, in lines on its stdin and stdout.

    Its stderr goes to the log file. Its stdin ends with this process, however that ends: the child has to end then,
    with what it started. When the child ends by itself, what it started is ended here.
    """

    def __init__(
        self,
        command: Sequence[str],
        what: str,
        answers: "queue.Queue[tuple[Talker, bytes | None]]",
        *,
        environment: Mapping[str, str],
    ) -> None:
        """answers: where its lines are put; None stands for its end."""
        self.what = what
        self._answers = answers
        self._said = deque[str](maxlen=LINES_KEPT)
        pipe = subprocess.PIPE
        self._child = subprocess.Popen(
            list(command),
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env=dict(environment),
            start_new_session=True,
            preexec_fn=_ignore_notice,
        )
        readers = [threading.Thread(target=target, daemon=True) for target in (self._read, self._listen)]
        self._watcher = threading.Thread(target=self._watch, args=(readers,), daemon=True)
        for thread in (*readers, self._watcher):
            thread.start()

    @property
    def pid(self) -> int:
        """Of the child, and of its process group."""
        return self._child.pid

    @property
    def exit_code(self) -> int | None:
        """Of the child, minus the number of the signal that killed it; None while it runs."""
        return self._child.poll()

    def ask(self, line: bytes) -> None:
        """Send one line. Raises ChildError when the child is gone."""
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(line)
            self._child.stdin.flush()
        except BrokenPipeError:
            self._watcher.join()
            raise self.error() from None

    def error(self) -> ChildError:
        """Why the child has ended, with what it said last."""
        code = self._child.wait()
        how = f"ended with exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += " (out of memory?)"
        again = "the same command again goes on from its last commit"
        return ChildError(f"{self.what} {how}; {again}. {_last_words(self._said)}")

    def close(self, *, now: bool) -> None:
        """End the child and all it started: at once, or by the end of its stdin, for which it gets some seconds."""
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        if not now:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(GRACE_SECONDS)
        if self._child.poll() is None:
            self._kill_group()
        self._watcher.join()

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self._answers.put((self, line))

    def _listen(self) -> None:
        assert self._child.stderr is not None
        for line in self._child.stderr:
            text = line.decode(errors="replace").rstrip()
            self._said.append(text)
            log.debug("%s: %s", self.what, text)

    def _watch(self, readers: Sequence[threading.Thread]) -> None:
        """What the child started may outlive it, and holds its pipes open."""
        self._child.wait()
        self._kill_group()
        for reader in readers:
            reader.join()
        _await_end_of_group(self._child.pid)
        self._answers.put((self, None))

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)


def _await_end_of_group(group: int) -> None:
    """A process that was killed closes its pipes first, and gives back memory and devices later."""
    deadline = time.monotonic() + GRACE_SECONDS
    while _lives(group) and time.monotonic() < deadline:
        time.sleep(0.01)


def _lives(group: int) -> bool:
    """Whether a process of the group is left that is no zombie."""
    import psutil

    for pid in psutil.pids():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getpgid(pid) == group and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def _last_words(lines: Sequence[str]) -> str:
    """The first and the last error in them, as later ones often only say that there was one; else the end."""
    errors = [line for line in lines if re.search(r"\b[A-Z]\w*(Error|Exception)\b: ?\S", line)]
    words = dict.fromkeys([*errors[:1], *errors[-1:]] or [line for line in lines if line.strip()][-3:])
    return f"Its last words: {' | '.join(words)}" if words else "It said nothing"


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
