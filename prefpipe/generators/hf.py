"""Sampling with transformers: one prefill per prompt, its samples decoded together, finished rows leave the batch.

The decode loop is ours because `transformers.generate` draws a whole batch from one random stream: there, a prompt's
answer depends on its neighbours. Here each request draws from its own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from prefpipe import models
from prefpipe.components import register
from prefpipe.generators import Generator, Skipped, request_seed
from prefpipe.progress import progress
from prefpipe.prompts import ChatTemplate, TemplateError
from prefpipe.records import Completion, Prompt, completion_id
from prefpipe.settings import HardwareConfig, ModelConfig

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import DynamicCache, PreTrainedModel

log = logging.getLogger(__name__)


class Sampled(NamedTuple):
    """One sampled completion: ids with the stop token, its log-probability at temperature 1, why it ended."""

    token_ids: list[int]
    logp: float
    finish_reason: str


class Request(NamedTuple):
    """One prompt in a batch: its place in the caller's list, its ids, one seed for each sample."""

    place: int
    prompt_ids: list[int]
    seeds: list[int]


@register("generator")
@dataclass
class HF(Generator):
    """transformers on a CPU or one GPU.

    max_batch_tokens: rows x (longest prompt + max_new_tokens) of one batch; what memory allows, it changes no answer.
    """

    name: str = "hf"
    max_batch_tokens: int = 65_536

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
        engine = _engine(_Key(model, folder, hardware))
        requests: list[Request] = []
        skipped: dict[int, Skipped] = {}
        for index, prompt in enumerate(prompts):
            try:
                ids = engine.template.prompt(prompt.messages)
            except TemplateError as error:
                skipped[index] = Skipped(prompt.prompt_id, error.code)
                continue
            if len(ids) >= engine.context:
                skipped[index] = Skipped(prompt.prompt_id, "prompt_too_long")
                continue
            seeds = [request_seed(seed, round_, prompt.prompt_id, sample) for sample in range(self.num_samples)]
            requests.append(Request(index, ids, seeds))
        answers = engine.sample(requests, self)
        for index, prompt in enumerate(prompts):
            if index in skipped:
                yield skipped[index]
                continue
            for sample, answer in enumerate(answers[index]):
                text = engine.template.decode(answer.token_ids)
                yield Completion(
                    prompt_id=prompt.prompt_id,
                    completion_id=completion_id(prompt.prompt_id, text, sample, round_),
                    messages=prompt.messages,
                    source=prompt.source,
                    split=prompt.split,
                    answer=prompt.answer,
                    meta=prompt.meta,
                    text=text,
                    token_ids=answer.token_ids,
                    logp=answer.logp,
                    finish_reason=answer.finish_reason,
                    seed=request_seed(seed, round_, prompt.prompt_id, sample),
                    round=round_,
                    model=engine.digest,
                )


class Engine:
    """A loaded model that samples."""

    def __init__(self, model: ModelConfig, folder: Path, hardware: HardwareConfig) -> None:
        import torch

        self.device = models.device_of(hardware)
        precision = models.precision_of(hardware, self.device)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.digest = models.weights_digest(folder)
        self.tokenizer = models.load_tokenizer(model, folder)
        self.template = ChatTemplate(self.tokenizer, models.stop_token_ids(self.tokenizer, folder))
        self.model: PreTrainedModel = models.load_weights(model, folder, dtype=dtype, device=self.device).eval()
        self.context = int(getattr(self.model.config, "max_position_embeddings", 1 << 30))
        self.stop = torch.tensor(sorted(self.template.stop_ids), device=self.device)
        log.info("sampling from %s on %s in %s", folder, self.device, precision)

    def sample(self, requests: Sequence[Request], generator: HF) -> dict[int, list[Sampled]]:
        """Every request's samples, by its index. Length-sorted batches under the token budget."""
        answers: dict[int, list[Sampled]] = {}
        total = sum(len(request.seeds) for request in requests)
        with progress("generate", unit="completion", total=total) as shown:
            for batch in self._batches(requests, generator):
                for request, samples in zip(batch, self._decode(batch, generator), strict=True):
                    answers[request.place] = samples
                    shown.update(len(samples))
        return answers

    def _batches(self, requests: Sequence[Request], generator: HF) -> Iterator[list[Request]]:
        """Batches of similar prompt length, each at most max_batch_tokens (a single prompt may exceed it)."""
        batch: list[Request] = []
        for request in sorted(requests, key=lambda r: (len(r.prompt_ids), r.place)):
            rows = (len(batch) + 1) * len(request.seeds)
            if batch and rows * (len(request.prompt_ids) + generator.max_new_tokens) > generator.max_batch_tokens:
                yield batch
                batch = []
            batch.append(request)
        if batch:
            yield batch

    def _decode(self, batch: Sequence[Request], generator: HF) -> list[list[Sampled]]:
        """Sample every request of one batch to its end.

        Letters: B prompts, N samples each, R rows still being written (B x N at first), V vocabulary.
        """
        import numpy as np
        import torch

        num_samples, length = len(batch[0].seeds), max(len(request.prompt_ids) for request in batch)
        limit = min(generator.max_new_tokens, self.context - length)
        rows = len(batch) * num_samples
        draws = np.stack([np.random.Generator(np.random.Philox(s)).random(limit) for r in batch for s in r.seeds])
        uniform = torch.from_numpy(draws).to(self.device)  # [R, limit] float64 in [0, 1)
        tokens = torch.zeros(rows, limit, dtype=torch.long, device=self.device)
        lengths = torch.zeros(rows, dtype=torch.long, device=self.device)
        logps = torch.zeros(rows, dtype=torch.float64, device=self.device)
        stopped = torch.zeros(rows, dtype=torch.bool, device=self.device)

        with torch.inference_mode():
            logits, cache, mask = self._prefill([request.prompt_ids for request in batch], num_samples)
            alive = torch.arange(rows, device=self.device)  # row numbers of what is still being written
            for step in range(limit):
                token, logp = _draw(logits, uniform[alive, step], generator)
                tokens[alive, step] = token
                lengths[alive] += 1
                logps[alive] += logp
                ended = torch.isin(token, self.stop)
                stopped[alive] |= ended
                if step + 1 == limit or bool(ended.all()):
                    break
                if bool(ended.any()):
                    # Finished rows leave at once: the rest of the batch gets faster from here on.
                    keep = (~ended).nonzero().squeeze(-1)
                    cache.batch_select_indices(keep)
                    alive, token, mask = alive[keep], token[keep], mask[keep]
                mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
                out = self.model(
                    input_ids=token[:, None],
                    attention_mask=mask,
                    position_ids=mask.sum(dim=1, keepdim=True) - 1,
                    past_key_values=cache,
                    use_cache=True,
                )
                logits, cache = out.logits[:, -1], out.past_key_values
        ids, counts = tokens.tolist(), lengths.tolist()
        samples = [
            Sampled(row[:count], logp, "stop" if stop else "length")
            for row, count, logp, stop in zip(ids, counts, logps.tolist(), stopped.tolist(), strict=True)
        ]
        return [samples[start : start + num_samples] for start in range(0, rows, num_samples)]

    def _prefill(self, prompts: list[list[int]], num_samples: int) -> tuple[Tensor, DynamicCache, Tensor]:
        """Run each prompt once, then give its samples a copy: (logits [R, V], cache of R rows, mask [R, T])."""
        import torch

        length = max(map(len, prompts))
        ids = torch.tensor([[0] * (length - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        if num_samples > 1:
            cache.batch_repeat_interleave(num_samples)
        return (
            out.logits[:, -1].repeat_interleave(num_samples, dim=0),
            cache,
            mask.repeat_interleave(num_samples, dim=0),
        )


class _Key(NamedTuple):
    """What a loaded engine is kept by; the settings are plain data, compared by their text."""

    model: ModelConfig
    folder: Path
    hardware: HardwareConfig

    def __hash__(self) -> int:
        return hash(repr(tuple(self)))


@lru_cache(maxsize=1)
def _engine(key: _Key) -> Engine:
    return Engine(key.model, key.folder, key.hardware)


def _draw(logits: Tensor, uniform: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """One token for each row, by inversion of the cumulative distribution, and its log-probability.

    Args:
        logits: [R, V]. uniform: [R] float64 in [0, 1), each from its request's own stream.

    Returns:
        (tokens [R] int64; log p [R] float64 at temperature 1, before top-p and top-k, nats).
    """
    import torch

    full = logits.float().log_softmax(dim=-1)
    if generator.temperature == 0:
        token = full.argmax(dim=-1)
    else:
        scaled = logits.float() / generator.temperature
        if generator.top_k and generator.top_k < scaled.shape[-1]:
            kth = scaled.topk(generator.top_k, dim=-1).values[:, -1:]
            scaled = scaled.masked_fill(scaled < kth, -torch.inf)
        if generator.top_p < 1:
            ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
            before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
            drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= generator.top_p)
            scaled = scaled.masked_fill(drop, -torch.inf)
        cumulative = scaled.double().softmax(dim=-1).cumsum(dim=-1)
        # Below the total, so that rounding can never pick a token behind the last one with any probability.
        target = uniform * cumulative[:, -1]
        token = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(-1)
        token = token.clamp(max=scaled.shape[-1] - 1)
    return token, full.gather(-1, token[:, None]).squeeze(-1).double()
