"""Log-probabilities of completions under a model: what the loop, the reference and the evaluation share."""

import logging
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefpipe.errors import ConfigError
from prefpipe.logps import PairLogps
from prefpipe.settings import TrainingConfig
from prefpipe.sharding import gathered
from prefpipe.training.attention import DOCUMENTS, set_attention
from prefpipe.training.batches import Batch, Example, collate, micro_batches
from prefpipe.training.head import Head, TokenLogps, token_kl, token_logps
from prefpipe.training.kernels import fastest_attention
from prefpipe.training.last_layer import narrow_last_layer

log = logging.getLogger(__name__)

PROBE_TOLERANCE = 1e-3
"""How far log-probabilities may differ, in nats, relative and absolute; rounding in float32 is a hundredth of it."""

NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Frozen:
    """A reference model in memory.

    off: the context to evaluate it in; a policy that is its own reference switches or exchanges its adapter there.
    """

    model: nn.Module
    off: Callable[[], AbstractContextManager[Any]] = nullcontext

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of its head, [N, V]."""
        with self.off():
            return Head.of(unwrapped(self.model))(hidden)


@dataclass(frozen=True)
class Engine:
    """How log-probabilities are computed; every choice gives the same numbers.

    batching: "padded", "packed" or "shared". head: "plain", "chunked" or "auto" (TrainingConfig says what they are).
    own_logits: take the model's own logits, of every position, for models whose head `Head` does not reproduce.
    attention: name, for set_attention, of the kernel used where several documents share a row.
    """

    device: torch.device
    batching: str = "padded"
    head: str = "auto"
    own_logits: bool = False
    attention: str = DOCUMENTS

    def prepare(self, model: PreTrainedModel) -> None:
        """Give a model the attention that the batching needs."""
        if self.batching != "padded":
            set_attention(model, self.attention)
            narrow_last_layer(model)

    def with_fastest_attention(self, model: PreTrainedModel, dtype: torch.dtype) -> "Engine":
        """This engine with the fastest attention kernel that works on the device, and the model prepared for it."""
        if self.batching == "padded":
            return self
        faster = replace(self, attention=fastest_attention(model, self.device, dtype))
        faster.prepare(model)
        return faster

    def logps(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        *,
        pairwise: bool,
        reads: frozenset[str] = NOTHING,
        reference: Frozen | None = None,
    ) -> PairLogps:
        """PairLogps of B examples from one forward pass; for SFT the rejected side is 0 nats of 1 token.

        reads: the optional parts wanted, as in Loss.reads; "kl" needs the reference model.
        """
        batch = collate(examples, self.batching, pairwise=pairwise).to(self.device)
        hidden = self._hidden(model, batch)
        found = self._token_logps(model, hidden, batch, collision="collision" in reads)
        table = _by_sequence(found.logps, batch)
        parts = {"token_logps": table} if "token_logps" in reads else {}
        if found.collision is not None:
            parts["collision"] = _by_sequence(found.collision, batch).sum(1)
        if "kl" in reads:
            assert reference is not None
            with torch.no_grad(), reference.off():
                other = self._hidden(reference.model, batch)
            kl = token_kl(self._head(model), hidden, nn.Identity() if self.own_logits else reference.logits, other)
            parts["kl"] = _by_sequence(kl, batch).sum(1)
        sums = table.sum(1)
        if not pairwise:
            return PairLogps(sums, torch.zeros_like(sums), batch.lengths, torch.ones_like(batch.lengths))
        (chosen, rejected), (chosen_tokens, rejected_tokens) = sums.chunk(2), batch.lengths.chunk(2)
        sides = {f"{side}_{name}": part for name, both in parts.items() for side, part in _sides(both)}
        return PairLogps(chosen, rejected, chosen_tokens, rejected_tokens, **sides)

    def rewards(self, model: nn.Module, batch: Batch) -> Tensor:
        """[S] rewards of a batch's completions, float32 at least: a reward model's head on their last tokens."""
        assert batch.ends is not None, "an encoder-decoder model gives no rewards"
        batch = batch._replace(positions=batch.ends).to(self.device)
        hidden = self._hidden(model, batch)
        with torch.autocast(self.device.type, enabled=False):
            score: Any = unwrapped(model).score
            # The head is float32 but for ZeRO in 16 bits, which holds all parameters in one type.
            found: Tensor = score(hidden.to(next(score.parameters()).dtype))[:, 0]
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def _hidden(self, model: nn.Module, batch: Batch) -> Tensor:
        """[N, H] hidden states that predict the targets; with own_logits [N, V] logits."""
        inner = unwrapped(model)
        if batch.encoder_ids is not None:
            return self._decoded(inner, batch)
        documents = {} if batch.documents is None else {"documents": batch.documents}
        body = inner if self.own_logits else inner.get_decoder()
        out = body(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **documents)
        states: Tensor = out.logits if self.own_logits else out.last_hidden_state
        return states.flatten(0, 1)[batch.positions]

    def _decoded(self, inner: PreTrainedModel, batch: Batch) -> Tensor:
        """`_hidden` of an encoder-decoder model; its encoder reads a prompt once, however many completions it has."""
        assert batch.encoder_ids is not None
        assert batch.encoder_mask is not None
        mask = batch.encoder_mask[batch.encoder_rows]
        if self.own_logits:
            prompts = batch.encoder_ids[batch.encoder_rows]
            out = inner(input_ids=prompts, attention_mask=mask, decoder_input_ids=batch.input_ids, use_cache=False)
        else:
            encoded = inner.get_encoder()(input_ids=batch.encoder_ids, attention_mask=batch.encoder_mask)
            out = inner.get_decoder()(
                input_ids=batch.input_ids,
                encoder_hidden_states=encoded.last_hidden_state[batch.encoder_rows],
                encoder_attention_mask=mask,
                use_cache=False,
            )
        states: Tensor = out.logits if self.own_logits else out.last_hidden_state
        return states.flatten(0, 1)[batch.positions]

    def _token_logps(self, model: nn.Module, hidden: Tensor, batch: Batch, *, collision: bool) -> TokenLogps:
        mode = "plain" if self.own_logits else self.head
        head = self._head(model)
        with gathered(head.module.parameters(recurse=False)):  # they are read outside its forward pass
            return token_logps(head, hidden, batch.targets, mode=mode, collision=collision)

    def _head(self, model: nn.Module) -> Head:
        return Head(nn.Identity()) if self.own_logits else Head.of(unwrapped(model))

    @torch.no_grad()
    def each_token(self, model: nn.Module, batch: Batch) -> list[np.ndarray]:
        """Log-probabilities of the tokens of each of the batch's S completions: S arrays [C], nats, no gradients.

        They are float32, or float64 for a float64 model.
        """
        batch = batch.to(self.device)
        logps = self._token_logps(model, self._hidden(model, batch), batch, collision=False).logps
        logps = logps if logps.dtype == torch.float64 else logps.float()
        return np.split(logps.cpu().numpy(), np.cumsum(batch.lengths.tolist())[:-1])

    def all_logps(
        self, model: nn.Module, examples: Sequence[Example], training: TrainingConfig, *, pairwise: bool = True
    ) -> PairLogps:
        """PairLogps of every example, [N] each on the CPU, no gradients, in micro-batches as training makes them."""
        sums = torch.zeros(2, len(examples), dtype=torch.float64)
        for chunk in micro_batches(examples, range(len(examples)), training):
            batch = collate([examples[i] for i in chunk], self.batching, pairwise=pairwise)
            found = [float(values.sum(dtype=np.float64)) for values in self.each_token(model, batch)]
            sums[: 1 + pairwise, chunk] = torch.tensor(found, dtype=torch.float64).view(1 + pairwise, -1)
        tokens = torch.tensor([[e.num_trained for e in examples], [len(e.rejected) for e in examples]])
        return PairLogps(sums[0], sums[1], tokens[0], tokens[1] if pairwise else torch.ones_like(tokens[1]))


def choose_engine(
    training: TrainingConfig,
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    device: torch.device,
    pairwise: bool = True,
) -> Engine:
    """The engine that training.batching and training.head ask for, checked on the two shortest examples.

    A model family that ignores document boundaries (because it has its own kernel) would let one completion attend to
    another, and the loss would still look plausible. So each engine must reproduce what the model's own forward pass
    gives for one completion at a time: "auto" takes the first that does; a batching that was named and does not raises
    ConfigError. The model is left with the attention of the engine that is returned.
    """
    batching = training.batching
    candidates = ["shared", "packed", "padded"] if batching == "auto" else [batching]
    if model.config.is_encoder_decoder:
        if batching not in ("auto", "padded"):
            raise ConfigError(
                f"training.batching={batching} lays a prompt and its completions into one row, but this model is an "
                f"encoder-decoder, which keeps them apart; use training.batching=auto, where its encoder reads a "
                f"prompt once for all its completions"
            )
        candidates = ["padded"]
    shortest = sorted(examples, key=lambda e: (e.length, e.row))[:2]
    oracle = Engine(device, own_logits=True)
    expected = oracle.all_logps(model, shortest, replace(training, micro_batch_size=1), pairwise=pairwise)
    own_attention = str(model.config._attn_implementation)
    for candidate in candidates:
        plain = Engine(device, candidate, training.head)
        for engine in (plain, replace(plain, own_logits=True)):
            reason = _why_not(engine, model, shortest, expected, own_attention, training, pairwise=pairwise)
            if reason is None:
                return engine
            set_attention(model, own_attention)
            log.info("batching %s%s: %s", candidate, " with the model's own head" * engine.own_logits, reason)
    raise ConfigError(f"training.batching={batching}: {reason}; use training.batching=auto, or another model.attention")


def _why_not(
    engine: Engine,
    model: PreTrainedModel,
    examples: Sequence[Example],
    expected: PairLogps,
    attention: str,
    training: TrainingConfig,
    *,
    pairwise: bool,
) -> str | None:
    if engine.batching != "padded" and attention not in ("sdpa", "eager", DOCUMENTS):
        return f"model.attention={attention} keeps no documents apart in one row"
    engine.prepare(model)
    together = replace(training, micro_batch_size=2, micro_batch_tokens=None)
    try:
        found = engine.all_logps(model, examples, together, pairwise=pairwise)
    except (TypeError, ValueError, AttributeError) as error:
        return f"the model's family cannot ({error})"
    for mine, theirs in ((found.chosen, expected.chosen), (found.rejected, expected.rejected)):
        if not torch.allclose(mine, theirs, rtol=PROBE_TOLERANCE, atol=PROBE_TOLERANCE):
            return f"its log-probabilities differ from the model's own ({mine.tolist()} against {theirs.tolist()})"
    return None


def _by_sequence(values: Tensor, batch: Batch) -> Tensor:
    """[N] values of tokens as [S, C] float64, 0 behind each completion's end.

    float64, because a sum of 2,000 tokens in float32 loses the fifth digit of DPO's first loss.
    """
    table = values.new_zeros(len(batch.lengths), batch.width, dtype=torch.float64)
    return table.index_put((batch.sequences, batch.offsets), values.double())


def _sides(both: Tensor) -> list[tuple[str, Tensor]]:
    chosen, rejected = both.chunk(2)
    return [("chosen", chosen), ("rejected", rejected)]


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside what peft put around it."""
    if not isinstance(model, PreTrainedModel) and hasattr(model, "get_base_model"):
        model = model.get_base_model()  # type: ignore[operator]
    assert isinstance(model, PreTrainedModel)
    return model


NOISE = re.compile(r"drop|jitter")


def without_dropout(model: PreTrainedModel) -> None:
    """Switch every dropout off for good: a preference loss compares log-probabilities, and noise would enter them.

    Families keep the rate in an nn.Dropout, in an attribute of a module, or in their config.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    for holder in (*model.modules(), model.config, model.config.get_text_config()):
        for name, value in list(vars(holder).items()):
            if isinstance(value, float) and NOISE.search(name):
                setattr(holder, name, 0.0)
