"""hardware and training as DeepSpeed's configuration; a pure function, so that it can be read, diffed and tested."""

from typing import Any

from prefpipe.settings import HardwareConfig, TrainingConfig


def deepspeed_config(
    hardware: HardwareConfig, training: TrainingConfig, *, precision: str, on_gpu: bool, accumulation: int
) -> dict[str, Any]:
    """What deepspeed.initialize is given.

    precision: "fp32", "bf16" or "fp16", never "auto". accumulation: micro-batches per optimizer step and process.
    The optimizer is ours, so it has no place here; see training/parallel.py for who counts micro-batches.
    """
    zero: dict[str, Any] = {"stage": hardware.zero_stage, "contiguous_gradients": True, "overlap_comm": True}
    if hardware.zero_stage == 3:
        # With offloading, what is gathered ahead of its use takes the memory that offloading is for.
        zero |= {"stage3_max_live_parameters": 1e9, "stage3_prefetch_bucket_size": 5e7}
    for key, offloaded in (("optimizer", hardware.offload_optimizer), ("param", hardware.offload_params)):
        if offloaded:
            zero[f"offload_{key}"] = {"device": "cpu", "pin_memory": on_gpu}
    return {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": training.max_grad_norm,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # SGD
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own Adam for CPUs has to be compiled first
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }
