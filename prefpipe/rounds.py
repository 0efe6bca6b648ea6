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
    path = Path(str(inputs.checkpoint))
    if not path.is_dir():
        raise ConfigError(f"inputs.checkpoint={path}: no such folder; give a folder with a model, or the word {BASE}")
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
