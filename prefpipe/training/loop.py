"""The training loop, from pairs to a saved checkpoint, top to bottom."""

import hashlib
import logging
import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from prefpipe import models
from prefpipe.errors import DataError
from prefpipe.files import write_json
from prefpipe.losses import Loss, PairScores
from prefpipe.progress import progress
from prefpipe.records import Demonstration, Pair
from prefpipe.reward_models import new_reward_model
from prefpipe.settings import HardwareConfig, ModelConfig, SelectionConfig, TrainingConfig
from prefpipe.training import adapters, checkpoints, rewards
from prefpipe.training.adapters import with_adapter
from prefpipe.training.attention import set_attention
from prefpipe.training.batches import Example, data_order, encode, micro_batches
from prefpipe.training.diagnostics import FallingChosen, Measured, metrics, speed
from prefpipe.training.engine import Engine, Frozen, without_dropout
from prefpipe.training.optim import OPTIMIZERS, learning_rate
from prefpipe.training.reference import (
    FixedReference,
    OnlineReference,
    Reference,
    cached_values,
    from_csv,
    in_memory,
    to_csv,
    whole_model,
)
from prefpipe.training.reference_cache import ReferenceCache
from prefpipe.training.reference_csv import PairNames
from prefpipe.training.selection import select

log = logging.getLogger(__name__)

MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


@dataclass(frozen=True)
class Job:
    """What one training run is made of.

    pairs: or demonstrations, for SFT; held-out ones are left out here, whatever was done before.
    policy, reference: folders of weights. work: where the checkpoint is written; a killed run's states lie there.
    reference_logps: a file of sums that stands in for the reference.
    """

    pairs: Iterable[Pair | Demonstration]
    model: ModelConfig
    policy: Path
    reference: Path
    loss: Loss
    training: TrainingConfig
    hardware: HardwareConfig
    seed: int
    work: Path
    cache: Path
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    reference_logps: Path | None = None


def train(job: Job) -> None:
    """Train job.policy with job.loss on job.pairs and save it, its tokenizer and metrics.jsonl into job.work.

    Raises DataError on a loss that is not finite, naming the rows.
    """
    training, loss, work = job.training, job.loss, job.work
    torch.manual_seed(job.seed)
    device = models.device_of(job.hardware)
    precision = models.precision_of(job.hardware, device)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=MIXED_PRECISION[precision])

    template = models.load_template(job.model, job.policy, rewards=loss.of_rewards)
    names = PairNames()
    pairs = names.seen(job.pairs) if loss.needs_reference else job.pairs
    examples, counts = encode(
        pairs, template, training, pairwise=loss.pairwise, all_turns=loss.all_turns, selection=job.selection
    )
    selected = select([e.pair_id for e in examples], [e.weight for e in examples], job.selection, job.seed)
    examples = [
        examples[i]._replace(weight=weight) for i, weight in zip(selected.indices, selected.weights, strict=True)
    ]
    counts += selected.counts
    write_json(work / "data_counts.json", dict(counts))
    num_steps, num_drawn = run_length(len(examples), training)
    log.info("%s, %d steps, %d examples %s", loss.describe(), num_steps, len(examples), dict(counts))
    log.info("training %s on %s in %s", job.policy, device, precision)

    policy = _load(job, job.policy, device)
    own_attention = str(policy.config._attn_implementation)
    engine = rewards.engine_for(loss, training, policy, examples, device=device)
    engine = engine.with_fastest_attention(policy, models.dtype_of(precision))
    log.info("forward pass: batching %s, head %s, %s", engine.batching, engine.head, policy.config._attn_implementation)
    with_gradients = with_adapter(policy, job.model)
    reference = _reference(job, names, with_gradients, examples, engine, accelerator) if loss.needs_reference else None
    if isinstance(reference, FixedReference):
        to_csv(work / "reference_logps.csv", reference, names, examples)
    if training.gradient_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with_gradients.train()
    trained = {name: p for name, p in with_gradients.named_parameters() if p.requires_grad}
    optimizer = OPTIMIZERS[training.optimizer](trained.values(), training)
    model, optimizer = accelerator.prepare(with_gradients, optimizer)

    frozen_model = in_memory(reference)
    moving = reference.moving() if isinstance(reference, OnlineReference) else {}
    data = hashlib.sha256(b"".join(key for e in examples for key in e.keys)).hexdigest()
    first_step = _resume(work, trained | moving, optimizer, accelerator, data=data)
    ranks = [example.rank for example in examples]
    order = islice(data_order(len(examples), num_drawn, job.seed, ranks), first_step * training.global_batch_size, None)
    # That a token passes: one of the two stacks of an encoder-decoder, which are about as large.
    num_parameters = sum(p.numel() for p in policy.parameters()) // (2 if policy.config.is_encoder_decoder else 1)
    falling = FallingChosen()
    metrics_file = (work / "metrics.jsonl").open("ab")
    timing_file = (work / "timing.jsonl").open("ab")
    with progress("train", unit="step", total=num_steps, done=first_step) as shown:
        for step in range(first_step, num_steps):
            started = time.perf_counter()
            indices = list(islice(order, training.global_batch_size))
            # Every pair (SFT: every token) of the global batch weighs the same, however it is cut into micro-batches.
            divisor = len(indices) if loss.pairwise else sum(examples[i].num_trained for i in indices)
            rows: list[int] = []
            measured: list[Measured] = []
            for micro in micro_batches(examples, indices, training):
                batch = [examples[i] for i in micro]
                with accelerator.autocast():
                    frozen = None if reference is None else reference.logps(micro, loss.reads)
                    logps = rewards.measure(engine, model, batch, loss, frozen_model)
                out = loss(logps, frozen, _scores(batch, device) if loss.needs_scores else None)
                if job.selection.apply == "loss":
                    out = out._replace(loss=out.loss * out.loss.new_tensor([example.weight for example in batch]))
                accelerator.backward(out.loss.sum() / divisor)
                rows += [examples[i].row for i in micro]
                measured.append(Measured.of(out, logps, frozen))
            values = Measured.of_step(measured)
            _refuse_non_finite(values.loss, rows, step)
            grad_norm = accelerator.clip_grad_norm_(trained.values(), training.max_grad_norm)
            rate = learning_rate(step, num_steps, training)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            if reference is not None:
                reference.follow(step + 1)

            epoch = (step * training.global_batch_size + len(indices)) / len(examples)
            row = {"step": step + 1, "epoch": round(epoch, 6), "train/learning_rate": rate}
            row |= {"train/grad_norm": float(grad_norm)}
            row |= metrics(values, divisor, loss=loss, with_reference=reference is not None)
            falling.see(row)
            metrics_file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
            metrics_file.flush()
            tokens = sum(examples[i].tokens(pairwise=loss.pairwise) for i in indices)
            timing = {"step": step + 1} | speed(time.perf_counter() - started, tokens, num_parameters, device)
            timing_file.write(orjson.dumps(timing, option=orjson.OPT_APPEND_NEWLINE))
            shown.note(f"loss {row['train/loss']:.4f}")
            shown.update()
            if training.save_every_steps and (step + 1) % training.save_every_steps == 0 and step + 1 < num_steps:
                os.fsync(metrics_file.fileno())
                extra = {"metrics_bytes": metrics_file.tell(), "data": data}
                _save_state(work, step + 1, trained | moving, optimizer, accelerator, extra)

    metrics_file.close()
    timing_file.close()
    policy = adapters.save(with_gradients, work)
    set_attention(policy, own_attention)
    models.save_weights(policy, work, like=job.policy, padding=template.tokenizer.pad_token_id)
    template.tokenizer.save_pretrained(work)


def run_length(num_examples: int, training: TrainingConfig) -> tuple[int, int]:
    """(optimizer steps, examples drawn). The last batch of num_epochs may be smaller; max_steps counts full batches."""
    if training.max_steps is not None:
        return training.max_steps, training.max_steps * training.global_batch_size
    drawn = max(1, round(training.num_epochs * num_examples))
    return math.ceil(drawn / training.global_batch_size), drawn


def _load(job: Job, folder: Path, device: torch.device) -> PreTrainedModel:
    """Weights in float32: the optimizer's updates at a learning rate of 5e-7 vanish in bfloat16."""
    if job.loss.of_rewards:
        model = new_reward_model(job.model, folder, seed=job.seed, device=device)
    else:
        model = models.load_weights(job.model, folder, dtype=torch.float32, device=device)
    without_dropout(model)
    return model


def _reference(
    job: Job, names: PairNames, policy: nn.Module, examples: list[Example], engine: Engine, accelerator: Accelerator
) -> Reference:
    """Where it is the policy itself, an adapter is switched off; a full policy has not moved yet when it is asked."""
    training = job.training
    if job.reference_logps is not None:
        return from_csv(job.reference_logps, names, examples, engine.device)
    is_policy = job.reference == job.policy
    adapted = job.model.adapter != "none"
    moving = training.reference == "moving"
    online = training.reference == "online" or moving or "kl" in job.loss.reads
    following = {}
    if adapted and moving:
        assert is_policy
        following = adapters.add_reference(policy)
        frozen = Frozen(policy, partial(adapters.reference_on, policy))
    elif is_policy and adapted:
        frozen = Frozen(policy, policy.disable_adapter)  # type: ignore[arg-type]
    elif is_policy and not online:
        frozen = Frozen(policy)
    else:
        second = _load(job, job.reference, engine.device)
        engine.prepare(second)
        frozen = Frozen(second.requires_grad_(False).eval())
        following = whole_model(second, policy) if moving else {}
    if online:
        alpha, every = training.reference_alpha or 0.0, training.reference_steps or 1
        return OnlineReference(frozen, examples, engine, following=following, alpha=alpha, every=every)
    precision = models.precision_of(job.hardware, engine.device)
    cache = ReferenceCache(
        job.cache / "reference_logps", weights=models.weights_digest(job.reference), precision=precision
    )
    with accelerator.autocast(), frozen.off():
        values = cached_values(
            frozen.model.eval(),
            examples,
            engine,
            cache=cache,
            training=training,
            snapshot=job.work / "reference_logps.safetensors",
        )
    return FixedReference.of_values(values, engine.device)


def _scores(batch: list[Example], device: torch.device) -> PairScores:
    for example in batch:
        if example.scores is None:
            raise DataError(
                f"row {example.row} of inputs.pairs has no scores, and the loss needs them; score and pair the "
                f"completions, or use data whose pairs carry chosen_score and rejected_score"
            )
    chosen, rejected = torch.tensor([e.scores for e in batch], dtype=torch.float64, device=device).unbind(1)
    return PairScores(chosen, rejected)


def _refuse_non_finite(loss: torch.Tensor, rows: list[int], step: int) -> None:
    bad = [row for row, finite in zip(rows, torch.isfinite(loss).tolist(), strict=True) if not finite]
    if bad:
        raise DataError(
            f"the loss of step {step + 1} is not finite for rows {bad[:8]} of inputs.pairs ({len(bad)} in all); look "
            f"at those rows, lower training.learning_rate, or use hardware.precision=fp32"
        )


def _save_state(
    work: Path,
    step: int,
    parameters: dict[str, nn.Parameter],
    optimizer: Any,
    accelerator: Accelerator,
    extra: dict[str, Any],
) -> None:
    scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
    checkpoints.save(work / "state", step, parameters, optimizer, {"scaler": scaler, **extra})


def _resume(
    work: Path, parameters: dict[str, nn.Parameter], optimizer: Any, accelerator: Accelerator, *, data: str
) -> int:
    """Restore the newest state; how many steps are done. The logs are cut back to that step."""
    state = checkpoints.load_newest(work / "state", parameters, optimizer)
    metrics_file, done = work / "metrics.jsonl", 0
    if state is None:
        metrics_file.unlink(missing_ok=True)
    else:
        if state["data"] != data:
            raise DataError(
                f"{work / 'state'} is of other data: the pairs, the template or their truncation have changed since; "
                f"use overwrite=true, or another exp_name"
            )
        done = int(state["step"])
        with metrics_file.open("r+b") as file:
            file.truncate(state["metrics_bytes"])
        if state["scaler"] and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        log.info("going on after step %d", done)
    (work / "timing.jsonl").unlink(missing_ok=True)
    return done
