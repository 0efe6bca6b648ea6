"""One vLLM engine as a process: JSON lines in, JSON lines out. `python -P worker.py`, in any environment with vLLM.

The first line is its settings, each further one a batch (see `main`). Nothing here needs what prefpipe needs: it may
run in an environment that has vLLM and no prefpipe.
"""

from __future__ import annotations

import atexit
import gc
import importlib.util
import json
import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from vllm.outputs import RequestOutput
    from vllm.v1.engine.llm_engine import LLMEngine

SECONDS_TO_END = 10.0


def offer_package() -> None:
    """Make prefpipe importable, here and in what this process spawns, and nothing that is installed beside it."""
    if "prefpipe" in sys.modules:
        return
    folder = Path(__file__).resolve().parents[1]
    spec = importlib.util.spec_from_file_location(
        "prefpipe", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["prefpipe"] = package
    spec.loader.exec_module(package)


offer_package()


class Inbox:
    """Lines from stdin. When it ends, so does this process with all it started: at once where it is at work."""

    def __init__(self) -> None:
        self.lines: queue.Queue[bytes | None] = queue.Queue()
        self.busy = True
        threading.Thread(target=self._read, daemon=True).start()

    def next(self) -> dict[str, Any] | None:
        """The next message; None when there are no more."""
        self.busy = False
        line = self.lines.get()
        self.busy = True
        return None if line is None else json.loads(line)

    def _read(self) -> None:
        for line in sys.stdin.buffer:
            self.lines.put(line)
        if not self.busy:
            self.lines.put(None)
            time.sleep(SECONDS_TO_END)
        os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Settings: {model, precision, engine: arguments of vLLM's EngineArgs, calculator}. Answers {ready: …}.

    Batches: {sampling: arguments of SamplingParams, limits: [tokens], requests: [[place, prompt ids, seeds]]}; answers
    {place, sample, token_ids, logp, finish_reason}, as they end, and `logps` of each token with the calculator.
    """
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    inbox = Inbox()
    settings = inbox.next()
    assert settings is not None
    engine = start(settings)
    children = multiprocessing.active_children()
    no_more = threading.Event()
    watcher = threading.Thread(target=end_with, args=(children, no_more), daemon=True)
    watcher.start()
    config = engine.vllm_config.model_config
    say(answers, ready={"max_model_len": config.max_model_len, "dtype": str(config.dtype), "device": device()})
    try:
        while (batch := inbox.next()) is not None:
            sample(engine, batch, answers, each_token=settings["calculator"])
        no_more.set()
    except Exception:
        if ended(children, timeout=0):
            traceback.print_exc()
            watcher.join()  # it says how a process has ended, which vLLM's own error does not, and exits
        raise


def end_with(children: Sequence[BaseProcess], no_more: threading.Event) -> None:
    """End at once when one of vLLM's own processes does, unless they are to end.

    vLLM 0.32 waits for ever for the answers of a core that was killed, and closes the socket under a request that is
    on its way to it. What the process itself had to say stands in stderr by now.
    """
    gone = ended(children, timeout=None)
    if not gone or no_more.is_set():
        return
    for child in gone:
        child.join()
        while child.exitcode is None:  # vLLM's own monitor is just reaping it
            time.sleep(0.001)
        print(f"ChildProcessError: vLLM's {child.name} ended with exit code {child.exitcode}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)


def ended(children: Sequence[BaseProcess], *, timeout: float | None) -> list[BaseProcess]:
    """Those that have ended, once there is one; none when there are no children."""
    if not children:
        return []
    sentinels = multiprocessing.connection.wait([child.sentinel for child in children], timeout)
    return [child for child in children if child.sentinel in sentinels]


def device() -> str:
    """What this vLLM is built for: "cpu", "cuda", …"""
    from vllm.platforms import current_platform

    return str(current_platform.device_type)


def start(settings: dict[str, Any]) -> LLMEngine:
    """Load the model."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    dtypes = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    best = "fp32" if current_platform.is_cpu() else "bf16" if current_platform.has_device_capability(80) else "fp16"
    precision = best if settings["precision"] == "auto" else settings["precision"]
    extra: dict[str, Any] = {}
    if settings["calculator"]:
        extra["logits_processors"] = ["prefpipe.vllm_engine.calculator:Calculator"]
    if current_platform.is_cpu():
        # vLLM 0.32 dies of a prompt with a seed that is computed in pieces: "CPU Generator does not use offset".
        extra["enable_chunked_prefill"] = False
    arguments = EngineArgs(
        model=settings["model"],
        tokenizer=settings["model"],
        # Token ids in, token ids out: prompts are rendered, and answers decoded, by those who ask.
        skip_tokenizer_init=True,
        generation_config="vllm",
        logprobs_mode="raw_logprobs",
        dtype=dtypes[precision],
        disable_log_stats=True,
        **settings["engine"],
        **extra,
    )
    return LLMEngine.from_engine_args(arguments, usage_context=UsageContext.LLM_CLASS)


def sample(engine: LLMEngine, batch: dict[str, Any], answers: BinaryIO, *, each_token: bool) -> None:
    """Sample a batch to its end."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    # So that an answer does not depend on the batches before. Not after the last answer, as whoever has that may end
    # this process, and while it is at work it is killed, with what vLLM leaves in /dev/shm and /tmp.
    engine.reset_prefix_cache()
    for (place, ids, seeds), limit in zip(batch["requests"], batch["limits"], strict=True):
        for number, seed in enumerate(seeds):
            params = SamplingParams(
                **batch["sampling"],
                max_tokens=limit,
                seed=seed,
                logprobs=0,
                ignore_eos=True,  # stop_token_ids says it all
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                skip_clone=True,
            )
            engine.add_request(f"{place}/{number}", TokensPrompt(prompt_token_ids=ids), params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                tell(answers, output, each_token=each_token)


def tell(answers: BinaryIO, output: RequestOutput, *, each_token: bool) -> None:
    """Send a finished completion."""
    (completion,) = output.outputs
    place, _, number = output.request_id.partition("/")
    ids = list(completion.token_ids)
    found: dict[str, Any] = {"place": int(place), "sample": int(number), "token_ids": ids}
    if each_token:
        assert completion.logprobs is not None
        found["logps"] = [known[token].logprob for known, token in zip(completion.logprobs, ids, strict=True)]
    say(answers, **found, logp=completion.cumulative_logprob, finish_reason=completion.finish_reason)


def say(answers: BinaryIO, **message: Any) -> None:
    """Send one line."""
    line = json.dumps(message).encode() + b"\n"
    while line:
        line = line[answers.write(line) :]


if __name__ == "__main__":
    atexit.register(gc.freeze)  # as in prefpipe.models.import_transformers
    main()
