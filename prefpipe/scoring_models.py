"""Local models as scorers ask them: many sequences at once, and the same numbers whatever their order and company."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel

from prefpipe import models
from prefpipe.kept import keep_last
from prefpipe.progress import progress
from prefpipe.prompts import Encoded, TemplateError
from prefpipe.records import Completion
from prefpipe.reward_models import load_reward_model
from prefpipe.scorers import Missing
from prefpipe.settings import HardwareConfig, ModelConfig
from prefpipe.training.attention import set_attention
from prefpipe.training.batches import Batch, Example, collate
from prefpipe.training.engine import Engine
from prefpipe.training.prefixes import Row, shared_batches
from prefpipe.training.rewards import own_rewards

log = logging.getLogger(__name__)


TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Of a mean log-probability, or a reward, against the model's own forward pass, before shared prefixes are trusted."""

NOTHING = np.zeros(0, dtype=np.int32)
V = TypeVar("V")


def encoded(encode: Callable[..., Encoded], *args: Any) -> Encoded | Missing:
    """encode(*args), or why the template refuses it."""
    try:
        return encode(*args)
    except TemplateError as error:
        return Missing(error.code)


class LanguageModel:
    """Gives the log-probabilities of completions.

    Prefixes that rows have in common are computed once, where the model's family allows; otherwise every row is padded
    to those of its length.
    """

    def __init__(self, model: ModelConfig, folder: Path, hardware: HardwareConfig) -> None:
        self.device = models.device_of(hardware)
        self.dtype = models.dtype_of(models.precision_of(hardware, self.device))
        self.template = models.load_template(model, folder)
        self.model = models.load_weights(model, folder, dtype=self.dtype, device=self.device).eval()
        self.context = _context_length(self.model)
        self._engine: Engine | None = None
        log.info("log-probabilities from %s on %s in %s", folder, self.device, self.dtype)

    def encoded(self, completion: Completion) -> Encoded | Missing:
        """A completion with the token that ends its turn, or without where it was cut before it wrote that."""
        if completion.finish_reason == "length" and self.template.decoder_start is None:
            return encoded(self.template.encode_open, completion.messages, completion.text)
        return encoded(self.template.encode, completion.messages, completion.text)

    def token_logps(self, rows: Sequence[Encoded | Missing], *, max_tokens: int) -> list[np.ndarray | Missing]:
        """Of each row the log-probability of each token of its completion, [C] float32, nats; what is missing stays so.

        A row longer than the model's context is Missing("too_long"), one without a token to predict, or to predict it
        from, Missing("empty").

        Args:
            max_tokens: of a batch; what memory allows, it changes no number.
        """
        rows = [self._checked(row) for row in rows]
        fit = [row for row in rows if isinstance(row, Encoded)]
        found = iter(self._token_logps(fit, max_tokens)) if fit else iter(())
        return [row if isinstance(row, Missing) else next(found) for row in rows]

    def _checked(self, row: Encoded | Missing) -> Encoded | Missing:
        if isinstance(row, Missing):
            return row
        if not row.prompt or not row.completion:
            return Missing("empty")
        together = self.template.decoder_start is None
        sizes = [len(row.prompt) + len(row.completion)] if together else [len(row.prompt), len(row.completion)]
        return Missing("too_long") if max(sizes) > self.context else row

    def _token_logps(self, rows: Sequence[Encoded], max_tokens: int) -> list[np.ndarray]:
        different, places = _once(rows, lambda row: (tuple(row.prompt), tuple(row.completion)))
        engine = self._engine = self._engine or self._chosen(different)
        values: list[np.ndarray] = [NOTHING] * len(different)
        with progress("log-probabilities", unit="row", total=len(different)) as shown:
            for numbers, batch in self._batches(different, engine, max_tokens):
                for number, logps in zip(numbers, engine.each_token(self.model, batch), strict=True):
                    values[number] = logps
                shown.update(len(numbers))
        return [values[place] for place in places]

    def _batches(self, rows: Sequence[Encoded], engine: Engine, max_tokens: int) -> Iterable[tuple[list[int], Batch]]:
        if engine.batching == "shared":
            ids = [np.array([*row.prompt, *row.completion], dtype=np.int32) for row in rows]
            starts = [Row(i, len(row.prompt)) for i, row in zip(ids, rows, strict=True)]
            return shared_batches(starts, max_tokens=max_tokens)
        return _padded_batches(rows, self.template.decoder_start, max_tokens)

    def _chosen(self, rows: Sequence[Encoded]) -> Engine:
        """Shared prefixes, once they give what the model's own forward pass gives of single rows; else padding."""
        shortest = sorted(rows, key=lambda row: len(row.prompt) + len(row.completion))[:2]
        own = Engine(self.device, "padded", own_logits=True)
        single = [b for row in shortest for _, b in _padded_batches([row], self.template.decoder_start, 1)]
        expected = [float(own.each_token(self.model, batch)[0].mean()) for batch in single]

        def values(engine: Engine) -> list[float]:
            found = [0.0] * len(shortest)
            for numbers, batch in self._batches(shortest, engine, 1 << 30):
                for number, logps in zip(numbers, engine.each_token(self.model, batch), strict=True):
                    found[number] = float(logps.mean())
            return found

        return _trusted(self.model, Engine(self.device, "shared"), own, values, expected, TOLERANCE[self.dtype])


class RewardModel:
    """Gives the rewards of conversations: what a sequence classifier of one label says at their last token.

    transformers looks for the last token that is not padding and so misses an end-of-turn token that serves as padding;
    here it is known where a row ends. An encoder, which reads the whole row, gets rows of equal length together.
    """

    def __init__(self, model: ModelConfig, folder: Path, hardware: HardwareConfig, *, key: str) -> None:
        self.device = models.device_of(hardware)
        self.dtype = models.dtype_of(models.precision_of(hardware, self.device))
        self.template = models.load_template(model, folder, rewards=True)
        self.model = load_reward_model(model, folder, dtype=self.dtype, device=self.device, key=key).eval()
        self.context = _context_length(self.model)
        self._engine: Engine | None = None
        log.info("rewards from %s on %s in %s", folder, self.device, self.dtype)

    def rewards(
        self, rows: Sequence[Encoded | Missing], *, max_tokens: int, longest: int | None = None
    ) -> list[float | Missing]:
        """Of each row its reward; what is missing stays so, and a row longer than the context is Missing("too_long").

        Args:
            max_tokens: of a batch. longest: that a row may be; null is the model's context.
        """
        limit = min(self.context, longest or self.context)
        ids = [row if isinstance(row, Missing) else (*row.prompt, *row.completion) for row in rows]
        checked = [row if isinstance(row, Missing) or len(row) <= limit else Missing("too_long") for row in ids]
        fit = [row for row in checked if not isinstance(row, Missing)]
        found = iter(self._rewards(fit, max_tokens)) if fit else iter(())
        return [row if isinstance(row, Missing) else next(found) for row in checked]

    def _rewards(self, rows: Sequence[tuple[int, ...]], max_tokens: int) -> list[float]:
        different, places = _once(rows, lambda row: row)
        engine = self._engine = self._engine or self._chosen(different)
        values = self._values(different, engine, max_tokens)
        return [values[place] for place in places]

    @torch.no_grad()
    def _values(self, rows: Sequence[Sequence[int]], engine: Engine, max_tokens: int) -> list[float]:
        values = [0.0] * len(rows)
        with progress("rewards", unit="row", total=len(rows)) as shown:
            if engine.own_logits:
                for numbers in equal_lengths([len(row) for row in rows], max_tokens):
                    found = self._own([rows[i] for i in numbers])
                    for number, value in zip(numbers, found, strict=True):
                        values[number] = value
                    shown.update(len(numbers))
                return values
            ids = [np.array(row, dtype=np.int32) for row in rows]
            for numbers, batch in shared_batches([Row(i, len(i)) for i in ids], max_tokens=max_tokens):
                found = engine.rewards(self.model, batch).tolist()
                for number, value in zip(numbers, found, strict=True):
                    values[number] = value
                shown.update(len(numbers))
        return values

    def _own(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """The model's own forward pass on rows of one length."""
        return [float(value) for value in own_rewards(self.model, rows, self.device)]

    def _chosen(self, rows: Sequence[Sequence[int]]) -> Engine:
        shortest = sorted(rows, key=len)[:2]
        expected = [self._own([row])[0] for row in shortest]
        engine, own = Engine(self.device, "shared"), Engine(self.device, "padded", own_logits=True)
        return _trusted(
            self.model, engine, own, lambda e: self._values(shortest, e, 1 << 30), expected, TOLERANCE[self.dtype]
        )


def _once(rows: Sequence[V], key: Callable[[V], object]) -> tuple[list[V], list[int]]:
    """Each different row once, and for each row that was given its number in there."""
    numbers: dict[object, int] = {}
    places = [numbers.setdefault(key(row), len(numbers)) for row in rows]
    different = dict(zip(reversed(places), reversed(rows), strict=True))
    return [different[number] for number in range(len(numbers))], places


def _padded_batches(
    rows: Sequence[Encoded], decoder_start: int | None, max_tokens: int
) -> Iterator[tuple[list[int], Batch]]:
    examples = [
        Example(
            number,
            np.array(row.prompt, dtype=np.int32),
            np.array(row.completion, dtype=np.int32),
            NOTHING,
            decoder_start=decoder_start,
        )
        for number, row in enumerate(rows)
    ]
    order = sorted(range(len(rows)), key=lambda i: (-examples[i].length, i))
    for numbers in within(order, [example.length for example in examples], max_tokens):
        yield numbers, collate([examples[i] for i in numbers], "padded", pairwise=False)


def equal_lengths(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Row numbers in batches of rows of one length, which need no padding, of at most max_tokens tokens."""
    groups: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        groups.setdefault(length, []).append(number)
    return [part for length in sorted(groups) for part in within(groups[length], lengths, max_tokens)]


def within(order: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Consecutive numbers in lists whose count times longest length is at most max_tokens, or of one number."""
    parts: list[list[int]] = []
    longest = 0
    for number in order:
        longest = max(longest, lengths[number])
        if not parts or (len(parts[-1]) + 1) * longest > max_tokens:
            parts.append([])
            longest = lengths[number]
        parts[-1].append(number)
    return parts


def _context_length(model: PreTrainedModel) -> int:
    """Tokens that a row may have; no limit where the config says none."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30)


def _trusted(
    model: PreTrainedModel,
    engine: Engine,
    own: Engine,
    values: Callable[[Engine], list[float]],
    expected: list[float],
    tolerance: float,
) -> Engine:
    """The engine if it gives the expected values of this model, else `own`."""
    attention = str(model.config._attn_implementation)
    reason = f"model.attention={attention} keeps no documents apart in one row"
    if attention in ("sdpa", "eager") and not model.config.is_encoder_decoder:
        engine.prepare(model)
        try:
            found = values(engine)
            if np.allclose(found, expected, rtol=tolerance, atol=tolerance):
                return engine
            reason = f"{found} in place of {expected}"
        except (TypeError, ValueError, AttributeError) as error:
            reason = f"the model's family cannot ({error})"
        set_attention(model, attention)
    log.info("shared prefixes: %s; rows are computed one by one", reason)
    return own


@keep_last(2)
def language_model(model: ModelConfig, folder: Path, hardware: HardwareConfig) -> LanguageModel:
    """The model of a folder, loaded once; two are kept, for a policy and its reference."""
    return LanguageModel(model, folder, hardware)


@keep_last(1)
def reward_model(model: ModelConfig, folder: Path, hardware: HardwareConfig, *, key: str) -> RewardModel:
    """The reward model of a folder, loaded once; key: of the config that names it, for error messages."""
    return RewardModel(model, folder, hardware, key=key)
