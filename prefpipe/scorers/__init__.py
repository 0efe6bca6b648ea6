"""Scorers give a completion a number. One file each; add conf/scorer/<name>.yaml."""

from collections.abc import Sequence
from dataclasses import dataclass

from prefpipe.records import Completion


@dataclass
class Scorer:
    """Base of all scorers. Load models on the first call."""

    name: str = "???"

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        """One finite number per completion, higher is better; None where there is none (counted, never a zero)."""
        raise NotImplementedError(f"{type(self).__name__} scores nothing")
