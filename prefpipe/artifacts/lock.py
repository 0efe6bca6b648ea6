"""One writer for each artifact: a lock, and a note of who holds it."""

import os
import socket
import time
from pathlib import Path

import orjson
from filelock import FileLock, Timeout

from prefpipe.errors import ArtifactError
from prefpipe.files import write_json
from prefpipe.provenance import describe_holder, lock_holder

HOLDER_SECONDS = 5.0
"""How long to wait for the holder's name, which it writes as soon as it has the lock."""


class WriteLock:
    """Held by the process that writes an artifact, which `.<name>.holder.json` beside the artifact names."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._lock = FileLock(out.parent / f".{out.name}.lock", timeout=0)
        self._holder = out.parent / f".{out.name}.holder.json"

    def acquire(self) -> None:
        """Become the writer. Raises ArtifactError, naming the one who is."""
        deadline = time.monotonic() + HOLDER_SECONDS
        while True:
            try:
                self._lock.acquire()
                break
            except Timeout:
                who = self._who()
                if who or time.monotonic() > deadline:
                    who = who or "another process"
                    raise ArtifactError(f"{self._out} is being written by {who}; wait for it, or end it") from None
                time.sleep(0.02)  # it has the lock and has not said so yet, or has just let go of it
        try:
            write_json(self._holder, lock_holder())
        except BaseException:
            self._lock.release()
            raise

    def release(self) -> None:
        """Let the next writer in."""
        self._holder.unlink(missing_ok=True)
        self._lock.release()

    def _who(self) -> str:
        """Who holds the lock; "" where no living process has written its name."""
        try:
            holder = orjson.loads(self._holder.read_bytes())
        except (OSError, orjson.JSONDecodeError):
            return ""
        if holder["host"] == socket.gethostname() and not _is_alive(holder["pid"]):
            return ""
        return describe_holder(holder)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
