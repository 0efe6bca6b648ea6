"""The points of a sweep as jobs of Slurm: Hydra's submitit launcher, and what it lacks.

That launcher sends every job Hydra's own state as a pickle, to compose its config where it runs, waits for all jobs,
and tells of the first that failed. Here a job gets the name of a config that was frozen when it was submitted, the
sweep may return at once, points that are done or in the queue are not submitted again, training writes a state before
its time is up, and every failure is told. Submission, the job script, and starting again after a time-out are
submitit's.
"""

import contextlib
import dataclasses
import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher
from submitit.core.utils import DelayedSubmission

from prefpipe.config import freeze, load_frozen, register_schemas, to_run_config
from prefpipe.errors import ConfigError
from prefpipe.files import chunks
from prefpipe.launch import notice, slurm_queue
from prefpipe.launch.attempts import DONE, FAILED, Unit, preempt, queued_now
from prefpipe.launch.slurm_queue import Job
from prefpipe.launch.status import STALE, Status, status_of
from prefpipe.launch.sweep import SLURM_LAUNCHER, SweepError, frozen_text, is_done, point_of, report_failures
from prefpipe.logs import report_errors, say, set_up_logging
from prefpipe.run import Command, run
from prefpipe.settings import LaunchConfig

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE, GROWTH = 1.0, 15.0, 1.1
"""Seconds between two looks at the queue, of everybody on the cluster: about a tenth of what it has taken so far."""

SHARE_TO_SAVE = 2 / 3
"""Of the time between Slurm's notice and the end, what training gets for its state where launch.save_seconds=null."""


def install() -> None:
    """Have Hydra take the launcher of this module for submitit's: it looks for one in hydra_plugins.* only."""
    Plugins.instance().class_name_to_class[SLURM_LAUNCHER] = PointsLauncher


class PointsLauncher(SlurmLauncher):  # type: ignore[misc]
    """hydra/launcher=slurm_* and submitit_slurm."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit the points that are not done, and wait for them unless launch.detach is set.

        Raises SweepError when some fail.
        """
        assert self.config is not None
        assert self.hydra_context is not None
        loader = self.hydra_context.config_loader
        points = [point_of(loader.load_sweep_config(self.config, list(overrides))) for overrides in job_overrides]
        set_up_logging()
        commands = [Command(to_run_config(cfg), cfg) for cfg, _ in points]
        _warn_of_lost_work(commands, self.params)
        jobs = slurm_queue.jobs() or {}
        units = []
        for (cfg, unit), command in zip(points, commands, strict=True):
            job = _in_queue(unit, jobs)
            if job is not None and unit.config.read_text() != frozen_text(cfg):
                raise ConfigError(
                    f"{unit.point or unit.name} is in Slurm's queue as job {job}, with other settings; let it end, "
                    f"or end it with scancel {job}"
                )
            done = job is None and is_done(command, jobs, self.params)
            if job is None and not (done and unit.config.is_file()):
                freeze(cfg, unit.config)
            if not done:
                units.append(unit)
        folder, num_done = points[0][1].run, len(points) - len(units)
        launch = commands[0].run.launch
        failed = submit_and_wait(folder, units, self.params, launch, os.getcwd(), num_done=num_done)
        report_failures(folder, failed, len(points))
        return [JobReturn(status=JobStatus.COMPLETED) for _ in points]


class PointJob:
    """What a Slurm job runs: a frozen config, in the folder where its sweep was started. Plain values, for pickle.

    save_seconds: how long it waits, at Slurm's notice, for training to write a state.
    """

    def __init__(self, config: Path, folder: str, save_seconds: float) -> None:
        self.config, self.folder, self.save_seconds = str(config.absolute()), folder, save_seconds

    def __call__(self) -> None:
        os.chdir(self.folder)
        set_up_logging()
        register_schemas()
        notice.expect(self._place)
        with report_errors():
            run(load_frozen(Path(self.config)))

    def checkpoint(self) -> DelayedSubmission:
        """Called at Slurm's notice, while the job is at work; what starts again goes on from what lies on disk."""
        preempt("its time was up, or it was preempted")
        notice.give(self._place, self.save_seconds)
        return DelayedSubmission(self)

    @property
    def _place(self) -> Path:
        return Path(self.config).with_suffix("")


def submit_and_wait(
    run_folder: Path,
    units: Sequence[Unit],
    launcher: Mapping[str, Any],
    launch: LaunchConfig,
    folder: str,
    *,
    num_done: int = 0,
) -> list[Status]:
    """Submit units whose configs are frozen, but for those in the queue, and wait for all. Returns those that failed.

    With launch.detach none is waited for. folder: where they run. num_done: of further ones that need not run.
    """
    ids = submit(units, launcher, launch, folder)
    arrays = ", ".join(dict.fromkeys(job.partition("_")[0] for job in ids))
    told = [f"{len(ids)} jobs submitted" + (f": {arrays}" if ids else "")]
    for number, where in ((len(units) - len(ids), "in the queue"), (num_done, "done")):
        told += [f"{number} of {len(units) + num_done} were {where} already"] if number else []
    say("; ".join([*told, f"prefpipe status {run_folder} shows how they do"]))
    return [] if launch.detach else wait(units)


def submit(units: Sequence[Unit], launcher: Mapping[str, Any], launch: LaunchConfig, folder: str) -> list[str]:
    """Give units to Slurm, as arrays of at most launch.max_array_size jobs; the ids of the jobs.

    launcher: settings of hydra/launcher. Arrays share array_parallelism; where it is less than one job for each, some
    begin when others have ended. What is in the queue is left alone.
    Raises ConfigError without Slurm, SweepError when it refuses.
    """
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise ConfigError(
            "hydra/launcher: there is no sbatch here; submit where Slurm is, or start one on this machine: "
            'eval "$(launchers/dev_slurm.sh up)"'
        )
    jobs = slurm_queue.jobs() or {}
    fresh = [unit for unit in units if _in_queue(unit, jobs) is None]
    ids: list[str] = []
    last: list[str] = []
    size = launch.max_array_size or slurm_queue.max_array_size()
    shares = _shares(len(fresh), size, int(launcher["array_parallelism"]))
    save_seconds = launch.save_seconds
    if save_seconds is None:
        save_seconds = SHARE_TO_SAVE * float(launcher["signal_delay_s"])
    for number, chunk in enumerate(chunks(fresh, size)):
        previous = last[number - len(shares)] if number >= len(shares) else None
        points = [PointJob(unit.config, folder, save_seconds) for unit in chunk]
        try:
            with contextlib.chdir(folder):
                executor = _executor(launcher, shares[number % len(shares)], previous)
                submitted = executor.submit_array(points)
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise SweepError(
                f"sbatch: {reason}; {len(ids)} of {len(fresh)} jobs were submitted; the same command again submits the "
                f"others"
            ) from error
        for unit, job in zip(chunk, submitted, strict=True):
            unit.put_in_line(queued_now(folder, job=job.job_id, launcher=dict(launcher)))
            ids.append(job.job_id)
        last.append(submitted[0].job_id.partition("_")[0])
    return ids


def wait(units: Sequence[Unit]) -> list[Status]:
    """Wait until no unit is in line or at work; those that failed.

    What a job says of itself counts at once. One that has left the queue without a word is looked at twice, as a file
    system of several machines may show its last word late.
    """
    failed: list[Status] = []
    left, silent, pause = list(units), set[Unit](), FIRST_PAUSE
    while left:
        time.sleep(pause)
        pause = min(GROWTH * pause, LONGEST_PAUSE)
        jobs = slurm_queue.jobs()
        for unit in list(left):
            found = status_of(unit, jobs)
            said = bool(found.attempts) and found.attempts[-1].job == found.job and found.attempts[-1].outcome
            if found.state in (DONE, STALE) or said == DONE:
                left.remove(unit)
            elif found.state == FAILED and (said == FAILED or unit in silent):
                left.remove(unit)
                failed.append(found)
            elif found.state == FAILED:
                silent.add(unit)
            else:
                silent.discard(unit)
    return failed


def describe(launcher: Mapping[str, Any], num_jobs: int, launch: LaunchConfig) -> str:
    """What would be asked of Slurm, in one line."""
    size = launch.max_array_size or slurm_queue.max_array_size()
    arrays = -(-num_jobs // size)
    at_once = min(num_jobs, int(launcher["array_parallelism"]))
    each = [f"{launcher['nodes']} node{'s' if launcher['nodes'] > 1 else ''}", f"{launcher['timeout_min']} min"]
    each += [f"{launcher[key]} {word}" for key, word in ASKED.items() if launcher.get(key)]
    return (
        f"Slurm: {num_jobs} jobs in {arrays} array{'s' if arrays > 1 else ''}, {at_once} at once; each "
        f"{', '.join(each)}; started again after a time-out up to {launcher['max_num_timeout']} times"
    )


ASKED = {"gpus_per_node": "GPUs a node", "cpus_per_task": "CPUs", "mem_gb": "GB of memory", "partition": "(partition)"}


def launch_config(unit: Unit) -> LaunchConfig:
    """Of the frozen config of a unit."""
    return to_run_config(load_frozen(unit.config)).launch


def _executor(launcher: Mapping[str, Any], parallelism: int, after: str | None) -> submitit.AutoExecutor:
    """submitit's, with the settings of hydra/launcher; its own have no prefix, Slurm's have one.

    after: an array that has to end first.
    """
    own = {"submitit_folder", "max_num_timeout", "array_parallelism"}
    shared = {field.name for field in dataclasses.fields(BaseQueueConf)}
    executor = submitit.AutoExecutor(
        folder=launcher["submitit_folder"], cluster="slurm", slurm_max_num_timeout=launcher["max_num_timeout"]
    )
    parameters = {
        name if name in shared else f"slurm_{name}": value for name, value in launcher.items() if name not in own
    }
    if after is not None:
        parameters["slurm_dependency"] = f"afterany:{after}"
    executor.update_parameters(**parameters, slurm_array_parallelism=parallelism)
    return executor


def _shares(num_jobs: int, size: int, parallelism: int) -> list[int]:
    """How many jobs of each array may run at once; with fewer entries than there are arrays, these take turns."""
    lanes = max(1, min(-(-num_jobs // size), parallelism))
    return [parallelism // lanes + (lane < parallelism % lanes) for lane in range(lanes)]


def _in_queue(unit: Unit, jobs: Mapping[str, Job]) -> str | None:
    """The job that a unit is in Slurm's queue as, or at work."""
    queued = unit.queued()
    job = jobs.get(queued.job) if queued is not None and queued.job else None
    return queued.job if queued is not None and job is not None and (job.waits or job.works) else None


def _warn_of_lost_work(commands: Sequence[Command], launcher: Mapping[str, Any]) -> None:
    settings = commands[0].run
    trains = settings.stage.value == "train" or (settings.stage.value == "loop" and "train" in settings.recipe.stages)
    if trains and launcher["max_num_timeout"] and any(c.run.training.save_every_steps is None for c in commands):
        log.warning(
            "training.save_every_steps=null: a job that ends without Slurm's notice, as its node fails, starts again "
            "from the first step; set it to what is done in some minutes"
        )
