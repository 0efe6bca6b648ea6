"""`prefpipe status DIR`: what has become of each stage of a run and of the points of its sweeps.

An artifact's manifest is believed first, then the records of attempts; Slurm's queue only tells what waits and what is
gone. So the table is the same with and without Slurm, and for sweeps that ran on this machine.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import orjson

from prefpipe import artifacts
from prefpipe.artifacts import is_complete
from prefpipe.errors import ArtifactError
from prefpipe.launch import slurm_queue
from prefpipe.launch.attempts import (
    DONE,
    EVALUATE_BASE,
    FAILED,
    PREEMPTED,
    RUNNING,
    Attempt,
    Queued,
    Unit,
    lives,
    units_of,
)
from prefpipe.launch.slurm_queue import Job
from prefpipe.processes import KILLED
from prefpipe.report.collect import Artifact, parent_problems
from prefpipe.rounds import BASE, WRITTEN_BY, Layout
from prefpipe.settings import Stage
from prefpipe.stages.analyze import aligned
from prefpipe.stages.shards import shard_folder

PENDING, STALE = "pending", "stale"
STATES = (FAILED, STALE, PREEMPTED, RUNNING, PENDING, DONE)
"""In the order in which they want attention."""

LOST = "lost"
"""The class of failure of what ended without a word, and of which Slurm knows no more."""

Jobs = Mapping[str, Job] | None


class Status(NamedTuple):
    """kind: the class of a failure, "" otherwise. why: of any state."""

    unit: Unit
    state: str
    kind: str
    why: str
    attempts: list[Attempt]
    job: str | None


def statuses(run: Path) -> list[Status]:
    """Of all units of a run. Raises ArtifactError where nothing was ever started."""
    units = units_of(run)
    if not units:
        raise ArtifactError(
            f"{run}: nothing was started here, or by a version before attempts/ was kept; give the folder of a run, "
            f"such as runs/default"
        )
    jobs = slurm_queue.jobs()  # before the records: what has left the queue has written its own
    return [status_of(unit, jobs) for unit in units]


def status_of(unit: Unit, jobs: Jobs) -> Status:
    """Of one unit, given a view of the queue that is older than its records."""
    attempts, queued = unit.attempts(), unit.queued()
    newest = attempts[-1] if attempts else None
    job = newest.job if newest and not _is_newer(queued, newest) else queued.job if queued else None
    state, kind, why = _state(unit, newest, queued, jobs)
    return Status(unit, state, kind, why, attempts, job)


def table(found: Sequence[Status]) -> str:
    """One line a unit, what wants attention first, and their number in each state."""
    lines = [_line(status) for status in sorted(found, key=lambda status: STATES.index(status.state))]
    header = ("state", "point", "stage", "round", "attempts", "job", "host", "since", "why")
    states = Counter(status.state for status in found)
    kinds = Counter(status.kind for status in found if status.kind)
    told = [f"{states[state]} {state}" for state in STATES if states[state]]
    if kinds:
        told[0] += f" ({', '.join(f'{kind} {count}' for kind, count in kinds.most_common())})"
    return f"{aligned(header, lines)}\n\n{', '.join(told)}"


def _line(status: Status) -> tuple[object, ...]:
    unit, newest = status.unit, status.attempts[-1] if status.attempts else None
    stage = unit.stage + (f" {unit.shard}" if unit.shard else "")
    state = f"{status.state}: {status.kind}" if status.kind else status.state
    since = (newest.ended or newest.started) if newest else None
    host = newest.host if newest else None
    return (state, unit.point, stage, unit.round, len(status.attempts), status.job, host, since, status.why)


def _state(unit: Unit, newest: Attempt | None, queued: Queued | None, jobs: Jobs) -> tuple[str, str, str]:
    """State, kind and why."""
    waiting = _is_newer(queued, newest)
    if newest is not None and not waiting and newest.outcome == RUNNING and _runs(newest, jobs):
        return RUNNING, "", ""
    output = _output(unit)
    there = output is not None and is_complete(output)
    if queued is not None and waiting:
        state = _state_in_line(queued, jobs)
        if not there or state[0] != FAILED:
            return state
    elif newest is not None and newest.outcome == DONE and output is None:
        return DONE, "", ""
    # A kill between the artifact's last rename and the record's end loses nothing.
    believed = newest is None or newest.outcome == DONE or (output is not None and _made_after(output, newest))
    if output is not None and there and believed:
        changed = _changed_since(output)
        return (STALE, "", changed) if changed else (DONE, "", "")
    if newest is None:
        return FAILED, KILLED, "killed as it began"
    if newest.outcome == DONE:
        return PENDING, "", f"{output} is no longer there"
    if newest.outcome == FAILED:
        return _state_of_failed(newest, jobs)
    return _state_of_stopped(newest, jobs)


def _state_in_line(queued: Queued, jobs: Jobs) -> tuple[str, str, str]:
    """Of what was put in line, and has not begun since."""
    if queued.job is None:
        if lives(queued) is False:
            return FAILED, "cancelled", "the sweep ended before its turn came"
        return PENDING, "", "waits for its turn"
    if jobs is None:
        return PENDING, "", "no Slurm answers here"
    job = jobs.get(queued.job)
    if job is None:
        return FAILED, LOST, "Slurm no longer knows its job, which never began"
    if job.waits or job.works:
        return PENDING, "", _waits_for(job)
    return FAILED, slurm_queue.KINDS.get(job.state, LOST), f"Slurm: {job.state} before it began"


def _state_of_failed(attempt: Attempt, jobs: Jobs) -> tuple[str, str, str]:
    """What it says of itself; where only its child was killed, Slurm may know why."""
    job = jobs.get(attempt.job) if jobs is not None and attempt.job else None
    if attempt.kind == KILLED and job is not None and job.state in slurm_queue.KINDS:
        return FAILED, slurm_queue.KINDS[job.state], f"Slurm: {job.state}"
    return FAILED, attempt.kind, attempt.reason


def _state_of_stopped(attempt: Attempt, jobs: Jobs) -> tuple[str, str, str]:
    """Of an attempt that was preempted, or ended without a word."""
    job = jobs.get(attempt.job) if jobs is not None and attempt.job else None
    if job is not None and (job.waits or job.works):
        return PREEMPTED, "", f"{attempt.reason or 'stopped by Slurm'}; {_waits_for(job)}"
    if attempt.outcome == PREEMPTED and jobs is None:
        return PREEMPTED, "", f"{attempt.reason}; no Slurm answers here"
    if job is not None:
        return FAILED, slurm_queue.KINDS.get(job.state, KILLED), f"Slurm: {job.state}"
    if attempt.job and jobs is not None:
        return FAILED, LOST, f"Slurm no longer knows job {attempt.job}, which ended without a word"
    return FAILED, KILLED, "its process is gone, and said nothing"


def _is_newer(queued: Queued | None, attempt: Attempt | None) -> bool:
    """Whether a unit was put in line again after its newest attempt."""
    if queued is None or attempt is None:
        return queued is not None
    if queued.job is not None and queued.job == attempt.job:
        return False
    return queued.since > attempt.started or (queued.job is not None and queued.since == attempt.started)


def _runs(attempt: Attempt, jobs: Jobs) -> bool:
    """Whether an attempt that says so still runs; of another machine's, only Slurm can tell."""
    alive = lives(attempt)
    if alive is not None or attempt.job is None or jobs is None:
        return alive is not False
    job = jobs.get(attempt.job)
    return job is not None and job.works


def _waits_for(job: Job) -> str:
    return f"{job.state.lower()}{f' ({job.reason})' if job.reason not in ('', 'None') else ''}"


def _output(unit: Unit) -> Path | None:
    """Where the unit's artifact lies; None for one that makes none."""
    layout = Layout(unit.run, unit.point, unit.round)
    if unit.stage == Stage.prepare.value:
        return layout.root / "prompts"
    if unit.stage == Stage.pair.value and is_complete(layout.output("demonstrations")):
        return layout.output("demonstrations")
    if unit.stage == EVALUATE_BASE:
        return layout.root / BASE / "evals"
    if unit.stage == Stage.evaluate.value:
        return layout.output("evals")
    for name, stage in WRITTEN_BY.items():
        if stage == unit.stage:
            folder = layout.output(name)
            if not unit.shard:
                return folder
            shard, _, num_shards = unit.shard.partition("-of-")
            return shard_folder(folder, int(shard), int(num_shards))
    return None


def _changed_since(output: Path) -> str:
    """Which inputs of an artifact are others by now; "" where none is."""
    try:
        found = Artifact(output.name, output, artifacts.manifest(output), {}, "")
        return "; ".join(problem.text for problem in parent_problems(found) if problem.kind == "stale")
    except ArtifactError as error:
        return str(error)


def _made_after(output: Path, attempt: Attempt) -> bool:
    """Whether the attempt itself made the output; in a tie, as times are to the second, not where it said it failed."""
    try:
        created = str(orjson.loads((output / "provenance.json").read_bytes())["created"])
    except (OSError, ValueError, KeyError):
        return False
    return created > attempt.started or (created == attempt.started and attempt.outcome != FAILED)
