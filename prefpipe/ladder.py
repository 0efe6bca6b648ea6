"""What to do when memory runs out: recognise it, and name the settings to try next, each with what it would take.

Rungs that change no result come first, the cheapest first; after them, marked as such, those that change the
experiment. A rung that does not apply, or saves nothing, is left out. No setting is changed automatically.
"""

import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from prefpipe.errors import ConfigError, OutOfMemoryError, PrefpipeError, kind_of
from prefpipe.files import write_json
from prefpipe.losses import Loss
from prefpipe.memory import (
    Lengths,
    Memory,
    Setting,
    estimate,
    longest_allowed,
    micro_batch,
    read_shape,
    resolved,
    size,
)
from prefpipe.processes import ChildError
from prefpipe.settings import HardwareConfig, ModelConfig, TrainingConfig
from prefpipe.torchrun import visible_gpus

log = logging.getLogger(__name__)

RECORD = "oom.json"
"""Written into the work folder of a training that ran out of memory; the next attempt removes it."""

LONGEST = "longest_batch.json"
"""In the same folder: the lengths of the largest micro-batch, to explain a process that was killed."""

SAVES = 0.001
"""The share of memory that a rung must save to be listed."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or its cause, says that memory ran out, of a GPU or of this machine."""
    seen: BaseException | None = error
    while seen is not None and kind_of(seen) != OutOfMemoryError.kind:
        seen = seen.__cause__
    return seen is not None


# ------------------------------------------------------------------------------------------------ the rungs


@dataclass(frozen=True)
class Rung:
    """One way to take less memory. override: for the command line. neutral: it changes no result."""

    override: str
    memory: Memory
    neutral: bool


def rungs(setting: Setting, *, num_gpus: int = 0) -> list[Rung]:
    """What would save memory, each setting on its own, in the order to try.

    num_gpus: of this machine; if there are more than the run uses, it can be sharded over them.
    """
    now = estimate(setting).total
    found = []
    for make, neutral in (*((make, True) for make in NEUTRAL), *((make, False) for make in CHANGING)):
        try:
            made = make(setting, num_gpus)
        except ConfigError:  # a combination that is refused is no way
            continue
        if made is None:
            continue
        override, other = made
        memory = estimate(other)
        if memory.total <= (1 - SAVES) * now:
            found.append(Rung(override, memory, neutral))
    return found


Made = tuple[str, Setting] | None
"""An override, and the setting with it; None where it does not apply."""


def _zero3(setting: Setting, num_gpus: int) -> Made:
    hardware = setting.hardware
    if hardware.zero_stage == 3:
        return None
    if setting.world_size > 1:
        return "hardware.zero_stage=3", replace(setting, hardware=replace(hardware, zero_stage=3))
    if num_gpus < 2 or not _divides(setting.training, setting.training.micro_batch_size, num_gpus):
        return None
    return "hardware=zero3", replace(setting, hardware=replace(hardware, zero_stage=3, gpus_per_node=num_gpus))


def _offload(setting: Setting, num_gpus: int) -> Made:
    hardware = setting.hardware
    if hardware.device == "cpu" or hardware.offload_params:
        return None
    offloaded = replace(hardware, zero_stage=3, offload_optimizer=True, offload_params=True)
    keys = ["hardware.zero_stage=3"] if hardware.zero_stage != 3 else []
    keys += [] if hardware.offload_optimizer else ["hardware.offload_optimizer=true"]
    return " ".join([*keys, "hardware.offload_params=true"]), replace(setting, hardware=offloaded)


def _gradient_checkpointing(setting: Setting, _: int) -> Made:
    return _training(setting, gradient_checkpointing=True)


def _half_micro_batch(setting: Setting, _: int) -> Made:
    """Accumulation follows from the global batch size, so the step stays the same."""
    training = setting.training
    if setting.loss.batch_wise or len(setting.lengths) < 2:
        return None
    if training.micro_batch_tokens is not None and len(setting.lengths) < training.micro_batch_size:
        return _training(setting, micro_batch_tokens=training.micro_batch_tokens // 2)
    half = training.micro_batch_size // 2
    while half > 1 and not _divides(training, half, setting.world_size):
        half -= 1
    return _training(setting, micro_batch_size=half)


def _chunked(setting: Setting, _: int) -> Made:
    if setting.adapted or setting.loss.of_rewards:  # a frozen head keeps no logits
        return None
    return _training(setting, head="chunked")


def _cached(setting: Setting, _: int) -> Made:
    if not setting.reference_online or "kl" in setting.loss.reads or setting.training.reference == "moving":
        return None
    return _training(setting, reference="cached")


def _lora(setting: Setting, _: int) -> Made:
    return _adapter(setting, "lora") if not setting.adapted else None


def _qlora(setting: Setting, _: int) -> Made:
    if setting.hardware.device == "cpu" or setting.model.adapter == "qlora" or setting.hardware.zero_stage == 3:
        return None
    return _adapter(setting, "qlora")


def _simpo(setting: Setting, _: int) -> Made:
    from prefpipe.losses import SimPO  # type: ignore[attr-defined]

    if not setting.loss.pairwise or setting.loss.of_rewards or not setting.loss.needs_reference:
        return None
    return "loss=simpo", replace(setting, loss=SimPO(), training=replace(setting.training, **_no_reference(setting)))


NEUTRAL: Sequence[Callable[[Setting, int], Made]] = (
    _zero3,
    _offload,
    _gradient_checkpointing,
    _half_micro_batch,
    _chunked,
    _cached,
)
CHANGING: Sequence[Callable[[Setting, int], Made]] = (_lora, _qlora, _simpo)


def _training(setting: Setting, **changes: Any) -> Made:
    if all(getattr(setting.training, key) == value for key, value in changes.items()):
        return None
    training = replace(setting.training, **changes)
    pairs = micro_batch(setting.lengths, training)
    override = " ".join(f"training.{key}={str(value).lower()}" for key, value in changes.items())
    return override, replace(setting, training=training, lengths=pairs)


def _adapter(setting: Setting, name: str) -> Made:
    model = replace(setting.model, adapter=name, adapter_rank=None, adapter_alpha=None, adapter_targets=[])
    return f"model.adapter={name}", replace(setting, model=model)


def _no_reference(setting: Setting) -> dict[str, Any]:
    return {"reference": "auto", "reference_alpha": None, "reference_steps": None}


def _divides(training: TrainingConfig, micro: int, world_size: int) -> bool:
    return training.global_batch_size % (micro * world_size) == 0


def in_words(setting: Setting, found: Sequence[Rung]) -> str:
    """The ladder as lines for people: what was predicted, then each rung with its own prediction."""
    lines = [f"predicted: {size(estimate(setting).total)} for each process, with pairs of {described(setting.lengths)}"]
    titles = {True: "the same experiment in less memory:", False: "in less memory, but another experiment:"}
    width = max((len(rung.override) for rung in found), default=0)
    for neutral, title in titles.items():
        some = [rung for rung in found if rung.neutral is neutral]
        lines += [title] if some else []
        lines += [f"  {rung.override:<{width}}  {size(rung.memory.total)}" for rung in some]
    if not found:
        lines.append("no setting is known that takes less; use a smaller model, or smaller training.max_tokens")
    return "\n".join(lines)


def described(lengths: Sequence[Lengths]) -> str:
    """A micro-batch in words."""
    longest = max(lengths, key=lambda p: p.prompt + max(p.chosen, p.rejected))
    return f"up to {longest.prompt} + {max(longest.chosen, longest.rejected)} tokens, {len(lengths)} at a time"


# ------------------------------------------------------------------------------------------------ where it is hooked in


def remember_longest(work: Path, lengths: Iterable[Sequence[int]], training: TrainingConfig) -> None:
    """Note the largest micro-batch that training can meet.

    lengths: (prompt, chosen, rejected) tokens of each pair.
    """
    write_json(work / LONGEST, [list(pair) for pair in micro_batch(lengths, training)])


@dataclass(frozen=True)
class Attempt:
    """One attempt to train, to explain its end when memory ran out.

    work: its folder. policy: the folder whose config.json gives the model's shape.
    """

    work: Path
    policy: Path
    model: ModelConfig
    loss: Loss
    training: TrainingConfig
    hardware: HardwareConfig
    reference_is_policy: bool = True
    reference_given: bool = False

    @contextmanager
    def answered(self) -> Iterator[None]:
        """Inside a training process: an out-of-memory error becomes an OutOfMemoryError with the ladder.

        Its details are then in RECORD. Of several processes the first one to fail reports; the others end by one line.
        """
        if _rank() == 0:
            self._forget()
        try:
            yield
            if _rank() == 0:
                self._forget()
        except PrefpipeError:
            raise
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.debug("out of memory", exc_info=True)
            what = _first_line(error)
            traceback.clear_frames(error.__traceback__)  # their tensors are what fills the memory
            raise self._told(f"out of memory {self._when()} ({what})") from None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around the processes that train, because one that the kernel kills for memory cannot report it.

        Its death becomes an OutOfMemoryError, and the ladder is logged.
        """
        self._forget()
        kills = oom_kills()
        try:
            yield
        except PrefpipeError as error:
            told = (self.work / RECORD).is_file() or (isinstance(error, ChildError) and error.reason)
            killed = kills is not None and (oom_kills() or 0) > kills
            if told or not (killed or error.kind == OutOfMemoryError.kind):
                raise
            why = "the kernel killed a process for it" if killed else f"it seems: {error}"
            raise self._told(f"out of memory {self._when()} ({why})") from None

    def _forget(self) -> None:
        for name in (RECORD, LONGEST):
            (self.work / name).unlink(missing_ok=True)

    def setting(self, num_gpus: int) -> Setting:
        """What the estimate reads. Raises ConfigError where the model's shape is not known."""
        return Setting(
            read_shape(self.policy),
            resolved(self.hardware, num_gpus=num_gpus),
            self.training,
            self.loss,
            self.model,
            self._lengths(),
            reference_is_policy=self.reference_is_policy,
            reference_given=self.reference_given,
        )

    def _lengths(self) -> list[Lengths]:
        with suppress(OSError, orjson.JSONDecodeError, TypeError):
            found = [Lengths(*pair) for pair in orjson.loads((self.work / LONGEST).read_bytes())]
            if found:
                return found
        return longest_allowed(self.training, pairwise=self.loss.pairwise)

    def _when(self) -> str:
        with suppress(OSError):
            steps = (self.work / "metrics.jsonl").read_bytes().splitlines()
            return f"after step {len(steps)}" if steps else "in the first step"
        return "before the first step"

    def _told(self, what: str) -> OutOfMemoryError:
        """The error, after the ladder was logged and the record written; of several processes the first one does."""
        num_gpus = visible_gpus()
        record: dict[str, Any] = {"kind": OutOfMemoryError.kind, "error": what, "rank": _rank()}
        try:
            setting = self.setting(num_gpus)
            found = rungs(setting, num_gpus=num_gpus)
            ways = in_words(setting, found)
            record |= {"predicted": asdict(estimate(setting)), "lengths": [list(pair) for pair in setting.lengths]}
            record["rungs"] = [asdict(rung) for rung in found]
        except ConfigError as error:
            found, ways = [], f"what would take less is not known: {error}"
        record["device"] = _device_memory()
        try:
            with (self.work / RECORD).open("xb") as file:
                file.write(orjson.dumps(record, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
        except FileExistsError:
            return OutOfMemoryError(f"{what}, as in another process before; the ways to take less stand there")
        except OSError as error:
            log.warning("%s cannot be written: %s", self.work / RECORD, error)
        log.error("%s\n%s", what, ways)
        first = f"; first to try: {found[0].override} ({size(found[0].memory.total)})" if found else ""
        return OutOfMemoryError(f"{what}{first}; what was predicted, and every way to take less, stands above")


def _rank() -> int:
    """The rank of this process, as torchrun sets it."""
    return int(os.environ.get("RANK", 0))


def oom_kills(cgroup: Path = Path("/proc/self/cgroup"), mounts: Path = Path("/sys/fs/cgroup")) -> int | None:
    """How many processes of this one's control group the kernel has killed for memory; None where it does not say."""
    with suppress(OSError):
        for line in cgroup.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            name = "memory.oom_control" if controllers else "memory.events"
            for folder in (mounts / controllers / path.lstrip("/"), mounts / controllers):
                with suppress(OSError):
                    counts = dict(entry.split(" ", 1) for entry in (folder / name).read_text().splitlines())
                    if "oom_kill" in counts:
                        return int(counts["oom_kill"])
    return None


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    found = re.search(r"(CUDA out of memory.*?|DefaultCPUAllocator.*?)(?:\. GPU |$)", text)
    return (found.group(1) if found else text)[:200]


def _device_memory() -> str | None:
    """The GPU allocator's summary, where torch has been imported and a GPU is in use."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return str(torch.cuda.memory_summary(abbreviated=True))
