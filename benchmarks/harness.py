"""How every benchmark measures and reports."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import orjson

from prefpipe.provenance import versions

PEERS = ("trl",)


@dataclass(frozen=True)
class Comparison:
    """One row: theirs / ours in time, so above 1 means that ours is faster.

    ratio: median over the repeats; ratio_min, ratio_max: the extremes. seconds are medians.
    peer: what ours is compared with. target: the least ratio that is claimed. threads: of each side; None is torch's
        own choice.
    peak_memory_ratio: ours / theirs, so below 1 means that ours needs less. See benchmarks/memory.py.
    details: anything else that belongs to the row.
    """

    profile: str
    ratio: float
    ratio_min: float
    ratio_max: float
    ours_seconds: float
    theirs_seconds: float
    repeats: int
    peer: str = ""
    target: float | None = None
    threads: int | None = None
    peak_memory_ratio: float | None = None
    details: dict[str, Any] = field(default_factory=dict)


def compare(
    profile: str,
    *,
    ours: Callable[[], float],
    theirs: Callable[[], float],
    repeats: int = 5,
    warm_up: bool = True,
    **known: Any,
) -> Comparison:
    """Measure both sides in turn, the side that goes first alternating; a side returns its own seconds.

    warm_up: one round before that counts for nothing. known: further fields of the row.
    """
    if warm_up:
        ours(), theirs()
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for repeat in range(repeats):
        sides = [("ours", ours), ("theirs", theirs)]
        for name, side in sides if repeat % 2 == 0 else sides[::-1]:
            seconds[name].append(side())
    ratios = [theirs_s / ours_s for ours_s, theirs_s in zip(seconds["ours"], seconds["theirs"], strict=True)]
    return Comparison(
        profile,
        ratio=round(statistics.median(ratios), 3),
        ratio_min=round(min(ratios), 3),
        ratio_max=round(max(ratios), 3),
        ours_seconds=round(statistics.median(seconds["ours"]), 4),
        theirs_seconds=round(statistics.median(seconds["theirs"]), 4),
        repeats=repeats,
        **known,
    )


def timed(side: Callable[[], Any]) -> Callable[[], float]:
    """A side that returns its wall time."""

    def run() -> float:
        started = time.perf_counter()
        side()
        return time.perf_counter() - started

    return run


def report(rows: Sequence[Comparison], out: Path | None) -> None:
    """Print the rows as a table, and write them as JSON with machine and versions."""
    head = ("profile", "peer", "threads", "ratio", "min .. max", "target", "", "ours s", "theirs s", "memory", "n")
    print_table([head, *map(_cells, rows)])
    if out:
        data = {"rows": [asdict(row) for row in rows], "machine": machine(), "versions": all_versions()}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(orjson.dumps(data, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def _cells(row: Comparison) -> tuple[str, ...]:
    return (
        row.profile,
        row.peer,
        "-" if row.threads is None else str(row.threads),
        f"{row.ratio:.2f}x",
        f"{row.ratio_min:.2f} .. {row.ratio_max:.2f}",
        "-" if row.target is None else f"{row.target:g}",
        "" if row.target is None else "met" if row.ratio >= row.target else "missed",
        f"{row.ours_seconds:.3f}",
        f"{row.theirs_seconds:.3f}",
        "-" if row.peak_memory_ratio is None else f"{row.peak_memory_ratio:.2f}",
        str(row.repeats),
    )


def print_table(lines: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their longest cell, the first one aligned left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *rest in lines:
        cells = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))]
        print("  ".join(cells).rstrip())


def machine() -> dict[str, Any]:
    """What the figures depend on; no names of hosts or folders."""
    import torch

    found: dict[str, Any] = {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(0)
    return found


def _cpu_model() -> str | None:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


def all_versions() -> dict[str, str]:
    """prefpipe's list of packages, and the peers that are installed."""
    found = dict(versions())
    for package in PEERS:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
