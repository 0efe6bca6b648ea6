"""Rows of runs and points, and their mean and spread over seeds. Plain data: what analysis.json holds."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from prefpipe.records import EvalResult
from prefpipe.report import collect
from prefpipe.report.collect import STATES, Run

Row = dict[str, Any]


def rows_of(run: Run) -> list[Row]:
    """One row for each round of a run (or of each of its points); one without a round when there is none."""
    if run.points:
        rows = [row for point in run.points for row in rows_of(point)]
        own = [
            row for row in _rows(run) if row["status"] == "failed" or any(m["after"] for m in row["metrics"].values())
        ]
        return sorted(own + rows, key=lambda row: (STATES.index(row["status"]), row["point"], row["round"] or 0))
    return _rows(run)


def _rows(run: Run) -> list[Row]:
    rounds: Sequence[int | None] = run.rounds or [None]
    return [_row(run, round_) for round_ in rounds]


def _row(run: Run, round_: int | None) -> Row:
    others = tuple(f"round_{r}/" for r in run.rounds if r != round_)
    problems = [problem for problem in run.problems if not problem.where.startswith(others or ("\0",))]
    moment = None if round_ is None else f"round_{round_}"
    before, after = collect.accuracy(run, "base"), collect.accuracy(run, moment)
    flat = collect.settings(run)
    shown = after or before
    return {
        "run": run.name,
        "point": run.point,
        "round": round_,
        "status": collect.state(problems),
        "loss": collect.named(flat, "loss"),
        "model": collect.named(flat, "model"),
        "seed": flat.get("seed"),
        "num_pairs": None if round_ is None else collect.num_pairs(run, round_),
        "num_eval": shown.n if shown else None,
        "accuracy_before": before.value if before else None,
        "accuracy_after": after.value if after else None,
        "accuracy_after_low": after.low if after else None,
        "accuracy_after_high": after.high if after else None,
        "seconds": collect.seconds(run, round_),
        "problems": [f"{problem.where}: {problem.kind}, {problem.text}" for problem in problems],
        "metrics": {
            "/".join(name): {
                "before": as_data(run.evals.get("base", {}).get(name)),
                "after": as_data(run.evals.get(moment or "", {}).get(name)),
            }
            for name in collect.metric_names(run)
        },
    }


def as_data(result: EvalResult | None) -> dict[str, Any] | None:
    """A result's numbers without its details."""
    return {"value": result.value, "low": result.low, "high": result.high, "n": result.n} if result else None


def group_by_settings(runs: Sequence[Run]) -> list[Row]:
    """Mean and spread over seeds of the runs that differ in nothing else; groups with failures first.

    Each run counts with its newest round. "spread" is the standard deviation between seeds (n - 1), None for one seed.
    """
    all_settings = [collect.settings(run) for run in runs]
    labels = label_points(all_settings)
    groups: dict[str, list[int]] = {}
    for index, flat in enumerate(all_settings):
        same = [runs[index].rounds, sorted((key, repr(value)) for key, value in flat.items() if not _is_seed(key))]
        # A run that failed before it wrote any setting is a group of its own: its name is all that is known.
        groups.setdefault(repr(same) if flat else f"unknown {runs[index].title}", []).append(index)
    found = [_group([runs[i] for i in members], labels[members[0]]) for members in groups.values()]
    return sorted(found, key=lambda group: (-group["num_failed"], group["label"]))


def _group(runs: Sequence[Run], label: str) -> Row:
    values: dict[str, list[float]] = {}
    before: dict[str, list[float]] = {}
    for run in runs:
        for moment, into in (("base", before), (collect.newest(run), values)):
            for name, result in run.evals.get(moment or "", {}).items():
                if result.value is not None:
                    into.setdefault("/".join(name), []).append(result.value)
    states = [collect.state(run.problems) for run in runs]
    seeds = [collect.settings(run).get("seed") for run in runs]
    return {
        "label": label or runs[0].title,
        "members": [run.point or run.name for run in runs],
        "seeds": seeds,
        "num_failed": sum(status in ("failed", "incomplete") for status in states),
        "metrics": {
            name: {"before": mean_spread(before.get(name, [])), "after": mean_spread(values.get(name, []))}
            for name in sorted(values.keys() | before.keys(), key=lambda name: (name != "accuracy/accuracy", name))
        },
    }


def mean_spread(values: Sequence[float]) -> Row | None:
    """Mean, standard deviation and number of values, or None for no values."""
    if not values:
        return None
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "spread": spread, "num": len(values)}


def label_points(all_settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """What tells the points apart, as "loss=simpo training.learning_rate=1e-06"; seeds are left out.

    A knob that follows from its component's name alone (every loss has its own beta) is left out too.
    """
    known = [flat for flat in all_settings if flat]
    keys = sorted({key for flat in known for key in flat if not _is_seed(key)})
    # A point that failed early lacks the settings of its later stages; that alone tells nothing apart.
    varying = [key for key in keys if len({repr(flat[key]) for flat in known if key in flat}) > 1]
    told = [key for key in varying if not _follows_from_name(key, known)]
    return [
        " ".join(f"{key.removesuffix('.name')}={flat[key]}" for key in told if flat.get(key) is not None)
        for flat in all_settings
    ]


def _follows_from_name(key: str, known: Sequence[Mapping[str, Any]]) -> bool:
    parent = key.rpartition(".")[0]
    name = f"{parent}.name"
    if not parent or key == name or not any(name in flat for flat in known):
        return False
    seen: dict[str, set[str]] = {}
    for flat in known:
        if key in flat:
            seen.setdefault(repr(flat.get(name)), set()).add(repr(flat[key]))
    return all(len(values) == 1 for values in seen.values())


def _is_seed(key: str) -> bool:
    return key.rpartition(".")[2] == "seed"
