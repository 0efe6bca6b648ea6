"""Progress of long work: a bar for a person who watches, one line a minute in a log file."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 60.0


class Progress(Protocol):
    """Counts what is done."""

    def update(self, n: int = 1) -> object:
        """n more are done."""

    def note(self, text: str) -> None:
        """What to show beside the count, e.g. the loss."""


class _Nothing:
    def update(self, n: int = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class _Lines:
    def __init__(self, what: str, unit: str, total: int, done: int) -> None:
        self.what, self.unit, self.total, self.done = what, unit, total, done
        self.first, self.started, self.said = done, time.monotonic(), time.monotonic()
        self.text = ""

    def update(self, n: int = 1) -> None:
        self.done += n
        now = time.monotonic()
        if now - self.said >= SECONDS_BETWEEN_LINES:
            rate = (self.done - self.first) / (now - self.started)
            left = (self.total - self.done) / rate if rate else float("inf")
            log.info(
                "%s: %d of %d %ss, %.2f/s, %.0f s left %s",
                self.what,
                self.done,
                self.total,
                self.unit,
                rate,
                left,
                self.text,
            )
            self.said = now

    def note(self, text: str) -> None:
        self.text = text


class _Bar:
    def __init__(self, what: str, unit: str, total: int, done: int) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=total, initial=done, desc=what, unit=unit, leave=False)

    def update(self, n: int = 1) -> None:
        self.bar.update(n)

    def note(self, text: str) -> None:
        self.bar.set_postfix_str(text, refresh=False)


@contextmanager
def progress(what: str, *, unit: str, total: int, done: int = 0, show: bool = True) -> Iterator[Progress]:
    """Show how far `what` is, of `total` units, `done` of them from before.

    show: false in all but one of several processes that do the same.
    """
    if not show:
        yield _Nothing()
    elif sys.stderr.isatty():
        shown = _Bar(what, unit, total, done)
        try:
            yield shown
        finally:
            shown.bar.close()
    else:
        yield _Lines(what, unit, total, done)
