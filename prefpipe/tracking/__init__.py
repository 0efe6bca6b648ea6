"""Trackers are told what a run does; metrics.jsonl and manifests come first, and no tracker holds up or ends a run.

One file for each tracker; add conf/tracking/<name>.yaml. What there is to tell is in records.py, what has been told in
sending.py; tracker.py and process.py do it beside the run.
"""

import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from prefpipe.errors import ConfigError
from prefpipe.settings import check_choice

if TYPE_CHECKING:
    from prefpipe.tracking.records import Record


LOADING_SECONDS = 300.0
"""For the import of a tracker's package, at most."""


class Row(NamedTuple):
    """What was measured at one step."""

    step: int
    values: dict[str, float]


@dataclass
class Tracking:
    """Base of everything that can be chosen with tracking=."""

    name: str = "???"


@dataclass
class Sink(Tracking):
    """Base of all trackers.

    Each call may come again with the same arguments, as its answer can get lost: what it says must then be there once.
    It may raise anything; the call comes again later.

    upload: "live" tells it while a stage runs, from a process of its own; "later" leaves all to stage=sync, for nodes
        without a network, or where the store is a file that network file systems cannot lock.
    every_seconds: between two looks at metrics.jsonl.
    wait_seconds: how long the end of a stage waits at most for what has not been told yet, once the tracker's package
        is imported; stage=sync tells the rest.
    """

    upload: str = "live"
    every_seconds: float = 5.0
    wait_seconds: float = 60.0

    needs: ClassVar[str] = ""
    """The package that it imports."""

    def __post_init__(self) -> None:
        check_choice("tracking.upload", self.upload, ("live", "later"))
        for key in ("every_seconds", "wait_seconds"):
            if not 0 < getattr(self, key) < math.inf:
                raise ConfigError(f"tracking.{key}={getattr(self, key)} must be above 0")

    def load(self) -> None:
        """Import what takes a while."""
        if self.needs:
            importlib.import_module(self.needs)

    def prepare(self) -> None:
        """Make the store where there is none. Many processes may do so at once."""

    def open(self, record: "Record", parent: str | None) -> str:
        """Find the run that has record.id, or make it below another run; its id in this tracker."""
        raise NotImplementedError(f"{type(self).__name__} keeps no runs")

    def describe(self, run: str, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Settings never change within a run; tags may."""
        raise NotImplementedError(f"{type(self).__name__} keeps no settings")

    def log(self, run: str, rows: Sequence[Row], time: int) -> None:
        """Metrics of steps. time: of the first call with these rows, in ms since 1970."""
        raise NotImplementedError(f"{type(self).__name__} keeps no metrics")

    def summarize(self, run: str, row: Row, time: int) -> None:
        """Metrics of what the run has come to after so many steps, such as an evaluation."""
        raise NotImplementedError(f"{type(self).__name__} keeps no results")

    def set_status(self, run: str, status: str, time: int) -> None:
        """RUNNING, FINISHED, FAILED or KILLED, since a time in ms since 1970."""
        raise NotImplementedError(f"{type(self).__name__} keeps no status")

    def is_busy(self, error: Exception) -> bool:
        """Whether an error of these calls says that others are at it, so that waiting helps."""
        return False


def flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and leaf values of nested dicts and lists."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if items is None:
        yield prefix, node
        return
    for key, value in items:
        yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
