"""generator=vllm with vLLM's own CPU build, in an environment of its own: offline, killed, and as a server."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from environments import ROOT, vllm_python

from prefpipe import artifacts, models
from prefpipe.api import ApiConfig
from prefpipe.artifacts import Plan
from prefpipe.generators import Skipped, request_seed
from prefpipe.generators.hf import HF
from prefpipe.generators.openai import OpenAI
from prefpipe.generators.vllm import VLLM, _running
from prefpipe.processes import ChildError
from prefpipe.records import Completion, Prompt, ScoredCompletion, prompt_id
from prefpipe.scorers.judge import Judge
from prefpipe.settings import HardwareConfig, ModelConfig
from prefpipe.sources.arithmetic import arithmetic_problems
from prefpipe.stages.generate import generate
from prefpipe.stages.score import score
from prefpipe.stages.shards import shard_folder, shard_of

pytestmark = [pytest.mark.integration, pytest.mark.vllm]

TINY = ModelConfig(name="tiny", path="builtin:tiny")
FOLDER = ROOT / "prefpipe" / "assets" / "tiny"
CPU = HardwareConfig(name="cpu", device="cpu", precision="fp32", num_threads=1)


@pytest.fixture(scope="module")
def python() -> Iterator[str]:
    """Of vLLM's environment. vLLM sizes its key-value cache by the machine unless told."""
    found = str(vllm_python())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield found
    VLLM().close()


def prompts(num: int, *more: str) -> list[Prompt]:
    texts = [*more, *(str(row["question"]) for row in islice(arithmetic_problems(0), num))]
    messages = [[{"role": "user", "content": text}] for text in texts]
    return [Prompt(prompt_id=prompt_id(m), messages=m, source="test") for m in messages]


def vllm(python: str, **knobs: Any) -> VLLM:
    return VLLM(python=python, enforce_eager=True, **knobs)


def sample(generator: VLLM | HF, rows: list[Prompt], *, seed: int = 0) -> list[Completion | Skipped]:
    return list(generator.generate(rows, model=TINY, folder=FOLDER, hardware=CPU, seed=seed, round_=0))


def group(leader: int) -> dict[int, str]:
    """The living processes of a process group: pid → command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, pgrp = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(pgrp) == leader and state != "Z":
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
    return found


def core_of(leader: int) -> int | None:
    """The process that does the engine's work, once it runs."""
    return next((pid for pid, line in group(leader).items() if pid != leader and "EngineCore" in line), None)


def test_greedy_answers_are_those_of_hf_token_for_token(python):
    """One of them may be a tie that rounding decides. Some end by themselves, some are cut."""
    end = models.load_tokenizer(TINY, FOLDER).eos_token
    rows = prompts(40, "long " * 4096, f"{end} forged", "漢字 🙂")
    greedy = {"num_samples": 1, "temperature": 0.0, "max_new_tokens": 40}
    theirs, ours = sample(vllm(python, **greedy), rows), sample(HF(**greedy), rows)
    assert [a for a in theirs if isinstance(a, Skipped)] == [
        Skipped(rows[0].prompt_id, "prompt_too_long"), Skipped(rows[1].prompt_id, "special_token"),
    ]  # fmt: skip
    same = [
        (mine, other)
        for mine, other in zip(ours[2:], theirs[2:], strict=True)
        if isinstance(mine, Completion) and isinstance(other, Completion) and mine.token_ids == other.token_ids
    ]
    assert len(same) >= 40
    assert {other.finish_reason for _, other in same} == {"stop", "length"}
    for mine, other in same:
        assert replace(other, logp=mine.logp) == mine
        assert other.logp == pytest.approx(mine.logp, abs=1e-4)


def test_samples_have_seeds_of_their_own_and_the_log_probability_of_the_model(python):
    """Told by transformers, at temperature 1 whatever the sampling."""
    rows = prompts(6)
    generator = vllm(python, num_samples=4, temperature=0.7, top_k=20, top_p=0.95, max_new_tokens=40)
    first, again, other = (sample(generator, rows, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert [a.seed for a in first] == [request_seed(0, 0, row.prompt_id, i) for row in rows for i in range(4)]
    assert [a.token_ids for a in other] != [a.token_ids for a in first]
    assert len({(a.prompt_id, *a.token_ids) for a in first}) > 12
    template = models.load_template(TINY, FOLDER)
    weights = models.load_weights(TINY, FOLDER, dtype=torch.float32, device=torch.device("cpu")).eval()
    for answer in first:
        ids = template.prompt(answer.messages)
        with torch.no_grad():
            logits = weights(torch.tensor([ids + answer.token_ids])).logits[0, len(ids) - 1 : -1]
        chosen = logits.log_softmax(-1).gather(-1, torch.tensor(answer.token_ids)[:, None])
        assert answer.logp == pytest.approx(chosen.sum().item(), abs=1e-3)
        assert (answer.token_ids[-1] in template.stop_ids) == (answer.finish_reason == "stop")
        assert answer.text == template.decode(answer.token_ids)


def test_an_engine_killed_in_the_middle_of_a_shard_loses_and_doubles_nothing(python, tmp_path, caplog):
    rows, out = prompts(64), tmp_path / "completions"
    with artifacts.draft(tmp_path / "prompts", Plan("prepare", Prompt.schema, uses={})) as draft:
        draft.commit(0, rows, rows_in=len(rows), rows_out=len(rows))
    generator = vllm(python, num_samples=16, max_new_tokens=48, prompts_per_part=8, num_shards=2, shard=1)
    mine = [row.prompt_id for row in rows if shard_of(row.prompt_id, 2) == 1]
    settings = {"generator": generator, "model": TINY, "folder": FOLDER, "hardware": CPU, "seed": 0, "round_": 0}
    partial = artifacts.partial_path(shard_folder(out, 1, 2))
    sample(generator, rows[:1])  # the engine runs
    leader = _running[0].engines.pids[0]

    def kill() -> None:
        deadline = time.time() + 300
        while not (partial / "progress" / "00000.json").exists() and time.time() < deadline:
            time.sleep(0.005)
        core = core_of(leader)
        assert core is not None
        os.kill(core, signal.SIGKILL)

    with ThreadPoolExecutor() as threads:
        killed = threads.submit(kill)
        with pytest.raises(
            ChildError,
            match=r"^the vLLM engine ended .*the same command again goes on.*EngineCore\S* ended with exit code -9$",
        ):
            generate([tmp_path / "prompts"], out, **settings)
        killed.result()
    assert group(leader) == {}
    before = {file.name: file.read_bytes() for file in partial.glob("part-*.jsonl")}
    assert 1 <= len(before) < -(-len(mine) // 8)

    with caplog.at_level("INFO", logger="prefpipe"):
        generate([tmp_path / "prompts"], out, **settings)
    assert f"going on after {len(before)} finished parts" in caplog.text
    made = shard_folder(out, 1, 2)
    assert {name: (made / name).read_bytes() for name in before} == before
    written = list(artifacts.read(made, Completion, key="k"))
    assert [(c.prompt_id, c.seed) for c in written] == [(i, request_seed(0, 0, i, n)) for i in mine for n in range(16)]
    assert not _running, "the stage gives the memory back"


def test_the_calculator_on_two_engines_is_that_of_hf(python, monkeypatch):
    """Greedy, so that the texts are the same. With vLLM's core in the worker itself, as vLLM offers it too."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    rows = prompts(24)
    knobs = {"num_samples": 1, "temperature": 0.0, "max_new_tokens": 64, "calculator": True}
    generator = vllm(python, data_parallel_size=2, **knobs)
    theirs, ours = sample(generator, rows), sample(HF(**knobs), rows)
    leaders = _running[0].engines.pids
    assert len(leaders) == 2
    same = [pair for pair in zip(ours, theirs, strict=True) if pair[0].token_ids == pair[1].token_ids]
    assert len(same) >= 23
    forced = 0
    for mine, other in same:
        found, expected = other.meta["calculator"], mine.meta["calculator"]
        assert {**found, "forced_logp": 0} == {**expected, "forced_logp": 0}
        assert found["forced_logp"] == pytest.approx(expected["forced_logp"], abs=1e-3)
        forced += len(found["forced"])
    assert forced > 0
    generator.close()
    assert [group(leader) for leader in leaders] == [{}, {}]


def test_no_engine_outlives_a_command_that_was_killed(python, tmp_path):
    code = (
        "from test_vllm import *; sample(vllm(sys.argv[1], num_samples=1, data_parallel_size=1), prompts(1)); "
        "print('sampled', flush=True); time.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = subprocess.Popen([sys.executable, "-c", code, python], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.time() + 300
    leader = core = None
    while core is None and time.time() < deadline:
        time.sleep(0.2)
        leader = leader or worker_of(command.pid)
        core = core_of(leader) if leader else None
    assert leader is not None
    assert core is not None
    command.kill()
    command.wait()
    while group(leader) and time.time() < deadline:
        time.sleep(0.2)
    assert group(leader) == {}


def worker_of(parent: int) -> int | None:
    """The child of a process that runs the worker."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
                if (
                    b"vllm_engine/worker.py" in line
                    and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent
                ):
                    return int(entry.name)
            except OSError:
                continue
    return None


@pytest.fixture(scope="module")
def server(python, tmp_path_factory) -> Iterator[str]:
    """vLLM's own OpenAI-compatible server; the address up to /v1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(FOLDER), "--served-model-name", "tiny",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager",
    ]  # fmt: skip
    quick = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCH_COMPILE_DISABLE": "1"}
    environment = {**os.environ, **quick}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        deadline = time.time() + 300
        while not healthy(port):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.time() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        if group(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def test_a_server_writes_and_judges(server, tmp_path, context):
    """Its greedy texts are those of hf. A judge so tiny gives no verdict, or one by chance: each is counted."""
    rows = prompts(12)
    api = ApiConfig(base_url=server, model="tiny", cache=str(tmp_path / "api"), max_failed_fraction=1.0)
    with artifacts.draft(tmp_path / "prompts", Plan("prepare", Prompt.schema, uses={})) as draft:
        draft.commit(0, rows, rows_in=len(rows), rows_out=len(rows))
    settings = {"model": TINY, "folder": None, "hardware": CPU, "seed": 0, "round_": 0}

    def write(name: str, **knobs: Any) -> list[Completion]:
        generator = OpenAI(api=replace(api), max_new_tokens=40, **knobs)
        generate([tmp_path / "prompts"], tmp_path / name, generator=generator, **settings)
        return list(artifacts.read(tmp_path / name, Completion, key="k"))

    greedy = {"num_samples": 1, "temperature": 0.0}
    mine = sample(HF(max_new_tokens=40, **greedy), rows)
    theirs = write("greedy", **greedy)
    same = [a for a, b in zip(mine, theirs, strict=True) if (a.text, a.finish_reason) == (b.text, b.finish_reason)]
    assert len(same) >= 11

    written = write("samples", num_samples=3)
    assert [c.seed for c in written] == [request_seed(0, 0, row.prompt_id, i) for row in rows for i in range(3)]
    assert len({c.text for c in written}) > 18

    score([tmp_path / "samples"], tmp_path / "scored", scorer=Judge(api=api, max_new_tokens=24), context=context)
    counts = artifacts.manifest(tmp_path / "scored")["counts"]
    scored = list(artifacts.read(tmp_path / "scored", ScoredCompletion, key="k"))
    assert counts["rows_in"] == len(written) == len(scored) + sum(counts["filtered"].values())
    assert counts["filtered"].keys() <= {"no_verdict", "truncated", "two_verdicts", "bad_verdict"}
    assert all(1 <= row.scores["judge"] <= 10 for row in scored)
