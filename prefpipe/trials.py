"""The trials of a search: chosen by Optuna, kept in a journal, so that a killed search goes on where it was.

A trial that was begun stays one until its result is known: a later command launches it again, under the same number.
What the sampler draws depends on the seed, the trial's number and the results before it, never on how often the search
was stopped; so a stopped search tries the points that it would have tried.
"""

import hashlib
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import orjson
from filelock import FileLock, Timeout

from prefpipe.artifacts import differences
from prefpipe.errors import ArtifactError, ConfigError
from prefpipe.settings import SweepConfig

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)

ERROR, BATCH = "error", "batch"
"""Attributes in the journal: why a trial failed; the number of the first trial of the last batch, and its size."""


@dataclass(frozen=True)
class Choices:
    """One of some values, spelt as on the command line; no order among them is assumed."""

    values: tuple[str, ...]

    def __str__(self) -> str:
        return ",".join(self.values)


@dataclass(frozen=True)
class Interval:
    """A number between two others, both included. step: between whole numbers; log: drawn by its logarithm."""

    low: float
    high: float
    log: bool = False
    whole: bool = False
    step: int = 1

    def __str__(self) -> str:
        more = [f"step {self.step}"] * (self.step != 1) + ["log"] * self.log + ["whole"] * self.whole
        return f"{self.low:g}..{self.high:g}" + (f" ({', '.join(more)})" if more else "")


Space = Mapping[str, Choices | Interval]
Values = dict[str, str]
"""Key → value, spelt as on the command line."""


@dataclass(frozen=True)
class Trial:
    """One point that is tried. state: "running", "complete" or "failed"; value: of the objective, once complete."""

    number: int
    values: Values
    state: str
    value: float | None = None
    error: str | None = None


class Trials:
    """All trials of one search. Made by `open_trials`."""

    def __init__(self, study: "optuna.Study", space: Space, sweep: SweepConfig) -> None:
        self._study, self._space, self._sweep = study, space, sweep

    def all(self) -> list[Trial]:
        """In the order of their numbers."""
        return [self._trial(found) for found in self._study.get_trials(deepcopy=False)]

    def of(self, state: str) -> list[Trial]:
        """Those in that state."""
        return [trial for trial in self.all() if trial.state == state]

    def best(self) -> Trial | None:
        """The complete trial of the best value, the first of equals; None before there is one."""
        sign = 1 if self._sweep.direction == "maximize" else -1
        return max(self.of("complete"), key=lambda trial: (sign * (trial.value or 0.0), -trial.number), default=None)

    def batch(self, size: int) -> list[Trial]:
        """Trials to run together: those of the last batch that have no result yet, or else `size` new ones."""
        trials = self.all()
        first, planned = self._study.user_attrs.get(BATCH, (0, 0))
        done = len(trials) >= first + planned and all(trial.state != "running" for trial in trials[first:])
        if done:
            first, planned = len(trials), size
            self._study.set_user_attr(BATCH, [first, planned])
        for trial in trials[first:]:
            self._complete_values(trial)
        for number in range(len(trials), first + planned):
            self._ask(number)
        return [trial for trial in self.all()[first:] if trial.state == "running"]

    def finish(self, trial: Trial, value: float) -> None:
        """Record a trial's value. Raises ValueError for one that is not finite: such a trial has failed."""
        if not math.isfinite(value):
            raise ValueError(f"trial {trial.number}: {value}")
        self._study.tell(trial.number, value)

    def fail(self, trial: Trial, reason: str) -> None:
        """Record that a trial has no value, and why."""
        from optuna.trial import TrialState

        self._again(trial.number).set_user_attr(ERROR, reason)
        self._study.tell(trial.number, state=TrialState.FAIL)

    def _ask(self, number: int) -> None:
        self._study.sampler = self._sampler(number, 0)
        asked = self._study.ask()
        assert asked.number == number
        self._draw(asked)

    def _complete_values(self, trial: Trial) -> None:
        """A search that was killed while it asked has drawn some of a trial's values."""
        if trial.state == "running" and len(trial.values) < len(self._space):
            self._study.sampler = self._sampler(trial.number, 0)
            self._draw(self._again(trial.number))

    def _draw(self, trial: "optuna.Trial") -> None:
        """Draw what the trial does not have yet."""
        for part, (key, values) in enumerate(self._space.items(), start=1):
            self._study.sampler = self._sampler(trial.number, part)
            if isinstance(values, Choices):
                trial.suggest_categorical(key, list(values.values))
            elif values.whole:
                trial.suggest_int(key, int(values.low), int(values.high), step=values.step, log=values.log)
            else:
                trial.suggest_float(key, values.low, values.high, log=values.log)

    def _again(self, number: int) -> "optuna.Trial":
        import optuna

        return optuna.Trial(self._study, self._study.get_trials(deepcopy=False)[number]._trial_id)

    def _sampler(self, number: int, part: int) -> "optuna.samplers.BaseSampler":
        """part: 0 where all values of a trial are drawn together, or else the number of the one."""
        from optuna.samplers import RandomSampler, TPESampler

        text = f"{self._sweep.seed} {number} {part}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        return RandomSampler(seed=seed) if self._sweep.sampler == "random" else TPESampler(seed=seed)

    def _trial(self, found: "optuna.trial.FrozenTrial") -> Trial:
        states = {"COMPLETE": "complete", "FAIL": "failed"}
        return Trial(
            number=found.number,
            values={key: _spelt(found.params[key]) for key in self._space if key in found.params},
            state=states.get(found.state.name, "running"),
            value=found.value,
            error=found.user_attrs.get(ERROR),
        )


@contextmanager
def open_trials(folder: Path, sweep: SweepConfig, space: Space, settings: Mapping[str, Any]) -> Iterator[Trials]:
    """The search of a folder, begun or gone on with; no other process may search there meanwhile.

    Args:
        settings: all that the value of a trial depends on besides its own values; kept with the first trial.

    Raises:
        ConfigError: Optuna is missing, or the search was begun with another space, objective or settings.
        ArtifactError: another process searches there, or the journal is damaged.
    """
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise ConfigError("sweep=optuna needs Optuna: pip install 'prefpipe[optuna]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ArtifactError(f"{folder}: another process searches there; wait for it, or end it") from None
    try:
        journal = folder / "journal.jsonl"
        _cut_torn_line(journal)
        storage = JournalStorage(JournalFileBackend(str(journal), lock_obj=cast(Any, _NoLock())))
        study = optuna.create_study(
            storage=storage, study_name="search", direction=cast(Any, sweep.direction), load_if_exists=True
        )
        _refuse_other_search(study, folder, sweep, space, settings)
        yield Trials(study, space, sweep)
    finally:
        lock.release()


class _NoLock:
    """The journal's own lock would outlive a killed search; that of `open_trials` does not, and covers the journal."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        return None


def _cut_torn_line(journal: Path) -> None:
    """A killed write may have left half a line, to which Optuna would append the next one."""
    if not journal.is_file():
        return
    content = journal.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            orjson.loads(line)
        except orjson.JSONDecodeError:
            raise ArtifactError(
                f"{journal}:{number} is damaged; use another exp_name, or delete the file: trials that have finished "
                f"are up to date, and cost nothing when they are tried again"
            ) from None
    if whole != content:
        log.warning("%s: its last line was cut by a kill, and is dropped", journal)
        os.truncate(journal, len(whole))


def _refuse_other_search(
    study: "optuna.Study", folder: Path, sweep: SweepConfig, space: Space, settings: Mapping[str, Any]
) -> None:
    """Trials of other settings would be compared with these as if they were alike."""
    mine = {"sweep.objective": sweep.objective, "sweep.direction": sweep.direction}
    mine |= {f"sweep.space.{key}": str(values) for key, values in space.items()} | dict(settings)
    mine = orjson.loads(orjson.dumps(mine, default=str))
    begun = study.user_attrs.get("search")
    if begun is None:
        study.set_user_attr("search", mine)
    elif changed := differences(begun, mine):
        raise ConfigError(
            f"{folder} holds a search that was begun with other settings: {'; '.join(changed)}. Use those, or another "
            f"exp_name"
        )


def _spelt(value: Any) -> str:
    """A value that was drawn, as an override has it, to the last digit."""
    return value if isinstance(value, str) else repr(value)


def as_rows(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Trials as plain data, for JSON."""
    return [
        {"number": t.number, "state": t.state, "value": t.value, "values": t.values, "error": t.error} for t in trials
    ]
