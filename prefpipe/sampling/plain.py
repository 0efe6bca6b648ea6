"""Answers to the prompts as they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from prefpipe.components import register
from prefpipe.generators import Generator
from prefpipe.records import Prompt
from prefpipe.sampling import Answers, Ask, Sampling


@register("sampling")
@dataclass
class Plain(Sampling):
    """generator.num_samples answers to every prompt."""

    name: str = "plain"
    can_calculate: ClassVar[bool] = True

    def rows_per_prompt(self, generator: Generator) -> int | None:
        return generator.num_samples

    def sample(self, prompts: Sequence[Prompt], generator: Generator, ask: Ask, *, seed: int, round_: int) -> Answers:
        return ask(generator, prompts)
