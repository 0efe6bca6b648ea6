"""Sampling with transformers: one prefill per prompt, its samples decoded together, finished rows leave the batch.

The decode loop is ours because `transformers.generate` draws a whole batch from one random stream: there, a prompt's
answer depends on its neighbours. Here each request draws from its own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from prefpipe import models
from prefpipe.annotations import FREE, Annotations, Writer
from prefpipe.components import register
from prefpipe.generators import Generator, Request, Sampled, Skipped, sampled_completion
from prefpipe.kept import keep_last
from prefpipe.progress import progress
from prefpipe.records import Completion, Prompt
from prefpipe.settings import HardwareConfig, ModelConfig

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

log = logging.getLogger(__name__)


@register("generator")
@dataclass
class HF(Generator):
    """transformers on a CPU or one GPU.

    max_batch_tokens: rows x (longest prompt + max_new_tokens) of one batch; what memory allows, it changes no answer.
    """

    name: str = "hf"
    max_batch_tokens: int = 65_536
    can_calculate: ClassVar[bool] = True
    can_continue: ClassVar[bool] = True

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
        engine = _engine(model, folder, hardware)
        requests, skipped = self.requests(prompts, engine.template, engine.room, seed=seed, round_=round_)
        seeds = {request.place: request.seeds for request in requests}
        answers = engine.sample(requests, self)
        for place, prompt in enumerate(prompts):
            if place in skipped:
                yield skipped[place]
                continue
            for sample, answer in enumerate(answers[place]):
                yield sampled_completion(
                    prompt,
                    answer,
                    template=engine.template,
                    sample=sample,
                    seed=seeds[place][sample],
                    round_=round_,
                    model=engine.digest,
                )


class Engine:
    """A loaded model that samples."""

    def __init__(self, model: ModelConfig, folder: Path, hardware: HardwareConfig) -> None:
        import torch

        self.device = models.device_of(hardware)
        precision = models.precision_of(hardware, self.device)
        dtype = models.dtype_of(precision)
        self.digest = models.weights_digest(folder)
        self.template = models.load_template(model, folder)
        self.tokenizer = self.template.tokenizer
        self.model: PreTrainedModel = models.load_weights(model, folder, dtype=dtype, device=self.device).eval()
        self.context = int(getattr(self.model.config, "max_position_embeddings", 1 << 30))
        self.stop = torch.tensor(sorted(self.template.stop_ids), device=self.device)
        log.info("sampling from %s on %s in %s", folder, self.device, precision)

    def room(self, prompt_tokens: int) -> int:
        """How many tokens the model's positions leave for a completion; 0 or less where the prompt is too long."""
        if self.template.decoder_start is None:
            return self.context - prompt_tokens
        return self.context if prompt_tokens <= self.context else 0

    @cached_property
    def annotations(self) -> Annotations:
        """For the calculator. Raises ConfigError where the tokenizer can write none."""
        return Annotations(self.tokenizer)

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
        limit = min(generator.max_new_tokens, self.room(length))
        rows = len(batch) * num_samples
        draws = np.stack([np.random.Generator(np.random.Philox(s)).random(limit) for r in batch for s in r.seeds])
        uniform = torch.from_numpy(draws).to(self.device)  # [R, limit] float64 in [0, 1)
        tokens = torch.zeros(rows, limit, dtype=torch.long, device=self.device)
        lengths = torch.zeros(rows, dtype=torch.long, device=self.device)
        logps = torch.zeros(rows, dtype=torch.float64, device=self.device)
        stopped = torch.zeros(rows, dtype=torch.bool, device=self.device)
        writers = [Writer(self.annotations) for _ in range(rows)] if generator.calculator else []
        writing = writers  # those of the rows in `alive`
        forced: Tensor | None = None  # [R] the tokens that must come next, FREE where the model chooses
        forced_logps = torch.zeros_like(logps)

        with torch.inference_mode():
            logits, text = self._prefill([request.prompt_ids for request in batch], num_samples)
            alive = torch.arange(rows, device=self.device)  # row numbers of what is still being written
            for step in range(limit):
                token, logp = _draw(logits, uniform[alive, step], generator, forced)
                tokens[alive, step] = token
                lengths[alive] += 1
                logps[alive] += logp
                if forced is not None:
                    forced_logps[alive] += logp.masked_fill(forced == FREE, 0.0)
                ended = torch.isin(token, self.stop)
                stopped[alive] |= ended
                if step + 1 == limit or bool(ended.all()):
                    break
                if bool(ended.any()):
                    # Finished rows leave at once: the rest of the batch gets faster from here on.
                    keep = (~ended).nonzero().squeeze(-1)
                    text.keep(keep)
                    alive, token = alive[keep], token[keep]
                    writing = [writing[row] for row in keep.tolist()] if writing else []
                if writing:
                    following = [writer.push(t) for writer, t in zip(writing, token.tolist(), strict=True)]
                    forced = torch.tensor(following, device=self.device) if max(following) != FREE else None
                logits = text.append(token)
        ids, counts = tokens.tolist(), lengths.tolist()
        samples = [
            Sampled(row[:count], logp, "stop" if stop else "length")
            for row, count, logp, stop in zip(ids, counts, logps.tolist(), stopped.tolist(), strict=True)
        ]
        if writers:
            notes = [
                {**writer.meta(count), "forced_logp": logp}
                for writer, count, logp in zip(writers, counts, forced_logps.tolist(), strict=True)
            ]
            samples = [sample._replace(calculator=note) for sample, note in zip(samples, notes, strict=True)]
        return [samples[start : start + num_samples] for start in range(0, rows, num_samples)]

    def _prefill(self, prompts: list[list[int]], num_samples: int) -> tuple[Tensor, _Text]:
        """Run each prompt once, then give its samples a copy: (logits [R, V], what R rows hold so far)."""
        import torch

        start, encoded = self.template.decoder_start, None
        padding = [[0] * (max(map(len, prompts)) - len(prompt)) for prompt in prompts]
        if start is None:  # padded on the left, so that all prompts end in one column
            ids = torch.tensor([zeros + p for zeros, p in zip(padding, prompts, strict=True)], device=self.device)
            mask = torch.tensor([zeros + [1] * len(p) for zeros, p in zip(padding, prompts, strict=True)]).to(ids)
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
            out = self.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1
            )
        else:  # on the right, as in training: some encoders count positions from the row's start
            ids = torch.tensor([p + zeros for zeros, p in zip(padding, prompts, strict=True)], device=self.device)
            mask = torch.tensor([[1] * len(p) + zeros for zeros, p in zip(padding, prompts, strict=True)]).to(ids)
            encoded = self.model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
            first = ids.new_full((len(prompts), 1), start)
            out = self.model(decoder_input_ids=first, encoder_outputs=(encoded,), attention_mask=mask, use_cache=True)
            encoded = encoded.repeat_interleave(num_samples, dim=0)
        cache = out.past_key_values
        if num_samples > 1:
            cache.batch_repeat_interleave(num_samples)
        text = _Text(self.model, cache, mask.repeat_interleave(num_samples, dim=0), encoded)
        return out.logits[:, -1].repeat_interleave(num_samples, dim=0), text


@dataclass
class _Text:
    """R rows that are being written.

    cache: keys and values of all tokens so far. mask: [R, T], 1 for tokens, of prompt and completion, or of the
    encoder's prompt alone. encoded: [R, T, H], what the encoder made of that; None for decoder-only models.
    """

    model: PreTrainedModel
    cache: DynamicCache | EncoderDecoderCache
    mask: Tensor
    encoded: Tensor | None

    def keep(self, rows: Tensor) -> None:
        """Go on with some rows alone, by number."""
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]
        if self.encoded is not None:
            self.encoded = self.encoded[rows]

    def append(self, token: Tensor) -> Tensor:
        """Logits [R, V] behind one more token [R] of each row."""
        import torch

        given: dict[str, Any]
        if self.encoded is None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(token), 1)], dim=1)
            given = {"input_ids": token[:, None], "position_ids": self.mask.sum(dim=1, keepdim=True) - 1}
        else:
            given = {"decoder_input_ids": token[:, None], "encoder_outputs": (self.encoded,)}
        out = self.model(**given, attention_mask=self.mask, past_key_values=self.cache, use_cache=True)
        self.cache = out.past_key_values
        logits: Tensor = out.logits[:, -1]
        return logits


@keep_last(1)
def _engine(model: ModelConfig, folder: Path, hardware: HardwareConfig) -> Engine:
    return Engine(model, folder, hardware)


def _draw(logits: Tensor, uniform: Tensor, generator: Generator, forced: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One token for each row, by inversion of the cumulative distribution, and its log-probability.

    Args:
        logits: [R, V]. uniform: [R] float64 in [0, 1), each from its request's own stream.
        forced: [R] tokens that are taken instead, where they are not FREE.

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
    if forced is not None:
        token = torch.where(forced == FREE, token, forced)
    return token, full.gather(-1, token[:, None]).squeeze(-1).double()
