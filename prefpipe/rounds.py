"""Where each artifact of a run lies, and which one a stage reads when nothing else is said."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefpipe import artifacts
from prefpipe.errors import ArtifactError, ConfigError
from prefpipe.settings import InputsConfig

BASE = "base"
"""The word for the starting model in inputs.checkpoint, and the folder of its evaluation."""

WRITTEN_BY = {
    "prompts": "prepare",
    "completions": "generate",
    "scored": "score",
    "pairs": "pair",
    "demonstrations": "pair",
    "checkpoint": "train",
}


@dataclass(frozen=True)
class Layout:
    """The folders of one run.

    shared: runs/<exp_name>. point: the name of one point of a sweep, "" otherwise; a point writes into its own folder
    and finds what it does not have itself in the shared one.
    """

    shared: Path
    point: str
    round: int

    @property
    def root(self) -> Path:
        return self.shared / "points" / self.point if self.point else self.shared

    @property
    def round_folder(self) -> Path:
        return self.root / f"round_{self.round}"

    def log_file(self, stage: str) -> Path:
        """Where a stage's log is kept, over all its attempts."""
        return self.root / "logs" / f"{stage}-round_{self.round}.log"

    def output(self, name: str) -> Path:
        """Where this round's artifact of that name is written."""
        return self.round_folder / name

    def candidates(self, name: str) -> list[Path]:
        """Where an input of that name may lie, best first: this round's, then what came with the data."""
        roots = [self.root] if not self.point else [self.root, self.shared]
        of_round = [root / f"round_{self.round}" / name for root in roots]
        given = [root / name for root in roots]
        return given if name == "prompts" else of_round if name == "completions" else of_round + given

    def input(self, name: str, explicit: Any) -> list[Path]:
        """The artifacts that `inputs.<name>` means.

        Raises ArtifactError when the stage that writes them has not run.
        """
        if explicit is not None:
            return [_existing(name, path) for path in _paths(name, explicit)]
        candidates = self.candidates(name)
        for path in candidates:
            if artifacts.is_complete(path):
                return [path]
        places = " or ".join(str(path) for path in candidates)
        raise ArtifactError(
            f"no {name} in {places}; run stage={WRITTEN_BY[name]} first (or stage=prepare on data that has {name}), "
            f"or say where with inputs.{name}="
        )

    def nearest(self, names: Sequence[str]) -> dict[str, list[Path]]:
        """The one of several inputs that lies nearest: made in this round, or else come with the data.

        Raises ArtifactError when there is none, or when two of them are equally near.
        """
        for paths in zip(*(self.candidates(name) for name in names), strict=True):
            found = {name: [path] for name, path in zip(names, paths, strict=True) if artifacts.is_complete(path)}
            if len(found) > 1:
                keys = ", ".join(f"inputs.{name}={path[0]}" for name, path in found.items())
                raise ArtifactError(f"{paths[0].parent} has {' and '.join(found)}; say which is meant, or both: {keys}")
            if found:
                return found
        return {names[0]: self.input(names[0], None)}

    def browsable(self, inputs: InputsConfig) -> dict[str, Path]:
        """Title → the artifacts of rows to look at: those that `inputs` names, or else all of this run and round.

        Raises ArtifactError when there is none.
        """
        names = ("prompts", "completions", "scored", "pairs", "demonstrations")
        given = [path for name in names for path in self._given(name, getattr(inputs, name))]
        places = [path for name in (*names, "eval_samples") for path in (self.root / name, self.output(name))]
        places.append(self.root / BASE / "eval_samples")
        found = given or [path for path in places if artifacts.is_complete(path)]
        if not found:
            raise ArtifactError(
                f"no rows to look at in {self.root} and {self.round_folder}; run stage=prepare first, or say where "
                f"with inputs.pairs= (prompts, completions, scored, demonstrations)"
            )
        return {self._title(path): path for path in found}

    def _given(self, name: str, explicit: Any) -> list[Path]:
        return [] if explicit is None else self.input(name, explicit)

    def _title(self, path: Path) -> str:
        """Its place in this run, or for an artifact from elsewhere its name and what it holds."""
        if path.resolve().is_relative_to(self.root.resolve()):
            return "-".join(path.resolve().relative_to(self.root.resolve()).parts)
        return f"{path.resolve().name}-{artifacts.digest(path)[:8]}"

    def newest_checkpoint(self) -> Path | None:
        """The checkpoint of the round before; None in round 0, which starts from the base model."""
        if self.round == 0:
            return None
        path = self.root / f"round_{self.round - 1}" / "checkpoint"
        if not artifacts.is_complete(path):
            raise ArtifactError(f"no checkpoint in {path}; run stage=train round={self.round - 1} first")
        return path


def explicit_checkpoint(inputs: InputsConfig) -> Path | None:
    """The folder of inputs.checkpoint; None when it is not given or is the word `base`."""
    if inputs.checkpoint in (None, BASE):
        return None
    return _model_folder("inputs.checkpoint", str(inputs.checkpoint), f"a folder with a model, or the word {BASE}")


def explicit_reference(inputs: InputsConfig) -> Path | None:
    """The folder of inputs.reference; None when it is not given."""
    return _model_folder("inputs.reference", inputs.reference, "a folder with a model") if inputs.reference else None


def explicit_adapter(inputs: InputsConfig) -> Path:
    """The folder of the adapter that inputs.checkpoint names: itself, or the `adapter` of a checkpoint."""
    for folder in (Path(inputs.checkpoint or BASE), Path(inputs.checkpoint or BASE) / "adapter"):
        if inputs.checkpoint is not None and (folder / "adapter_config.json").is_file():
            return folder
    given = "null" if inputs.checkpoint is None else inputs.checkpoint
    raise ConfigError(
        f"inputs.checkpoint={given} holds no adapter (adapter_config.json); stage=merge needs the folder of one, such "
        f"as the folder adapter of a checkpoint of model.adapter=lora"
    )


def _model_folder(key: str, name: str, allowed: str) -> Path:
    path = Path(name)
    if not path.is_dir():
        raise ConfigError(f"{key}={path}: no such folder; give {allowed}")
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise ConfigError(
            f"{key}={path} is an adapter without its model; give the checkpoint folder above it, whose weights have it "
            f"merged in, or make one: prefpipe stage=merge exp_name=NAME inputs.checkpoint={path}"
        )
    return path


def _paths(name: str, explicit: Any) -> Sequence[str]:
    if isinstance(explicit, str):
        return [explicit]
    if isinstance(explicit, list) and explicit and all(isinstance(path, str) for path in explicit):
        return explicit
    raise ConfigError(f"inputs.{name}={explicit!r} must be a path or a list of paths")


def _existing(name: str, path: str) -> Path:
    artifacts.manifest(Path(path), key=f"inputs.{name}")
    return Path(path)
