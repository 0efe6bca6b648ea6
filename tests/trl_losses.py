"""Run with TRL on the path: `python trl_losses.py JOBS RESULTS`, both files of torch.save.

JOBS holds `tokenizer` (a folder), `batches` by name and `cases` by name; RESULTS TRL's version and, per case, what its
trainer's compute_loss makes of it. Only the model is a stand-in, a table of logits; what TRL does with it is its own.
"""

import sys
import tempfile
from typing import Any

import datasets
import torch
import trl
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationMixin, LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

TRAINERS: dict[str, tuple[type, type]] = {
    "dpo": (trl.DPOTrainer, trl.DPOConfig),
    "cpo": (CPOTrainer, CPOConfig),
    "orpo": (ORPOTrainer, ORPOConfig),
}


class Table(nn.Module):
    """A backbone whose last hidden states do not depend on its input."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self, input_ids: Tensor, **ignored: Any) -> BaseModelOutput:
        assert input_ids.shape == self.values.shape[:2]
        return BaseModelOutput(last_hidden_state=self.values)


class TableLM(PreTrainedModel, GenerationMixin):
    """With the identity as head: the table [2 B, T, V] holds the logits."""

    config_class = LlamaConfig
    base_model_prefix = "model"

    def __init__(self, logits: Tensor) -> None:
        vocabulary = logits.shape[-1]
        super().__init__(LlamaConfig(vocab_size=vocabulary, hidden_size=vocabulary, num_attention_heads=1))
        self.model = Table(logits.clone())
        self.lm_head = nn.Linear(vocabulary, vocabulary, bias=False)
        self.lm_head.weight = nn.Parameter(torch.eye(vocabulary, dtype=logits.dtype), requires_grad=False)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(self, input_ids: Tensor, **ignored: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids).last_hidden_state))


def of_pairs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What DPOTrainer's collator gives: chosen rows, then rejected ones."""
    return {key: batch[key] for key in ("input_ids", "attention_mask", "completion_mask")}


def of_sides(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the collator of CPOTrainer and ORPOTrainer gives."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    parts = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
    return {
        f"{side}_{key}": rows
        for key, value in parts.items()
        for side, rows in zip(("chosen", "rejected"), value.chunk(2), strict=True)
    }


def evaluated(case: dict[str, Any], batch: dict[str, Tensor], tokenizer: Any) -> dict[str, Any]:
    """loss: its value. gradient: [2 B, T, V], of the logits. rewards: means as logged, chosen and rejected."""
    dtype = getattr(torch, case["dtype"])
    torch.set_default_dtype(dtype)  # of the constants that TRL makes tensors of, such as exo_pair's epsilon
    trainer_class, config_class = TRAINERS[case["trainer"]]
    model = TableLM(batch["logits"].to(dtype))
    with tempfile.TemporaryDirectory() as folder:
        rest = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False}
        trainer = trainer_class(
            model=model,
            args=config_class(output_dir=folder, **rest, **case["knobs"]),
            train_dataset=datasets.Dataset.from_list([{"prompt": "1", "chosen": "2", "rejected": "3"}]),
            processing_class=tokenizer,
            **({"ref_model": TableLM(batch["ref_logits"].to(dtype))} if case["trainer"] == "dpo" else {}),
        )
        loss = trainer.compute_loss(model, of_pairs(batch) if case["trainer"] == "dpo" else of_sides(batch))
    loss.backward()
    logged = trainer._metrics if case["trainer"] == "dpo" else trainer._stored_metrics
    rewards = [logged["train"][f"rewards/{side}"][-1] for side in ("chosen", "rejected")]
    return {"loss": loss.item(), "gradient": model.model.values.grad, "rewards": rewards}


def main(jobs_file: str, results_file: str) -> None:
    datasets.disable_progress_bars()
    jobs = torch.load(jobs_file)
    tokenizer = AutoTokenizer.from_pretrained(jobs["tokenizer"])
    results = {name: evaluated(case, jobs["batches"][case["batch"]], tokenizer) for name, case in jobs["cases"].items()}
    torch.save({"version": trl.__version__, "results": results}, results_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
