"""The calculator inside of vLLM: a logits processor that leaves one token to choose where a result must come."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoTokenizer
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from prefpipe.annotations import FREE, Annotations, Writer


class Row:
    """One request in the batch. tokens: what it has written, a list that vLLM adds to."""

    def __init__(self, annotations: Annotations, tokens: list[int]) -> None:
        self.writer, self.tokens = Writer(annotations), tokens
        self.following = FREE

    def forced(self) -> int:
        """The token that must come next, or FREE."""
        for token in self.tokens[len(self.writer.ids) :]:
            self.following = self.writer.push(token)
        return self.following


class Calculator(LogitsProcessor):  # type: ignore[misc] # vLLM is absent where types are checked  # type: ignore[misc]
    """See Generator.calculator; which tokens were forced follows from the tokens, so nothing is reported from here."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.annotations = Annotations(AutoTokenizer.from_pretrained(vllm_config.model_config.tokenizer))
        self.rows: dict[int, Row] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:
            self.rows.pop(index, None)
        for index, _, _, tokens in batch_update.added:
            self.rows[index] = Row(self.annotations, tokens)
        for source, target, direction in batch_update.moved:
            first, second = self.rows.pop(source, None), self.rows.pop(target, None)
            if first is not None:
                self.rows[target] = first
            if second is not None and direction == MoveDirectionality.SWAP:
                self.rows[source] = second

    def apply(self, logits: Tensor) -> Tensor:
        forced = {index: token for index, row in self.rows.items() if (token := row.forced()) != FREE}
        if forced:
            rows = torch.tensor(list(forced), device=logits.device)
            tokens = torch.tensor(list(forced.values()), device=logits.device)
            logits[rows] = -torch.inf
            logits[rows, tokens] = 0.0
        return logits
