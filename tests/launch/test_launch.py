"""Attempts are recorded whatever ends them; status believes manifests, then records, then Slurm; retry repeats."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import orjson
import psutil
import pytest

from prefpipe import artifacts
from prefpipe.artifacts import Plan
from prefpipe.check import Checker
from prefpipe.config import CONF_DIR, to_run_config
from prefpipe.errors import ArtifactError, ConfigError, kind_of
from prefpipe.launch.attempts import (
    DONE,
    FAILED,
    PREEMPTED,
    Attempt,
    Queued,
    Unit,
    attempt_at,
    lives,
    preempt,
    queued_now,
    units_of,
)
from prefpipe.launch.slurm import _shares, describe
from prefpipe.launch.slurm_queue import Job
from prefpipe.launch.status import status_of, statuses, table
from prefpipe.launch.sweep import is_done, point_of
from prefpipe.processes import ChildError, run_process
from prefpipe.records import ScoredCompletion, completion_id, prompt_id
from prefpipe.run import Command
from prefpipe.settings import LaunchConfig

EARLIER, LATER = "2026-01-01T00:00:00Z", "2026-01-01T00:10:00Z"


@pytest.fixture
def unit(tmp_path: Path) -> Unit:
    return Unit(tmp_path / "run", "seed=1", 0, "pair")


def gone(**changes: object) -> Attempt:
    """An attempt whose process has ended without a word, on this machine."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    started = psutil.Process(process.pid).create_time()
    process.wait()
    attempt = Attempt(1, socket.gethostname(), process.pid, started, None, EARLIER)
    return replace(attempt, **changes)


def publish(unit: Unit, *, of: Path | None = None) -> Path:
    """The unit's artifact."""
    out = unit.run / "points" / unit.point / f"round_{unit.round}" / "pairs"
    with artifacts.draft(out, Plan("pair", "pair/1", {}, {"scored": [of]} if of else {})) as draft:
        draft.commit_stream([{"row": 1}])
    return out


# ------------------------------------------------------------------------------------- records


def test_an_attempt_is_recorded_from_its_start_to_its_end(unit):
    with attempt_at(unit):
        (inside,) = unit.attempts()
        assert (inside.outcome, inside.ended, inside.pid) == ("running", None, os.getpid())
        assert lives(inside)
    with pytest.raises(ConfigError), attempt_at(unit):
        raise ConfigError("loss.beta=-1 must be above 0")
    with pytest.raises(KeyboardInterrupt), attempt_at(unit):
        raise KeyboardInterrupt
    first, second, third = unit.attempts()
    assert (first.outcome, first.kind) == (DONE, "")
    assert (second.outcome, second.kind, second.reason) == (FAILED, "config", "loss.beta=-1 must be above 0")
    assert (third.outcome, third.kind, third.reason) == (FAILED, "interrupted", "KeyboardInterrupt")
    assert first.started <= first.ended <= third.ended
    assert units_of(unit.run) == [unit]


def test_a_failure_has_the_class_that_the_innermost_process_gave_it(unit):
    """A child's child runs out of memory, and its words are those of the record."""
    inner = "raise MemoryError('no 3 GB left')"
    outer = "run_process([sys.executable, '-c', sys.argv[1]], 'inner')"
    code = (
        "import sys\nfrom prefpipe.logs import report_errors\nfrom prefpipe.processes import run_process\n"
        "with report_errors():\n    "
    )
    with pytest.raises(ChildError, match="outer failed with exit code 1"), attempt_at(unit):
        run_process([sys.executable, "-c", code + outer, code + inner], "outer")
    (attempt,) = unit.attempts()
    assert (attempt.kind, attempt.reason) == ("oom", "MemoryError: no 3 GB left")


@pytest.mark.parametrize(("sign", "kind"), [(signal.SIGKILL, "oom"), (signal.SIGTERM, "killed")])
def test_a_child_that_is_killed_cannot_give_its_reason(unit, sign, kind):
    with pytest.raises(ChildError), attempt_at(unit):
        run_process([sys.executable, "-c", f"import os; os.kill(os.getpid(), {int(sign)})"], "training")
    (attempt,) = unit.attempts()
    assert attempt.kind == kind
    assert attempt.reason.startswith(f"training was killed by {sign.name}")


def test_a_child_outlives_slurms_notice():
    run_process([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGUSR2)"], "training")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"), "oom"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "oom"),
        (ArtifactError("gone"), "artifact"),
        (ChildError("training failed", "data", "row 3"), "data"),
        (OSError("no space left"), "error"),
    ],
)
def test_errors_have_a_class(error, kind):
    assert kind_of(error) == kind


def test_attempts_at_once_get_numbers_of_their_own(unit):
    threads = [threading.Thread(target=unit.begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [attempt.number for attempt in unit.attempts()] == list(range(1, 9))


def test_a_preempted_attempt_says_so_before_it_ends(unit):
    with pytest.raises(SystemExit), attempt_at(unit):
        preempt("its time was up")
        assert unit.attempts()[0].outcome == PREEMPTED
        raise SystemExit(-1)
    (attempt,) = unit.attempts()
    assert (attempt.outcome, attempt.reason) == (PREEMPTED, "its time was up")


def test_only_the_first_of_several_nodes_keeps_a_record(unit, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "1")
    with attempt_at(unit):
        assert unit.attempts() == []


def test_names_of_shards_and_points_survive_the_file_system(tmp_path):
    units = [Unit(tmp_path, point, 2, stage, shard) for point in ("", "a=1,b=2") for stage, shard in
             (("generate", "3-of-8"), ("evaluate_base", ""), ("train", ""))]  # fmt: skip
    for one in units:
        one.begin()
    assert units_of(tmp_path) == sorted(units)


# ------------------------------------------------------------------------------------- status

PENDING_JOB, RUNNING_JOB = Job("PENDING", "Priority"), Job("RUNNING", "None")


def in_line(job: str | None = "7_1", since: str = LATER) -> Queued:
    return replace(queued_now("/", job=job), since=since)


@pytest.mark.parametrize(
    ("attempt", "queued", "jobs", "state", "kind"),
    [
        (None, in_line(), {"7_1": PENDING_JOB}, "pending", ""),
        (None, in_line(), {"7_1": Job("CANCELLED", "None")}, "failed", "cancelled"),
        (None, in_line(), {}, "failed", "lost"),
        (None, in_line(), None, "pending", ""),
        (None, in_line(job=None), None, "pending", ""),  # a sweep on this machine, whose process lives
        (None, replace(in_line(job=None), pid_started=0.0), None, "failed", "cancelled"),
        ({"outcome": "done"}, None, None, "pending", ""),  # its output was deleted
        ({"outcome": "failed", "kind": "oom"}, None, None, "failed", "oom"),
        ({"outcome": "failed", "kind": "oom"}, in_line(), {"7_1": PENDING_JOB}, "pending", ""),  # retried
        ({"job": "7_1"}, in_line(), {"7_1": Job("OUT_OF_MEMORY", "None")}, "failed", "oom"),
        ({"job": "7_1"}, in_line(), {"7_1": PENDING_JOB}, "preempted", ""),
        ({"job": "7_1"}, in_line(), {}, "failed", "lost"),
        ({"job": "7_1", "outcome": "preempted", "reason": "time"}, in_line(), {"7_1": PENDING_JOB}, "preempted", ""),
        ({"job": "7_1", "outcome": "preempted", "reason": "time"}, in_line(), None, "preempted", ""),
        ({"job": "7_1", "outcome": "failed", "kind": "killed"}, in_line(), {"7_1": Job("CANCELLED", "")}, "failed",
         "cancelled"),
        ({"job": "7_1", "outcome": "failed", "kind": "data"}, in_line(), {"7_1": Job("FAILED", "")}, "failed", "data"),
        ({"job": "7_1", "host": "elsewhere"}, in_line(), {"7_1": RUNNING_JOB}, "running", ""),
        ({"job": "7_1", "host": "elsewhere"}, in_line(), {"7_1": Job("NODE_FAIL", "")}, "failed", "node"),
        ({"host": "elsewhere"}, None, None, "running", ""),
        ({}, None, None, "failed", "killed"),
    ],
)  # fmt: skip
def test_status_of_a_unit_without_output(unit, attempt, queued, jobs, state, kind):
    if attempt is not None:
        unit.begin()
        unit.write(gone(**attempt))
    if queued is not None:
        unit.config.parent.mkdir(parents=True, exist_ok=True)
        unit.put_in_line(queued)
    found = status_of(unit, jobs)
    assert (found.state, found.kind) == (state, kind), found.why


def test_a_manifest_is_believed_before_a_record(unit, tmp_path):
    """A kill after the last rename, and one that left an older artifact as it was."""
    unit.begin()
    unit.write(gone())
    out = publish(unit)
    assert status_of(unit, None).state == "done"
    provenance = orjson.loads((out / "provenance.json").read_bytes())
    (out / "provenance.json").write_bytes(orjson.dumps({**provenance, "created": "2025-12-31T00:00:00Z"}))
    assert status_of(unit, None).kind == "killed"


def test_a_kill_between_an_attempts_name_and_its_record_is_a_failure(unit):
    unit.begin()
    next(unit.config.parent.glob("*.0001.json")).write_bytes(b"")
    assert (status_of(unit, None).state, status_of(unit, None).kind) == ("failed", "killed")
    assert unit.begin().number == 2


def test_an_input_that_changed_makes_an_output_stale(unit, tmp_path):
    scored = tmp_path / "scored"
    for number in (1, 2):
        with artifacts.draft(scored, Plan("score", "scored/1", {"seed": number}), overwrite=True) as draft:
            draft.commit_stream([{"row": number}])
        if number == 1:
            with attempt_at(unit):
                publish(unit, of=scored)
            assert status_of(unit, None).state == "done"
    found = status_of(unit, None)
    assert found.state == "stale"
    assert "its input scored" in found.why


def test_the_table_has_what_wants_attention_first(unit):
    with attempt_at(unit):
        publish(unit)
    other = replace(unit, point="seed=0")
    with pytest.raises(MemoryError), attempt_at(other):
        raise MemoryError("2 GB\nmore")
    lines = table(statuses(unit.run)).splitlines()
    assert lines[0].split() == ["state", "point", "stage", "round", "attempts", "host", "since", "why"]
    assert lines[1].startswith("failed: oom  seed=0  pair   0      1")
    assert lines[1].endswith("2 GB␤more")
    assert lines[2].startswith("done         seed=1")
    assert lines[4:] == ["1 failed (oom 1), 1 done"]


def test_a_folder_without_attempts_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="nothing was started here"):
        statuses(tmp_path)


# ------------------------------------------------------------------------------------- what is done


def scored_rows(number: int) -> list[ScoredCompletion]:
    rows = []
    for index in range(number):
        messages = [{"role": "user", "content": f"question {index // 2}"}]
        prompt, text = prompt_id(messages), f"answer {index}"
        identity = {"prompt_id": prompt, "completion_id": completion_id(prompt, text, index, 0), "messages": messages}
        rows.append(ScoredCompletion(**identity, source="test", text=text, scores={"s": float(index % 2)}))
    return rows


def test_a_point_is_done_while_a_new_start_would_change_nothing(tmp_path):
    """Not when its input has changed, its settings, or its output is gone; nor where it is to be made anew."""
    scored = tmp_path / "scored"
    with artifacts.draft(scored, Plan("score", ScoredCompletion.schema, {})) as draft:
        draft.commit_stream(scored_rows(4))

    @cache
    def point(*more: str) -> Command:
        common = ["stage=pair", "pairer=best_worst", f"inputs.scored={scored}", f"paths.runs={tmp_path / 'runs'}"]
        (composed,) = Checker(CONF_DIR, [CONF_DIR], "config", multirun=True).check([*common, "seed=1", *more])
        cfg, unit = point_of(composed)
        assert unit.point == "pairer=best_worst,seed=1"
        return Command(to_run_config(cfg), cfg)

    assert not is_done(point(), None)
    point().start()
    assert is_done(point(), None)
    assert is_done(point("hardware.num_threads=2"), {})
    assert not is_done(point("overwrite=true"), None)
    unit = point().unit
    with pytest.raises(ArtifactError), attempt_at(unit):
        raise ArtifactError("made with other settings")
    assert not is_done(point(), None)  # until its status says so again
    point().start()
    assert is_done(point(), None)
    with artifacts.draft(scored, Plan("score", ScoredCompletion.schema, {}), overwrite=True) as draft:
        draft.commit_stream(scored_rows(6))
    assert not is_done(point(), None)
    point("overwrite=true").start()
    assert is_done(point(), None)
    shutil.rmtree(point().layout.output("pairs"))
    assert not is_done(point(), None)


# ------------------------------------------------------------------------------------- arrays


@pytest.mark.parametrize(
    ("num_jobs", "size", "parallelism", "shares"),
    [
        (6, 1001, 32, [32]),
        (2002, 1001, 32, [16, 16]),
        (3000, 1001, 32, [11, 11, 10]),
        (3000, 1001, 2, [1, 1]),  # the third array waits for the first
        (0, 1001, 32, [32]),
    ],
)
def test_arrays_share_how_many_jobs_may_run_at_once(num_jobs, size, parallelism, shares):
    assert _shares(num_jobs, size, parallelism) == shares


def test_a_plan_says_what_would_be_asked_of_slurm():
    launcher = {"nodes": 2, "timeout_min": 60, "gpus_per_node": 8, "mem_gb": None, "cpus_per_task": 4,
                "array_parallelism": 5, "max_num_timeout": 10}  # fmt: skip
    assert describe(launcher, 7, LaunchConfig(max_array_size=4)) == (
        "Slurm: 7 jobs in 2 arrays, 5 at once; each 2 nodes, 60 min, 8 GPUs a node, 4 CPUs; started again after a "
        "time-out up to 10 times"
    )


# ------------------------------------------------------------------------------------- the command line


def refused(done: "subprocess.CompletedProcess[str]") -> str:
    assert done.returncode == 2, done
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_what_slurm_alone_can_do_is_refused_elsewhere(cli):
    sweep = ["-m", "stage=train", "seed=0,1"]
    line = refused(cli(*sweep, "launch.detach=true", check=False))
    assert "launch.detach=true would be ignored by hydra/launcher=basic" in line
    line = refused(cli(*sweep, "hydra/launcher=slurm_2x8", check=False))
    assert "hydra.launcher.nodes=2, and the run is for hardware.num_nodes=1; they must be equal" in line
    line = refused(cli(*sweep, "hydra/launcher=slurm_cpu", "launch.max_array_size=0", check=False))
    assert "launch.max_array_size=0 must be at least 1" in line
    line = refused(cli(*sweep, "launch.save_seconds=9", check=False))
    assert "launch.save_seconds=9.0 would be ignored by hydra/launcher=basic" in line
    line = refused(cli(*sweep, "hydra/launcher=slurm_cpu", "launch.save_seconds=120", check=False))
    assert "launch.save_seconds=120.0 must be less than hydra.launcher.signal_delay_s=120" in line
    assert "usage: prefpipe status DIR" in refused(cli("status", check=False))
    assert "nowhere: no such folder" in refused(cli("retry", "nowhere", check=False))


def test_status_and_retry_of_a_sweep_on_this_machine(cli, tmp_path):
    """One point cannot write its output; after that is mended, retry runs it alone, from another folder too."""
    run = tmp_path / "runs" / "default"
    (run / "points" / "seed=1").mkdir(parents=True)
    (run / "points" / "seed=1" / "prompts.partial").touch()
    sweep = ["-m", "stage=prepare", "seed=0,1"]
    assert cli(*sweep, check=False).returncode == 1
    text = cli("status", str(run)).stdout
    assert text.splitlines()[1].startswith("failed: error  seed=1  prepare  0      1")
    assert text.splitlines()[-1] == "1 failed (error 1), 1 done"
    failed = cli("retry", str(run), check=False)
    assert failed.returncode == 1
    assert "1 of 1 jobs failed (error 1)" in failed.stderr.splitlines()[-1]
    (run / "points" / "seed=1" / "prompts.partial").unlink()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    cli("retry", "../runs/default", cwd=elsewhere)
    assert [(s.state, len(s.attempts)) for s in statuses(run)] == [("done", 1), ("done", 3)]
    assert list(elsewhere.iterdir()) == []
    assert cli("retry", str(run)).stdout == f"nothing in {run} failed\n"


def test_a_point_whose_sweep_was_killed_before_its_turn_is_retried(cli, tmp_path):
    run = tmp_path / "runs" / "default"
    command = [sys.executable, "-m", "prefpipe", "-m", "stage=prepare", "seed=0,1,2"]
    child = subprocess.Popen([*command, f"paths.runs={tmp_path / 'runs'}"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(run.glob("attempts/seed=0/*.0001.json")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.kill()
    child.wait()
    found = {status.unit.point: status for status in statuses(run)}
    assert {found[f"seed={seed}"].kind for seed in (1, 2)} == {"cancelled"}
    cli("retry", str(run), "--only=cancelled,killed")
    assert {status.state for status in statuses(run)} == {"done"}
