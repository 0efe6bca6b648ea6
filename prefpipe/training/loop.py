"""The training loop, from pairs to a saved checkpoint, top to bottom."""

import hashlib
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from prefpipe import ladder, models
from prefpipe.errors import DataError
from prefpipe.files import write_json
from prefpipe.launch.notice import Listener
from prefpipe.losses import Loss, PairScores
from prefpipe.progress import progress
from prefpipe.records import Demonstration, Pair
from prefpipe.settings import HardwareConfig, ModelConfig, SelectionConfig, TrainingConfig
from prefpipe.sharding import num_elements
from prefpipe.training import adapters, rewards
from prefpipe.training.adapters import with_adapter
from prefpipe.training.attention import set_attention
from prefpipe.training.batches import Example, data_order, encode, micro_batches
from prefpipe.training.diagnostics import FallingChosen, Interval, LogFiles, Measured, metrics, refuse_non_finite
from prefpipe.training.engine import Engine, Frozen
from prefpipe.training.optim import OPTIMIZERS, learning_rate
from prefpipe.training.parallel import Parallel, connect
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
from prefpipe.training.weights import in_float32, load

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What one training run is made of.

    pairs: or demonstrations, for SFT; held-out ones are left out here, whatever was done before.
    policy, reference: folders of weights. work: where the checkpoint is written; a killed run's states lie there.
    reference_logps: a file of sums that stands in for the reference. world_size: how many processes run this job.
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
    world_size: int = 1


def train(job: Job) -> None:
    """Train job.policy with job.loss on job.pairs and save it, its tokenizer and metrics.jsonl into job.work.

    Every process of the job runs this; the first one writes. Raises DataError on a loss that is not finite, naming the
    rows.
    """
    training, loss, work = job.training, job.loss, job.work
    torch.manual_seed(job.seed)
    device = models.device_of(job.hardware)
    parallel = connect(job.hardware, training, device, world_size=job.world_size)

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
    if parallel.is_first:
        write_json(work / "data_counts.json", dict(counts))
        ladder.remember_longest(work, ((len(e.prompt), len(e.chosen), len(e.rejected)) for e in examples), training)
    num_steps, num_drawn = run_length(len(examples), training)
    log.info("%s, %d steps, %d examples %s", loss.describe(), num_steps, len(examples), dict(counts))
    data = hashlib.sha256(b"".join(key for e in examples for key in e.keys)).hexdigest()
    config = repr((loss, training, job.selection, job.model, job.seed, job.policy, job.reference))
    parallel.refuse_differences({"data": data, "config": hashlib.sha256(config.encode()).hexdigest()})
    log.info("training %s on %s in %s, %d processes", job.policy, device, parallel.precision, parallel.world_size)

    # DoRA divides by the norms of its weights, so those stay as they are read.
    half = parallel.half if job.model.adapter == "lora" else None
    policy = parallel.build(partial(_load, job, job.policy, device, half=half))
    own_attention = str(policy.config._attn_implementation)
    with parallel.evaluating(policy), in_float32(policy):
        engine = rewards.engine_for(loss, training, policy, examples, device=device)
    engine = engine.with_fastest_attention(policy, models.dtype_of(parallel.precision))
    forward_pass = f"batching {engine.batching}, head {engine.head}, {policy.config._attn_implementation}"
    parallel.refuse_differences({"forward pass": forward_pass})
    log.info("forward pass: %s", forward_pass)
    parallel.placed(policy)
    with_gradients = parallel.build(partial(with_adapter, policy, job.model))
    reference = _reference(job, names, with_gradients, examples, engine, parallel) if loss.needs_reference else None
    if isinstance(reference, FixedReference) and parallel.is_first:
        to_csv(work / "reference_logps.csv", reference, names, examples)
    if training.gradient_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with_gradients.train()
    trained = {name: p for name, p in with_gradients.named_parameters() if p.requires_grad}
    # That a token passes: one of the two stacks of an encoder-decoder, which are about as large.
    num_parameters = sum(map(num_elements, policy.parameters())) // (2 if policy.config.is_encoder_decoder else 1)
    moving = reference.moving() if isinstance(reference, OnlineReference) else {}
    parallel.prepare(with_gradients, trained, OPTIMIZERS[training.optimizer](trained.values(), training), moving)

    frozen_model = in_memory(reference)

    def one_pass(model: nn.Module, micro: list[int], divisor: int, measured: list[Measured]) -> torch.Tensor:
        """The part of the step's loss that a micro-batch gives; of an empty one 0, after the same work."""
        indices = micro or [0]
        batch = [examples[i] for i in indices]
        frozen = None if reference is None else reference.logps(indices, loss.reads)
        logps = rewards.measure(engine, model, batch, loss, frozen_model)
        out = loss(logps, frozen, _scores(batch, device) if loss.needs_scores else None)
        if job.selection.apply == "loss":
            weights = torch.tensor([example.weight for example in batch], dtype=out.loss.dtype)
            out = out._replace(loss=out.loss * weights.to(device, non_blocking=True))
        if not micro:
            return out.loss.sum() * 0.0
        measured.append(Measured.of(out, logps, frozen))
        return out.loss.sum() / divisor

    first_step = _resume(work, parallel, data=data)
    ranks = [example.rank for example in examples]
    order = islice(data_order(len(examples), num_drawn, job.seed, ranks), first_step * training.global_batch_size, None)
    falling = FallingChosen()
    logs = LogFiles(work, written=parallel.is_first)
    bar = progress("train", unit="step", total=num_steps, done=first_step, show=parallel.is_first)
    with bar as shown, Listener(listens=parallel.is_first) as notice:
        since = Interval()
        for step in range(first_step, num_steps):
            indices = list(islice(order, training.global_batch_size))
            # Every pair (SFT: every token) of the global batch weighs the same, however it is cut into micro-batches.
            divisor = len(indices) if loss.pairwise else sum(examples[i].num_trained for i in indices)
            mine = parallel.share(micro_batches(examples, indices, training))
            for number, micro in enumerate(mine, 1):
                part = partial(one_pass, micro=micro, divisor=divisor, measured=since.measured)
                parallel.backward(part, last=number == len(mine))
            rate = learning_rate(step, num_steps, training)
            grad_norm = parallel.step(rate)
            if reference is not None:
                reference.follow(step + 1)
            tokens = sum(examples[i].tokens for i in indices)
            since.add_step(divisor, tokens, rows=[examples[i].row for micro in mine for i in micro])
            shown.update()
            if (step + 1) % training.log_every_steps and step + 1 < num_steps:
                continue

            # Only from here on does this process wait for its device, and for the other processes.
            everyone = parallel.all_of((Measured.joined(since.measured), since.rows, notice.heard()))
            values = Measured.joined([values for values, *_ in everyone])
            refuse_non_finite(values.loss, [row for _, rows, _ in everyone for row in rows], step + 1, since.steps)
            epoch = (step * training.global_batch_size + len(indices)) / len(examples)
            row = {"step": step + 1, "epoch": round(epoch, 6), "train/learning_rate": rate}
            row |= {"train/grad_norm": float(grad_norm)}
            row |= metrics(values, since.divisor, loss=loss, with_reference=reference is not None)
            falling.see(row)
            timing = since.speed(num_parameters, device, parallel.world_size)
            logs.write(row, {"step": step + 1} | timing)
            shown.note(f"loss {row['train/loss']:.4f}")
            regular = training.save_every_steps and (step + 1) % training.save_every_steps == 0 and step + 1 < num_steps
            if regular or any(heard for *_, heard in everyone):
                _save_state(work, step + 1, parallel, logs, data)
                notice.answer()
            since = Interval()

    logs.close()
    weights = parallel.whole()
    if parallel.is_first:
        if weights is not None and job.model.adapter != "none":
            with_gradients = with_adapter(_load(job, job.policy, torch.device("cpu")), job.model)
            with_gradients.load_state_dict(weights, strict=False)
            weights = None
        policy = adapters.save(with_gradients, work)
        set_attention(policy, own_attention)
        padding = template.tokenizer.pad_token_id
        models.save_weights(policy, work, like=job.policy, padding=padding, weights=weights)
        template.tokenizer.save_pretrained(work)
    parallel.wait()


def run_length(num_examples: int, training: TrainingConfig) -> tuple[int, int]:
    """(optimizer steps, examples drawn). The last batch of num_epochs may be smaller; max_steps counts full batches."""
    if training.max_steps is not None:
        return training.max_steps, training.max_steps * training.global_batch_size
    drawn = max(1, round(training.num_epochs * num_examples))
    return math.ceil(drawn / training.global_batch_size), drawn


def _load(job: Job, folder: Path, device: torch.device, *, half: torch.dtype | None = None) -> PreTrainedModel:
    return load(job.model, folder, device, rewards=job.loss.of_rewards, seed=job.seed, half=half)


def _reference(
    job: Job, names: PairNames, policy: nn.Module, examples: list[Example], engine: Engine, parallel: Parallel
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
        half = None if moving else parallel.half
        second = parallel.build(partial(_load, job, job.reference, engine.device, half=half))
        engine.prepare(second)
        parallel.freeze(second, keep_head="kl" in job.loss.reads)
        frozen = Frozen(second)
        following = whole_model(second, policy) if moving else {}
    if online:
        alpha, every = training.reference_alpha or 0.0, training.reference_steps or 1
        return OnlineReference(frozen, examples, engine, following=following, alpha=alpha, every=every)
    cache = ReferenceCache(
        job.cache / "reference_logps",
        weights=models.reference_digest(job.model, job.reference),
        precision=parallel.precision,
    )
    with parallel.autocast(), frozen.off(), parallel.evaluating(frozen.model):
        values = cached_values(
            frozen.model.eval(),
            examples,
            engine,
            cache=cache,
            training=training,
            snapshot=job.work / "reference_logps.safetensors",
            parallel=parallel,
        )
    return FixedReference.of_values(values, engine.device)


def _scores(batch: list[Example], device: torch.device) -> PairScores:
    for example in batch:
        if example.scores is None:
            raise DataError(
                f"row {example.row} of inputs.pairs has no scores, and the loss needs them; score and pair the "
                f"completions, or use data whose pairs carry chosen_score and rejected_score"
            )
    scores = torch.tensor([e.scores for e in batch], dtype=torch.float64)
    chosen, rejected = scores.to(device, non_blocking=True).unbind(1)
    return PairScores(chosen, rejected)


def _save_state(work: Path, step: int, parallel: Parallel, logs: LogFiles, data: str) -> None:
    parallel.save(work / "state", step, {"metrics_bytes": logs.synced(), "data": data})


def _resume(work: Path, parallel: Parallel, *, data: str) -> int:
    """Restore the newest state; how many steps are done. The logs are cut back to that step."""
    state = parallel.load(work / "state")
    if state is not None and state["data"] != data:
        raise DataError(
            f"{work / 'state'} is of other data: the pairs, the template or their truncation have changed since; "
            f"use overwrite=true, or another exp_name"
        )
    done = 0 if state is None else int(state["step"])
    if parallel.is_first:
        (work / "timing.jsonl").unlink(missing_ok=True)
        with (work / "metrics.jsonl").open("ab") as file:
            file.truncate(state["metrics_bytes"] if state else 0)
    if done:
        log.info("going on after step %d", done)
    return done
