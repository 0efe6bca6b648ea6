"""sweep=optuna: points are asked for, checked, run by Hydra's launcher, and told what their evaluation came to.

The trials are kept in trials.py; here is what they are to prefpipe: overrides, folders and metrics.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf

from prefpipe import artifacts, suggest
from prefpipe.check import Checker, default_stage, fixed_line, names_point, without_hydra
from prefpipe.config import RunConfig, to_run_config
from prefpipe.errors import ConfigError, DataError, PrefpipeError
from prefpipe.files import write_json
from prefpipe.launch import slurm_queue
from prefpipe.launch.attempts import DONE, FAILED, RUNNING, Unit
from prefpipe.launch.status import Jobs, status_of
from prefpipe.launch.sweep import SLURM_LAUNCHER, is_done, point_of, prepare
from prefpipe.logs import say
from prefpipe.records import EvalResult
from prefpipe.report.collect import flatten
from prefpipe.rounds import BASE, Layout
from prefpipe.run import Command
from prefpipe.search_space import as_overrides, corners, low_corner, num_values, values_of
from prefpipe.settings import Stage, SweepConfig
from prefpipe.trials import Space, Trial, Trials, as_rows, open_trials

log = logging.getLogger(__name__)

MAX_CORNERS = 32
"""Points that are checked before the first trial runs: all corners of the space, or with more of them its edges."""

WITHOUT_EFFECT = ("paths.", "hardware.", "tracking.", "preview.", "browse.", "sweep.", "launch.")
"""Settings that may change between the commands of one search."""

TRIALS = "trials.json"
"""In the folder of a search: its trials, for people and programs; the search itself reads its journal."""

SECONDS_BETWEEN_LOOKS = 1.0


def search(checker: Checker, overrides: Sequence[str], task: TaskFunction) -> None:
    """Try points until sweep.trials of them have a value; what earlier commands of the same search found counts.

    Args:
        task: runs one point.

    Raises:
        ConfigError: the search cannot be one; nothing has run. DataError: too many trials failed.
    """
    with checker.opened():
        plan = _Plan.of(checker, overrides)
        if plan.run.plan:
            _print_plan(plan)
            return
        with open_trials(plan.folder, plan.sweep, plan.space, plan.settings) as trials:
            _Driver(plan, trials, task).run()


@dataclass(frozen=True)
class _Plan:
    """What a search is made of.

    fixed: overrides of every trial. of_hydra: those for Hydra itself. first: the config of one trial, and `run` typed.
    """

    checker: Checker
    fixed: list[str]
    of_hydra: list[str]
    space: Space
    first: DictConfig
    run: RunConfig

    @classmethod
    def of(cls, checker: Checker, overrides: Sequence[str]) -> "_Plan":
        fixed, of_hydra, swept = [], [], []
        for override in checker.parse(overrides):
            if override.is_sweep_override():
                swept.append(override)
            elif override.key_or_group.startswith(("hydra.", "hydra/")):
                of_hydra.append(fixed_line(override))
            else:
                fixed.append(fixed_line(override))
        space = {override.get_key_element(): values_of(override) for override in swept}
        declared = checker.point([*of_hydra, *fixed, *as_overrides(low_corner(space))]).sweep.space or {}
        typed = {key.lstrip("+") for key in space}
        space |= {
            override.get_key_element(): values_of(override)
            for key, text in declared.items()
            if key not in typed
            for override in checker.parse([f"{key}={text}"])
        }
        first = checker.point([*of_hydra, *fixed, *as_overrides(low_corner(space))])
        plan = cls(checker, fixed, of_hydra, space, first, _typed(first))
        plan._check()
        return plan

    @property
    def sweep(self) -> SweepConfig:
        return self.run.sweep

    @property
    def folder(self) -> Path:
        return Path(self.run.paths.runs) / self.run.exp_name / "search"

    @property
    def settings(self) -> dict[str, Any]:
        """All settings of the first trial but those that change no value: with the space, they are the search's."""
        plain = OmegaConf.to_container(without_hydra(self.first), resolve=True, enum_to_str=True)
        assert isinstance(plain, dict)
        names = ("exp_name", "point", "plan", "overwrite")
        flat = flatten({str(key): value for key, value in plain.items()})
        return {key: value for key, value in flat.items() if key not in names and not key.startswith(WITHOUT_EFFECT)}

    def point(self, values: Mapping[str, str]) -> DictConfig:
        """The checked config of the trial with these values."""
        return self.checker.point([*self.of_hydra, *self.fixed, *as_overrides(values)])

    def _check(self) -> None:
        if not self.space:
            raise ConfigError(
                "sweep=optuna needs values to choose from, e.g. loss.beta=0.1,0.3 or "
                "'training.learning_rate=tag(log,interval(1e-6,1e-5))', on the command line or in sweep.space"
            )
        for key in self.space:
            if not names_point(key):
                raise ConfigError(f"{key} cannot be searched: its value makes no point of a sweep; give it one value")
        sweeper = self.first.hydra.runtime.choices["hydra/sweeper"]
        if sweeper != "basic":
            raise ConfigError(f"hydra/sweeper={sweeper} would be ignored with sweep=optuna; drop one of them")
        if self.run.launch.detach:
            raise ConfigError(
                "launch.detach=true returns before there is a result, and sweep=optuna chooses its trials by results; "
                "drop it"
            )
        self._check_objective()
        size = math.prod(num_values(values) for values in self.space.values())
        if size < (self.sweep.trials or 0):
            raise ConfigError(
                f"sweep.trials={self.sweep.trials}, but the space has no more than {size:.0f} points; use fewer, or "
                f"sweep=grid for all of them"
            )
        for values in corners(self.space, MAX_CORNERS):
            self.point(values)

    def _check_objective(self) -> None:
        run = self.run
        measured = [f"{task.name}/{metric}" for task in run.task.values() for metric in task.metrics()]
        if run.sweep.objective not in measured:
            given = "sweep.objective must be given" if run.sweep.objective is None else ""
            given = given or f"sweep.objective={run.sweep.objective} is no metric of task=[{','.join(run.task)}]"
            raise ConfigError(f"{given}; there are {', '.join(measured)}, and other tasks have others")
        recipe = run.recipe
        if run.stage is Stage.loop and "evaluate" in (*recipe.stages, *recipe.after):
            return
        if run.stage is not Stage.evaluate:
            is_loop = run.stage is Stage.loop
            what = f"recipe={recipe.name}" if is_loop else f"stage={run.stage.value}"
            raise ConfigError(
                f"{what} evaluates nothing, and sweep=optuna reads {run.sweep.objective}; use stage=loop with "
                f"recipe=tune (train, evaluate), or another recipe that evaluates"
            )


class _Driver:
    """Runs trials in batches."""

    def __init__(self, plan: _Plan, trials: Trials, task: TaskFunction) -> None:
        self.plan, self.trials, self.task = plan, trials, task
        self.num_launched = self.num_failed = 0

    def run(self) -> None:
        """Until the target is reached. Raises DataError when too many trials fail."""
        target, parallel = self.plan.sweep.trials, self.plan.sweep.parallel
        assert target is not None
        assert parallel is not None
        while (left := target - len(self.trials.of("complete"))) > 0:
            batch = self.trials.batch(min(parallel, left))
            self._write()
            self._run_batch(batch)
            self._write()
            self._refuse_more_failures()
        say(_counted(self.plan, [trial.state for trial in self.trials.all()]))
        best = self.trials.best()
        assert best is not None
        values = " ".join(as_overrides(best.values))
        say(f"best: trial {best.number}, {self.plan.sweep.objective} {best.value:g}, {values}")

    def _run_batch(self, batch: Sequence[Trial]) -> None:
        """Trials of the same values share a point, and so its result."""
        known = {tuple(t.values.items()): t.value for t in self.trials.of("complete")}
        points: dict[tuple[tuple[str, str], ...], _Point] = {}
        for trial in batch:
            values = tuple(trial.values.items())
            value = known.get(values)
            if value is not None:
                self.trials.finish(trial, value)
            elif values in points:
                points[values].trials.append(trial)
            else:
                try:
                    points[values] = _Point.of(self.plan.point(trial.values), trial)
                except ConfigError as error:
                    self._fail([trial], str(error))
        if points:
            self._launch(list(points.values()))

    def _launch(self, points: Sequence["_Point"]) -> None:
        """Run points, and record what became of each: its own records tell it, whatever the launcher says."""
        at_work = [point for point in points if point.is_at_work()]
        jobs = slurm_queue.jobs()
        done = [point for point in points if point not in at_work and point.is_done(jobs)]
        others = [point for point in points if point not in at_work + done]
        launched = [len(point.unit.attempts()) for point in others]
        for point in points:
            state = " (at work since an earlier command)" * (point in at_work) + " (done before)" * (point in done)
            log.info("trial %s%s: %s", _numbers(point.trials), state, " ".join(as_overrides(point.trials[0].values)))
        trouble: Exception | None = None
        try:
            if others:
                prepare([point.composed for point in others])
                overrides = [[*self.plan.fixed, *as_overrides(point.trials[0].values)] for point in others]
                _launcher(self.plan, self.task).launch(overrides, initial_job_idx=self.num_launched)
        except Exception as error:
            trouble = error  # of one point, as a rule, and the others may still be at work
        self.num_launched += len(others)
        begun = [p for p, attempts in zip(others, launched, strict=True) if len(p.unit.attempts()) > attempts]
        recorded = [point for point in (*at_work, *done, *begun) if self._record(point)]
        left = [point for point in points if point not in recorded]
        if left:
            self._write()
            numbers = _numbers([trial for point in left for trial in point.trials])
            why = suggest.one_line(trouble or "the launcher came back before they ended")
            raise DataError(f"trials {numbers} have no result yet: {why}; the same command again goes on with them")

    def _record(self, point: "_Point") -> bool:
        """Wait for the end of a point that was begun, and tell the trials; False when it will go on later."""
        while (found := status_of(point.unit, slurm_queue.jobs())).state == RUNNING:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        if found.state == FAILED:
            self._fail(point.trials, suggest.one_line(found.why or found.kind))
        elif found.state != DONE:
            return False
        else:
            try:
                value = point.value(str(self.plan.sweep.objective))
            except PrefpipeError as error:
                self._fail(point.trials, str(error))
                return True
            for trial in point.trials:
                self.trials.finish(trial, value)
                log.info("trial %d: %s %g", trial.number, self.plan.sweep.objective, value)
        return True

    def _fail(self, group: Sequence[Trial], reason: str) -> None:
        log.info("trial %s failed: %s", _numbers(group), reason)
        for trial in group:
            self.trials.fail(trial, reason)
        self.num_failed += 1

    def _refuse_more_failures(self) -> None:
        allowed = self.plan.sweep.max_failures
        assert allowed is not None
        if self.num_failed > allowed:
            last = self.trials.of("failed")[-1]
            raise DataError(
                f"{self.num_failed} trials failed, more than sweep.max_failures={allowed}; of trial {last.number}: "
                f"{last.error}"
            )

    def _write(self) -> None:
        best = self.trials.best()
        rows = as_rows(self.trials.all())
        data = {
            "objective": self.plan.sweep.objective,
            "direction": self.plan.sweep.direction,
            "space": {key: str(values) for key, values in self.plan.space.items()},
            "best": best and best.number,
            "trials": rows,
        }
        write_json(self.plan.folder / TRIALS, data)


@dataclass(frozen=True, eq=False)
class _Point:
    """Where the trials of the same values run. composed: its config with Hydra's; run: the same, typed."""

    composed: DictConfig
    run: RunConfig
    unit: Unit
    trials: list[Trial]

    @classmethod
    def of(cls, composed: DictConfig, trial: Trial) -> "_Point":
        cfg, unit = point_of(composed)
        return cls(composed, to_run_config(cfg), unit, [trial])

    def is_at_work(self) -> bool:
        """Whether what an earlier command started on this machine still runs; for Slurm's jobs its launcher waits."""
        attempts = self.unit.attempts()
        return bool(attempts) and attempts[-1].job is None and status_of(self.unit, None).state == RUNNING

    def is_done(self, jobs: Jobs) -> bool:
        """Whether an earlier command has made it, and ended before it could say so here. jobs: Slurm's queue."""
        launcher = self.composed.hydra.launcher
        on_slurm = launcher if launcher._target_ == SLURM_LAUNCHER else None
        return is_done(Command(self.run, without_hydra(self.composed)), jobs, on_slurm)

    def value(self, objective: str) -> float:
        """Of the objective, as the point's evaluation has it. Raises DataError when it is missing, or no number."""
        run = self.run
        last = run.recipe.rounds - 1 if run.stage is Stage.loop else run.round
        at = Layout(self.unit.run, self.unit.point, last)
        of_base = run.stage is Stage.evaluate and run.inputs.checkpoint == BASE
        folder = at.root / BASE / "evals" if of_base else at.output("evals")
        found = {f"{r.task}/{r.metric}": r.value for r in artifacts.read(folder, EvalResult, key="evals")}
        value = found.get(objective)
        if value is None or not math.isfinite(value):
            raise DataError(f"{folder}: {objective} is {value}; there are {', '.join(found)}")
        return value


def _launcher(plan: _Plan, task: TaskFunction) -> Any:
    """Hydra's launcher as its own sweeper would have it."""
    loader = GlobalHydra.instance().config_loader()
    config = loader.load_configuration(
        config_name=plan.checker.config_name,
        overrides=[*plan.of_hydra, "hydra.mode=MULTIRUN", *plan.fixed, *as_overrides(low_corner(plan.space))],
        run_mode=RunMode.MULTIRUN,
    )
    context = HydraContext(config_loader=loader, callbacks=Callbacks(config))
    return Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=config)


def _typed(cfg: DictConfig) -> RunConfig:
    task = without_hydra(cfg)
    default_stage(task, cfg.hydra.runtime.choices)
    return to_run_config(task)


def _numbers(group: Sequence[Trial]) -> str:
    return ", ".join(str(trial.number) for trial in group)


def _print_plan(plan: _Plan) -> None:
    """How far the search is, where it may look, and what a trial would do."""
    from prefpipe.plan import show

    file = plan.folder / TRIALS
    rows = orjson.loads(file.read_bytes())["trials"] if file.is_file() else []
    say(_counted(plan, [row["state"] for row in rows]))
    for key, values in plan.space.items():
        say(f"  {key} in {values}")
    say("one trial, at the low ends:")
    show([plan.first], multirun=True)


def _counted(plan: _Plan, states: Sequence[str]) -> str:
    text = f"search in {plan.folder}: {states.count('complete')} of {plan.sweep.trials} trials finished"
    return text + "".join(f", {states.count(word)} {word}" for word in ("running", "failed") if word in states)
