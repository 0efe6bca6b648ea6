"""Both sides of a training comparison: our loop and TRL's trainers, each as its users run it, on the same tokens.

Seconds are those of optimizer steps alone, without the first: ours from timing.jsonl, TRL's between the callbacks
on_step_begin and on_step_end, which leave out its collation and its logging. TRL runs with its own defaults where they
are fast (fused AdamW, fused LM head, log-probabilities of the reference computed once) and without gradient
checkpointing, which it would do by default.
"""

import contextlib
import gc
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson
import torch

from benchmarks.profiles import Profile, make_pairs
from prefpipe import models
from prefpipe.losses import DPO, Loss, SimPO
from prefpipe.prompts import ChatTemplate
from prefpipe.records import Pair
from prefpipe.settings import HardwareConfig, ModelConfig, TrainingConfig
from prefpipe.training.batches import data_order, encode
from prefpipe.training.loop import Job, train

SEED = 0
BETA = {"dpo": 0.1, "simpo": 2.0}
SIMPO_GAMMA = 1.0
LORA_SCALE = 2
"""Alpha over rank."""
REFERENCES = ("cached", "online")


@dataclass(frozen=True)
class Run:
    """What one short run left. seconds: of each optimizer step but the first. losses: of every step."""

    seconds: list[float]
    losses: list[float]

    @property
    def per_step(self) -> float:
        return sum(self.seconds) / len(self.seconds)


@dataclass(frozen=True)
class Race:
    """What both sides train on: the profile's pairs in the order of our own seeded shuffle, so in the same batches.

    folder: weights and tokenizer. threads: None leaves it to torch.
    batching, head, micro_batch_size: of our side; a micro-batch is the whole batch where None.
    cache: of our side's reference, kept between runs; None is a new one for each run.
    lora_rank: adapters of that rank on every linear layer but the head are trained; None trains all weights.
    every_loss: record TRL's loss at each step, not only the mean.
    """

    profile: Profile
    folder: Path
    threads: int | None = None
    reference: str = "cached"
    batching: str = "auto"
    head: str = "auto"
    micro_batch_size: int | None = None
    cache: Path | None = None
    learning_rate: float = 1e-4
    lora_rank: int | None = None
    gpu: bool = False
    every_loss: bool = False

    @cached_property
    def pairs(self) -> list[Pair]:
        """As many as the run takes, but for the gate, which goes over its four batches again and again."""
        batches = min(self.num_steps, self.profile.num_batches or self.num_steps)
        vocabulary = orjson.loads((self.folder / "config.json").read_bytes())["vocab_size"]
        return make_pairs(self.profile, batches * self.profile.batch_size, vocabulary)

    @property
    def num_steps(self) -> int:
        """The measured ones and the one before."""
        return self.profile.num_steps + 1

    @property
    def hardware(self) -> HardwareConfig:
        if self.gpu:
            return HardwareConfig(name="gpu", device="cuda", precision="bf16")
        return HardwareConfig(name="cpu", device="cpu", precision="fp32", num_threads=self.threads)

    @property
    def model(self) -> ModelConfig:
        if self.lora_rank is None:
            return ModelConfig(name="benchmark", path=str(self.folder))
        alpha = float(LORA_SCALE * self.lora_rank)
        return ModelConfig(
            name="benchmark", path=str(self.folder), adapter="lora", adapter_rank=self.lora_rank, adapter_alpha=alpha
        )

    @property
    def loss(self) -> Loss:
        if self.profile.loss == "simpo":
            return SimPO(beta=BETA["simpo"], gamma=SIMPO_GAMMA)
        return DPO(beta=BETA["dpo"])

    @property
    def training(self) -> TrainingConfig:
        return TrainingConfig(
            learning_rate=self.learning_rate,
            schedule="linear",
            warmup_fraction=0.0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            max_steps=self.num_steps,
            global_batch_size=self.profile.batch_size,
            micro_batch_size=self.micro_batch_size or self.profile.batch_size,
            max_tokens=self.profile.max_tokens,
            max_prompt_tokens=self.profile.max_tokens - 1,
            batching=self.batching,
            head=self.head,
            reference=self.reference,
        )

    @property
    def order(self) -> list[int]:
        """The number of the pair at each place of the run."""
        return list(data_order(len(self.pairs), self.num_steps * self.profile.batch_size, SEED))


def ours(race: Race) -> Run:
    """prefpipe.training.loop.train, from texts to a saved checkpoint."""
    with tempfile.TemporaryDirectory(prefix="bench-ours-") as scratch:
        work = Path(scratch)
        train(
            Job(
                pairs=race.pairs,
                model=race.model,
                policy=race.folder,
                reference=race.folder,
                loss=race.loss,
                training=race.training,
                hardware=race.hardware,
                seed=SEED,
                work=work,
                cache=race.cache or work / "cache",
            )
        )
        timing, metrics = (_rows(work / name) for name in ("timing.jsonl", "metrics.jsonl"))
    gc.collect()
    return Run([row["seconds"] for row in timing[1:]], [row["train/loss"] for row in metrics])


def our_ids(race: Race) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected) ids of each pair of the run, as our loop encodes them."""
    tokenizer = models.load_tokenizer(race.model, race.folder)
    template = ChatTemplate(tokenizer, models.stop_token_ids(tokenizer, race.folder))
    examples, counts = encode(race.pairs, template, race.training, pairwise=True)
    if counts["truncated"] or len(examples) != len(race.pairs):
        raise SystemExit(f"our side does not train on every pair as it is: {dict(counts)}")
    return [(e.prompt.tolist(), e.chosen.tolist(), e.rejected.tolist()) for e in map(examples.__getitem__, race.order)]


def trl(race: Race) -> Run:
    """DPOTrainer.train() for dpo, the experimental CPOTrainer for simpo, on a data set in the order of our side."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    if race.threads is not None:
        torch.set_num_threads(race.threads)
    with tempfile.TemporaryDirectory(prefix="bench-trl-") as scratch, _quiet():
        trainer, seconds = _trl_trainer(race, Path(scratch))
        _refuse_other_ids(race, trainer)
        result = trainer.train()
        logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    losses = logged if race.every_loss else [result.training_loss] * race.num_steps
    del trainer
    gc.collect()
    return Run(seconds[1:], losses)


def _trl_trainer(race: Race, scratch: Path) -> tuple[Any, list[float]]:
    """A trainer, and the list that its steps' seconds will be in."""
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback

    common = {
        "output_dir": str(scratch),
        "per_device_train_batch_size": race.profile.batch_size,
        "num_train_epochs": 1,
        "max_steps": race.num_steps,
        "learning_rate": race.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "train_sampling_strategy": "sequential",
        "max_length": race.profile.max_tokens,
        "beta": BETA[race.profile.loss],
        "gradient_checkpointing": False,
        "bf16": race.gpu,
        "use_cpu": not race.gpu,
        "dataloader_num_workers": 0,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": SEED,
    }
    if race.every_loss:
        common["logging_steps"] = 1
    rows = [
        {
            "prompt": pair.messages,
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
        }
        for pair in map(race.pairs.__getitem__, race.order)
    ]
    data = {"train_dataset": Dataset.from_list(rows), "processing_class": AutoTokenizer.from_pretrained(race.folder)}
    if race.lora_rank is not None:
        from peft import LoraConfig

        data["peft_config"] = LoraConfig(
            r=race.lora_rank,
            lora_alpha=LORA_SCALE * race.lora_rank,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
    clock, seconds = _clock(race.gpu)
    if race.profile.loss == "simpo":
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        args = CPOConfig(**common, loss_type="simpo", simpo_gamma=SIMPO_GAMMA, cpo_alpha=0.0)
        trainer: Any = CPOTrainer(model=str(race.folder), args=args, callbacks=[clock], **data)
    else:
        from trl import DPOConfig, DPOTrainer

        args = DPOConfig(**common, precompute_ref_log_probs=race.reference == "cached")
        trainer = DPOTrainer(model=str(race.folder), args=args, callbacks=[clock], **data)
    trainer.remove_callback(PrinterCallback)
    return trainer, seconds


def _clock(gpu: bool) -> tuple[Any, list[float]]:
    from transformers import TrainerCallback

    seconds: list[float] = []

    class Clock(TrainerCallback):
        """Seconds from on_step_begin to on_step_end."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.started)

    return Clock(), seconds


def _refuse_other_ids(race: Race, trainer: Any) -> None:
    """SystemExit unless TRL trains on the very ids that our side trains on."""
    found = []
    for row in trainer.train_dataset:
        if "prompt_ids" in row:
            found.append((row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]))
        else:
            prompt = row["prompt_input_ids"]
            sides = [row[key] for key in ("chosen_input_ids", "rejected_input_ids")]
            if any(side[: len(prompt)] != prompt for side in sides):
                raise SystemExit("TRL's prompt is no prefix of its sequence")
            found.append((prompt, *(side[len(prompt) :] for side in sides)))
    for place, (theirs, mine) in enumerate(zip(found, our_ids(race), strict=True)):
        if theirs != mine:
            raise SystemExit(f"the sides train on other tokens at place {place}: {theirs} against {mine}")


SIDES: dict[str, Callable[[Race], Run]] = {"ours": ours, "trl": trl}


def _rows(file: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in file.read_bytes().splitlines()]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing of a trainer's chatter between the rows of a table."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
