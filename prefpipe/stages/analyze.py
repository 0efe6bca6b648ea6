"""any number of runs → one table: analysis.json, analysis.csv, and summary.json when it is a single run."""

import csv
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefpipe.errors import ConfigError
from prefpipe.files import write_json
from prefpipe.report import collect, sweeps
from prefpipe.report.collect import STATES, Run
from prefpipe.report.sweeps import Row
from prefpipe.report.text import duration, fixed, number, visible

log = logging.getLogger(__name__)

COLUMNS = (
    "run", "point", "round", "status", "loss", "model", "seed", "num_pairs", "num_eval",
    "accuracy_before", "accuracy_after", "accuracy_after_low", "accuracy_after_high", "seconds",
)  # fmt: skip


def analyze(run_dirs: list[Path], *, out: Path) -> None:
    """Collect what the runs measured, before and after, into the folder `out`, and print it as a table.

    Reads manifests and evals only. Runs and points that failed, are incomplete or stale come first.
    """
    if not run_dirs:
        raise ConfigError("analyze: no runs given; name one or more run folders")
    runs = [collect.load_run(path) for path in run_dirs]
    rows = [row for run in runs for row in sweeps.rows_of(run)]
    rows.sort(key=lambda row: STATES.index(row["status"]))  # stable: the order given, within a status
    members = [point for run in runs for point in (run.points or [run])]
    groups = sweeps.group_by_settings(members) if len(members) > 1 else []
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "analysis.json", rows)
    _write_csv(out / "analysis.csv", rows)
    if len(runs) == 1:
        write_json(out / "summary.json", summary(runs[0]))
    log.info("%s: %d rows of %d runs", out, len(rows), len(runs))
    _print(rows, groups, runs)


def summary(run: Run) -> dict[str, Any]:
    """A run in one object: accuracy before and after the newest round, every other metric, rounds, problems, points."""
    newest = collect.newest(run)
    before, after = collect.accuracy(run, "base"), collect.accuracy(run, newest)
    shown, flat = after or before, collect.settings(run)
    problems = [(run.point or run.name, problem) for run in (run, *run.points) for problem in run.problems]
    return {
        "run": run.name,
        "status": collect.state([problem for _, problem in problems]),
        "loss": collect.named(flat, "loss"),
        "model": collect.named(flat, "model"),
        "seed": flat.get("seed"),
        "accuracy_before": before.value if before else None,
        "accuracy_before_interval": [before.low, before.high] if before else None,
        "accuracy_after": after.value if after else None,
        "accuracy_after_interval": [after.low, after.high] if after else None,
        "num_eval": shown.n if shown else None,
        "seconds": collect.seconds(run),
        "num_pairs": collect.num_pairs(run),
        "rounds": [
            {key: row[key] for key in ("round", "status", "num_pairs", "accuracy_after", "seconds")}
            for row in sweeps.rows_of(replace(run, points=[]))
            if row["round"] is not None
        ],
        "metrics": {
            moment: {"/".join(name): sweeps.as_data(results[name]) for name in sorted(results)}
            for moment, results in run.evals.items()
        },
        "problems": [
            {"run": name, "kind": problem.kind, "artifact": problem.where, "text": problem.text}
            for name, problem in problems
        ],
        "points": sweeps.rows_of(run) if run.points else [],
        "groups": sweeps.group_by_settings(run.points) if run.points else [],
    }


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line a row; each metric gives columns for its value after, its interval, its n, and its value before."""
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    parts = [("before", "value"), ("after", "value"), ("after", "low"), ("after", "high"), ("after", "n")]
    header = [*COLUMNS, *(f"{name} {side} {part}" for name in names for side, part in parts), "problems"]
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([_cell(name) for name in header])
        for row in rows:
            metrics = [
                ((row["metrics"].get(name) or {}).get(side) or {}).get(part) for name in names for side, part in parts
            ]
            writer.writerow(
                [_cell(value) for value in (*(row[c] for c in COLUMNS), *metrics, "; ".join(row["problems"]))]
            )
    temporary.rename(path)


def _cell(value: Any) -> Any:
    """Spreadsheets run a text that starts like a formula, so such a text gets a quote in front."""
    if isinstance(value, str):
        value = visible(value)
        return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t")) else value
    return value


# ------------------------------------------------------------------------------------------------ the table on screen


def _print(rows: Sequence[Row], groups: Sequence[Row], runs: Sequence[Run]) -> None:
    header = (
        "status",
        "run",
        "round",
        "loss",
        "model",
        "seed",
        "pairs",
        "n",
        "before",
        "after",
        "95 %",
        "change",
        "time",
    )
    print(aligned(header, [_line(row) for row in rows]))
    repeated = [group for group in groups if len(group["members"]) > 1]
    if repeated:
        print("\nmean ± standard deviation over seeds")
        lines = [
            (
                group["label"],
                name,
                len(group["seeds"]),
                group["num_failed"],
                _spread(sides["before"]),
                _spread(sides["after"]),
            )
            for group in repeated
            for name, sides in (group["metrics"] or {"": {"before": None, "after": None}}).items()
        ]
        print(aligned(("settings", "metric", "runs", "failed", "before", "after"), lines))
    problems = [(r.title, p) for run in runs for r in (run, *run.points) for p in r.problems if p.kind != "note"]
    if problems:
        print("\nnot complete")
        for title, problem in problems:
            print(visible(f"  {title} {problem.where}: {problem.kind}, {problem.text}"))


def _line(row: Row) -> tuple[Any, ...]:
    before, after = row["accuracy_before"], row["accuracy_after"]
    low, high = row["accuracy_after_low"], row["accuracy_after_high"]
    interval = "" if low is None or high is None else f"{fixed(low)}..{fixed(high)}"
    change = None if before is None or after is None else after - before
    name = f"{row['run']}/{row['point']}" if row["point"] else row["run"]
    counts = (number(row["num_pairs"]), number(row["num_eval"]))
    start = (row["status"], name, row["round"], row["loss"], row["model"], row["seed"])
    return (*start, *counts, fixed(before), fixed(after), interval, fixed(change, sign=True), duration(row["seconds"]))


def _spread(found: Row | None) -> str:
    if found is None:
        return fixed(None)
    spread = "" if found["spread"] is None else f" ± {fixed(found['spread'])}"
    return f"{fixed(found['mean'])}{spread} ({found['num']})"


def aligned(header: Sequence[Any], lines: Sequence[Sequence[Any]]) -> str:
    """A plain table, columns padded to their widest cell; a column that is empty throughout is left out."""
    cells = [
        [visible("–" if cell is None else str(cell)).replace("\n", "␤").replace("\t", " ") for cell in line]
        for line in lines
    ]
    kept = [i for i in range(len(header)) if any(line[i] not in ("", "–") for line in cells)]
    table = [[str(header[i]) for i in kept], *([line[i] for i in kept] for line in cells)]
    widths = [max(len(line[i]) for line in table) for i in range(len(kept))]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table)
    return "\n".join(line.rstrip() for line in padded)
