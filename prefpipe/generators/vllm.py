"""Sampling with vLLM, in processes of its own: a death there is an error here, and no memory stays behind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from prefpipe import models
from prefpipe.annotations import FREE, Annotations, Writer
from prefpipe.components import register, runtime
from prefpipe.errors import ConfigError
from prefpipe.generators import Generator, Sampled, Skipped, sampled_completion
from prefpipe.processes import ChildError
from prefpipe.progress import progress
from prefpipe.records import Completion, Prompt
from prefpipe.settings import HardwareConfig, ModelConfig
from prefpipe.vllm_engine.client import Engines, EngineSettings

if TYPE_CHECKING:
    from prefpipe.prompts import ChatTemplate

LEAST_TEMPERATURE = 0.01
"""vLLM takes this for anything between it and 0."""


class Running(NamedTuple):
    """Engines, the model that they serve, and what is read of it once for all parts. digest: of the weights."""

    engines: Engines
    model: ModelConfig
    template: ChatTemplate
    digest: str

    def fits(self, settings: EngineSettings, model: ModelConfig) -> bool:
        """Whether they serve these settings, and live."""
        return self.engines.alive and (self.engines.settings, self.model) == (settings, model)


_running: list[Running] = []
"""One at most. Parts share it, and it outlives the copies that evaluation makes of a generator."""


@register("generator")
@dataclass
class VLLM(Generator):
    """vLLM's engine. A part is a batch of its own; the engine starts with the first one and ends with the stage.

    python: of an environment that has vLLM, where it is not this one.
    tensor_parallel_size: GPUs that share one copy of the weights. data_parallel_size: such copies, each an engine that
        samples its share of a part's prompts.
    max_model_len: tokens of a prompt and its completion; null takes the model's. gpu_memory_utilization: share of a
        GPU's memory for weights and key-value cache. enable_prefix_caching: a prompt is computed once for its samples.
    max_num_seqs: completions at once; null leaves it to vLLM. enforce_eager: no CUDA graphs and no compilation, which
        starts sooner and samples slower.

    Seeds are those of each request, but other kernels and batches may round differently: the same command on the same
    machine gives the same samples as far as vLLM's kernels do.
    """

    name: str = "vllm"
    python: str | None = runtime(None)
    tensor_parallel_size: int = runtime(1)
    data_parallel_size: int = runtime(1)
    max_model_len: int | None = None
    gpu_memory_utilization: float = runtime(0.9)
    enable_prefix_caching: bool = runtime(True)
    max_num_seqs: int | None = runtime(None)
    enforce_eager: bool = runtime(False)
    can_calculate: ClassVar[bool] = True
    can_continue: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("tensor_parallel_size", "data_parallel_size", "max_model_len", "max_num_seqs"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"generator.{key}={value} must be at least 1")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"generator.gpu_memory_utilization={self.gpu_memory_utilization} must be in (0, 1]")
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise ConfigError(
                f"generator.temperature={self.temperature} would be {LEAST_TEMPERATURE} in vLLM; set that, or 0, which "
                f"is greedy"
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
        if not prompts:
            return
        engines, _, template, digest = self._start(model, folder, hardware)
        requests, skipped = self.requests(
            prompts, template, lambda tokens: engines.max_model_len - tokens, seed=seed, round_=round_
        )
        limits = [min(self.max_new_tokens, engines.max_model_len - len(request.prompt_ids)) for request in requests]
        seeds = {request.place: request.seeds for request in requests}
        read = _Reader(Annotations(template.tokenizer) if self.calculator else None)
        written: dict[int, dict[int, Completion]] = {request.place: {} for request in requests}
        with progress("generate", unit="completion", total=sum(map(len, seeds.values()))) as shown:
            for answer in engines.sample(
                requests,
                limits,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                stop_token_ids=sorted(template.stop_ids),
            ):
                place, sample = answer["place"], answer["sample"]
                written[place][sample] = sampled_completion(
                    prompts[place],
                    read(answer),
                    template=template,
                    sample=sample,
                    seed=seeds[place][sample],
                    round_=round_,
                    model=digest,
                )
                shown.update()
        for place in range(len(prompts)):
            if place in skipped:
                yield skipped[place]
            else:
                yield from (written[place][sample] for sample in range(self.num_samples))

    def close(self) -> None:
        """End the engines; the memory of their GPUs is free when this returns."""
        while _running:
            _running.pop().engines.close()

    def _start(self, model: ModelConfig, folder: Path, hardware: HardwareConfig) -> Running:
        """Engines with these settings: those of the last call, where they fit and live."""
        settings = self._settings(folder, hardware)
        if not _running or not _running[0].fits(settings, model):
            self.close()
            engines = Engines(settings)
            try:
                # While the engines load: together they take as long as one of them.
                template, digest = models.load_template(model, folder), models.weights_digest(folder)
                if template.decoder_start is not None:
                    raise ConfigError(
                        f"model={model.name}: vLLM samples from no encoder-decoder models; use generator=hf"
                    )
                engines.wait()
            except BaseException:
                engines.close(now=True)
                raise
            _running.append(Running(engines, model, template, digest))
        return _running[0]

    def _settings(self, folder: Path, hardware: HardwareConfig) -> EngineSettings:
        arguments = {
            "max_model_len": self.max_model_len,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "enable_prefix_caching": self.enable_prefix_caching,
            "max_num_seqs": self.max_num_seqs,
            "enforce_eager": self.enforce_eager,
        }
        return EngineSettings(
            python=self.python,
            model=str(folder.resolve()),
            precision=hardware.precision,
            device=hardware.device,
            num_threads=hardware.num_threads,
            tensor_parallel_size=self.tensor_parallel_size,
            data_parallel_size=self.data_parallel_size,
            calculator=self.calculator,
            arguments=arguments,
        )


@dataclass
class _Reader:
    """Makes what an engine answers to what was sampled."""

    annotations: Annotations | None

    def __call__(self, answer: dict[str, Any]) -> Sampled:
        reason, ids = answer["finish_reason"], answer["token_ids"]
        if reason not in ("stop", "length"):
            raise ChildError(f"the vLLM engine gave up a completion ({reason}); run the same command again")
        notes = None if self.annotations is None else _notes(Writer(self.annotations), ids, answer["logps"])
        return Sampled(ids, answer["logp"], reason, notes)


def _notes(writer: Writer, ids: Sequence[int], logps: Sequence[float]) -> dict[str, Any]:
    """meta.calculator of a completion. Raises ChildError where another token stands than the one that was forced."""
    following = FREE
    for place, token in enumerate(ids):
        if following not in (FREE, token):
            raise ChildError(f"vLLM wrote token {token} at place {place} of {ids}, where {following} was forced")
        if place + 1 < len(ids):
            following = writer.push(token)
    notes = writer.meta(len(ids))
    return {**notes, "forced_logp": sum((sum(logps[start:end]) for start, end in notes["forced"]), 0.0)}
