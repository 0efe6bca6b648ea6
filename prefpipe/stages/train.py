"""pairs → checkpoint. The work is done by a process of its own, which ends with all its memory."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from prefpipe import artifacts, ladder, models, torchrun
from prefpipe.artifacts import Plan
from prefpipe.errors import ConfigError
from prefpipe.files import sha256_of
from prefpipe.losses import Loss
from prefpipe.processes import run_process
from prefpipe.settings import HardwareConfig, ModelConfig, SelectionConfig, TrainingConfig

SCHEMA = "checkpoint/1"
SCRATCH = ("state", "progress", "plan.json", "reference_logps.safetensors", "timing.jsonl", "provenance.json")
"""What lies in the work folder without being part of the checkpoint."""


def train(
    data: Mapping[str, Sequence[Path]],
    out: Path,
    *,
    model: ModelConfig,
    policy: Path,
    reference: Path,
    loss: Loss,
    training: TrainingConfig,
    selection: SelectionConfig,
    hardware: HardwareConfig,
    seed: int,
    freeze: Callable[[dict[str, object], str], Path],
    reference_logps: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Train a policy and publish its checkpoint.

    Args:
        data: "pairs", and for a loss that reads but one side "demonstrations" → artifacts.
        policy, reference: folders of weights.
        freeze: writes the run's config with these inputs filled in under a name, and returns its path.
        reference_logps: a CSV of sums that stands in for the reference; see training/reference_csv.py.
    """
    world_size = hardware.num_nodes * torchrun.processes_per_node(hardware)
    training.accumulation(world_size)
    _check_hardware(hardware, training, loss, world_size)
    whole = training.global_batch_size == training.micro_batch_size and training.micro_batch_tokens is None
    if loss.batch_wise and not whole:
        raise ConfigError(
            f"loss={loss.name} compares the pairs of a batch with each other, so a global batch cannot be cut: set "
            f"training.micro_batch_size={training.global_batch_size}, as training.global_batch_size, and "
            f"training.micro_batch_tokens=null"
        )
    if loss.batch_wise and selection.apply == "loss":
        raise ConfigError(
            f"selection.apply=loss multiplies each pair's loss, and loss={loss.name} has none of a pair alone; use "
            f"selection.apply=sampling"
        )
    _check_reference(loss, training, reference_logps)
    if model.adapter == "qlora" and hardware.zero_stage == 3:
        raise ConfigError(
            "model.adapter=qlora with hardware.zero_stage=3: ZeRO-3 shards weights, and 4-bit ones are not cut; use "
            "hardware=zero2, or model.adapter=lora"
        )
    if model.adapter != "none" and training.reference == "moving" and reference != policy:
        raise ConfigError(
            f"training.reference=moving moves a copy of the adapter of model.adapter={model.adapter}, so it starts at "
            f"the policy: drop inputs.reference={reference}, or use model.adapter=none"
        )
    uses = {
        "loss": loss,
        "training": training,
        "selection": selection,
        "precision": hardware.precision,
        "device": hardware.device,
        "model": models.model_uses(model, policy) | models.adapter_uses(model),
        "reference": models.weights_digest(reference) if loss.needs_reference and not reference_logps else None,
        "seed": seed,
    }
    uses |= {"reference_logps": sha256_of(reference_logps)} if reference_logps else {}
    folders = {name: [str(path) for path in paths] for name, paths in data.items()}

    def run_training(work: Path) -> None:
        name = f"train-node-{node}" if node else "train"
        config = freeze({**folders, "checkpoint": str(policy), "reference": str(reference)}, name)
        arguments = [str(config), "--work", str(work), "--world-size", str(world_size)]
        command = torchrun.command(hardware, "prefpipe.training.worker", arguments)
        attempt = ladder.Attempt(
            work, policy, model, loss, training, hardware, reference == policy, reference_logps is not None
        )
        with attempt.watched():
            run_process(command, "training", environment=torchrun.environment(hardware), in_step=True)

    node = torchrun.node_rank(hardware)
    if node:  # the first node publishes
        if overwrite or not artifacts.is_complete(out):
            run_training(artifacts.partial_path(out))
        return
    with artifacts.draft(out, Plan("train", SCHEMA, uses=uses, parents=data), overwrite=overwrite) as draft:
        if draft.is_current:
            return
        run_training(draft.work)
        shutil.rmtree(draft.work / "state", ignore_errors=True)
        (draft.work / "reference_logps.safetensors").unlink(missing_ok=True)
        names = [str(file.relative_to(draft.work)) for file in sorted(draft.work.rglob("*")) if file.is_file()]
        draft.add_files(name for name in names if Path(name).parts[0] not in SCRATCH and not name.endswith(".tmp"))


def _check_hardware(hardware: HardwareConfig, training: TrainingConfig, loss: Loss, world_size: int) -> None:
    """Refuse what cannot be spread over processes."""
    if loss.batch_wise and world_size > 1:
        raise ConfigError(
            f"loss={loss.name} compares the pairs of a batch with each other, so they cannot be spread over "
            f"{world_size} processes; use hardware.gpus_per_node=1 and hardware.num_nodes=1"
        )


def _check_reference(loss: Loss, training: TrainingConfig, reference_logps: Path | None) -> None:
    """Refuse what the loss does not read, or cannot have from there."""
    if not loss.needs_reference:
        ignored = f"inputs.reference_logps={reference_logps}" if reference_logps else ""
        ignored = ignored or f"training.reference={training.reference}" * (training.reference != "auto")
        if ignored:
            raise ConfigError(f"{ignored} would be ignored, as loss={loss.name} reads no reference; drop it")
    if loss.of_rewards and training.head != "auto":
        raise ConfigError(
            f"training.head={training.head} would be ignored with loss={loss.name}: a reward model's head has one "
            f"output; drop it"
        )
    if "kl" in loss.reads and training.reference == "cached":
        raise ConfigError(
            f"loss={loss.name} needs the reference's whole distributions, which training.reference=cached does not "
            f"hold; use training.reference=online"
        )
    if reference_logps is None:
        return
    if not reference_logps.is_file():
        raise ConfigError(f"inputs.reference_logps={reference_logps}: no such file; give a CSV, or drop it")
    if training.reference != "auto":
        raise ConfigError(
            f"training.reference={training.reference} would be ignored, as inputs.reference_logps={reference_logps} "
            f"stands in for the reference; drop one of them"
        )
    if loss.reads & {"kl", "token_logps"}:
        raise ConfigError(
            f"loss={loss.name} reads the reference token by token, and inputs.reference_logps={reference_logps} holds "
            f"sums; drop it, and the reference is computed"
        )
