"""Models that compare two answers to a prompt, in the layout of PairRM."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, DebertaV2Model, PretrainedConfig

from prefpipe import models
from prefpipe.errors import ConfigError
from prefpipe.kept import keep_last
from prefpipe.progress import progress
from prefpipe.scorers import Missing
from prefpipe.scoring_models import within
from prefpipe.settings import HardwareConfig

log = logging.getLogger(__name__)

SOURCE, FIRST, SECOND = "<|source|>", "<|candidate1|>", "<|candidate2|>"


class PairRM(nn.Module):
    """The weights' layout of llm-blender/PairRM-hf, Jiang et al. 2023, arXiv:2306.02561.

    Each of the three marks <|source|>, <|candidate1|>, <|candidate2|> has a hidden state; one head rates the source's
    beside that of either candidate, and the logit is the difference of both.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.pretrained_model = DebertaV2Model(config)
        self.head_layer = nn.Sequential(
            nn.Dropout(0.0),
            nn.Linear(2 * config.hidden_size, config.hidden_size),
            nn.Tanh(),
            nn.Dropout(0.0),
            nn.Linear(config.hidden_size, getattr(config, "n_tasks", 1)),
        )
        self.marks = (config.source_prefix_id, config.cand1_prefix_id, config.cand2_prefix_id)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B] logits that the first candidate is better."""
        hidden = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        source, first, second = (hidden[input_ids == mark] for mark in self.marks)
        left = self.head_layer(torch.cat([source, first], -1))
        right = self.head_layer(torch.cat([source, second], -1))
        logits: Tensor = (left - right).mean(-1)
        return logits


class PairRankerModel:
    """Compares candidates with each other, each in both places.

    A model whose config names PairRM's marks is read in its layout; any other must be a sequence classifier, of one
    label, the logit that the first candidate is better, or of two, the first of them for the first candidate.
    """

    def __init__(self, folder: Path, hardware: HardwareConfig) -> None:
        self.device = models.device_of(hardware)
        dtype = models.dtype_of(models.precision_of(hardware, self.device))
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        self.special -= {self.tokenizer.unk_token_id}
        config = AutoConfig.from_pretrained(folder)
        self.model: Any
        if hasattr(config, "cand1_prefix_id"):
            self.model = PairRM(config)
            self.model.load_state_dict(load_file(folder / "model.safetensors"))
        elif models.is_classifier(config) and config.num_labels in (1, 2):
            self.model = AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True)
        else:
            raise ConfigError(
                f"scorer.path={folder} is neither in PairRM's layout nor a classifier of one or two labels "
                f"({', '.join(config.architectures or ['no architecture'])})"
            )
        self.model.to(self.device, dtype).eval()
        log.info("comparing with %s on %s in %s", folder, self.device, dtype)

    def source(self, text: str, *, longest: int) -> list[int] | Missing:
        """Ids of a prompt with its mark, no more than `longest`."""
        return self._marked(SOURCE, text, longest)

    def candidate(self, text: str, *, longest: int) -> tuple[list[int], list[int]] | Missing:
        """Ids of a candidate in the first and in the second place."""
        first, second = (self._marked(mark, text, longest) for mark in (FIRST, SECOND))
        if isinstance(first, Missing) or isinstance(second, Missing):
            return first if isinstance(first, Missing) else second  # type: ignore[return-value]
        return first, second

    def _marked(self, mark: str, text: str, longest: int) -> list[int] | Missing:
        if self.special.intersection(self.tokenizer(text, add_special_tokens=False)["input_ids"]):
            return Missing("special_token")
        ids: list[int] = self.tokenizer(mark + text)["input_ids"]
        return ids if len(ids) <= longest else Missing("too_long")

    @torch.no_grad()
    def logits(self, rows: Sequence[Sequence[int]], *, max_tokens: int) -> list[float]:
        """Of each row the logit that the candidate in the first place is better; max_tokens: of a batch."""
        found = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
        with progress("comparisons", unit="pair", total=len(rows)) as shown:
            for numbers in within(order, [len(row) for row in rows], max_tokens):
                width = max(len(rows[i]) for i in numbers)
                pad = self.tokenizer.pad_token_id or 0
                ids = torch.tensor([[*rows[i], *[pad] * (width - len(rows[i]))] for i in numbers], device=self.device)
                sizes = torch.tensor([len(rows[i]) for i in numbers], device=self.device)
                mask = (torch.arange(width, device=self.device) < sizes[:, None]).long()
                for number, value in zip(numbers, self._forward(ids, mask).double().tolist(), strict=True):
                    found[number] = value
                shown.update(len(numbers))
        return found

    def _forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        out = self.model(input_ids=ids, attention_mask=mask)
        if isinstance(out, Tensor):
            return out
        logits: Tensor = out.logits.float()
        return logits[:, 0] if logits.shape[1] == 1 else logits[:, 0] - logits[:, 1]


@keep_last(1)
def pair_ranker(folder: Path, hardware: HardwareConfig) -> PairRankerModel:
    """The model of a folder, loaded once."""
    return PairRankerModel(folder, hardware)
