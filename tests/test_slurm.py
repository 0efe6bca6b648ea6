"""Sweeps on a real Slurm of one node, which launchers/dev_slurm.sh installs and starts."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import orjson
import psutil
import pytest

from prefpipe import artifacts
from prefpipe.check import Checker
from prefpipe.config import CONF_DIR
from prefpipe.files import sha256_of
from prefpipe.launch import slurm_queue
from prefpipe.launch.attempts import Attempt, Unit
from prefpipe.launch.status import Status, statuses
from prefpipe.suggest import short_hash

ROOT = Path(__file__).resolve().parents[1]
DEV_SLURM = ROOT / "launchers" / "dev_slurm.sh"

pytestmark = [pytest.mark.integration, pytest.mark.slurm]

TRAIN = ["stage=train", "debug=tiny", "hydra/launcher=slurm_cpu", "inputs.pairs=runs/default/pairs"]
SWEEP = ["-m", *TRAIN, "loss=dpo,simpo,ipo", "seed=0,1", "tracking=mlflow", "tracking.wait_seconds=120"]
POINTS = [f"debug=tiny,loss={loss},seed={seed}" for loss in ("dpo", "ipo", "simpo") for seed in (0, 1)]
FAILING = "debug=tiny,loss=ipo,seed=1"
STEPS = 100
LONG = ["training.save_every_steps=null", f"training.max_steps={STEPS}"]
LONG_POINT = ",".join(["debug=tiny", *sorted(LONG)])


class Place(NamedTuple):
    """A folder to work in, with pairs in runs/default, and how to call prefpipe there."""

    folder: Path
    call: Callable[..., "subprocess.CompletedProcess[str]"]

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def unit(self, name: str, point: str = "") -> Unit:
        return Unit(self.run(name), point, 0, "train")


@pytest.fixture(scope="module")
def slurm() -> Iterator[None]:
    """A Slurm of its own, with room for a job of one CPU besides those of slurm_cpu.

    Its folder has always the same name, so that the next one ends what a suite that was killed has left.
    """
    own = {
        "DEV_SLURM_DIR": f"{tempfile.gettempdir()}/prefpipe-test-slurm-{os.getuid()}-{short_hash(str(ROOT))}",
        "DEV_SLURM_PORT": str(two_ports()),
        "DEV_SLURM_CPUS": str(8 * len(os.sched_getaffinity(0)) + 4),
    }
    command = {"env": {**os.environ, **own}, "capture_output": True, "text": True}
    before = os.environ.get("SLURM_CONF")
    try:
        up = subprocess.run([DEV_SLURM, "up"], timeout=300, **command)
        if "only root can install" in up.stderr:
            pytest.skip(up.stderr.strip())
        assert up.returncode == 0, up.stderr
        (line,) = up.stdout.splitlines()
        os.environ["SLURM_CONF"] = line.removeprefix("export SLURM_CONF=")
        yield
    finally:
        subprocess.run([DEV_SLURM, "down"], check=True, timeout=60, **command)
        os.environ.pop("SLURM_CONF", None)
        if before is not None:
            os.environ["SLURM_CONF"] = before
    until(lambda: not processes_with(f"{own['DEV_SLURM_DIR']}/slurm.conf"), 30, "no daemon and no job is left")
    shutil.rmtree(own["DEV_SLURM_DIR"])


def two_ports() -> int:
    """The first of two neighbours that are free."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


def processes_with(conf: str) -> list[psutil.Process]:
    """Slurm's daemons and their jobs were started with their configuration's name."""
    processes = psutil.process_iter(["environ"])
    return [process for process in processes if (process.info["environ"] or {}).get("SLURM_CONF") == conf]


@pytest.fixture(scope="module")
def place(slurm, tmp_path_factory) -> Place:
    folder = tmp_path_factory.mktemp("sweeps")
    rows = [{"prompt": f"What is {i} + 1?", "chosen": f"#### {i + 1}", "rejected": f"#### {i}"} for i in range(40)]
    (folder / "pairs.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))

    def call(*args: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "prefpipe", *args]
        environment = {**os.environ, "PREFPIPE_RUNS": "runs"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
        assert not check or done.returncode == 0, f"{' '.join(args)}\n{done.stdout}\n{done.stderr}"
        return done

    call("stage=prepare", "data_mixer=files", "data_mixer.spec=pairs.jsonl:1.0")
    return Place(folder, call)


def until(true: Callable[[], object], seconds: float, what: str) -> None:
    """Wait; fail when it does not come true."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.2)


def of(found: list[Status], point: str) -> Status:
    (one,) = [status for status in found if status.unit.point == point and status.unit.stage == "train"]
    return one


def trainers(place: Place, name: str) -> list[psutil.Process]:
    """The processes that train for a run."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        words = process.info["cmdline"] or []
        if "prefpipe.training.worker" in words and process.info["cwd"] == str(place.folder):
            found += [process] * any(word.startswith(f"runs/{name}/") for word in words)
    return found


def weights(run: Path) -> str:
    artifacts.verify(run / "round_0" / "checkpoint")
    return sha256_of(run / "round_0" / "checkpoint" / "model.safetensors")


@pytest.fixture(scope="module")
def out_of_time(place: Place) -> Place:
    """A point that trains when its time runs out, while the other tests go on: its training is halted until then."""
    # Slurm looks every 30 s whether a notice is due, so this one comes 45 to 75 s after the start.
    limits = ["hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=45", "hydra.launcher.cpus_per_task=1"]
    done = place.call("-m", *TRAIN, *LONG, "exp_name=long", *limits, "launch.detach=true")
    assert re.search(r"^1 jobs submitted: \d+; prefpipe status runs/long ", done.stdout, re.M)
    metrics = place.run("long") / "points" / LONG_POINT / "round_0" / "checkpoint.partial" / "metrics.jsonl"
    until(lambda: metrics.is_file() and metrics.stat().st_size, 300, "training begins")
    (process,) = trainers(place, "long")
    process.send_signal(signal.SIGSTOP)
    unit = place.unit("long", LONG_POINT)

    def go_on_at_the_notice() -> None:
        until(lambda: unit.attempts()[0].outcome == "preempted", 240, "its time runs out")
        process.send_signal(signal.SIGCONT)

    threading.Thread(target=go_on_at_the_notice, daemon=True).start()
    return place


def test_a_detached_sweep_goes_on_by_itself(out_of_time):
    """What becomes of it is told below, when the other tests have used its time."""
    assert of(statuses(out_of_time.run("long")), LONG_POINT).state == "running"


# ------------------------------------------------------------------------------------- one array of six points


@pytest.fixture(scope="module")
def sweep(place: Place) -> "tuple[Place, subprocess.CompletedProcess[str]]":
    """Six points, of which one cannot write its output."""
    obstacle = place.run("default") / "points" / FAILING / "round_0"
    obstacle.parent.mkdir(parents=True)
    obstacle.touch()
    return place, place.call(*SWEEP, check=False)


def test_a_sweep_is_one_array_and_a_failure_hides_no_other_point(sweep):
    place, done = sweep
    run = place.run("default")
    for point in POINTS:
        assert artifacts.is_complete(run / "points" / point / "round_0" / "checkpoint") == (point != FAILING)
    jobs = [queued.job for point in POINTS if (queued := place.unit("default", point).queued())]
    (array,) = {job.partition("_")[0] for job in jobs}
    assert sorted(jobs) == [f"{array}_{index}" for index in range(6)]
    (script,) = (run / "multirun" / ".submitit").glob("**/*_submission.sh")
    assert "#SBATCH --array=0-5%6" in script.read_text()
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("prefpipe: error: ")]
    assert len(errors) == 2, done.stderr
    assert errors[0].startswith(f"prefpipe: error: [{FAILING}] ")
    assert "1 of 6 jobs failed (error 1); prefpipe status runs/default shows them" in errors[1]


def test_status_says_what_became_of_each_point(sweep):
    place, _ = sweep
    table = place.call("status", "runs/default").stdout
    rows = {
        line.split()[2 if line.startswith("failed:") else 1]: line for line in table.splitlines() if "loss=" in line
    }
    assert sorted(rows) == POINTS
    assert all(rows[point].startswith("failed: error" if point == FAILING else "done ") for point in POINTS)
    assert table.splitlines()[-1] == "1 failed (error 1), 6 done"  # with stage=prepare
    (attempt,) = place.unit("default", FAILING).attempts()
    assert (attempt.outcome, attempt.kind) == ("failed", "error")
    assert attempt.job in rows[FAILING]
    assert attempt.ended is not None


def test_retry_starts_only_what_failed_and_the_sweep_again_repeats_nothing(sweep):
    place, _ = sweep
    run = place.run("default")
    (run / "points" / FAILING / "round_0").unlink()
    refused = place.call("retry", "runs/default", "--only=oom", check=False)
    assert refused.stderr == "prefpipe: error: --only=oom: nothing in runs/default failed so; failures: error 1\n"
    place.call("retry", "runs/default", "--only=error")
    assert [len(place.unit("default", point).attempts()) for point in POINTS] == [1, 1, 1, 2, 1, 1]
    assert {status.state for status in statuses(run)} == {"done"}
    assert place.call("retry", "runs/default").stdout == "nothing in runs/default failed\n"
    made = {point: (run / "points" / point / "round_0" / "checkpoint" / "provenance.json") for point in POINTS}
    before = {point: file.read_bytes() for point, file in made.items()}
    again = place.call(*SWEEP).stdout
    assert again.startswith("0 jobs submitted; 6 of 6 were done already; prefpipe status runs/default ")
    changed = place.call("-m", *TRAIN, "loss=dpo", "seed=0", "hardware.precision=bf16", check=False)
    assert changed.returncode == 1
    assert changed.stdout.startswith("1 jobs submitted: ")
    assert re.search(r"was made with other settings: precision '\w+' -> 'bf16'", changed.stderr)
    assert {point: file.read_bytes() for point, file in made.items()} == before
    assert [len(place.unit("default", point).attempts()) for point in POINTS] == [2, 1, 1, 2, 1, 1]


def test_the_sweep_is_one_tree_of_runs(sweep):
    """One for the sweep, below it one for each point, whichever job and command made it; each metric came once."""
    from mlflow import MlflowClient

    place, _ = sweep
    client = MlflowClient(f"sqlite:///{place.folder / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("prefpipe").experiment_id])
    (above,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    below = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == above.info.run_id]
    assert len(runs) == 1 + 6
    assert sorted(run.info.run_name for run in below) == POINTS
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in below:
        folder = place.run("default") / "points" / run.info.run_name / "round_0" / "checkpoint"
        rows = [orjson.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]
        told = client.get_metric_history(run.info.run_id, "train/loss")
        assert [(one.step, one.value) for one in told] == [(row["step"], row["train/loss"]) for row in rows]


# ------------------------------------------------------------------------------------- shards, in two arrays


def test_shards_are_arrays_no_larger_than_allowed(place):
    arguments = [
        "stage=generate",
        "debug=tiny",
        "exp_name=stopped",
        "generator.num_shards=3",
        "generator.max_new_tokens=8",
        "inputs.prompts=runs/default/prompts",
    ]
    one_cpu = ["hydra/launcher=slurm_cpu", "hydra.launcher.array_parallelism=2", "hydra.launcher.cpus_per_task=2"]
    shards = ["generator.shard=0,1,2", "launch.max_array_size=2"]
    place.call("-m", *arguments, *shards, *one_cpu)
    scripts = (place.run("stopped") / "multirun" / ".submitit").glob("**/*_submission.sh")
    arrays = sorted(re.findall(r"--array=(\S+)", script.read_text()) for script in scripts)
    assert arrays == [[], ["0-1%1"]]  # a single job is no array
    place.call(*arguments)
    artifacts.verify(place.run("stopped") / "round_0" / "completions")
    assert "generate 2-of-3" in place.call("status", "runs/stopped").stdout


def test_the_largest_array_is_what_slurm_says(slurm):
    assert slurm_queue.max_array_size() == 1001


# ------------------------------------------------------------------------------------- scancel


def test_what_scancel_ends_is_cancelled_and_retry_finishes_it(place):
    units = [place.unit("stopped", f"debug=tiny,seed={seed}") for seed in (0, 1)]
    arguments = ["seed=0,1", "hydra.launcher.array_parallelism=1", "launch.detach=true"]
    place.call("-m", *TRAIN, "exp_name=stopped", *arguments)
    until(lambda: trainers(place, "stopped"), 300, "training begins")
    trainers(place, "stopped")[0].send_signal(signal.SIGSTOP)  # not to end before scancel
    again = place.call("-m", *TRAIN, "exp_name=stopped", *arguments).stdout
    assert "0 jobs submitted; 2 of 2 were in the queue already" in again
    changed = place.call("-m", *TRAIN, "exp_name=stopped", *arguments, "hardware.num_threads=2", check=False)
    assert "is in Slurm's queue as job" in changed.stderr
    job = units[0].queued().job.partition("_")[0]
    subprocess.run(["scancel", job], check=True)

    def became(field: str) -> set[str]:
        found = statuses(place.run("stopped"))
        return {getattr(of(found, unit.point), field) for unit in units}

    until(lambda: became("kind") == {"cancelled"}, 120, "cancelled")
    assert trainers(place, "stopped") == []
    place.call("retry", "runs/stopped", "--only=cancelled")
    until(lambda: became("state") == {"done"}, 600, "done")
    assert [len(unit.attempts()) for unit in units] == [2, 1]


# ------------------------------------------------------------------------------------- out of time


def test_a_point_that_ran_out_of_time_goes_on_and_ends_with_the_same_weights(out_of_time):
    """The only state is the one that it wrote at Slurm's notice, as training.save_every_steps=null."""
    place = out_of_time
    unit, run = place.unit("long", LONG_POINT), place.run("long") / "points" / LONG_POINT

    def attempts() -> list[Attempt]:
        return unit.attempts()

    until(lambda: attempts()[0].outcome == "preempted", 180, "its time runs out")
    place.call(*TRAIN[:2], TRAIN[-1], *LONG, "exp_name=whole")
    until(lambda: of(statuses(place.run("long")), LONG_POINT).state == "done", 300, "it goes on and ends")
    *stopped, last = attempts()
    assert {attempt.job for attempt in stopped} == {last.job}
    assert {attempt.outcome for attempt in stopped} == {"preempted"}
    log = (run / "logs" / "train-round_0.log").read_text()
    assert "Slurm's notice: the state is written" in log
    resumed = [int(step) for step in re.findall(r"going on after step (\d+)", log)]
    assert resumed == sorted(resumed)
    assert 1 <= resumed[0] <= STEPS
    assert weights(run) == weights(place.run("whole"))
    assert trainers(place, "long") == []


# ------------------------------------------------------------------------------------- two nodes


def test_the_script_of_two_nodes_starts_one_agent_on_each(slurm, tmp_path):
    from prefpipe.launch.slurm import PointJob, _executor

    arguments = ["stage=train", "hydra/launcher=slurm_2x8", "hardware=zero3", "hardware.num_nodes=2"]
    (cfg,) = Checker(CONF_DIR, [CONF_DIR], "config", multirun=True).check(arguments)
    launcher = {**cfg.hydra.launcher, "submitit_folder": str(tmp_path / "%j")}
    del launcher["_target_"]
    executor = _executor(launcher, 4, None)._executor
    text = executor._make_submission_file_text(executor._submitit_command_str, "0")
    assert PointJob(tmp_path / "train.yaml", "/somewhere", 60.0).config == str(tmp_path / "train.yaml")
    flags = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.M))
    assert {name: flags[name] for name in ("nodes", "ntasks-per-node", "gpus-per-node", "signal")} == {
        "nodes": "2",
        "ntasks-per-node": "1",
        "gpus-per-node": "8",
        "signal": "USR2@300",
    }
    assert (flags["cpus-per-task"], flags["mem"], flags["time"], flags["requeue"]) == ("96", "900GB", "1440", "")
    command = text.splitlines()[-1]
    assert command.startswith("srun --unbuffered --output ")
    assert f"{sys.executable} -u -m submitit.core._submit" in command
