"""pairs → checkpoint. The work is done by a process of its own, which ends with all its memory."""

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from prefpipe import artifacts, models
from prefpipe.artifacts import Plan
from prefpipe.errors import ConfigError
from prefpipe.losses import Loss
from prefpipe.processes import run_process
from prefpipe.settings import HardwareConfig, ModelConfig, SelectionConfig, TrainingConfig

SCHEMA = "checkpoint/1"
SCRATCH = ("state", "progress", "plan.json", "reference_logps.safetensors", "timing.jsonl", "provenance.json")
"""What lies in the work folder without being part of the checkpoint."""


def train(
    pairs: Sequence[Path],
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
    freeze: Callable[[dict[str, object]], Path],
    overwrite: bool = False,
) -> None:
    """Train a policy and publish its checkpoint.

    Args:
        policy, reference: folders of weights.
        freeze: writes the run's config with these inputs filled in, and returns its path.
    """
    if training.global_batch_size % training.micro_batch_size:
        low = training.global_batch_size // training.micro_batch_size * training.micro_batch_size
        legal = [size for size in (low, low + training.micro_batch_size) if size]
        raise ConfigError(
            f"training.global_batch_size={training.global_batch_size} is not a multiple of "
            f"training.micro_batch_size={training.micro_batch_size}; nearest legal values are "
            f"{' and '.join(map(str, legal))}"
        )
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
    if "kl" in loss.reads and training.reference == "cached":
        raise ConfigError(
            f"loss={loss.name} needs the reference's whole distributions, which training.reference=cached does not "
            f"hold; use training.reference=online"
        )
    if model.adapter != "none" and training.reference == "moving":
        raise ConfigError(
            f"training.reference=moving follows whole models, and model.adapter={model.adapter} trains none; use "
            f"training.reference=auto, or model.adapter=none"
        )
    uses = {
        "loss": loss,
        "training": training,
        "selection": selection,
        "precision": hardware.precision,
        "device": hardware.device,
        "model": models.model_uses(model, policy) | models.adapter_uses(model),
        "reference": models.weights_digest(reference) if loss.needs_reference else None,
        "seed": seed,
    }
    with artifacts.draft(out, Plan("train", SCHEMA, uses=uses, parents={"pairs": pairs}), overwrite=overwrite) as draft:
        if draft.is_current:
            return
        inputs = {"pairs": [str(p) for p in pairs], "checkpoint": str(policy), "reference": str(reference)}
        config = freeze(dict(inputs))
        run_process(
            [sys.executable, "-m", "prefpipe.training.worker", str(config), "--work", str(draft.work)], "training"
        )
        shutil.rmtree(draft.work / "state", ignore_errors=True)
        (draft.work / "reference_logps.safetensors").unlink(missing_ok=True)
        names = [str(file.relative_to(draft.work)) for file in sorted(draft.work.rglob("*")) if file.is_file()]
        draft.add_files(name for name in names if Path(name).parts[0] not in SCRATCH and not name.endswith(".tmp"))
