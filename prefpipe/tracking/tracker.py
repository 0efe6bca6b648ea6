"""The run's end of tracking: starts the process that does it, and waits for it no longer than it was told to."""

import contextlib
import dataclasses
import logging
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from prefpipe.tracking import LOADING_SECONDS, Sink, Tracking

log = logging.getLogger(__name__)

INTERRUPTED_SECONDS = 5.0
"""For the last word after Ctrl-C."""

NOT_INHERITED = ("MLFLOW_RUN_ID", "WANDB_RUN_ID")
"""They would have every run written into one (mlflow#15713)."""


class Tracker:
    """Tells a tracker of one stage; does nothing where none is chosen, or all is left to stage=sync.

    Nothing here raises: what a tracker did not take is one warning.
    """

    def __init__(self, tracking: Tracking, log_file: Path) -> None:
        self.sink = tracking if isinstance(tracking, Sink) and tracking.upload == "live" else None
        self.log_file = log_file
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Have the process import its library while the stage does its work."""
        if self.sink is None or self._child is not None:
            return
        environment = {key: value for key, value in os.environ.items() if key not in NOT_INHERITED}
        try:
            self.log_file.parent.mkdir(parents=True, exist_ok=True)
            with self.log_file.open("ab") as file:
                self._child = subprocess.Popen(
                    [sys.executable, "-m", "prefpipe.tracking.process"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=file,
                    env=environment,
                    start_new_session=True,
                )
        except OSError as error:
            log.warning("tracking=%s: no process for it: %s", self.sink.name, error)
            return
        self._say({"sink": dataclasses.asdict(self.sink), "log": str(self.log_file)})

    def follow(self, record: Path) -> None:
        """Tell of a training run while it runs."""
        self._say({"follow": str(record)})

    def finish(self, records: Sequence[Path], outcome: str) -> None:
        """Tell of these records and end. Waits Sink.wait_seconds at most, and after Ctrl-C hardly."""
        if records:
            self.start()
        if self.sink is None or self._child is None:
            return
        child, self._child = self._child, None
        if not records:
            _end(child)
            return
        seconds, loading = self.sink.wait_seconds, LOADING_SECONDS
        if outcome == "KILLED":
            seconds, loading = min(seconds, INTERRUPTED_SECONDS), INTERRUPTED_SECONDS
        message = orjson.dumps({"tell": [str(record) for record in records], "outcome": outcome})
        try:
            problem = _last_word(child, message + b"\n", seconds, loading)
        finally:
            _end(child)
        if problem:
            log.warning(
                "tracking=%s did not take everything (%s); nothing is lost: stage=sync, or the same command again, "
                "sends the rest",
                self.sink.name,
                re.sub(r"\s+", " ", problem)[:300],
            )

    def _say(self, message: dict[str, Any]) -> None:
        if self._child is None or self._child.stdin is None:
            return
        with contextlib.suppress(OSError):  # it has ended; `finish` finds out why
            self._child.stdin.write(orjson.dumps(message) + b"\n")
            self._child.stdin.flush()


def _last_word(child: "subprocess.Popen[bytes]", message: bytes, seconds: float, loading: float) -> str:
    """What went wrong after a last message, "" for nothing. loading: seconds for the import before."""
    assert child.stdin is not None
    answers: queue.Queue[dict[str, Any]] = queue.Queue()

    def read() -> None:
        assert child.stdout is not None
        with contextlib.suppress(ValueError):
            for line in child.stdout:
                answers.put(orjson.loads(line))
        answers.put({"problem": "its process ended"})

    threading.Thread(target=read, daemon=True).start()
    try:
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(message)
            child.stdin.close()
        answer = answers.get(timeout=loading)
        if "problem" not in answer:
            answer = answers.get(timeout=seconds)
        child.wait(seconds)
        return str(answer["problem"])
    except (queue.Empty, subprocess.TimeoutExpired):
        return f"it took longer than tracking.wait_seconds={seconds:g}"
    except OSError as error:
        return str(error)


def _end(child: subprocess.Popen[bytes]) -> None:
    """With all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    child.wait()
