"""Child processes: asked in lines, ended with all that they started, and their end told."""

import os
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from prefpipe.processes import ChildError, Talker, run_process

ECHO = """
import subprocess, sys
inner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], {pipes})
print(inner.pid, flush=True)
for line in sys.stdin:
    if line.startswith("fail"):
        raise ValueError("told to " + line)
    print(line.upper(), end="", flush=True)
"""
"""Answers in capitals; has a child, whose pid is its first answer."""

QUIET = "stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL"

Answers = queue.Queue[tuple[Talker, bytes | None]]


def told(answers: Answers) -> bytes | None:
    return answers.get(timeout=60)[1]


@pytest.fixture(params=["", QUIET], ids=["its child holds its pipes", "its child is apart"])
def talk(request: pytest.FixtureRequest) -> Iterator[tuple[Talker, Answers, int]]:
    """A talker, what it answers, and the pid of its child's child."""
    answers: Answers = queue.Queue()
    command = [sys.executable, "-c", ECHO.format(pipes=request.param)]
    talker = Talker(command, "the echo", answers, environment=os.environ)
    first = told(answers)
    assert first is not None
    yield talker, answers, int(first)
    talker.close(now=True)


def ended(*pids: int) -> bool:
    """None lives; one that nobody has waited for may still have its number."""
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


@pytest.mark.parametrize("now", [False, True])
def test_close_returns_when_all_its_processes_are_gone(talk, now):
    talker, answers, inner = talk
    talker.ask(b"hello\n")
    assert told(answers) == b"HELLO\n"
    talker.close(now=now)
    assert ended(talker.pid, inner)
    assert told(answers) is None


def test_an_end_is_told_once_all_its_processes_are_gone_with_its_last_words(talk):
    talker, answers, inner = talk
    talker.ask(b"fail\n")
    assert told(answers) is None
    assert ended(talker.pid, inner)
    again = "the same command again goes on from its last commit"
    assert str(talker.error()) == f"the echo ended with exit code 1; {again}. Its last words: ValueError: told to fail"
    with pytest.raises(ChildError, match="told to fail"):
        talker.ask(b"more\n")


def test_a_kill_is_told_with_its_likely_reason(talk):
    talker, answers, inner = talk
    os.kill(talker.pid, signal.SIGKILL)
    assert told(answers) is None
    assert ended(talker.pid, inner)
    assert str(talker.error()).startswith("the echo was killed by SIGKILL (out of memory?); the same command again")


def test_a_process_that_fails_is_told_with_its_exit_code():
    run_process([sys.executable, "-c", "pass"], "nothing")
    with pytest.raises(ChildError, match=r"^the sum failed with exit code 3; its message stands above$"):
        run_process([sys.executable, "-c", "raise SystemExit(3)"], "the sum")
    with pytest.raises(ChildError, match=r"^the sum was killed by SIGKILL \(out of memory\?\); the same command"):
        run_process([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], "the sum")


def test_a_process_that_is_interrupted_here_is_ended(monkeypatch):
    """KeyboardInterrupt while it is waited for."""
    started: list[subprocess.Popen[bytes]] = []
    wait = subprocess.Popen.wait

    def interrupted(child: "subprocess.Popen[bytes]", timeout: float | None = None) -> int:
        if child in started:
            return wait(child, timeout)
        started.append(child)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_process([sys.executable, "-c", "import time; time.sleep(600)"], "a nap")
    assert started[0].returncode == -signal.SIGTERM
