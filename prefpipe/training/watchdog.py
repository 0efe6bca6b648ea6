"""Ends a training process that waits for ever, and says where it stands.

Of processes that train together all wait when one does not get on, for as long as their process group allows. Every
process that waits ends itself here, so the stacks of all of them are in the log, and the one that differs is the cause.
"""

import faulthandler
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from prefpipe.errors import HangError
from prefpipe.processes import tell_parent

log = logging.getLogger(__name__)

PATIENCE = 300.0
"""Seconds. Slow storage and a kernel that is compiled for a new shape take less."""

TIMES_LONGEST = 10
"""Times the longest wait so far, where that is more."""


class Watchdog:
    """Ends this process when no `beat` has come for `patience` seconds since the last one, until `stop`.

    Seconds in which this process was suspended do not count. The first beat starts it.
    """

    def __init__(self, *, watches: bool, patience: float = PATIENCE) -> None:
        self._patience = patience
        self._waited = self._longest = 0.0
        self._paused, self._over = False, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True) if watches else None

    def beat(self) -> None:
        """This process has got on."""
        self._longest = max(self._longest, self._waited)
        self._waited = 0.0
        if self._thread is not None and self._thread.ident is None:
            self._thread.start()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within this context waiting is no fault, and does not count."""
        self._paused = True
        try:
            yield
        finally:
            self._waited, self._paused = 0.0, False

    def stop(self) -> None:
        """For good."""
        self._over.set()

    def _watch(self) -> None:
        tick = min(1.0, self._patience / 10)
        while not self._over.wait(tick):
            self._waited += 0.0 if self._paused else tick
            if self._waited > max(self._patience, TIMES_LONGEST * self._longest):
                self._give_up()

    def _give_up(self) -> None:
        error = HangError(
            f"no micro-batch has ended for {self._waited:.0f} s, where the longest before took {self._longest:.0f} s: "
            f"a process hangs, or the network between them does. Where each thread stands follows, for each process; "
            f"the same command again goes on from the last state"
        )
        log.critical("%s", error)
        tell_parent(error)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        logging.shutdown()
        os._exit(1)
