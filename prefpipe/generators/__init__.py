"""Generators write completions for prompts. One file each; add conf/generator/<name>.yaml."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from prefpipe.components import runtime
from prefpipe.errors import ConfigError
from prefpipe.prompts import ChatTemplate, TemplateError
from prefpipe.records import Completion, Prompt, completion_id
from prefpipe.settings import HardwareConfig, ModelConfig


class Skipped(NamedTuple):
    """A prompt that could not be answered, or lacks some of its samples, and why (counted in the manifest)."""

    prompt_id: str
    reason: str


class Request(NamedTuple):
    """One prompt for an engine: its place in the caller's list, its ids, one seed for each sample."""

    place: int
    prompt_ids: list[int]
    seeds: list[int]


class Sampled(NamedTuple):
    """One sampled completion: ids with the stop token, its log-probability at temperature 1, why it ended.

    calculator: what Generator.calculator says; None where it is off.
    """

    token_ids: list[int]
    logp: float
    finish_reason: str
    calculator: dict[str, Any] | None = None


@dataclass
class Generator:
    """Base of all generators.

    num_samples: completions per prompt. temperature: 0 is greedy. top_p, top_k: 1.0 and 0 switch them off.
    max_new_tokens: of each completion. prompts_per_part: how much one commit holds, so how much a kill can cost.
    calculator: work out arithmetic annotations: when a completion reaches `<<48/2=`, the tokens of `24>>` are forced
        (prefpipe/annotations.py); what is refused is left to the model. Completions then say in meta.calculator:
        `forced`, the [start, end) places in token_ids that were not sampled; `forced_logp`, their part of logp, so
        that logp - forced_logp is of the sampled tokens alone; `refused`, the code of each annotation that was left.
    num_shards, shard: sample one shard of the prompts, from 0 to num_shards - 1, into an artifact of its own; without a
        shard, stage=generate merges all num_shards of them (prefpipe/stages/shards.py).
    """

    name: str = "???"
    num_samples: int = 4
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 512
    prompts_per_part: int = 256
    calculator: bool = False
    num_shards: int = runtime(1)
    shard: int | None = runtime(None)
    can_calculate: ClassVar[bool] = False
    can_continue: ClassVar[bool] = False
    """Whether `generate` goes on with a prompt whose last turn is the assistant's; others would answer that."""
    samples_policy: ClassVar[bool] = True
    """Whether completions come from the weights in `folder`; no checkpoint is evaluated with another generator."""

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
        for key in ("num_samples", "max_new_tokens", "prompts_per_part", "num_shards"):
            if getattr(self, key) < 1:
                raise ConfigError(f"generator.{key}={getattr(self, key)} must be at least 1")
        if self.calculator and not self.can_calculate:
            raise ConfigError(f"generator.calculator=true, but generator={self.name} has none; drop it")
        if self.top_k < 0:
            raise ConfigError(f"generator.top_k={self.top_k} must be at least 0; 0 switches it off")
        if self.shard is not None and self.num_shards == 1:
            raise ConfigError(f"generator.shard={self.shard} needs generator.num_shards above 1; give both, or neither")
        if self.shard is not None and not 0 <= self.shard < self.num_shards:
            raise ConfigError(
                f"generator.shard={self.shard} must be from 0 to generator.num_shards - 1 = {self.num_shards - 1}"
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
        """Completions in the order of the prompts, num_samples each. Weights are loaded on the first call.

        Args:
            prompts: any number; batching is the generator's own business and changes no answer. One that ends in a
                turn of the assistant's is gone on with, where can_continue: completions are what follows.
            model: whose chat template and tokenizer are used.
            folder: with the weights and the tokenizer that are sampled from.
            seed, round_: each request's own seed is a hash of these, the prompt's id and the sample's number.
        """
        raise NotImplementedError(f"{type(self).__name__} generates nothing")

    def close(self) -> None:
        """Give back the memory of an engine that `generate` keeps outside of this process; it starts one again."""

    def requests(
        self,
        prompts: Sequence[Prompt],
        template: ChatTemplate,
        room: Callable[[int], int],
        *,
        seed: int,
        round_: int,
    ) -> tuple[list[Request], dict[int, Skipped]]:
        """What to ask an engine, and by its place what it cannot be asked.

        room: tokens of a prompt → how many the model's positions leave for a completion.
        """
        requests: list[Request] = []
        skipped: dict[int, Skipped] = {}
        for place, prompt in enumerate(prompts):
            try:
                ids = _ids(prompt, template)
            except TemplateError as error:
                skipped[place] = Skipped(prompt.prompt_id, error.code)
                continue
            if room(len(ids)) < 1:
                skipped[place] = Skipped(prompt.prompt_id, "prompt_too_long")
                continue
            seeds = [request_seed(seed, round_, prompt.prompt_id, sample) for sample in range(self.num_samples)]
            requests.append(Request(place, ids, seeds))
        return requests, skipped


def _ids(prompt: Prompt, template: ChatTemplate) -> list[int]:
    *before, last = prompt.messages
    if last["role"] != "assistant":
        return template.prompt(prompt.messages)
    begun = template.encode_open(before, last["content"])
    return [*begun.prompt, *begun.completion]


def written(prompt: Prompt, text: str, *, sample: int, round_: int) -> Completion:
    """The record of a text for a prompt; what is known of how it was written, the caller adds."""
    return Completion(
        prompt_id=prompt.prompt_id,
        completion_id=completion_id(prompt.prompt_id, text, sample, round_),
        messages=prompt.messages,
        source=prompt.source,
        split=prompt.split,
        answer=prompt.answer,
        meta=prompt.meta,
        text=text,
        round=round_,
    )


def sampled_completion(
    prompt: Prompt, answer: Sampled, *, template: ChatTemplate, sample: int, seed: int, round_: int, model: str
) -> Completion:
    """The record of what an engine sampled. seed: of the request. model: digest of the weights."""
    return replace(
        written(prompt, template.decode(answer.token_ids), sample=sample, round_=round_),
        meta=prompt.meta if answer.calculator is None else prompt.meta | {"calculator": answer.calculator},
        token_ids=answer.token_ids,
        logp=answer.logp,
        finish_reason=answer.finish_reason,
        seed=seed,
        model=model,
    )


def request_seed(seed: int, round_: int, prompt_id: str, sample: int) -> int:
    """63 bits that depend on nothing but the request, so that the answer is the same whatever the batch."""
    digest = hashlib.sha256(f"{seed}/{round_}/{prompt_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
