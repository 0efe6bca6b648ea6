"""Generators write completions for prompts. One file each; add conf/generator/<name>.yaml."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from prefpipe.errors import ConfigError
from prefpipe.records import Completion, Prompt
from prefpipe.settings import HardwareConfig, ModelConfig


class Skipped(NamedTuple):
    """A prompt that could not be answered, and why (counted in the manifest)."""

    prompt_id: str
    reason: str


@dataclass
class Generator:
    """Base of all generators.

    num_samples: completions per prompt. temperature: 0 is greedy. top_p, top_k: 1.0 and 0 switch them off.
    max_new_tokens: of each completion. prompts_per_part: how much one commit holds, so how much a kill can cost.
    """

    name: str = "???"
    num_samples: int = 4
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 512
    prompts_per_part: int = 256

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError(f"generator.temperature={self.temperature} must be at least 0; 0 is greedy")
        if self.temperature == 0 and self.num_samples > 1:
            raise ConfigError(
                f"generator.temperature=0 with generator.num_samples={self.num_samples} would write the same text "
                f"{self.num_samples} times; set num_samples=1 or a temperature above 0"
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"generator.top_p={self.top_p} must be in (0, 1]; 1 switches it off")
        for key in ("num_samples", "max_new_tokens", "prompts_per_part"):
            if getattr(self, key) < 1:
                raise ConfigError(f"generator.{key}={getattr(self, key)} must be at least 1")
        if self.top_k < 0:
            raise ConfigError(f"generator.top_k={self.top_k} must be at least 0; 0 switches it off")

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        model: ModelConfig,
        folder: Path,
        hardware: HardwareConfig,
        seed: int,
        round_: int,
    ) -> Iterator[Completion | Skipped]:
        """Completions in the order of the prompts, num_samples each. Weights are loaded on the first call.

        Args:
            prompts: any number; batching is the generator's own business and changes no answer.
            model: whose chat template and tokenizer are used.
            folder: with the weights and the tokenizer that are sampled from.
            seed, round_: each request's own seed is a hash of these, the prompt's id and the sample's number.
        """
        raise NotImplementedError(f"{type(self).__name__} generates nothing")


def request_seed(seed: int, round_: int, prompt_id: str, sample: int) -> int:
    """63 bits that depend on nothing but the request, so that the answer is the same whatever the batch."""
    digest = hashlib.sha256(f"{seed}/{round_}/{prompt_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
