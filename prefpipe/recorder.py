"""What a command tells the tracker of its run: which records it keeps, and where they hang in the tree of runs.

A sweep stands above its points, a loop above its stages: both are found by their folder, so that whatever runs in it,
on whichever machine and day, comes under the same run. A checkpoint has a run, and its evaluations go into it.
"""

import contextlib
import getpass
import importlib.util
import logging
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from prefpipe import artifacts, rounds, torchrun, tracking
from prefpipe.check import point_name
from prefpipe.config import RunConfig
from prefpipe.errors import ConfigError
from prefpipe.pairers import Demonstrator
from prefpipe.provenance import git_state
from prefpipe.rounds import BASE, Layout
from prefpipe.settings import Stage
from prefpipe.tracking import Sink, records
from prefpipe.tracking.tracker import Tracker

log = logging.getLogger(__name__)

RECORDED = (Stage.prepare, Stage.generate, Stage.score, Stage.pair, Stage.train, Stage.evaluate, Stage.loop)
NOT_A_SETTING = ("stage", "plan", "overwrite", "tracking")
MAX_VALUE = 500
"""Characters of a setting; MLflow cuts longer ones without a word, and the folder's config has them all."""


class Recorder:
    """Of one command. What goes wrong here is a warning, but for a tracker that is not installed."""

    def __init__(self, run: RunConfig, cfg: DictConfig, layout: Layout) -> None:
        self.run, self.cfg, self.at = run, cfg, layout
        self.tracker = Tracker(run.tracking, layout.log_file("tracking"))
        self._training: list[Path] = []

    def start(self) -> None:
        """Before the stage. Raises ConfigError where the tracker's package is missing."""
        if not self._is_on():
            return
        check_installed(self.run.tracking)
        if self.run.stage is Stage.loop:
            self._guarded(lambda: [self._loop()])
        else:
            self.tracker.start()

    def training_begins(self) -> None:
        """When the work folder is there and the training process is not: its metrics are told while they are made."""
        if self._is_on():
            self._training = self._guarded(lambda: [self._made(self.at.output("checkpoint"), Stage.train, made=False)])
            for record in self._training:
                self.tracker.follow(record)

    def finish(self, error: BaseException | None) -> None:
        """After the stage, with what ended it."""
        if not self._is_on():
            return
        if error is None:
            self.tracker.finish(self._guarded(self._finished), "FINISHED")
            return
        begun = [self._loop_file] if self.run.stage is Stage.loop else self._training
        self.tracker.finish(begun, "FAILED" if isinstance(error, Exception) else "KILLED")

    def _is_on(self) -> bool:
        """Of several nodes that train together, the first one tells."""
        if not isinstance(self.run.tracking, Sink) or self.run.stage not in RECORDED:
            return False
        return self.run.hardware.num_nodes == 1 or torchrun.node_rank(self.run.hardware) == 0

    def _finished(self) -> list[Path]:
        """Records of what the stage has made."""
        stage, at = self.run.stage, self.at
        if stage is Stage.loop:
            return [self._loop_file]
        if stage is Stage.evaluate:
            return self._evaluated()
        pairs = "demonstrations" if isinstance(self.run.pairer, Demonstrator) else "pairs"
        made = {
            Stage.prepare: at.root / "prompts",
            Stage.generate: at.output("completions"),
            Stage.score: at.output("scored"),
            Stage.pair: at.output(pairs),
            Stage.train: at.output("checkpoint"),
        }[stage]
        # Outside of a loop the stages before training have no run to hang under.
        told = stage is Stage.train or self._loop_file.is_file()
        return [self._made(made, stage, made=True)] if told and artifacts.is_complete(made) else []

    def _evaluated(self) -> list[Path]:
        """An evaluation goes into the run of the checkpoint that it is of; the starting model's has one of its own."""
        base = self.run.inputs.checkpoint == BASE
        evals = self.at.root / BASE / "evals" if base else self.at.output("evals")
        if not artifacts.is_complete(evals):
            return []
        found, into = [], {}
        checkpoint = None if base else rounds.explicit_checkpoint(self.run.inputs) or self.at.output("checkpoint")
        if checkpoint == self.at.output("checkpoint") and artifacts.is_complete(checkpoint):
            found = [self._made(checkpoint, Stage.train, made=True)]
        elif checkpoint and records.path_of(checkpoint).is_file():
            found = [records.path_of(checkpoint)]
        for record in found:
            into[os.path.relpath(record, evals.parent)] = records.last_step(records.artifact_of(record))
        own_run = not found
        if self._loop_file.is_file():
            into[os.path.relpath(self._loop_file, evals.parent)] = 0 if base else self.run.round + 1
        return [*found, self._made(evals, Stage.evaluate, made=True, own_run=own_run, into=into)]

    def _made(self, artifact: Path, stage: Stage, *, made: bool, **known: object) -> Path:
        """The record of an artifact."""
        loop = self._loop_file if self._loop_file.is_file() else None
        whole = self.run.point or self.run.exp_name
        base = stage is Stage.evaluate and artifact.parent.name == BASE
        part = BASE if base else f"round_{self.run.round}" if loop or self.run.round else ""
        name = f"{stage.value if loop else whole} {part if stage is not Stage.prepare else ''}".strip()
        parent = loop or self._sweep()
        settings, tags = self._settings(), self._tags()
        return records.begin(artifact, stage.value, name, made=made, parent=parent, params=settings, tags=tags, **known)

    @property
    def _loop_file(self) -> Path:
        return self.at.root / f"loop{records.SUFFIX}"

    def _loop(self) -> Path:
        sweep, name = self._sweep(), self.run.point or self.run.exp_name
        parent = os.path.relpath(sweep, self.at.root) if sweep else None
        return records.ensure_group(
            self._loop_file, "loop", name, parent=parent, params=self._settings(), tags=self._tags()
        )

    def _sweep(self) -> Path | None:
        return sweep_record(self.at) if self.run.point else None

    def _settings(self) -> dict[str, str]:
        """The config as dotted keys and texts."""
        flat = tracking.flatten(OmegaConf.to_container(self.cfg, resolve=True, enum_to_str=True))
        told = {key: str(value) for key, value in flat if key.partition(".")[0] not in NOT_A_SETTING}
        return {key: value for key, value in told.items() if len(value) <= MAX_VALUE}

    def _tags(self) -> dict[str, str]:
        """Where and by whom it was begun."""
        found = {"folder": self.at.root, "host": socket.gethostname(), "slurm_job": os.environ.get("SLURM_JOB_ID")}
        with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
            found["user"] = getpass.getuser()
        return {key: str(value) for key, value in {**git_state(), **found}.items() if value is not None}

    def _guarded(self, write: Callable[[], list[Path]]) -> list[Path]:
        try:
            return write()
        except Exception as error:  # a full disk, or a folder that is not ours: the run is worth more than its record
            log.warning(
                "tracking=%s: no record of this run: %s: %s", self.run.tracking.name, type(error).__name__, error
            )
            return []


def sweep_record(at: Layout) -> Path:
    """The record of the sweep that a point belongs to: one for all points of its folder."""
    return records.ensure_group(at.shared / "multirun" / f"sweep{records.SUFFIX}", "sweep", at.shared.name)


def prepare_sweep(configs: Sequence[DictConfig]) -> None:
    """Make the tracker's store, and the sweep's run in it, before the points fan out and all do so at once.

    Args:
        configs: each point's, as composed, with its hydra node.
    """
    seen: list[tuple[str, object]] = []
    for cfg in configs:
        if cfg.tracking.name == "none" or cfg.plan:
            continue
        HydraConfig.instance().set_config(cfg)
        sink, point = OmegaConf.to_object(cfg.tracking), point_name(list(cfg.hydra.overrides.task))
        stage = Stage.loop if OmegaConf.is_missing(cfg, "stage") else cfg.stage  # an experiment given alone
        at = Layout(Path(cfg.paths.runs) / cfg.exp_name, point, cfg.round)
        if not point or not isinstance(sink, Sink) or stage not in RECORDED or (str(at.shared), sink) in seen:
            continue
        seen.append((str(at.shared), sink))
        check_installed(sink)
        Tracker(sink, at.shared / "logs" / "tracking.log").finish([sweep_record(at)], "FINISHED")


def check_installed(sink: tracking.Tracking) -> None:
    """Raise ConfigError where the tracker's package is missing."""
    if isinstance(sink, Sink) and sink.needs and importlib.util.find_spec(sink.needs) is None:
        raise ConfigError(f"tracking={sink.name} needs the package {sink.needs}: pip install 'prefpipe[{sink.needs}]'")
