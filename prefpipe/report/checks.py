"""What a reader should know before believing a number: the warnings at the top of a report."""

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prefpipe.report import collect
from prefpipe.report.collect import Run
from prefpipe.report.streams import Comparison, Curve, PairStatistics, Training
from prefpipe.report.text import fixed, number, percent

LONGER = 1.2
"""Chosen completions that much longer than rejected ones teach length as much as quality."""

MANY_CUT = 0.2
FEW_PROMPTS = 100


@dataclass(frozen=True)
class Caution:
    """level: "bad" (a result is missing or wrong), "warn" (a result may mislead) or "note"."""

    level: str
    text: str


def check(
    run: Run, trainings: Mapping[int, Training], pairs: Mapping[int, PairStatistics], comparison: Comparison | None
) -> list[Caution]:
    """All warnings, worst first."""
    found = [
        *_problems(run),
        *(warning for round_, training in trainings.items() for warning in _training(round_, training)),
        *(warning for round_, statistics_ in pairs.items() for warning in _pairs(round_, statistics_)),
        *_evaluation(run, comparison),
        *_provenance(run),
    ]
    return sorted(found, key=lambda warning: ("bad", "warn", "note").index(warning.level))


def _problems(run: Run) -> Iterator[Caution]:
    levels = {"failed": "bad", "missing": "bad", "stale": "bad", "note": "note"}
    for problem in run.problems:
        yield Caution(levels[problem.kind], f"{problem.where}: {problem.text}.")
    failed = [point for point in run.points if collect.state(point.problems) != "complete"]
    if failed:
        yield Caution(
            "bad", f"{len(failed)} of {len(run.points)} points are not complete; they come first in the table."
        )


def _training(round_: int, training: Training) -> Iterator[Caution]:
    for name, num in sorted(training.bad_steps.items()):
        yield Caution("bad", f"Round {round_}: {name} was not a finite number in {num} of {training.num_steps} steps.")
    loss, chosen = _trend(training, "train/loss"), _trend(training, "train/logps/chosen")
    if loss and chosen and loss[1] < loss[0] and chosen[1] < chosen[0] - max(0.5, 2 * chosen[2]):
        rejected = _trend(training, "train/logps/rejected")
        beside = f" (rejected: {number(rejected[0])} to {number(rejected[1])})" if rejected else ""
        yield Caution(
            "warn",
            f"Round {round_}: the log-probability of chosen completions fell from {number(chosen[0])} to "
            f"{number(chosen[1])} nats{beside} while the loss fell from {number(loss[0])} to {number(loss[1])}. The "
            f"loss falls because rejected completions become unlikely faster, not because chosen ones become likely; "
            f"a lower training.learning_rate or a larger loss.beta keeps the policy closer to where it started.",
        )


def _trend(training: Training, name: str) -> tuple[float, float, float] | None:
    """(mean of the first fifth, mean of the last fifth, standard error of their difference) of a curve."""
    values = [value for _, value in training.curves.get(name, Curve()).points()]
    size = len(values) // 5 if len(values) >= 10 else len(values) // 2
    if size < 1:
        return None
    first, last = values[:size], values[-size:]
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / size) if size > 1 else 0.0
    return statistics.fmean(first), statistics.fmean(last), error


def _pairs(round_: int, pairs: PairStatistics) -> Iterator[Caution]:
    if pairs.num == 0:
        yield Caution("bad", f"Round {round_}: there are no pairs to train on.")
        return
    chosen, rejected = pairs.chosen_lengths.mean, pairs.rejected_lengths.mean
    if chosen and rejected is not None and chosen > LONGER * rejected:
        yield Caution(
            "warn",
            f"Round {round_}: chosen completions are longer than rejected ones, {number(round(chosen, 1))} against "
            f"{number(round(rejected, 1))} characters on average, longer in "
            f"{percent(pairs.chosen_longer / pairs.num)} of the pairs. The policy may learn length instead of quality; "
            f"compare the lengths before and after.",
        )
    if pairs.ties:
        yield Caution("warn", f"Round {round_}: in {pairs.ties} of {pairs.num} pairs both scores are equal.")
    if pairs.identical:
        yield Caution("bad", f"Round {round_}: in {pairs.identical} of {pairs.num} pairs both texts are the same.")


def _evaluation(run: Run, comparison: Comparison | None) -> Iterator[Caution]:
    newest = collect.newest(run)
    before, after = collect.accuracy(run, "base"), collect.accuracy(run, newest)
    if after and not before:
        yield Caution("note", "There is no evaluation of the starting model, so nothing says what training changed.")
    if before and after and after.value is not None and before.value is not None:
        if comparison and comparison.gain is not None and comparison.low is not None and comparison.high is not None:
            within = comparison.low <= 0 <= comparison.high
            evidence = (
                f"the paired 95 % interval of the difference is {fixed(comparison.low, sign=True)} to "
                f"{fixed(comparison.high, sign=True)} over {comparison.num} prompts"
            )
        else:
            within = after.low <= before.high and before.low <= after.high
            evidence = f"the 95 % intervals overlap (n = {after.n})"
        change = after.value - before.value
        if within:
            yield Caution("warn", f"The change in accuracy, {fixed(change, sign=True)}, is within noise: {evidence}.")
        elif change < 0:
            yield Caution("warn", f"Accuracy fell by {fixed(-change)}, more than noise explains: {evidence}.")
        if before.n != after.n:
            yield Caution(
                "warn", f"Accuracy before rests on {before.n} prompts, after on {after.n}; they do not compare."
            )
    if after and after.n < FEW_PROMPTS:
        yield Caution("note", f"Only {after.n} held-out prompts were evaluated; intervals are wide.")
    for name in ("prompts", "pairs"):
        if _parents(run, "base/evals", name) != _parents(run, f"{newest}/evals", name) and newest and before and after:
            yield Caution("warn", f"The evaluations before and after read different {name}.")
    first, last = (run.artifacts.get(f"{moment}/evals") for moment in ("base", newest))
    if first and last and first.uses.get("task") != last.uses.get("task"):
        yield Caution("warn", "The evaluations before and after were made with different task settings.")
    if comparison and comparison.after.cut_share > MANY_CUT:
        yield Caution(
            "warn",
            f"{percent(comparison.after.cut_share)} of the evaluated completions were cut at generator.max_new_tokens "
            f"(before: {percent(comparison.before.cut_share)}); a cut answer counts as wrong.",
        )


def _parents(run: Run, place: str, name: str) -> list[str] | None:
    artifact = run.artifacts.get(place)
    entries = artifact.manifest.get("parents", {}).get(name) if artifact else None
    return [entry.get("digest") for entry in entries] if entries else None


def _provenance(run: Run) -> Iterator[Caution]:
    dirty = [artifact.name for artifact in run.artifacts.values() if artifact.manifest.get("git_dirty")]
    if dirty:
        yield Caution("note", f"The checkout had uncommitted changes when {_few(dirty)} were made.")
    seen: dict[str, set[str]] = {}
    for artifact in run.artifacts.values():
        for package, version in artifact.manifest.get("versions", {}).items():
            seen.setdefault(package, set()).add(str(version))
    for package, versions in sorted(seen.items()):
        if len(versions) > 1:
            yield Caution("note", f"Stages ran with different versions of {package}: {', '.join(sorted(versions))}.")


def _few(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
