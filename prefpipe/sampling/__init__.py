"""What generators are asked for. One file each; add conf/sampling/<name>.yaml.

A method works with every generator: it makes prompts of prompts, has them answered, and makes completions of that.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from prefpipe.errors import ConfigError
from prefpipe.generators import Generator, Skipped
from prefpipe.records import Completion, Prompt

Answers = Iterator[Completion | Skipped]
Ask = Callable[[Generator, Sequence[Prompt]], Answers]
"""Generator.generate with the model, the hardware, the seed and the round of the run."""


@dataclass
class Sampling:
    """Base of all methods."""

    name: str = "???"
    can_calculate: ClassVar[bool] = False
    """Whether generator.calculator says of every completion what it forced."""

    def check(self, generator: Generator) -> None:
        """Raise ConfigError where the method and the generator do not go together."""
        if generator.calculator and not self.can_calculate:
            raise ConfigError(f"generator.calculator=true is not for sampling={self.name}; drop it")

    def rows_per_prompt(self, generator: Generator) -> int | None:
        """The most completions that a prompt can have; None where that is not known before."""
        return None

    def sample(self, prompts: Sequence[Prompt], generator: Generator, ask: Ask, *, seed: int, round_: int) -> Answers:
        """Completions in the order of the prompts, and what is lacking, with the ids of `prompts`.

        What a prompt gets depends on nothing but the prompt, the generator, the seed and the round.

        Args:
            generator: as configured; `ask` takes it, or a copy with other settings.
        """
        raise NotImplementedError(f"{type(self).__name__} samples nothing")
