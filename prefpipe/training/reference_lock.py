"""One process at a time computes the values of a reference cache; the others say for whom they wait."""

import errno
import fcntl
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import orjson

from prefpipe.provenance import describe_holder, lock_holder

log = logging.getLogger(__name__)

SECONDS_BETWEEN_TRIES = 0.2
SECONDS_BETWEEN_LINES = 60.0


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; it ends with its holder, however that ends.

    Where the file system has no locks there is a warning instead: then several may compute the same values.
    """
    with (folder / "lock").open("a+b", buffering=0) as file:
        _wait_for(file, folder)
        try:
            _write_holder(file)
            yield
        finally:
            file.truncate(0)
            with suppress(OSError):
                # Closing alone would leave the lock to forked children.
                fcntl.flock(file, fcntl.LOCK_UN)


def _wait_for(file: IO[bytes], folder: Path) -> None:
    began = said = 0.0
    holder = ""
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            current, at = _holder(file), time.monotonic()
            began = began or at
            if current != holder or at - said >= SECONDS_BETWEEN_LINES:
                log.info("%s: waiting %.0f s for %s, who computes its values", folder, at - began, current)
                holder, said = current, at
            time.sleep(SECONDS_BETWEEN_TRIES)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            log.warning("%s cannot be locked (%s): processes may compute the same values", file.name, error)
            return
        else:
            if holder:
                log.info("%s: free after %.0f s", folder, time.monotonic() - began)
            return


def _write_holder(file: IO[bytes]) -> None:
    file.truncate(0)
    file.write(orjson.dumps(lock_holder()))


def _holder(file: IO[bytes]) -> str:
    file.seek(0)
    try:
        return describe_holder(orjson.loads(file.read()))
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return "another process"
