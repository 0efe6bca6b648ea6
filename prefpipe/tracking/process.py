"""The process that tells a tracker of one stage: `python -m prefpipe.tracking.process`, a JSON message a line on stdin.

It has a life of its own, so that a tracker which is slow, or hangs, or takes its memory, is none of the run's business.
The first message says which tracker; the last one, or the end of stdin when the run was killed, what is left to tell.
"""

import contextlib
import importlib
import logging
import os
import pkgutil
import queue
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

import prefpipe.tracking
from prefpipe.components import COMPONENTS
from prefpipe.logs import log_to, set_up_logging
from prefpipe.tracking import LOADING_SECONDS, Sink
from prefpipe.tracking.sending import Follower, tell_patiently

log = logging.getLogger("prefpipe.tracking")

LONGEST_PAUSE_SECONDS = 60.0
GRACE_SECONDS = 5.0


def main() -> None:
    """Messages: {"sink": fields, "log": file}, {"follow": record}, {"tell": [record, …], "outcome": status}."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever a library prints is no answer
    loaded = threading.Event()
    lines = _lines(loaded)
    first = lines.get()
    if first is None:
        return
    set_up_logging()
    log_to(Path(first["log"]))
    sink = sink_of(first["sink"])
    _attempt(sink.load, "cannot be imported")
    loaded.set()
    with contextlib.suppress(BrokenPipeError):
        answers.write(orjson.dumps({"loaded": True}) + b"\n")
    _attempt(sink.prepare, "cannot be reached")
    followed, last = _follow(sink, lines)
    # Without a last word the run was killed.
    paths = [Path(path) for path in last["tell"]] if last else [followed] if followed else []
    problems = [tell_patiently(path, sink, last["outcome"] if last else "KILLED") for path in paths]
    with contextlib.suppress(BrokenPipeError):
        answers.write(orjson.dumps({"problem": next(filter(None, problems), "")}) + b"\n")


def sink_of(fields: dict[str, Any]) -> Sink:
    """A tracker by its name and settings."""
    for module in pkgutil.iter_modules(prefpipe.tracking.__path__):
        if module.name != "process":
            importlib.import_module(f"prefpipe.tracking.{module.name}")
    found = COMPONENTS["tracking"][fields["name"]](**fields)
    assert isinstance(found, Sink)
    return found


def _follow(sink: Sink, lines: "queue.Queue[dict[str, Any] | None]") -> tuple[Path | None, dict[str, Any] | None]:
    """Look after a run until its end: (the record, the last message)."""
    follower: Follower | None = None
    pause, due = sink.every_seconds, float("inf")
    while True:
        try:
            message = lines.get(timeout=max(0.0, due - time.monotonic()) if follower else None)
        except queue.Empty:
            assert follower is not None
            failed = _attempt(follower.look, "did not take metrics")
            pause = min(2 * pause, max(LONGEST_PAUSE_SECONDS, sink.every_seconds)) if failed else sink.every_seconds
            due = time.monotonic() + pause
            continue
        if message is None or "tell" in message:
            return follower.path if follower else None, message
        follower, due = Follower(Path(message["follow"]), sink), time.monotonic()


def _attempt(call: Callable[[], None], what: str) -> bool:
    """Whether a call failed."""
    try:
        call()
    except Exception as error:  # whatever a tracker throws, the run is worth more than its record
        log.debug("tracker %s: %s: %s", what, type(error).__name__, error)
        return True
    return False


def _lines(loaded: threading.Event) -> "queue.Queue[dict[str, Any] | None]":
    """The messages on stdin as they come; None at its end. What hangs then ends all the same."""
    found: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def read() -> None:
        seconds = 0.0
        for line in sys.stdin.buffer:
            message = orjson.loads(line)
            seconds = message.get("sink", {}).get("wait_seconds", seconds)
            found.put(message)
        found.put(None)
        loaded.wait(LOADING_SECONDS)
        time.sleep(seconds + GRACE_SECONDS)
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    return found


if __name__ == "__main__":
    main()
