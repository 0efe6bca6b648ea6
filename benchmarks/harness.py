"""How every benchmark measures and reports."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from prefpipe.provenance import versions


@dataclass(frozen=True)
class Comparison:
    """theirs / ours, in wall time: above 1 means that ours is faster.

    ratio: median over the repeats; ratio_min, ratio_max: the extremes. seconds are medians.
    """

    profile: str
    ratio: float
    ratio_min: float
    ratio_max: float
    ours_seconds: float
    theirs_seconds: float
    repeats: int


def compare(profile: str, *, ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int = 5) -> Comparison:
    """Time both sides in turn, after one unmeasured round; the side that goes first alternates."""
    ours(), theirs()
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for repeat in range(repeats):
        sides = [("ours", ours), ("theirs", theirs)]
        for name, side in sides if repeat % 2 == 0 else sides[::-1]:
            started = time.perf_counter()
            side()
            times[name].append(time.perf_counter() - started)
    ratios = [theirs_s / ours_s for ours_s, theirs_s in zip(times["ours"], times["theirs"], strict=True)]
    return Comparison(
        profile,
        ratio=round(statistics.median(ratios), 3),
        ratio_min=round(min(ratios), 3),
        ratio_max=round(max(ratios), 3),
        ours_seconds=round(statistics.median(times["ours"]), 3),
        theirs_seconds=round(statistics.median(times["theirs"]), 3),
        repeats=repeats,
    )


def report(rows: list[Comparison], out: Path | None) -> None:
    """Print the rows, and write them as JSON with machine and versions."""
    for row in rows:
        print(
            f"{row.profile:<28} {row.ratio:6.2f}x  ({row.ratio_min:.2f} .. {row.ratio_max:.2f}, {row.repeats} repeats) "
            f" ours {row.ours_seconds:.2f} s, theirs {row.theirs_seconds:.2f} s"
        )
    if out:
        machine = {"cpu_count": os.cpu_count(), "platform": platform.platform(), "machine": platform.machine()}
        data = {"rows": [asdict(row) for row in rows], "machine": machine, "versions": versions()}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(orjson.dumps(data, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
