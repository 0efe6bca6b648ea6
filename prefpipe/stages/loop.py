"""A recipe: its stages in order, round after round, each in a process of its own."""

import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from prefpipe.files import now, write_json
from prefpipe.processes import run_process
from prefpipe.rounds import BASE
from prefpipe.settings import RecipeConfig

log = logging.getLogger(__name__)


def loop(config: Path, recipe: RecipeConfig, *, record: Path) -> None:
    """Run a recipe. A stage whose output is up to date returns at once, so the same command again goes on.

    Args:
        config: the frozen config that every stage reads.
        record: file for what ran and how long it took (its longest attempt, so that a repeat which finds everything up
            to date hides nothing), rewritten after each stage.
    Raises:
        ChildError: a stage failed; its own message was printed before.
    """
    before = _seconds_before(record)
    done: dict[str, Any] = {"started": now(), "stages": []}
    for stage, round_, overrides in steps(recipe):
        started = time.time()
        log.info("loop: stage=%s round=%d", stage, round_)
        settings = [f"stage={stage}", f"round={round_}", *overrides]
        run_process([sys.executable, "-m", "prefpipe.worker", str(config), *settings], f"stage={stage} round={round_}")
        seconds = round(max(time.time() - started, before.pop((stage, round_), 0.0)), 2)
        done["stages"].append({"stage": stage, "round": round_, "seconds": seconds})
        write_json(record, done)


def _seconds_before(record: Path) -> dict[tuple[str, int], float]:
    """(stage, round) → seconds in an earlier run of the same command; of a stage that comes twice, the first."""
    if not record.is_file():
        return {}
    seconds: dict[tuple[str, int], float] = {}
    for entry in orjson.loads(record.read_bytes())["stages"]:
        seconds.setdefault((entry["stage"], entry["round"]), entry["seconds"])
    return seconds


def steps(recipe: RecipeConfig) -> Iterator[tuple[str, int, list[str]]]:
    """(stage, round, further settings) in order."""
    for stage in recipe.before:
        yield stage, 0, [f"inputs.checkpoint={BASE}"] if stage == "evaluate" else []
    for round_ in range(recipe.rounds):
        for stage in recipe.stages:
            yield stage, round_, []
    for stage in recipe.after:
        yield stage, recipe.rounds - 1, []
