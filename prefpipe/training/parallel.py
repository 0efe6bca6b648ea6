"""How the processes of a training run share its work: one process alone, DDP, or DeepSpeed's ZeRO.

The loop asks the same of each: a forward and backward pass, an optimizer step, a state to go on from, and the weights.
"""

import gc
import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from prefpipe import models, sharding
from prefpipe.errors import ConfigError, DataError
from prefpipe.settings import HardwareConfig, TrainingConfig
from prefpipe.training import checkpoints
from prefpipe.training.deepspeed import deepspeed_config
from prefpipe.training.engine import unwrapped
from prefpipe.training.watchdog import Watchdog

log = logging.getLogger(__name__)

MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}

TIMEOUT = timedelta(minutes=30)
"""What one process may take longer than another, e.g. to save a state, before the run is given up as hung. In a step
training/watchdog.py gives up sooner."""

WHOLE = "whole copies"
TAG = "zero"
"""DeepSpeed's name of the folder of its parts in a state."""

VERSIONS = ("prefpipe", "torch", "transformers", "accelerate", "deepspeed", "peft")


Compute = Callable[[nn.Module], Tensor]
"""A model → a scalar."""

Model = TypeVar("Model", bound=nn.Module)


class Forward(nn.Module):
    """A model whose forward pass is any function of it.

    DDP and DeepSpeed hook into the forward pass of what they wrap, and the engine calls parts of a model. The function
    is all it is given: DeepSpeed copies lists and tuples among a module's arguments.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Compute) -> Tensor:
        return compute(self.model)


class Parallel:
    """One process alone, or DDP: each process holds the whole model and computes its share of a batch.

    rank, world_size: of this process among all of them, on all nodes.
    """

    model: Any
    optimizer: Any

    def __init__(self, hardware: HardwareConfig, training: TrainingConfig, device: torch.device) -> None:
        self.hardware, self.training, self.device = hardware, training, device
        self.precision = models.precision_of(hardware, device)
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        self._connect()
        self._watchdog = Watchdog(watches=self.world_size > 1)

    def _connect(self) -> None:
        self.accelerator = Accelerator(
            cpu=self.device.type == "cpu",
            mixed_precision=MIXED_PRECISION[self.precision],
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=TIMEOUT),
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            ],
        )
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self.rank == 0)

    def all_of(self, value: Any) -> list[Any]:
        """What each process gives here, by rank. Every process has to come here; values are small."""
        if self.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.world_size
        distributed.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Until every process has come here."""
        if self.world_size > 1:
            distributed.barrier()

    def refuse_differences(self, digests: Mapping[str, str]) -> None:
        """Raise ConfigError when the processes would not train on the same: config, data, versions."""
        mine = dict(digests)
        for package in VERSIONS:
            try:
                mine[package] = version(package)
            except PackageNotFoundError:
                mine[package] = "none"
        for rank, theirs in enumerate(everyone := self.all_of(mine)):
            for key in mine:
                if theirs[key] != everyone[0][key]:
                    raise ConfigError(
                        f"process {rank} has another {key} ({theirs[key][:16]}) than process 0 "
                        f"({everyone[0][key][:16]}); all nodes need the same environment, files and hub cache"
                    )

    def share(self, batches: Sequence[list[int]]) -> list[list[int]]:
        """This process's part of a step's micro-batches: as many as any other gets, so that all work in step.

        Large ones are halved until they can be dealt out evenly; where there are fewer examples than processes, some
        get an empty one.
        """
        if self.world_size == 1:
            return list(batches)
        parts = list(batches)
        while len(parts) % self.world_size:
            largest = max(range(len(parts)), key=lambda i: len(parts[i]))
            whole, half = parts[largest], len(parts[largest]) // 2
            parts[largest : largest + 1] = [whole[:half], whole[half:]] if half else [whole, []]
        return parts[self.rank :: self.world_size]

    def build(self, make: Callable[[], Model]) -> Model:
        """Call what loads a model, or adds to one; with ZeRO-3 this process gets only its shard of each parameter."""
        return make()

    def placed(self, model: nn.Module) -> None:
        """Give a model the type in which it is held while it is trained, or asked as a reference."""

    def evaluating(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within this context a model can be called before `prepare`; with ZeRO-3 by all processes at once."""
        return nullcontext()

    def freeze(self, model: PreTrainedModel, *, keep_head: bool) -> None:
        """Take over a second model, which is only evaluated.

        keep_head: with ZeRO-3, do not shard its head, because it is called tile by tile.
        """
        model.requires_grad_(False).eval()
        self.placed(model)

    def prepare(
        self, model: nn.Module, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, kept: dict[str, Any]
    ) -> None:
        """Take over a model and its optimizer.

        trained: the parameters that the optimizer changes, by name. kept: what else a state holds.
        """
        self.trained, self.kept = trained, kept
        forward = Forward(model)
        self.model = self.accelerator.prepare_model(forward) if self.world_size > 1 else forward
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        if self.world_size > 1 and not isinstance(self.model, DistributedDataParallel):
            raise RuntimeError(f"{self.world_size} processes, and accelerate made {type(self.model)} of the model")

    @property
    def half(self) -> torch.dtype | None:
        """The type that autocast gives linear layers, and that frozen ones may be held in; None without autocast."""
        return None if self.precision == "fp32" else models.dtype_of(self.precision)

    def autocast(self) -> AbstractContextManager[None]:
        """Within it a model computes in the run's precision."""
        return self.accelerator.autocast()  # type: ignore[no-any-return]

    def backward(self, compute: Compute, *, last: bool) -> None:
        """Add the gradient of compute(model) to the others of this step; after the last, processes exchange theirs."""
        self._watchdog.beat()
        self._backward(compute, last=last)

    def _backward(self, compute: Compute, *, last: bool) -> None:
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            with self.autocast():
                loss = self.model(compute)
            self.accelerator.backward(loss * self.world_size)  # the exchange takes the mean over processes

    def step(self, learning_rate: float) -> Tensor | float:
        """Clip, change the parameters, forget the gradients; the gradient's norm before clipping."""
        norm: Tensor = self.accelerator.clip_grad_norm_(self.trained.values(), self.training.max_grad_norm)
        self._set_learning_rate(learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _set_learning_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def save(self, folder: Path, step: int, extra: dict[str, Any]) -> None:
        """Write a state to go on from; every process has to come here."""
        with self._watchdog.paused():
            if self.is_first:
                checkpoints.begin(folder, step)
            self._write(checkpoints.aside(folder, step))
            if self.is_first:
                scaler = None if self._scaler is None else self._scaler.state_dict()
                checkpoints.publish(folder, step, {"scaler": scaler, "sharding": self.sharding, **extra})
            self.wait()

    def load(self, folder: Path) -> dict[str, Any] | None:
        """Go back to the newest undamaged state; its state.json, or None where there is none.

        Raises DataError when it is in parts of another number of processes.
        """
        found = self.all_of(checkpoints.newest(folder) if self.is_first else None)[0]
        if found is None:
            return None
        path: Path = found[0]
        state: dict[str, Any] = found[1]
        if (written_by := state.get("sharding", WHOLE)) != self.sharding:
            raise DataError(
                f"{path} is a state of {written_by}, and this run is {self.sharding}: a state in parts is gone on from "
                f"by as many processes that share alike. Take those again, or remove {folder} to begin anew"
            )
        if not all(seen := self.all_of(path.is_dir())):
            raise ConfigError(
                f"process {seen.index(False)} does not see {path}: paths.runs must be a folder that all nodes share"
            )
        self._read(path)
        checkpoints.load_random(path)
        if state["scaler"] and self._scaler is not None:
            self._scaler.load_state_dict(state["scaler"])
        return state

    def _write(self, aside: Path) -> None:
        if self.is_first:
            checkpoints.save_tensors(aside, self.trained | self.kept, self.optimizer)

    def _read(self, path: Path) -> None:
        checkpoints.load_tensors(path, self.trained | self.kept, self.optimizer)

    @property
    def _scaler(self) -> Any:
        return self.accelerator.scaler

    @property
    def sharding(self) -> str:
        """Who can go on from this run's states; whole ones are for any number of processes."""
        return WHOLE

    def whole(self) -> dict[str, Tensor] | None:
        """All parameters, or those of the adapter that was trained, in float32 on the CPU of the first process.

        None: the model itself holds them. Nothing is trained after this.
        """
        self._watchdog.stop()
        return self._whole()

    def _whole(self) -> dict[str, Tensor] | None:
        halved = any(p.dtype in (torch.bfloat16, torch.float16) for p in self.model.parameters())
        return {name: p.detach().float().cpu() for name, p in self.trained.items()} if halved else None


class Zero(Parallel):
    """DeepSpeed's ZeRO: each process holds a part of the optimizer, of the gradients (2) and of the weights (3)."""

    def _connect(self) -> None:
        try:
            import deepspeed
        except ImportError:
            raise ConfigError(
                f"hardware.zero_stage={self.hardware.zero_stage} needs DeepSpeed: pip install 'prefpipe[deepspeed]'"
            ) from None
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=TIMEOUT)
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()

    def build(self, make: Callable[[], Model]) -> Model:
        if not self._shards_weights:
            return make()
        with sharding.sharded_loading(self._config("fp32")):  # `placed` converts the shards
            return make()

    @property
    def _shards_weights(self) -> bool:
        return self.hardware.zero_stage == 3

    def _config(self, precision: str) -> dict[str, Any]:
        return deepspeed_config(
            self.hardware,
            self.training,
            precision=precision,
            on_gpu=self.device.type == "cuda",
            accumulation=self.training.accumulation(self.world_size),
        )

    def placed(self, model: nn.Module) -> None:
        sharding.cast(model, models.dtype_of(self.precision))

    def evaluating(self, model: nn.Module) -> AbstractContextManager[None]:
        return sharding.gathering_in_forward(model)

    def freeze(self, model: PreTrainedModel, *, keep_head: bool) -> None:
        super().freeze(model, keep_head=keep_head)
        sharding.gather_in_forward(model)
        if keep_head:
            sharding.keep_gathered(_head_parameters(model))

    def prepare(
        self, model: nn.Module, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, kept: dict[str, Any]
    ) -> None:
        import deepspeed

        self.trained, self.kept = trained, kept
        self.placed(model)  # an adapter has come; DeepSpeed converts no part of a model that is sharded already
        forward = Forward(model)
        gc.collect()  # sharded parameters refer to themselves, so those of a reference that is done with are still here
        self.model, self.optimizer, *_ = deepspeed.initialize(
            model=forward, optimizer=optimizer, config=self._config(self.precision), dist_init_required=False
        )
        stage = self.model.zero_optimization_stage()
        if not isinstance(self.model, deepspeed.DeepSpeedEngine) or stage != self.hardware.zero_stage:
            raise RuntimeError(f"DeepSpeed made {type(self.model)} with stage {stage} of the model")
        if self._shards_weights:
            # The engine reads the head's weights without calling the head, so nothing else would gather them.
            for parameter in _head_parameters(unwrapped(model)):
                deepspeed.zero.register_external_parameter(forward, parameter)

    @property
    def half(self) -> torch.dtype | None:
        return None  # `placed` converts all

    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _backward(self, compute: Compute, *, last: bool) -> None:
        # Micro-batches of a token budget are not equally many in each step, so the boundary is said, not counted.
        self.model.set_gradient_accumulation_boundary(last)
        loss = self.model(compute)
        self.model.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> Tensor | float:
        self._set_learning_rate(learning_rate)
        self.model.step()
        norm: Tensor | float | None = self.model.get_global_grad_norm()
        return math.nan if norm is None else norm  # of a step that fp16 overflowed

    @property
    def sharding(self) -> str:
        return f"ZeRO-{self.hardware.zero_stage} in {self.world_size} processes"

    def _write(self, aside: Path) -> None:
        self.wait()  # for the folder
        self.model.save_checkpoint(str(aside), tag=TAG, save_latest=False)  # each process its own part
        if self._shards_weights and self.kept:
            self._folder_of_shards(aside).mkdir()
            checkpoints.save_tensors(self._folder_of_shards(aside), self._kept_shards())
        elif self.is_first:
            checkpoints.save_tensors(aside, self.kept)
        self.wait()

    def _read(self, path: Path) -> None:
        self.model.load_checkpoint(str(path), tag=TAG)
        if self._shards_weights and self.kept:
            checkpoints.load_tensors(self._folder_of_shards(path), self._kept_shards())
            for parameter in self.kept.values():
                sharding.drop_gathered(parameter)
        else:
            checkpoints.load_tensors(path, self.kept)

    def _folder_of_shards(self, state: Path) -> Path:
        return state / f"kept-{self.rank:05d}"

    def _kept_shards(self) -> dict[str, Tensor]:
        return {name: sharding.local_shard(parameter) for name, parameter in self.kept.items()}

    @property
    def _scaler(self) -> Any:
        return None  # DeepSpeed's own is in its state

    def _whole(self) -> dict[str, Tensor] | None:
        from deepspeed.utils import safe_get_full_fp32_param

        weights = {}
        model = self.model.module.model
        for name, parameter in model.named_parameters():
            if name in self.trained:
                full = safe_get_full_fp32_param(parameter)
            elif isinstance(model, PreTrainedModel):  # not the frozen weights under an adapter
                with sharding.gathered([parameter]):
                    full = parameter.data
            else:
                continue
            if self.is_first:
                weights[name] = full.detach().float().cpu()
        return weights


def _head_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    head = model.get_output_embeddings()
    return [] if head is None else list(head.parameters(recurse=False))


def connect(hardware: HardwareConfig, training: TrainingConfig, device: torch.device, *, world_size: int) -> Parallel:
    """This process's place among world_size of them.

    Raises RuntimeError where they are not as many as asked for: libraries then train on, each process alone.
    """
    parallel = (Zero if hardware.zero_stage else Parallel)(hardware, training, device)
    if parallel.world_size != world_size:
        raise RuntimeError(f"{world_size} processes were asked for, and {parallel.world_size} train together")
    return parallel
