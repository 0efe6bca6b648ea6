"""What `prefpipe -m` does besides Hydra: points are put in line with their frozen configs, and started again."""

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from prefpipe.check import default_stage, point_name, without_hydra
from prefpipe.config import freeze, register_schemas, to_run_config
from prefpipe.errors import ArtifactError, ConfigError, PrefpipeError
from prefpipe.launch import status
from prefpipe.launch.attempts import DONE, FAILED, Unit, queued_now
from prefpipe.launch.status import Status
from prefpipe.logs import say, set_up_logging
from prefpipe.processes import ChildError, run_process
from prefpipe.run import Command
from prefpipe.suggest import one_line

SLURM_LAUNCHER = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
OWN_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
"""The one whose points are known before it runs."""


class SweepError(PrefpipeError, RuntimeError):
    """Some points failed; each has been told of."""


def prepare(configs: Sequence[DictConfig]) -> None:
    """Before Hydra runs the points of a sweep, as composed by check.Checker: put them in line; or Slurm will."""
    first = configs[0]
    if first.hydra.launcher._target_ == SLURM_LAUNCHER:
        from prefpipe.launch import slurm

        slurm.install()
    elif first.hydra.sweeper._target_ == OWN_SWEEPER:
        for composed in configs:
            cfg, unit = point_of(composed)
            freeze(cfg, unit.config)
            unit.put_in_line(queued_now(os.getcwd()))


def point_of(composed: DictConfig) -> tuple[DictConfig, Unit]:
    """A point's own config, without Hydra's, and what it starts."""
    HydraConfig.instance().set_config(composed)
    cfg = without_hydra(composed)
    default_stage(cfg, composed.hydra.runtime.choices)
    point = point_name(composed.hydra.overrides.task)
    if point:
        cfg.point = point
    return cfg, Command(to_run_config(cfg), cfg).unit


def is_done(command: Command, jobs: status.Jobs, launcher: Mapping[str, Any] | None = None) -> bool:
    """Whether all that a point makes is there, of the very settings and inputs that it would be made of now.

    launcher: the settings of hydra/launcher where Slurm runs it. Also where its last attempt failed, it is not done.
    """
    from prefpipe import plan

    return status.status_of(command.unit, jobs).state == DONE and plan.finds_all(command, slurm=launcher)


def frozen_text(cfg: DictConfig) -> str:
    """What config.freeze writes."""
    return OmegaConf.to_yaml(cfg, resolve=True)


def status_command(words: Sequence[str]) -> None:
    """`prefpipe status DIR …`."""
    if not words or any(word.startswith("-") for word in words):
        raise ConfigError("usage: prefpipe status DIR …, each the folder of a run, such as runs/default")
    for number, word in enumerate(words):
        title = f"{chr(10) * bool(number)}{word}\n" if len(words) > 1 else ""
        say(title + status.table(status.statuses(_run_folder(word))))


def retry_command(words: Sequence[str]) -> None:
    """`prefpipe retry DIR [--only KIND,…]`: start what failed again, as it was started before."""
    folders = [word for word in words if not word.startswith("-")]
    only = {kind for word in words if word.startswith("--only=") for kind in word.removeprefix("--only=").split(",")}
    if len(folders) != 1 or len(words) - len(folders) > 1 or (len(words) > 1 and not only):
        raise ConfigError("usage: prefpipe retry DIR [--only=KIND,…], with classes of failure from prefpipe status DIR")
    set_up_logging()
    register_schemas()
    run = _run_folder(folders[0])
    failed = [found for found in status.statuses(run) if found.state == FAILED]
    chosen = [found for found in failed if not only or found.kind in only]
    started = [found for found in chosen if found.unit.config.is_file() and found.unit.queued() is not None]
    if only and not chosen:
        there = Counter(found.kind for found in failed)
        kinds = ", ".join(f"{kind} {count}" for kind, count in there.most_common()) or "none"
        raise ConfigError(f"--only={','.join(sorted(only))}: nothing in {run} failed so; failures: {kinds}")
    if chosen and not started:
        raise ArtifactError(
            f"{run}: {_names(chosen)} failed, and no sweep started it; give the command that did once more: it goes on "
            f"where that stopped"
        )
    if not started:
        say(f"nothing in {run} failed")
        return
    failed_again = [again for group in _alike(started) for again in _start(run, *group)]
    report_failures(run, failed_again, len(started))


def report_failures(run: Path, failed: Sequence[Status], total: int) -> None:
    """One line for each, then SweepError; nothing where there is none."""
    for found in failed:
        said = one_line(found.why or found.kind)
        print(f"prefpipe: error: [{found.unit.point or found.unit.name}] {said}", file=sys.stderr)
    if failed:
        kinds = ", ".join(f"{kind} {count}" for kind, count in Counter(found.kind for found in failed).most_common())
        raise SweepError(
            f"{len(failed)} of {total} jobs failed ({kinds}); prefpipe status {run} shows them, prefpipe retry {run} "
            f"starts them again"
        )


def _start(run: Path, units: Sequence[Unit], launcher: Mapping[str, Any] | None, folder: str) -> list[Status]:
    """Start units in the folder where they ran before; those that fail again."""
    if launcher is not None:
        from prefpipe.launch import slurm

        return slurm.submit_and_wait(run, units, launcher, slurm.launch_config(units[0]), folder)
    for unit in units:
        unit.put_in_line(queued_now(folder))
    for unit in units:
        config = unit.config.absolute()
        with contextlib.suppress(ChildError), contextlib.chdir(folder):
            run_process([sys.executable, "-m", "prefpipe.worker", str(config)], unit.point or unit.name)
    return [found for unit in units if (found := status.status_of(unit, None)).state == FAILED]


def _alike(found: Sequence[Status]) -> list[tuple[list[Unit], Mapping[str, Any] | None, str]]:
    """Units that were started alike: with the same launcher (None: on this machine), from the same folder."""
    groups: dict[bytes, tuple[list[Unit], Mapping[str, Any] | None, str]] = {}
    for one in found:
        queued = one.unit.queued()
        assert queued is not None
        key = orjson.dumps([queued.launcher, queued.folder], option=orjson.OPT_SORT_KEYS)
        groups.setdefault(key, ([], queued.launcher, queued.folder))[0].append(one.unit)
    return list(groups.values())


def _names(found: Sequence[Status]) -> str:
    return ", ".join(f"{one.unit.point} {one.unit.name}".strip() for one in found[:3]) + ", …" * (len(found) > 3)


def _run_folder(word: str) -> Path:
    folder = Path(word)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; give the folder of a run, such as runs/default")
    return folder
