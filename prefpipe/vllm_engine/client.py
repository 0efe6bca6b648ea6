"""Engines in child processes, as seen by who asks them. The protocol is that of worker.py."""

from __future__ import annotations

import importlib.util
import logging
import os
import queue
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from prefpipe.errors import ConfigError
from prefpipe.generators import Request
from prefpipe.processes import Talker

log = logging.getLogger(__name__)

WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True)
class EngineSettings:
    """What engines are started with; other settings need other engines.

    python: of the environment that has vLLM; None is this one. model: a folder. precision, device, num_threads: of
    HardwareConfig. arguments: of vLLM's EngineArgs. tensor_parallel_size, data_parallel_size: GPUs of an engine, and
    engines.
    """

    python: str | None
    model: str
    precision: str
    device: str
    num_threads: int | None
    tensor_parallel_size: int
    data_parallel_size: int
    calculator: bool
    arguments: Mapping[str, Any]


class Engines:
    """data_parallel_size engines, each a process tree of its own; a prompt's samples stay together.

    They start while this process goes on; `wait` comes before the first `sample`.
    max_model_len: tokens of a prompt and its completion that the model has places for; known after `wait`.
    Raises ChildError when an engine dies, in `wait` and in `sample`; the others are ended then, too.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.max_model_len = 0
        self._answers: queue.Queue[tuple[Talker, bytes | None]] = queue.Queue()
        self._talkers: list[Talker] = []
        # vLLM 0.32 leaves its sockets behind.
        self._sockets = tempfile.TemporaryDirectory(prefix="prefpipe-", ignore_cleanup_errors=True)
        try:
            for number in range(settings.data_parallel_size):
                talker = Talker(
                    [_python(settings), "-P", str(WORKER)],
                    f"vLLM engine {number}" if settings.data_parallel_size > 1 else "the vLLM engine",
                    self._answers,
                    environment={"VLLM_RPC_BASE_PATH": self._sockets.name, **_environment(settings, number)},
                )
                self._talkers.append(talker)
                talker.ask(_line(_for_worker(settings)))
        except BaseException:
            self.close(now=True)
            raise

    def wait(self) -> None:
        """Until every engine has loaded the model. Raises ConfigError where vLLM is built for another device."""
        try:
            ready = [self._next()["ready"] for _ in self._talkers]
            _check_device(self.settings, ready[0]["device"])
        except BaseException:
            self.close(now=True)
            raise
        self.max_model_len = int(ready[0]["max_model_len"])
        log.info("vLLM samples from %s on %s in %s", self.settings.model, ready[0]["device"], ready[0]["dtype"])

    @property
    def alive(self) -> bool:
        """False once they were closed, by an error too."""
        return bool(self._talkers)

    @property
    def pids(self) -> list[int]:
        """Of the engines; each leads its process group."""
        return [talker.pid for talker in self._talkers]

    def sample(self, requests: Sequence[Request], limits: Sequence[int], **sampling: Any) -> Iterator[dict[str, Any]]:
        """Answers as they come: place, sample, token_ids, logp, finish_reason, and logps with the calculator.

        limits: the most tokens of each request's completions. sampling: arguments of vLLM's SamplingParams.
        """
        try:
            for number, talker in enumerate(self._talkers):
                mine = slice(number, None, len(self._talkers))
                rows = [tuple(request) for request in requests[mine]]
                if rows:
                    talker.ask(_line({"requests": rows, "limits": limits[mine], "sampling": sampling}))
            for _ in range(sum(len(request.seeds) for request in requests)):
                yield self._next()
        except BaseException:
            self.close(now=True)
            raise

    def close(self, *, now: bool = False) -> None:
        """End the engines, and wait until all their processes are gone. now: though they are at work."""
        for talker in self._talkers:
            talker.close(now=now)
        self._talkers = []
        self._sockets.cleanup()

    def _next(self) -> dict[str, Any]:
        talker, line = self._answers.get()
        if line is None:
            raise talker.error()
        answer: dict[str, Any] = orjson.loads(line)
        return answer


def _line(message: Mapping[str, Any]) -> bytes:
    return orjson.dumps(message, option=orjson.OPT_APPEND_NEWLINE)


def _for_worker(settings: EngineSettings) -> dict[str, Any]:
    arguments = {**settings.arguments, "tensor_parallel_size": settings.tensor_parallel_size}
    return {
        "model": settings.model,
        "precision": settings.precision,
        "engine": arguments,
        "calculator": settings.calculator,
    }


def _check_device(settings: EngineSettings, found: str) -> None:
    if settings.device != "auto" and (settings.device == "cpu") != (found == "cpu"):
        raise ConfigError(
            f"hardware.device={settings.device}, but this vLLM is built for {found}; install its other build, or name "
            f"an environment that has it by generator.python"
        )


def _python(settings: EngineSettings) -> str:
    if settings.python is None:
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                "generator=vllm needs the package vllm: pip install 'prefpipe[vllm]', or give the Python of an "
                "environment that has it: generator.python=/path/to/bin/python"
            )
        return sys.executable
    found = shutil.which(Path(settings.python).expanduser())
    if found is None:
        raise ConfigError(
            f"generator.python={settings.python}: no such program; give the Python (3.11 or newer) of an environment "
            f"that has vllm"
        )
    return found


def _environment(settings: EngineSettings, number: int) -> dict[str, str]:
    """Of one engine: what this process has, and on a CPU what keeps engines from fighting for the same cores."""
    found = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "TOKENIZERS_PARALLELISM": "false",
        **os.environ,
    }
    if settings.python is not None:
        for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
            found.pop(name, None)
        # Kernels may be compiled at run time, with tools of that environment.
        found["PATH"] = f"{Path(_python(settings)).absolute().parent}{os.pathsep}{found.get('PATH', '')}"
    if settings.arguments["enforce_eager"]:
        found.setdefault("TORCH_COMPILE_DISABLE", "1")  # vLLM 0.32 compiles parts of its sampler all the same
    if settings.num_threads is not None:
        found["OMP_NUM_THREADS"] = str(settings.num_threads)
    if settings.calculator:
        found["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # its logits processors have another interface
    if settings.data_parallel_size > 1:
        gpus, each = found.get("CUDA_VISIBLE_DEVICES"), settings.tensor_parallel_size
        total = each * settings.data_parallel_size
        names = list(map(str, range(total))) if gpus is None else gpus.split(",")
        if settings.device == "cuda" and len(names) < total:
            raise ConfigError(
                f"generator.data_parallel_size={settings.data_parallel_size} x generator.tensor_parallel_size={each} "
                f"needs {total} GPUs, but CUDA_VISIBLE_DEVICES={gpus} names {len(names)}"
            )
        found["CUDA_VISIBLE_DEVICES"] = ",".join(names[number * each : (number + 1) * each])
    return found
