"""Scorers give a completion a number. One file each; add conf/scorer/<name>.yaml."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from prefpipe import models
from prefpipe.errors import ConfigError
from prefpipe.records import Completion
from prefpipe.settings import HardwareConfig, ModelConfig


class Missing(NamedTuple):
    """No score, and why (counted in the manifest). A failed call is never a number."""

    reason: str


Score = float | Mapping[str, float]
"""A finite number, higher is better; or several, kept as "<scorer>.<key>"."""


@dataclass(frozen=True)
class ScoringContext:
    """What some scorers need besides the rows.

    model: of the policy. policy: gives the folder of its weights (and fetches or converts them, so that only scorers
        which ask the policy pay for it). hardware: where models run.
    cache: a folder kept between runs. work: a folder that survives a kill of this stage and goes once it is done.
    counts: what a scorer counts while it scores a part; added up over all parts, also of killed attempts, for `report`.
    """

    model: ModelConfig
    policy: Callable[[], Path]
    hardware: HardwareConfig
    cache: Path
    work: Path
    seed: int = 0
    counts: Counter[str] = field(default_factory=Counter)


def local_model(
    context: ScoringContext, path: str | None, *, revision: str | None = None, chat_template: str | None = None
) -> tuple[ModelConfig, Path]:
    """The model that a scorer names, and its folder; the policy where it names none.

    chat_template: in place of the tokenizer's own, as model.chat_template.
    """
    if path is not None:
        model = ModelConfig(name=path, path=path, revision=revision, chat_template=chat_template)
        return model, models.model_folder(model, cache=context.cache)
    if revision is not None:
        raise ConfigError(f"scorer.revision={revision} would be ignored without a path; drop it, or name the model")
    return replace(context.model, chat_template=chat_template or context.model.chat_template), context.policy()


def model_identity(context: ScoringContext, model: ModelConfig, folder: Path) -> dict[str, Any]:
    """What the numbers of a local model depend on, for Scorer.identity."""
    hardware = context.hardware
    return {**models.model_uses(model, folder), "precision": hardware.precision, "device": hardware.device}


@dataclass
class Scorer:
    """Base of all scorers. Load models on the first call.

    on_missing: what happens to a completion without a score: "leave_out" (counted), "keep" it without this score
        (counted), or "refuse" the stage.
    """

    whole_prompts: ClassVar[bool] = False
    """The rows of one call hold all completions of their prompts, those of one prompt together."""
    rows_per_part: ClassVar[int] = 5_000
    """How much one commit holds (prompts, with whole_prompts), so how much a kill can cost."""

    name: str = "???"
    on_missing: str = "leave_out"

    def __post_init__(self) -> None:
        if self.on_missing not in ("leave_out", "keep", "refuse"):
            raise ConfigError(f"scorer.on_missing={self.on_missing} must be leave_out, keep or refuse")

    def identity(self, context: ScoringContext) -> dict[str, Any]:
        """What the scores depend on besides the rows and this component's fields, e.g. a model's digest."""
        return {}

    def score(self, completions: Sequence[Completion], context: ScoringContext) -> list[Score | Missing]:
        """One score per completion, in order."""
        raise NotImplementedError(f"{type(self).__name__} scores nothing")

    def report(self, counts: Mapping[str, int]) -> dict[str, Any]:
        """What the manifest says about the scoring, from the sums of context.counts."""
        return dict(sorted(counts.items()))
