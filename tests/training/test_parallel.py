"""Training in several processes: DDP and DeepSpeed's ZeRO give the losses of one process, and go on exactly."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import orjson
import pytest
import test_encoder_decoder
import torch
from test_loop import TRAINING, job, metrics, weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from prefpipe import torchrun
from prefpipe.components import COMPONENTS
from prefpipe.errors import ConfigError
from prefpipe.launch import notice
from prefpipe.settings import HardwareConfig, ModelConfig, TrainingConfig
from prefpipe.training.deepspeed import deepspeed_config
from prefpipe.training.loop import train
from prefpipe.training.parallel import Parallel

HERE = Path(__file__).parent
HARDWARE: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "offload": {"zero_stage": 3, "offload_optimizer": True, "offload_params": True},
}
LONG = replace(TRAINING, max_steps=20, save_every_steps=7)
LOSSES = ("dpo", "simpo")


def run(folder: Path, jobs: list[dict[str, Any]], *, num: int = 2, fails: bool = False, **more: str) -> str:
    """Jobs one after the other in `num` processes; what they print."""
    hardware = HardwareConfig(name="test", device="cpu", num_threads=1, gpus_per_node=num, zero_stage=1)
    command = torchrun.command(hardware, "parallel_jobs", [str(folder), orjson.dumps(jobs).decode()])
    environment = torchrun.environment(hardware) | {"PYTHONPATH": str(HERE)} | more
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode != 0) == fails, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def spec(work: Path, loss: str, hardware: str, training: TrainingConfig = LONG, **more: Any) -> dict[str, Any]:
    return {"work": str(work), "loss": loss, "hardware": HARDWARE[hardware], "training": asdict(training)} | more


def losses(work: Path) -> list[float]:
    return [row["train/loss"] for row in metrics(work)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """The runs of one process."""
    root = tmp_path_factory.mktemp("alone")
    for loss in LOSSES:
        train(job(root / loss, tiny_folder, COMPONENTS["loss"][loss](), LONG))
    return root


@pytest.mark.integration
@pytest.mark.parametrize("hardware", HARDWARE)
def test_two_processes_give_the_losses_and_the_weights_of_one(tmp_path, tiny_folder, alone, hardware):
    if HARDWARE[hardware]:
        pytest.importorskip("deepspeed")
    run(tiny_folder, [spec(tmp_path / loss, loss, hardware) for loss in LOSSES])
    for loss in LOSSES:
        expected, found = losses(alone / loss), losses(tmp_path / loss)
        assert len(found) == 20
        assert max(abs(a - b) for a, b in zip(expected, found, strict=True)) < 1e-4
        assert metrics(tmp_path / loss)[-1].keys() == metrics(alone / loss)[-1].keys()
        for key, value in weights(alone / loss).items():
            assert torch.allclose(weights(tmp_path / loss)[key], value, atol=1e-3), key
        model = AutoModelForCausalLM.from_pretrained(tmp_path / loss)
        ids = torch.arange(20)[None]
        same = AutoModelForCausalLM.from_pretrained(alone / loss)
        assert torch.allclose(model(ids).logits, same(ids).logits, atol=1e-2)


def wide_model(folder: Path, tiny: Path, *, seed: int, width: int = 320, layers: int = 2, tied: bool = True) -> str:
    """A model whose matrices have more than the 100,000 elements up to which DeepSpeed keeps parameters whole."""
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = AutoConfig.from_pretrained(tiny)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = width, 2 * width, layers
    config.head_dim, config.num_attention_heads, config.num_key_value_heads = 64, width // 64, width // 64
    config.tie_word_embeddings = tied
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


FEW = replace(TRAINING, max_steps=4)
ONLINE = replace(FEW, reference="online")
MOVING = replace(FEW, reference="moving", reference_alpha=0.6, reference_steps=2)
LORA = {"adapter": "lora", "adapter_rank": 4}
DORA = {"adapter": "dora", "adapter_rank": 4}


@pytest.mark.integration
@pytest.mark.parametrize(
    ("hardware", "wanted"),
    [
        ("zero3", ("other", "cached", "rewards", "budget", "t5")),
        ("zero3", ("kl", "moving")),
        ("zero3", ("lora", "dora", "moving_adapter", "rewards_adapter")),
        ("offload", ("other", "moving")),
    ],
    ids=["models", "distributions", "adapters", "offload"],
)
def test_sharded_weights_are_whole_wherever_they_are_read(tmp_path, tiny_folder, t5_folder, hardware, wanted):
    """A second model, recomputed activations, a head in tiles, adapters that are switched off, rewards, T5."""
    pytest.importorskip("deepspeed")
    tied = wide_model(tmp_path / "tied_model", tiny_folder, seed=1)
    second = wide_model(tmp_path / "second_model", tiny_folder, seed=2)
    untied = wide_model(tmp_path / "untied_model", tiny_folder, seed=3, tied=False)
    recomputed = replace(ONLINE, gradient_checkpointing=True, head="chunked")
    budget = replace(FEW, micro_batch_tokens=150, num_epochs=1.3, max_steps=None)
    single_pairs = replace(FEW, micro_batch_size=1)  # 7 in the pass of the reference: one process has 3
    every = {
        "other": spec(tmp_path / "other", "dpo", hardware, recomputed, folder=tied, reference=untied),
        "cached": spec(tmp_path / "cached", "dpo", hardware, single_pairs, folder=untied),
        "rewards": spec(tmp_path / "rewards", "bradley_terry", hardware, FEW, folder=tied),
        "budget": spec(tmp_path / "budget", "ipo", hardware, budget, folder=tied),
        "t5": spec(tmp_path / "t5", "dpo", hardware, FEW, folder=str(t5_folder), encoder_decoder=True),
        "kl": spec(tmp_path / "kl", "tdpo", hardware, FEW, folder=tied, reference=untied),
        "moving": spec(tmp_path / "moving", "tdpo", hardware, MOVING, folder=tied, reference=second),
        "lora": spec(tmp_path / "lora", "tdpo", hardware, ONLINE, folder=tied, model=LORA),
        "dora": spec(tmp_path / "dora", "dpo", hardware, FEW, folder=untied, model=DORA),
        "moving_adapter": spec(tmp_path / "moving_adapter", "dpo", hardware, MOVING, folder=tied, model=LORA),
        "rewards_adapter": spec(tmp_path / "rewards_adapter", "bradley_terry", hardware, FEW, folder=tied, model=LORA),
    }
    jobs = [every[name] for name in wanted]
    run(tiny_folder, jobs)
    for one in jobs:
        work, loss, folder = Path(one["work"]), COMPONENTS["loss"][one["loss"]](), Path(one["folder"])
        made = test_encoder_decoder.job if "encoder_decoder" in one else job
        single = made(tmp_path / "alone" / work.name, folder, loss, TrainingConfig(**one["training"]))
        model = ModelConfig(name="tiny", path="builtin:tiny", **one.get("model", {}))
        train(replace(single, model=model, reference=Path(one.get("reference", folder))))
        expected, found = losses(single.work), losses(work)
        assert max(abs(a - b) for a, b in zip(expected, found, strict=True)) < 1e-4, work.name
        before, saved, whole = weights(folder), weights(work), weights(single.work)
        assert saved.keys() == whole.keys()
        for key, value in whole.items():  # Adam turns the sign of a rounding error into a step
            assert torch.allclose(saved[key], value, atol=1e-3), (work.name, key)
        assert any(not torch.equal(value, before[key]) for key, value in saved.items() if key in before)
        assert (work / "config.json").read_bytes() == (single.work / "config.json").read_bytes()
        AutoTokenizer.from_pretrained(work)


@pytest.mark.integration
def test_no_process_ever_holds_the_whole_model(tmp_path, tiny_folder):
    """95 MiB in two processes: what each has allocated while it loads the model and calls it."""
    pytest.importorskip("deepspeed")
    folder = wide_model(tmp_path / "model", tiny_folder, seed=0, width=640, layers=6)
    run(tiny_folder, [{"folder": folder, "measure": f"{tmp_path}/rank"}], MALLOC_MMAP_THRESHOLD_="65536")
    expected = AutoModelForCausalLM.from_pretrained(folder)(torch.arange(20)[None]).logits[0, -1]
    for rank in (0, 1):
        found = orjson.loads((tmp_path / f"rank.{rank}.json").read_bytes())
        assert found["whole"] > 90 * 2**20
        assert found["held"] == pytest.approx(found["whole"] / 2, rel=0.01)
        assert found["loaded"] < 0.7 * found["whole"]
        assert found["peak"] < 0.8 * found["whole"]
        assert torch.allclose(torch.tensor(found["logits"]), expected, atol=1e-4)


@pytest.mark.integration
@pytest.mark.parametrize(("hardware", "at_notice"), [("ddp", False), ("ddp", True), ("zero3", False)])
def test_killed_and_gone_on_is_the_same_run_bit_for_bit(tmp_path, tiny_folder, monkeypatch, hardware, at_notice):
    """From a state of each second step, or the one of Slurm's notice, which the first process alone gets to know."""
    if HARDWARE[hardware]:
        pytest.importorskip("deepspeed")
    training = replace(MOVING if hardware == "zero3" else TRAINING, max_steps=5)
    training = replace(training, save_every_steps=None if at_notice else 2)
    monkeypatch.setenv(notice.VARIABLE, str(tmp_path / "train-round_0"))
    told = {"notice_in": 4} if at_notice else {}
    started = time.monotonic()
    run(tiny_folder, [spec(tmp_path / "killed", "dpo", hardware, training, kill_after=4, **told)], fails=True)
    assert time.monotonic() - started < 120
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    both = [spec(tmp_path / name, "dpo", hardware, training) for name in ("killed", "whole")]
    run(tiny_folder, both)
    assert (tmp_path / "killed" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    for key, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "killed")[key]), key
    if hardware == "zero3":
        state = tmp_path / "killed" / "state"
        assert any("zero_pp_rank_1" in file.name for file in state.rglob("*"))
        assert len(list(state.glob("step-000004/kept-*/model.safetensors"))) == 2  # shards of the moving reference
        (tmp_path / "killed" / "model.safetensors").unlink()
        said = run(tiny_folder, [spec(tmp_path / "killed", "dpo", "zero2", training)], fails=True)
        assert "is a state of ZeRO-3 in 2 processes, and this run is ZeRO-2 in 2 processes" in said


@pytest.mark.integration
@pytest.mark.parametrize(
    ("victim", "sign"),
    [("training.worker", "SIGKILL"), ("prefpipe stage=train", "SIGKILL"), ("training.worker", "SIGSTOP")],
)
def test_one_death_ends_them_all(tmp_path, victim, sign):
    """Of a training process, or of the command itself: no process is left, whoever is killed outright, or hangs."""
    rows = [
        {"prompt": f"{tmp_path.name} What is {i} + {i}?", "chosen": f"#### {2 * i}", "rejected": f"#### {2 * i + 1}"}
        for i in range(30)
    ]
    (tmp_path / "pairs.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    common = ["data_mixer=files", f"data_mixer.spec={tmp_path}/pairs.jsonl:1.0", f"paths.runs={tmp_path}/runs"]
    common += [f"paths.cache={tmp_path}/cache"]
    prefpipe = [sys.executable, "-m", "prefpipe"]
    subprocess.run([*prefpipe, "stage=prepare", *common], check=True, cwd=tmp_path)
    knobs = ["hardware=ddp", "hardware.device=cpu", "hardware.num_threads=1", "hardware.gpus_per_node=2"]
    knobs += ["training.max_steps=5000", "training.global_batch_size=4", "training.micro_batch_size=2"]
    driver = subprocess.Popen([*prefpipe, "stage=train", *common, *knobs], cwd=tmp_path, stderr=subprocess.PIPE)
    until(lambda: any(file.stat().st_size for file in tmp_path.rglob("metrics.jsonl")), seconds=120)
    assert len(members(f"{tmp_path}")) == 4  # the command, torchrun, and two that train
    os.kill(members(victim, f"{tmp_path}")[-1], signal.Signals[sign])
    until(lambda: not members(f"{tmp_path}"), seconds=30)
    assert driver.wait() != 0
    assert driver.stderr is not None
    said = driver.stderr.read().decode()
    if sign == "SIGSTOP":
        assert re.search(
            r"prefpipe: error: process \d+ of training was stopped by a signal for 15 s, while others", said
        )
    elif victim == "training.worker":
        assert "prefpipe: error: training failed with exit code 1" in said


def members(*marks: str) -> list[int]:
    """Processes whose command line has all the marks, in the order of their numbers."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if int(entry.name) != os.getpid() and all(mark in line for mark in marks):
            found.append(int(entry.name))
    return sorted(found)


def until(holds: Any, *, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.integration
def test_two_nodes_train_what_one_does(tmp_path, tiny_folder, alone):
    """Two agents on one machine, a process each, as Slurm would start them on two nodes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{found.getsockname()[1]}"
    agents = []
    for rank in (0, 1):
        node = HardwareConfig(name="t", device="cpu", num_threads=1, num_nodes=2, node_rank=rank, rendezvous=place)
        jobs = orjson.dumps([spec(tmp_path / "dpo", "dpo", "ddp")]).decode()
        command = torchrun.command(node, "parallel_jobs", [str(tiny_folder), jobs])
        environment = torchrun.environment(node) | {"PYTHONPATH": str(HERE)}
        agents.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    for agent in agents:
        said, _ = agent.communicate(timeout=300)
        assert agent.returncode == 0, said.decode()[-5000:]
    expected, found = losses(alone / "dpo"), losses(tmp_path / "dpo")
    assert max(abs(a - b) for a, b in zip(expected, found, strict=True)) < 1e-4


class Some(Parallel):
    """A process of some, without the others."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("sizes", [(4, 4), (4, 4, 4), (4, 3), (1,), (2, 1, 1)])
def test_each_process_gets_as_many_micro_batches_and_each_example_is_in_one(sizes, world_size):
    numbers = iter(range(100))
    batches = [[next(numbers) for _ in range(size)] for size in sizes]
    shares = [Some(rank, world_size).share(batches) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for micro in share for i in micro) == list(range(sum(sizes)))
    assert max(len(micro) for share in shares for micro in share) <= max(sizes)
    if sum(sizes) >= world_size * len(shares[0]):
        assert all(micro for share in shares for micro in share)


@pytest.mark.parametrize("name", ["zero2", "zero3", "offload"])
def test_deepspeeds_configuration_is_the_committed_one(name):
    hardware = HardwareConfig(name=name, gpus_per_node=8, **HARDWARE[name])
    training = TrainingConfig(global_batch_size=128, micro_batch_size=4)
    made = deepspeed_config(
        hardware, training, precision="bf16", on_gpu=True, accumulation=training.accumulation(world_size=8)
    )
    assert made == orjson.loads((HERE / "deepspeed" / f"{name}.json").read_bytes())


@pytest.mark.parametrize(
    ("sizes", "world_size", "expected"),
    [((128, 4), 8, 4), ((32, 8), 1, 4), ((8, 8), 1, 1), ((6, 1), 3, 2)],
)
def test_accumulation_times_micro_batch_times_processes_is_the_global_batch(sizes, world_size, expected):
    training = TrainingConfig(global_batch_size=sizes[0], micro_batch_size=sizes[1])
    assert training.accumulation(world_size) == expected


@pytest.mark.parametrize(
    ("sizes", "world_size", "legal"),
    [((100, 4), 8, "x 8 processes = 32; nearest legal values are 96 and 128"), ((8, 4), 4, "legal value is 16")],
)
def test_a_global_batch_that_does_not_divide_is_refused_with_the_nearest_that_do(sizes, world_size, legal):
    training = TrainingConfig(global_batch_size=sizes[0], micro_batch_size=sizes[1])
    with pytest.raises(ConfigError, match=legal):
        training.accumulation(world_size)


def test_the_command_of_one_process_of_a_node_and_of_a_node_among_others(monkeypatch):
    one = HardwareConfig(name="cpu", device="cpu")
    assert torchrun.command(one, "m", ["a"]) == [sys.executable, "-m", "m", "a"]
    node = torchrun.command(replace(one, gpus_per_node=4), "m", ["a"])
    assert " ".join(node[1:]) == "-m torch.distributed.run --nproc-per-node 4 --max-restarts 0 --standalone -m m a"
    many = replace(one, gpus_per_node=4, num_nodes=2, node_rank=1, rendezvous="10.0.0.1:29500")
    assert "--nnodes 2 --node-rank 1 --rdzv-backend c10d --rdzv-endpoint 10.0.0.1:29500" in " ".join(
        torchrun.command(many, "m", ["a"])
    )
    monkeypatch.delenv("SLURM_NODEID", raising=False)
    with pytest.raises(ConfigError, match=r"hardware.num_nodes=2, and nothing says which of them this is"):
        torchrun.node_rank(replace(one, num_nodes=2))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    assert torchrun.processes_per_node(HardwareConfig(name="ddp", gpus_per_node=None)) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match=r"hardware.gpus_per_node=null \(hardware=ddp\)"):
        torchrun.processes_per_node(HardwareConfig(name="ddp", gpus_per_node=None))


def test_a_training_process_is_told_nothing_of_another_run(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "PMI_RANK"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    told = torchrun.environment(HardwareConfig(name="zero2", device="cpu", num_threads=3, zero_stage=2))
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "PMI_RANK"} & told.keys()
    assert (told["SLURM_JOB_ID"], told["OMP_NUM_THREADS"], told["DS_ACCELERATOR"]) == ("9", "3", "cpu")
    assert told["PATH"].startswith(str(Path(sys.executable).parent))
