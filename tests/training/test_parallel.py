"""Training in several processes: DDP and DeepSpeed's ZeRO give the losses of one process, and go on exactly."""

import os
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
import torch
from test_loop import TRAINING, job, metrics, weights
from transformers import AutoModelForCausalLM

from prefpipe import torchrun
from prefpipe.components import COMPONENTS
from prefpipe.errors import ConfigError
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


def run(folder: Path, jobs: list[dict[str, Any]], *, num: int = 2, fails: bool = False) -> str:
    """Jobs one after the other in `num` processes; what they print."""
    hardware = HardwareConfig(name="test", device="cpu", num_threads=1, gpus_per_node=num, zero_stage=1)
    command = torchrun.command(hardware, "parallel_jobs", [str(folder), orjson.dumps(jobs).decode()])
    environment = torchrun.environment(hardware) | {"PYTHONPATH": str(HERE)}
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


@pytest.mark.integration
def test_sharded_weights_are_whole_wherever_they_are_read(tmp_path, tiny_folder):
    """Recomputed activations, a head in tiles, an adapter that is off for the reference, distributions, rewards."""
    pytest.importorskip("deepspeed")
    few = replace(TRAINING, max_steps=4)
    recomputed = replace(few, gradient_checkpointing=True, head="chunked", reference="online")
    lora = {"adapter": "lora", "adapter_rank": 4}
    budget = replace(few, micro_batch_tokens=150, num_epochs=1.3, max_steps=None)
    jobs = [
        spec(tmp_path / "recomputed", "dpo", "zero3", recomputed),
        spec(tmp_path / "lora", "dpo", "zero3", replace(few, reference="online"), model=lora),
        spec(tmp_path / "kl", "tdpo", "zero3", few),
        spec(tmp_path / "rewards", "bradley_terry", "zero3", few),
        spec(tmp_path / "budget", "ipo", "zero3", budget),
    ]
    run(tiny_folder, jobs)
    for one in jobs:
        work, loss = Path(one["work"]), COMPONENTS["loss"][one["loss"]]()
        single = job(work.with_suffix(".alone"), tiny_folder, loss, TrainingConfig(**one["training"]))
        train(replace(single, model=ModelConfig(name="tiny", path="builtin:tiny", **one.get("model", {}))))
        expected, found = losses(single.work), losses(work)
        assert max(abs(a - b) for a, b in zip(expected, found, strict=True)) < 1e-4, work.name


@pytest.mark.integration
@pytest.mark.parametrize("hardware", ["ddp", "zero3"])
def test_killed_and_gone_on_is_the_same_run_bit_for_bit(tmp_path, tiny_folder, hardware):
    if HARDWARE[hardware]:
        pytest.importorskip("deepspeed")
    training = replace(TRAINING, max_steps=5, save_every_steps=2)
    started = time.monotonic()
    run(tiny_folder, [spec(tmp_path / "killed", "dpo", hardware, training, kill_after=4)], fails=True)
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
        (tmp_path / "killed" / "model.safetensors").unlink()
        said = run(tiny_folder, [spec(tmp_path / "killed", "dpo", "zero2", training)], fails=True)
        assert "is a state of ZeRO-3 in 2 processes, and this run is ZeRO-2 in 2 processes" in said


@pytest.mark.integration
@pytest.mark.parametrize("victim", ["training.worker", "prefpipe stage=train"])
def test_one_death_ends_them_all(tmp_path, victim):
    """Of a training process, or of the command itself: no process is left, whoever is killed outright."""
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
    os.kill(members(victim, f"{tmp_path}")[-1], signal.SIGKILL)
    until(lambda: not members(f"{tmp_path}"), seconds=30)
    assert driver.wait() != 0
    assert driver.stderr is not None
    if victim == "training.worker":
        assert b"prefpipe: error: training failed with exit code 1" in driver.stderr.read()


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
