"""One command from its typed config to its stage: the table of contents of everything that can happen."""

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from prefpipe import artifacts, rounds
from prefpipe.config import RunConfig, freeze, to_run_config
from prefpipe.errors import ArtifactError, ConfigError
from prefpipe.launch.attempts import EVALUATE_BASE, Unit, attempt_at
from prefpipe.logs import log_to, say
from prefpipe.pairers import Demonstrator
from prefpipe.recorder import Recorder
from prefpipe.rounds import BASE, Layout
from prefpipe.settings import Stage

log = logging.getLogger(__name__)

READERS = ("analyze", "report", "preview", "browse", "sync")
"""Stages that look at artifacts and make none."""


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

    @cached_property
    def recorder(self) -> Recorder:
        return Recorder(self.run, self.cfg, self.layout)

    def start(self) -> None:
        """Dispatch to the stage."""
        run, at = self.run, self.layout
        if run.plan:
            from prefpipe.plan import plan_of

            say(plan_of([self]))
            return
        with attempt_at(self.unit):
            self._start(at)

    def _start(self, at: Layout) -> None:
        run, started = self.run, time.time()
        log_to(at.log_file(self._log_name))
        log.info("stage=%s exp_name=%s round=%d", run.stage.value, run.exp_name, run.round)
        if run.generator.shard is not None and run.stage in (Stage.evaluate, Stage.loop):
            raise ConfigError(
                f"generator.shard={run.generator.shard} would be ignored by stage={run.stage.value}, as only "
                f"stage=generate samples in shards; drop it"
            )
        if run.hardware.num_nodes > 1 and run.stage is not Stage.train:
            raise ConfigError(
                f"hardware.num_nodes={run.hardware.num_nodes} is for stage=train alone, and stage={run.stage.value} "
                f"would run on each of the nodes; use hardware.num_nodes=1 there, and stage=train on its own"
            )
        self.recorder.start()
        try:
            self.dispatch()
        except BaseException as error:
            log.debug("stage=%s ended: %s: %s", run.stage.value, type(error).__name__, error, exc_info=True)
            self.recorder.finish(error)
            raise
        self.recorder.finish(None)
        log.info("stage=%s done in %.1f s", run.stage.value, time.time() - started)

    def dispatch(self) -> None:
        """Run the stage, and no more."""
        stages: dict[Stage, Callable[[], None]] = {
            Stage.prepare: self._prepare,
            Stage.generate: self._generate,
            Stage.score: self._score,
            Stage.pair: self._pair,
            Stage.train: self._train,
            Stage.evaluate: self._evaluate,
            Stage.analyze: self._analyze,
            Stage.report: self._report,
            Stage.preview: self._preview,
            Stage.browse: self._browse,
            Stage.merge: self._merge,
            Stage.sync: self._sync,
            Stage.loop: self._loop,
        }
        stages[self.run.stage]()

    @property
    def unit(self) -> Unit:
        """What is started, for the record of attempts."""
        run, at = self.run, self.layout
        sharded = run.stage is Stage.generate and run.generator.shard is not None
        shard = f"{run.generator.shard}-of-{run.generator.num_shards}" if sharded else ""
        base = run.stage is Stage.evaluate and run.inputs.checkpoint == BASE
        return Unit(at.shared, at.point, at.round, EVALUATE_BASE if base else run.stage.value, shard)

    @property
    def _log_name(self) -> str:
        """Of the stage; shards run side by side, so each has its own."""
        generator = self.run.generator
        shard = f"-shard-{generator.shard}-of-{generator.num_shards}" if generator.shard is not None else ""
        return self.run.stage.value + (shard if self.run.stage is Stage.generate else "")

    def _prepare(self) -> None:
        from prefpipe.stages.prepare import prepare

        prepare(
            self.layout.root,
            mixer=self.run.data_mixer,
            seed=self.run.seed,
            count_tokens=(f"{self.run.model.path}@{self.run.model.revision}", self._token_counter),
            overwrite=self.run.overwrite,
        )

    def _generate(self) -> None:
        from prefpipe.stages.generate import generate

        run, at = self.run, self.layout
        generate(
            at.input("prompts", run.inputs.prompts),
            at.output("completions"),
            generator=run.generator,
            sampling=run.sampling,
            model=run.model,
            folder=self._sampling_policy() if run.generator.samples_policy else None,
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
        from prefpipe.stages.demonstrate import demonstrate
        from prefpipe.stages.pair import pair

        run, at = self.run, self.layout
        scored = at.input("scored", run.inputs.scored)
        if isinstance(run.pairer, Demonstrator):
            out = at.output("demonstrations")
            demonstrate(scored, out, pairer=run.pairer, seed=run.seed, overwrite=run.overwrite)
            return
        pair(scored, at.output("pairs"), pairer=run.pairer, seed=run.seed, overwrite=run.overwrite)

    def _train(self) -> None:
        from prefpipe.stages.train import train

        run, at = self.run, self.layout
        if not run.loss.needs_reference and run.inputs.reference:
            raise ConfigError(
                f"inputs.reference={run.inputs.reference}, but loss={run.loss.name} reads no reference; drop it"
            )
        if run.inputs.reference and run.inputs.reference_logps:
            raise ConfigError(
                f"inputs.reference={run.inputs.reference} would be ignored, as "
                f"inputs.reference_logps={run.inputs.reference_logps} stands in for it; drop one of them"
            )
        policy = self._training_start()
        train(
            self._training_data(),
            at.output("checkpoint"),
            model=run.model,
            policy=policy,
            reference=rounds.explicit_reference(run.inputs) or policy,
            loss=run.loss,
            training=run.training,
            selection=run.selection,
            hardware=run.hardware,
            seed=run.seed,
            freeze=self._freeze_for_worker,
            reference_logps=Path(run.inputs.reference_logps) if run.inputs.reference_logps else None,
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

    def _preview(self) -> None:
        from prefpipe.stages.preview import preview

        run, at = self.run, self.layout
        text = preview(
            self._training_data(),
            at.output("preview.html"),
            model=run.model,
            policy=self._training_start(),
            loss=run.loss,
            training=run.training,
            selection=run.selection,
            num_examples=run.preview.num_examples,
        )
        say(text)

    def _browse(self) -> None:
        from prefpipe.stages.browse import browse

        run, at = self.run, self.layout
        for page in browse(at.browsable(run.inputs), at.root / "browse", settings=run.browse, seed=run.seed):
            say(str(page))

    def _merge(self) -> None:
        from prefpipe.stages.merge import merge

        run = self.run
        merge(
            rounds.explicit_adapter(run.inputs),
            self.layout.output("checkpoint"),
            model=run.model,
            base=self._base_model(),
            hardware=run.hardware,
            overwrite=run.overwrite,
        )

    def _sync(self) -> None:
        from prefpipe.stages.sync import sync

        sync(self.layout.root, tracking=self.run.tracking)

    def _loop(self) -> None:
        from prefpipe.stages.loop import loop

        if isinstance(self.run.pairer, Demonstrator) and self.run.loss.pairwise and "pair" in self.run.recipe.stages:
            raise ConfigError(
                f"pairer={self.run.pairer.name} makes demonstrations, and loss={self.run.loss.name} reads pairs; use "
                f"loss=sft, or a pairer that makes pairs"
            )
        config = self.layout.root / "loop.yaml"
        freeze(self.cfg, config)
        loop(config, self.run.recipe, record=self.layout.root / "loop.json")

    def _token_counter(self) -> Callable[[Sequence[str]], list[int]]:
        from prefpipe.models import load_tokenizer

        tokenizer = load_tokenizer(self.run.model, self._base_model())
        return lambda texts: [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

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

    def _training_data(self) -> dict[str, list[Path]]:
        """The pairs; where no rejected side is read, the demonstrations, or pairs for their chosen side."""
        given = {
            name: paths
            for name, paths in (("pairs", self.run.inputs.pairs), ("demonstrations", self.run.inputs.demonstrations))
            if paths is not None
        }
        if not self.run.loss.pairwise:
            at = self.layout
            found = {name: at.input(name, paths) for name, paths in given.items()}
            return found or at.nearest(["demonstrations", "pairs"])
        if "demonstrations" in given:
            raise ConfigError(
                f"inputs.demonstrations={given['demonstrations']}: demonstrations have no rejected side, which "
                f"loss={self.run.loss.name} reads; train on pairs, or with loss=sft"
            )
        return {"pairs": self.layout.input("pairs", given.get("pairs"))}

    def _pairs_to_evaluate(self) -> list[Path]:
        """Pairs that came with the data, or are named; made pairs hold no held-out prompt."""
        if self.run.inputs.pairs is not None:
            return self.layout.input("pairs", self.run.inputs.pairs)
        roots = (self.layout.root, self.layout.shared)
        return next(([root / "pairs"] for root in roots if artifacts.is_complete(root / "pairs")), [])

    def _freeze_for_worker(self, inputs: dict[str, object], name: str) -> Path:
        cfg = self.cfg.copy()
        for key, value in inputs.items():
            OmegaConf.update(cfg, f"inputs.{key}", value)
        path = self.layout.round_folder / f"{name}.yaml"
        freeze(cfg, path)
        self.recorder.training_begins()
        return path
