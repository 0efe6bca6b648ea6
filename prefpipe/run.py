"""One command from its typed config to its stage: the table of contents of everything that can happen."""

import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from prefpipe import artifacts, rounds, tracking
from prefpipe.config import RunConfig, freeze, to_run_config
from prefpipe.errors import ArtifactError, ConfigError
from prefpipe.logs import log_to
from prefpipe.rounds import BASE, Layout
from prefpipe.settings import Stage

log = logging.getLogger(__name__)


def run(cfg: DictConfig, *, point: str = "") -> None:
    """Run the stage of a composed config.

    Args:
        cfg: RunConfig as composed by Hydra, or read back from a frozen file.
        point: the name of this point of a sweep, "" for a single run.
    Raises:
        PrefpipeError: what a user can act on.
    """
    if point:
        cfg.point = point
    settings = to_run_config(cfg)
    Command(settings, cfg).start()


@dataclasses.dataclass(frozen=True)
class Command:
    """One stage with everything it needs: the typed config, and the folders that follow from it."""

    run: RunConfig
    cfg: DictConfig

    @property
    def layout(self) -> Layout:
        return Layout(Path(self.run.paths.runs) / self.run.exp_name, self.run.point, self.run.round)

    def start(self) -> None:
        """Dispatch to the stage."""
        run, at = self.run, self.layout
        if run.plan:
            self._print_plan()
            return
        started = time.time()
        log_to(at.log_file(run.stage.value))
        log.info("stage=%s exp_name=%s round=%d", run.stage.value, run.exp_name, run.round)
        stages: dict[Stage, Callable[[], None]] = {
            Stage.prepare: self._prepare,
            Stage.generate: self._generate,
            Stage.score: self._score,
            Stage.pair: self._pair,
            Stage.train: self._train,
            Stage.evaluate: self._evaluate,
            Stage.analyze: self._analyze,
            Stage.report: self._report,
            Stage.loop: self._loop,
        }
        try:
            stages[run.stage]()
        except BaseException as error:
            log.debug("stage=%s ended: %s: %s", run.stage.value, type(error).__name__, error, exc_info=True)
            raise
        if run.tracking.mlflow and run.stage in (Stage.train, Stage.evaluate):
            tracking.send_to_mlflow(at.output("checkpoint"), at.output("evals"), run.tracking, self._flat())
        log.info("stage=%s done in %.1f s", run.stage.value, time.time() - started)

    def _prepare(self) -> None:
        from prefpipe.stages.prepare import prepare

        prepare(self.layout.root, mixer=self.run.data_mixer, seed=self.run.seed, overwrite=self.run.overwrite)

    def _generate(self) -> None:
        from prefpipe.stages.generate import generate

        run, at = self.run, self.layout
        generate(
            at.input("prompts", run.inputs.prompts),
            at.output("completions"),
            generator=run.generator,
            model=run.model,
            folder=self._sampling_policy(),
            hardware=run.hardware,
            seed=run.seed,
            round_=run.round,
            overwrite=run.overwrite,
        )

    def _score(self) -> None:
        from prefpipe.scorers import ScoringContext
        from prefpipe.stages.score import score

        run, at = self.run, self.layout
        completions = at.input("completions", run.inputs.completions)
        context = ScoringContext(
            run.model, self._sampling_policy, run.hardware, cache=Path(run.paths.cache), work=at.root, seed=run.seed
        )
        score(completions, at.output("scored"), scorer=run.scorer, context=context, overwrite=run.overwrite)

    def _pair(self) -> None:
        from prefpipe.stages.pair import pair

        run, at = self.run, self.layout
        scored = at.input("scored", run.inputs.scored)
        pair(scored, at.output("pairs"), pairer=run.pairer, seed=run.seed, overwrite=run.overwrite)

    def _train(self) -> None:
        from prefpipe.stages.train import train

        run, at = self.run, self.layout
        if not run.loss.needs_reference and run.inputs.reference:
            raise ConfigError(
                f"inputs.reference={run.inputs.reference}, but loss={run.loss.name} reads no reference; drop it"
            )
        policy = self._training_start()
        train(
            at.input("pairs", run.inputs.pairs),
            at.output("checkpoint"),
            model=run.model,
            policy=policy,
            reference=Path(run.inputs.reference) if run.inputs.reference else policy,
            loss=run.loss,
            training=run.training,
            selection=run.selection,
            hardware=run.hardware,
            seed=run.seed,
            freeze=self._freeze_for_worker,
            overwrite=run.overwrite,
        )

    def _evaluate(self) -> None:
        from prefpipe.stages.evaluate import evaluate

        run, at = self.run, self.layout
        base = run.inputs.checkpoint == BASE
        folder = self._base_model() if base else rounds.explicit_checkpoint(run.inputs) or at.output("checkpoint")
        if not base and not run.inputs.checkpoint and not artifacts.is_complete(folder):
            raise ArtifactError(
                f"no checkpoint in {folder}; run stage=train first, or evaluate the starting model with "
                f"inputs.checkpoint={BASE}"
            )
        evaluate(
            at.input("prompts", run.inputs.prompts),
            self._pairs_to_evaluate(),
            at.root / BASE / "evals" if base else at.output("evals"),
            tasks=run.task,
            model=run.model,
            folder=folder,
            generator=run.generator,
            training=run.training,
            hardware=run.hardware,
            seed=run.seed,
            overwrite=run.overwrite,
        )

    def _analyze(self) -> None:
        from prefpipe.stages.analyze import analyze

        analyze([self.layout.root], out=self.layout.root)

    def _report(self) -> None:
        from prefpipe.stages.report import report

        report(self.layout.root, out=self.layout.root / "report.html")

    def _loop(self) -> None:
        from prefpipe.stages.loop import loop

        config = self.layout.root / "loop.yaml"
        freeze(self.cfg, config)
        loop(config, self.run.recipe, record=self.layout.root / "loop.json")

    def _base_model(self) -> Path:
        from prefpipe.models import model_folder

        return model_folder(self.run.model, cache=Path(self.run.paths.cache))

    def _sampling_policy(self) -> Path:
        """Whose completions this round trains on: the newest checkpoint, or the base model in round 0."""
        explicit = rounds.explicit_checkpoint(self.run.inputs)
        if explicit or self.run.inputs.checkpoint == BASE:
            return explicit or self._base_model()
        return self.layout.newest_checkpoint() or self._base_model()

    def _training_start(self) -> Path:
        """Where this round's training starts: as the recipe says, unless inputs.checkpoint does."""
        if self.run.inputs.checkpoint is None and self.run.recipe.start_from == BASE:
            return self._base_model()
        return self._sampling_policy()

    def _pairs_to_evaluate(self) -> list[Path]:
        """Pairs that came with the data, or are named; made pairs hold no held-out prompt."""
        if self.run.inputs.pairs is not None:
            return self.layout.input("pairs", self.run.inputs.pairs)
        roots = (self.layout.root, self.layout.shared)
        return next(([root / "pairs"] for root in roots if artifacts.is_complete(root / "pairs")), [])

    def _freeze_for_worker(self, inputs: dict[str, object]) -> Path:
        cfg = self.cfg.copy()
        for name, value in inputs.items():
            OmegaConf.update(cfg, f"inputs.{name}", value)
        path = self.layout.round_folder / "train.yaml"
        freeze(cfg, path)
        return path

    def _flat(self) -> dict[str, Any]:
        """The config as dotted keys and plain values, for trackers."""
        return dict(tracking.flatten(OmegaConf.to_container(self.cfg, resolve=True, enum_to_str=True)))

    def _print_plan(self) -> None:
        """What would run: the stages, where each writes, and whether that is there already."""
        run, at = self.run, self.layout
        recipe = run.recipe
        names = [*recipe.before, *recipe.stages, *recipe.after] if run.stage is Stage.loop else [run.stage.value]
        outputs = {
            "prepare": "prompts",
            "generate": "completions",
            "score": "scored",
            "pair": "pairs",
            "train": "checkpoint",
        }
        print(f"run folder: {at.root}")
        for name in names:
            output = at.root / "prompts" if name == "prepare" else at.output(outputs.get(name, "evals"))
            state = "reads what is there" if name in ("analyze", "report") else str(output)
            if name not in ("analyze", "report"):
                state += " (there already)" if artifacts.is_complete(output) else " (to be made)"
            print(f"  {name:<9} {state}")
