"""The content of a report as plain data, and its rendering. Everything that shows a text from outside goes through the
template's autoescaping and `visible`; nothing is ever marked as safe."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from prefpipe import __version__
from prefpipe.artifacts import is_complete, manifest, partial_path
from prefpipe.records import EvalResult
from prefpipe.report import checks, collect, figures, streams, sweeps, text
from prefpipe.report.collect import Run
from prefpipe.report.streams import Comparison, PairStatistics, Training

SHOWN_SAMPLES = {"improved": 3, "worsened": 3, "both wrong": 2, "both right": 1, "right": 3, "wrong": 3}
SHOWN_PAIRS = 6
SHOWN_POINTS = 60
MAX_CHARACTERS = 20_000
FOLD_CHARACTERS, FOLD_LINES = 500, 10

PANELS: tuple[tuple[str, tuple[tuple[str, str, str, bool], ...]], ...] = (
    ("Loss", (("train/loss", "loss", "plain", False),)),
    (
        "Rewards of chosen and rejected",
        (
            ("train/rewards/chosen", "chosen", "chosen", False),
            ("train/rewards/rejected", "rejected", "rejected", True),
        ),
    ),
    ("Reward margin", (("train/rewards/margin", "margin", "plain", False),)),
    (
        "Reward accuracy: share of pairs with a positive margin",
        (("train/rewards/accuracy", "accuracy", "plain", False),),
    ),
    (
        "Reward accuracy by length: where the chosen side is longer, and shorter",
        (
            ("train/rewards/accuracy_longer", "chosen is longer", "chosen", False),
            ("train/rewards/accuracy_shorter", "chosen is shorter", "rejected", True),
        ),
    ),
    (
        "Log-probabilities under policy minus reference, nats per token",
        (
            ("train/log_ratio/chosen", "chosen", "chosen", False),
            ("train/log_ratio/rejected", "rejected", "rejected", True),
        ),
    ),
    (
        "Log-probabilities of chosen and rejected, nats",
        (("train/logps/chosen", "chosen", "chosen", False), ("train/logps/rejected", "rejected", "rejected", True)),
    ),
    ("Gradient norm, before clipping", (("train/grad_norm", "norm", "plain", False),)),
    ("Learning rate", (("train/learning_rate", "rate", "plain", False),)),
)


def render(run: Run) -> str:
    """The whole page."""
    return environment().get_template("template.html.j2").render(content(run))


def environment() -> jinja2.Environment:
    """Where pages are rendered: autoescaped, every text made visible."""
    made = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {
        "number": text.number,
        "fixed": text.fixed,
        "percent": text.percent,
        "duration": text.duration,
        "outline": text.outline,
        "pieces": text.pieces,
        "folded": folded,
        "moment": moment_name,
    }
    return made


def _finalize(value: Any) -> Any:
    """Applied to every value that the template prints; Markup comes only from the template's own macros."""
    if value is None:
        return "\u2013"
    return text.visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def folded(whole: str) -> dict[str, Any]:
    """A text with the beginning that stands for it when it is long, and cut when it is endless."""
    shown = whole[:MAX_CHARACTERS]
    head = "\n".join(shown.split("\n", FOLD_LINES)[:FOLD_LINES])[:FOLD_CHARACTERS]
    return {"text": shown, "head": head, "is_long": head != shown, "num": len(whole), "cut": len(whole) - len(shown)}


def moment_name(moment: str) -> str:
    """ "base" is before; "round_1" is round 1."""
    return "before" if moment == "base" else moment.replace("_", " ")


def content(run: Run) -> dict[str, Any]:
    """Everything that the template shows."""
    trainings = {r: training for r in run.rounds if (training := _training(run, r))}
    pairs, pair_problems = _pairs(run)
    comparison, sample_problems = _comparison(run)
    run.problems += [*pair_problems, *sample_problems]
    flat = collect.settings(run)
    return {
        "run": run,
        "version": __version__,
        "status": collect.state([p for r in (run, *run.points) for p in r.problems]),
        "loss": collect.named(flat, "loss"),
        "model": collect.named(flat, "model"),
        "seed": flat.get("seed"),
        "warnings": checks.check(run, trainings, pairs, comparison),
        "headline": headline(run, comparison),
        "seconds": _sum([collect.seconds(part) for part in (run, *run.points)]),
        "num_pairs": collect.num_pairs(run),
        "sweep": sweep(run),
        "results": results(run, comparison),
        "training": training_section(trainings),
        "pairs": pairs_section(pairs),
        "comparison": comparison,
        "before_name": "before",
        "after_name": moment_name(collect.newest(run) or "after"),
        "accounting": accounting(run),
        "cost": cost(run, trainings),
        "provenance": provenance(run),
    }


# ---------------------------------------------------------------------------------- reading what is large


def _training(run: Run, round_: int) -> Training | None:
    """Of the checkpoint, or of one in the making."""
    folder = run.path / f"round_{round_}" / "checkpoint"
    return streams.read_training(folder if is_complete(folder) else partial_path(folder))


def _pairs(run: Run) -> tuple[dict[int, PairStatistics], list[collect.Problem]]:
    found, problems = {}, []
    for round_ in run.rounds or [0]:
        paths = collect.training_pairs(run, round_)
        paths = [path for path in paths if manifest(path)["schema"] == "pair/1"]
        try:
            if paths:
                found[round_] = streams.read_pairs(paths, num_samples=SHOWN_PAIRS, seed=round_)
        except collect.UNREADABLE as error:
            problems.append(collect.Problem("failed", f"pairs of round {round_}", f"cannot be read: {error}"))
    return found, problems


def _comparison(run: Run) -> tuple[Comparison | None, list[collect.Problem]]:
    """Of the samples before and those of the newest round that has some."""
    places = [f"round_{r}/eval_samples" for r in reversed(run.rounds)]
    after = next((run.artifacts[place].path for place in places if place in run.artifacts), None)
    before = run.artifacts["base/eval_samples"].path if "base/eval_samples" in run.artifacts else None
    if before is None and after is None:
        return None, []
    try:
        return streams.compare(before, after, per_kind=SHOWN_SAMPLES, seed=0), []
    except collect.UNREADABLE as error:
        return None, [collect.Problem("failed", "eval_samples", f"cannot be read: {error}")]


# ---------------------------------------------------------------------------------- sections


def headline(run: Run, comparison: Comparison | None) -> dict[str, Any] | None:
    """The one number: accuracy before and after, or the first metric there is."""
    names = collect.metric_names(run)
    newest = collect.newest(run)
    if not names or (run.points and not newest):
        return None
    before, after = run.evals.get("base", {}).get(names[0]), run.evals.get(newest or "", {}).get(names[0])
    is_accuracy = names[0] == ("accuracy", "accuracy")
    paired = comparison if is_accuracy and comparison and comparison.gain is not None else None
    change = after.value - before.value if _known(before) and _known(after) and before and after else None
    return {
        "name": "Accuracy" if is_accuracy else "/".join(names[0]),
        "before": before,
        "after": after,
        "change": change,
        "low": paired.low if paired else None,
        "high": paired.high if paired else None,
    }


def _sum(parts: Sequence[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if known else None


def _known(result: EvalResult | None) -> bool:
    # A NaN comes back from JSON as None, whatever the record's type says.
    return result is not None and all(isinstance(x, int | float) for x in (result.value, result.low, result.high))


def results(run: Run, comparison: Comparison | None) -> dict[str, Any]:
    """Before, each round, and the change of the newest against before, for every metric.

    Overlapping intervals say little about prompts that were answered twice, so a paired interval replaces that remark.
    """
    moments, newest = collect.moments(run), collect.newest(run)
    rows: list[dict[str, Any]] = []
    pictures: list[figures.Picture] = []
    for name in collect.metric_names(run):
        cells = [run.evals[moment].get(name) for moment in moments]
        first, last = run.evals.get("base", {}).get(name), run.evals.get(newest or "", {}).get(name)
        comparable = first and last and _known(first) and _known(last)
        change = last.value - first.value if comparable and first and last else None
        overlap = last.low <= first.high and first.low <= last.high if comparable and first and last else None
        paired = comparison if name == ("accuracy", "accuracy") and comparison and comparison.gain is not None else None
        row = {"task": name[0], "metric": name[1], "cells": cells, "change": change}
        rows.append(row | {"overlap": overlap and not paired, "paired": paired if change is not None else None})
        named = [(moment_name(m), run.evals[m][name]) for m in moments if _known(run.evals[m].get(name))]
        if named and len(pictures) < 8:
            pictures.append(figures.results(named, f"{'/'.join(name)}, 95 % intervals"))
    return {"moments": moments, "rows": rows, "pictures": pictures}


def training_section(trainings: dict[int, Training]) -> dict[str, Any]:
    """Curves of all rounds one after the other, a dotted line between rounds."""
    ends, offsets, start = [], {}, 0
    for round_, found in trainings.items():
        offsets[round_], start = start, start + found.last_step
        ends.append(start + 0.5)
    pictures = []
    for caption, series in PANELS:
        lines = []
        for key, label, role, dashed in series:
            segments = [
                [(offsets[round_] + step, value) for step, value in found.curves[key].points()]
                for round_, found in trainings.items()
                if key in found.curves
            ]
            if segments:
                lines.append(figures.Line(label, segments, role, dashed))
        if lines:
            pictures.append(figures.curves(lines, caption, ends=ends[:-1]))
    return {"rounds": trainings, "pictures": pictures}


def pairs_section(pairs: dict[int, PairStatistics]) -> dict[str, Any]:
    """Statistics of every round, figures and samples of the newest."""
    pictures = []
    for round_, found in list(pairs.items())[-2:]:
        if found.num:
            caption = f"Lengths in round {round_}, without the longest 0.5 %"
            pictures.append(figures.lengths(found.chosen_lengths, found.rejected_lengths, caption))
        if found.margins.num:
            pictures.append(figures.margins(found.margins, f"Score margins in round {round_}"))
    newest = max(pairs, default=None)
    samples = pairs[newest].samples if newest is not None else []
    return {"rounds": pairs, "pictures": pictures, "newest": newest, "samples": samples}


def accounting(run: Run) -> list[dict[str, Any]]:
    """Where the rows went, in the order of the stages. Checkpoints hold no rows."""
    rows = []
    for artifact in run.artifacts.values():
        counts = artifact.manifest.get("counts", {})
        if artifact.name.endswith(("checkpoint", "/evals")):
            continue
        rows_in, rows_out = counts.get("rows_in", 0), counts.get("rows_out", 0)
        rows.append(
            {
                "name": artifact.name,
                "rows_in": rows_in,
                "rows_out": rows_out,
                "share": rows_out / rows_in if rows_in else None,
                "num_records": artifact.manifest.get("num_records"),
                "filtered": counts.get("filtered", {}),
                "quarantined": counts.get("quarantined", {}),
            }
        )
    return rows


def cost(run: Run, trainings: dict[int, Training]) -> dict[str, Any]:
    """Seconds of each stage: in the last loop, and when each artifact was made."""
    made: list[dict[str, Any]] = [
        {"name": a.name, "stage": a.manifest.get("stage"), "seconds": _seconds(a.provenance.get("seconds"))}
        for a in run.artifacts.values()
    ]
    longest = max([row["seconds"] or 0.0 for row in made], default=0.0) or 1.0
    return {
        "made": [row | {"share": (row["seconds"] or 0) / longest} for row in made],
        "loop": run.loop,
        "rates": {r: t.tokens_per_second for r, t in trainings.items() if t.tokens_per_second},
    }


def _seconds(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def provenance(run: Run) -> list[dict[str, Any]]:
    """Of every artifact: what it is, what made it, from what, when and where."""
    plain = {"stage", "schema", "uses", "parents", "num_records", "counts", "parts", "quarantine", "parent_paths"}
    plain |= {"prefpipe", "versions", "git", "git_dirty"}
    return [
        {
            "name": artifact.name,
            "digest": artifact.digest,
            "manifest": artifact.manifest,
            "created": artifact.provenance.get("created"),
            "where": " ".join(
                str(artifact.provenance[key]) for key in ("host", "platform") if key in artifact.provenance
            ),
            "command": text.redact(" ".join(str(word) for word in artifact.provenance.get("command", []))),
            "extras": {key: value for key, value in artifact.manifest.items() if key not in plain},
        }
        for artifact in run.artifacts.values()
    ]


def sweep(run: Run) -> dict[str, Any] | None:
    """The points, failures first, then from best to worst; and their groups over seeds."""
    if not run.points:
        return None
    names = collect.metric_names(Run("", run.path, evals={str(i): r for i, r in enumerate(_all_evals(run.points))}))
    metric = names[0] if names else None
    labels = sweeps.label_points([collect.settings(point) for point in run.points])
    rows = [_point_row(point, label, metric) for point, label in zip(run.points, labels, strict=True)]
    rows.sort(key=lambda row: (collect.STATES.index(row["state"]), -row["order"], row["name"]))
    drawn = [(row["name"], row["before"].value if _known(row["before"]) else None, row["after"]) for row in rows]
    drawn = [(name, before, after) for name, before, after in drawn if _known(after)][:SHOWN_POINTS]
    drawn.sort(key=lambda entry: -entry[2].value)
    return {
        "metric": "/".join(metric) if metric else None,
        "rows": rows,
        "num_complete": sum(row["state"] == "complete" for row in rows),
        "groups": sweeps.group_by_settings(run.points),
        "picture": figures.sweep(drawn, f"{'/'.join(metric)} of each point; hollow: before")
        if drawn and metric
        else None,
    }


def _all_evals(points: Sequence[Run]) -> list[dict[collect.Metric, EvalResult]]:
    return [results for point in points for results in point.evals.values()]


def _point_row(point: Run, label: str, metric: collect.Metric | None) -> dict[str, Any]:
    before = point.evals.get("base", {}).get(metric) if metric else None
    after = point.evals.get(collect.newest(point) or "", {}).get(metric) if metric else None
    both = before and after and _known(before) and _known(after)
    return {
        "name": point.point,
        "label": label,
        "seed": collect.settings(point).get("seed"),
        "state": collect.state(point.problems),
        "before": before,
        "after": after,
        "order": after.value if after and _known(after) else 0.0,
        "change": after.value - before.value if both and before and after else None,
        "num_pairs": collect.num_pairs(point),
        "seconds": collect.seconds(point),
        "problems": [p for p in point.problems if p.kind != "note"],
    }
