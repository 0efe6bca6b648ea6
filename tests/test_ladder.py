"""Memory that really runs out: what is recognised, which ways out are named, and that one of them works."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
import torch
from omegaconf import OmegaConf
from test_memory import LLAMA_8B

from benchmarks.profiles import Profile, Shape, build_model, make_pairs
from prefpipe import artifacts
from prefpipe.artifacts import Plan
from prefpipe.check import Checker, without_hydra
from prefpipe.config import CONF_DIR, freeze
from prefpipe.errors import OutOfMemoryError
from prefpipe.ladder import LONGEST, RECORD, Attempt, is_out_of_memory, oom_kills, remember_longest, rungs
from prefpipe.losses import AOT, DPO, TDPO, SimPO
from prefpipe.memory import Lengths, Setting, estimate, shape_of
from prefpipe.processes import ChildError, run_process
from prefpipe.records import Pair
from prefpipe.settings import HardwareConfig, ModelConfig, TrainingConfig

WIDE_VOCABULARY = Shape(32, 2, 2, 2, 64, 32_000)
ROOM = 500 * 2**20


def gpu_setting(**training: object) -> Setting:
    hardware = HardwareConfig(name="t", device="cuda", precision="bf16")
    defaults = {"global_batch_size": 128, "micro_batch_size": 4, "reference": "online", "head": "plain"}
    settings = TrainingConfig(**(defaults | training))  # type: ignore[arg-type]
    model = ModelConfig(name="t", path="t")
    return Setting(shape_of(LLAMA_8B), hardware, settings, DPO(), model, [Lengths(1536, 512, 512)] * 4)


def overrides(setting: Setting, *, neutral: bool, num_gpus: int = 1) -> list[str]:
    return [rung.override for rung in rungs(setting, num_gpus=num_gpus) if rung.neutral is neutral]


# The rungs


def test_ways_that_change_no_result_come_first() -> None:
    found = rungs(gpu_setting(), num_gpus=8)
    assert [rung.override for rung in found] == [
        "hardware=zero3",
        "hardware.zero_stage=3 hardware.offload_optimizer=true hardware.offload_params=true",
        "training.gradient_checkpointing=true",
        "training.micro_batch_size=2",
        "training.head=chunked",
        "training.reference=cached",
        "model.adapter=lora",
        "model.adapter=qlora",
        "loss=simpo",
    ]
    assert [rung.neutral for rung in found] == [True] * 6 + [False] * 3
    now = estimate(gpu_setting()).total
    assert all(rung.memory.total < now for rung in found)


def test_a_way_that_does_not_apply_or_saves_nothing_is_left_out() -> None:
    done = gpu_setting(reference="cached", head="chunked", gradient_checkpointing=True, micro_batch_size=1)
    done = replace(done, lengths=done.lengths[:1])
    assert overrides(done, neutral=True) == [
        "hardware.zero_stage=3 hardware.offload_optimizer=true hardware.offload_params=true"
    ]
    assert overrides(done, neutral=False) == ["model.adapter=lora", "model.adapter=qlora"]
    on_cpu = replace(done, hardware=HardwareConfig(name="t", device="cpu", precision="fp32"))
    assert overrides(on_cpu, neutral=True) == []
    assert overrides(on_cpu, neutral=False) == ["model.adapter=lora"]
    adapted = replace(gpu_setting(), model=ModelConfig(name="t", path="t", adapter="lora"))
    ways = overrides(adapted, neutral=True)
    assert "training.head=chunked" not in ways  # a frozen head keeps none
    assert "training.reference=cached" not in ways  # it is the policy itself
    assert overrides(adapted, neutral=False) == ["model.adapter=qlora"]
    no_reference = replace(gpu_setting(reference="auto"), loss=SimPO())
    assert not {"training.reference=cached", "loss=simpo"} & {rung.override for rung in rungs(no_reference)}


def test_a_loss_over_whole_batches_is_never_cut() -> None:
    whole = replace(gpu_setting(global_batch_size=4), loss=AOT())
    assert not [way for way in overrides(whole, neutral=True) if "micro_batch" in way]


def test_a_loss_that_reads_distributions_keeps_its_reference() -> None:
    assert "training.reference=cached" not in overrides(replace(gpu_setting(), loss=TDPO()), neutral=True)


def test_a_half_micro_batch_still_divides_the_global_one() -> None:
    """24 pairs a step: 12 at a time become 6; of 8 processes with 3 each, 1."""
    twelve = gpu_setting(global_batch_size=24, micro_batch_size=12)
    twelve = replace(twelve, lengths=twelve.lengths[:1] * 12)
    assert "training.micro_batch_size=6" in overrides(twelve, neutral=True)
    hardware = replace(gpu_setting().hardware, gpus_per_node=8)
    three = replace(gpu_setting(global_batch_size=24, micro_batch_size=3), hardware=hardware)
    assert "training.micro_batch_size=1" in overrides(three, neutral=True)
    assert overrides(three, neutral=True)[0] == "hardware.zero_stage=3"
    budget = gpu_setting(micro_batch_size=8, micro_batch_tokens=5_000)
    budget = replace(budget, lengths=budget.lengths[:1] * 2)
    assert "training.micro_batch_tokens=2500" in overrides(budget, neutral=True)


def test_every_way_can_be_typed() -> None:
    checker = Checker(CONF_DIR, [CONF_DIR], "config", multirun=False)
    for rung in rungs(gpu_setting(), num_gpus=8):
        hardware = [] if rung.override.startswith("hardware=") else ["hardware=single_gpu"]
        start = ["stage=train", *hardware, "training.micro_batch_size=4"]
        assert len(checker.check([*start, *rung.override.split()])) == 1


# Recognising it


def test_real_errors_are_recognised() -> None:
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(2**46)
    assert is_out_of_memory(of_torch.value)
    with pytest.raises(MemoryError) as of_python:
        bytearray(2**62)
    assert is_out_of_memory(of_python.value)
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    with pytest.raises(ValueError, match="while loading") as wrapped:
        try:
            torch.empty(2**46)
        except RuntimeError as error:
            raise ValueError("while loading") from error
    assert is_out_of_memory(wrapped.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_the_kernels_count_is_read_where_it_stands(tmp_path: Path) -> None:
    group = tmp_path / "cgroup"
    mounts = tmp_path / "mounts"
    for folder, name, text in (
        ("job", "memory.events", "low 0\noom 3\noom_kill 2\n"),
        ("memory/job", "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n"),
    ):
        (mounts / folder).mkdir(parents=True)
        (mounts / folder / name).write_text(text)
    group.write_text("0::/job\n")
    assert oom_kills(group, mounts) == 2
    group.write_text("7:cpu:/job\n4:memory:/job\n")
    assert oom_kills(group, mounts) == 5
    group.write_text("0::/elsewhere\n")
    assert oom_kills(group, mounts) is None


# The end of a process


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whose logits are its memory."""
    return build_model(WIDE_VOCABULARY, tmp_path_factory.mktemp("wide"))


def attempt(work: Path, policy: Path, **training: object) -> Attempt:
    settings = TrainingConfig(**({"global_batch_size": 16, "micro_batch_size": 16} | training))  # type: ignore[arg-type]
    hardware = HardwareConfig(name="cpu", device="cpu", precision="fp32")
    return Attempt(work, policy, ModelConfig(name="t", path=str(policy)), DPO(), settings, hardware)


def test_a_child_that_was_killed_is_answered(
    tmp_path: Path, wide_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tried = attempt(tmp_path, wide_model)
    kill = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    said = r"^out of memory before the first step \(it seems: training was killed"
    with pytest.raises(OutOfMemoryError, match=said), tried.watched():
        remember_longest(tmp_path, [(24, 400, 300)] * 20, tried.training)
        run_process(kill, "training")
    assert "with pairs of up to 24 + 400 tokens, 16 at a time" in caplog.text
    assert "training.gradient_checkpointing=true" in caplog.text
    assert "training.micro_batch_size=8" not in caplog.text  # whose logits head=auto would keep, and so take more
    record = orjson.loads((tmp_path / RECORD).read_bytes())
    assert record["kind"] == OutOfMemoryError.kind == "oom"
    assert record["lengths"] == [[24, 400, 300]] * 16
    assert record["rungs"][0]["memory"]["total"] < record["predicted"]["total"]


def test_a_child_that_failed_otherwise_is_not(tmp_path: Path, wide_model: Path) -> None:
    with pytest.raises(ChildError, match="exit code 3"), attempt(tmp_path, wide_model).watched():
        run_process([sys.executable, "-c", "raise SystemExit(3)"], "training")
    assert not (tmp_path / RECORD).exists()


def test_of_several_processes_one_tells(
    tmp_path: Path, wide_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    tried = attempt(tmp_path, wide_model)
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        said = "as in another process" if rank == "0" else "first to try"
        with pytest.raises(OutOfMemoryError, match=said), tried.answered():
            if rank == "0":  # which began before the other one had failed
                (tmp_path / RECORD).write_text("{}")
            torch.empty(2**46)
    assert caplog.text.count("predicted:") == 1


def test_a_model_of_unknown_shape_is_said_to_be_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(OutOfMemoryError), attempt(tmp_path, tmp_path / "none").answered():
        torch.empty(2**46)
    assert "what would take less is not known" in caplog.text


WORKER = """
import resource, sys
from pathlib import Path
import peft, torch
from prefpipe.training import loop, worker
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
worker.main()
"""
"""A training process that gets so many bytes more than its packages take."""


@pytest.fixture
def in_little_memory(tmp_path: Path, wide_model: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Train the wide model on 16 pairs of 8 + 256 tokens, whose logits take 1 GB."""
    pairs = make_pairs(Profile(8, 256, batch_size=16), 16, WIDE_VOCABULARY.vocabulary)
    with artifacts.draft(tmp_path / "pairs", Plan("prepare", Pair.schema, {})) as draft:
        draft.commit_stream(pairs)
    work = tmp_path / "work"

    def train(*more: str) -> "subprocess.CompletedProcess[str]":
        words = ["stage=train", "hardware=cpu", "hardware.num_threads=1", f"model.path={wide_model}"]
        words += [f"paths.runs={tmp_path}/runs", f"paths.cache={tmp_path}/cache", "training.max_steps=1"]
        words += ["training.global_batch_size=16", "training.micro_batch_size=16", "training.head=plain"]
        words += ["training.max_tokens=300", "training.max_prompt_tokens=40"]
        words += [f"inputs.pairs={tmp_path}/pairs", f"inputs.checkpoint={wide_model}", f"inputs.reference={wide_model}"]
        (composed,) = Checker(CONF_DIR, [CONF_DIR], "config", multirun=False).compose([*words, *more])
        cfg = without_hydra(composed)
        OmegaConf.update(cfg, "inputs.pairs", [str(tmp_path / "pairs")])
        freeze(cfg, tmp_path / "train.yaml")
        work.mkdir(exist_ok=True)
        command = [sys.executable, "-c", WORKER, str(ROOM), str(tmp_path / "train.yaml"), "--work", str(work)]
        return subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "RANK": "0"}, cwd=Path(__file__).parents[1]
        )

    return train


def test_training_that_runs_out_of_memory_names_the_ways_out_and_one_of_them_works(
    tmp_path: Path, in_little_memory: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    failed = in_little_memory()
    assert failed.returncode == 1, failed.stderr
    lines = failed.stderr.splitlines()
    assert "prefpipe: error: out of memory before the first step (DefaultCPUAllocator" in lines[-1]
    assert "Traceback" not in failed.stderr
    start = lines.index("the same experiment in less memory:")
    named = [line.split()[0] for line in lines[start + 1 :] if line.startswith("  ")]
    neutral = ["training.gradient_checkpointing=true", "training.micro_batch_size=8", "training.head=chunked"]
    assert named == [*neutral, "model.adapter=lora"]
    assert lines.index("in less memory, but another experiment:") == start + 4
    record = orjson.loads((tmp_path / "work" / RECORD).read_bytes())
    assert (record["kind"], record["rank"]) == ("oom", 0)
    assert record["predicted"]["total"] > ROOM > record["rungs"][2]["memory"]["total"]
    again = in_little_memory("training.head=chunked")
    assert again.returncode == 0, again.stderr
    assert not (tmp_path / "work" / RECORD).exists()
    assert not (tmp_path / "work" / LONGEST).exists()
