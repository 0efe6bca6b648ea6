"""Completions from an OpenAI-compatible server: vLLM, SGLang, or a hosted model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from prefpipe.api import ApiConfig
from prefpipe.api.replies import Choice, Failure
from prefpipe.components import register
from prefpipe.errors import ConfigError
from prefpipe.generators import Generator, Skipped, request_seed, written
from prefpipe.records import Completion, Prompt
from prefpipe.settings import HardwareConfig, ModelConfig


@register("generator")
@dataclass
class OpenAI(Generator):
    """Whatever model a server serves, which is not this run's policy unless you serve that.

    api: the server. samples_per_request: 1 gives each sample a request and a seed of its own; with more, they share the
        price of the prompt and the seed of their first. top_k: vLLM and SGLang know it, OpenAI refuses it; and it
        answers no prompt that ends in a turn of the assistant's (sampling=citation_branches), as those two do.

    A sample that is refused, empty, or fails for good is counted by its reason; a prompt without any is left out.
    """

    name: str = "openai"
    api: ApiConfig = field(default_factory=ApiConfig)
    samples_per_request: int = 1
    samples_policy: ClassVar[bool] = False
    can_continue: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.api = self.api.with_endpoint()
        if not 1 <= self.samples_per_request <= self.num_samples:
            raise ConfigError(
                f"generator.samples_per_request={self.samples_per_request} must be between 1 and "
                f"generator.num_samples={self.num_samples}"
            )

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
        from prefpipe.api.client import Client

        starts = range(0, self.num_samples, self.samples_per_request)
        with Client(self.api, component=f"generator={self.name}") as client:
            bodies = [
                client.body(
                    prompt.messages,
                    max_new_tokens=self.max_new_tokens,
                    temperature=self.temperature,
                    top_p=self.top_p,
                    top_k=self.top_k,
                    seed=request_seed(seed, round_, prompt.prompt_id, start),
                    num_samples=min(self.samples_per_request, self.num_samples - start),
                    continues=prompt.messages[-1]["role"] == "assistant",
                )
                for prompt in prompts
                for start in starts
            ]
            outcomes = iter(client.complete(bodies))
        for prompt in prompts:
            lacking: list[str] = []
            for start in starts:
                outcome, wanted = next(outcomes), min(self.samples_per_request, self.num_samples - start)
                if isinstance(outcome, Failure):
                    lacking.append(outcome.reason)
                    continue
                if len(outcome.choices) < wanted:
                    lacking.append("too_few_choices")
                request = request_seed(seed, round_, prompt.prompt_id, start)
                for sample, choice in enumerate(outcome.choices[:wanted], start):
                    reason = _no_completion(choice)
                    if reason:
                        lacking.append(reason)
                        continue
                    yield replace(
                        written(prompt, choice.text, sample=sample, round_=round_),
                        token_ids=choice.token_ids,
                        finish_reason=choice.finish_reason,
                        seed=request,
                        model=outcome.model or self.api.model or "",
                    )
            if lacking:
                yield Skipped(prompt.prompt_id, lacking[0])


def _no_completion(choice: Choice) -> str:
    """Why a choice is no completion, or ""."""
    if choice.finish_reason not in ("stop", "length"):
        return choice.finish_reason
    return "" if choice.text.strip() else "empty_text"
