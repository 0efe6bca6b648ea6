"""From pairs to padded token batches: encoding, truncation, the order of the data, micro-batches."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from prefpipe.errors import DataError
from prefpipe.logps import IGNORE_INDEX
from prefpipe.prompts import ChatTemplate, Encoded, TemplateError
from prefpipe.records import Pair
from prefpipe.settings import TrainingConfig

log = logging.getLogger(__name__)


class Example(NamedTuple):
    """One pair as token ids; for SFT the rejected side is empty.

    row: its number in the input artifact, for error messages. length: of the longer side, prompt included.
    """

    row: int
    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def length(self) -> int:
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


class Batch(NamedTuple):
    """Right-padded token ids of S sequences: all chosen ones, then all rejected ones.

    input_ids: [S, T] int64. labels: [S, T], IGNORE_INDEX on prompt and padding.
    Causal attention from right-padded rows needs no mask: no real token can see the padding behind it.
    """

    input_ids: Tensor
    labels: Tensor


def encode(
    pairs: Iterable[Pair], template: ChatTemplate, training: TrainingConfig, *, pairwise: bool
) -> tuple[list[Example], Counter[str]]:
    """Token ids of every pair, and how many were truncated, dropped or refused, by reason.

    Raises DataError when nothing is left.
    """
    examples: list[Example] = []
    counts: Counter[str] = Counter()
    first_refusal = ""
    for row, pair in enumerate(pairs):
        counts["pairs"] += 1
        try:
            chosen = template.encode(pair.messages, pair.chosen)
            rejected = template.encode(pair.messages, pair.rejected) if pairwise else Encoded(chosen.prompt, [])
        except TemplateError as error:
            counts[error.code] += 1
            first_refusal = first_refusal or f"row {row}: {error}"
            continue
        longest = len(chosen.prompt) + max(len(chosen.completion), len(rejected.completion))
        if longest > training.max_tokens:
            if training.on_too_long == "drop":
                counts["too_long"] += 1
                continue
            counts["truncated"] += 1
        prompt = cut_prompt(chosen.prompt, longest, training, keep_first=template.bos is not None)
        room = training.max_tokens - len(prompt)
        sides = [
            np.array(ids, dtype=np.int32) for ids in (prompt, chosen.completion[:room], rejected.completion[:room])
        ]
        examples.append(Example(row, *sides))
    if first_refusal:
        log.warning("some rows cannot be rendered; the first is %s", first_refusal)
    if not examples:
        raise DataError(f"no pair is left to train on; of {counts['pairs']}: {dict(counts)}. {first_refusal}".strip())
    return examples, counts


def cut_prompt(prompt: list[int], longest: int, training: TrainingConfig, *, keep_first: bool) -> list[int]:
    """The prompt, cut at its start (BOS stays) when prompt and longer completion pass training.max_tokens.

    It is cut no further than needed, and never below training.max_prompt_tokens: what is still too much is taken from
    the completions' ends, which keep at least max_tokens - max_prompt_tokens tokens.
    """
    excess = longest - training.max_tokens
    keep = max(training.max_prompt_tokens, len(prompt) - excess)
    if excess <= 0 or len(prompt) <= keep:
        return prompt
    head = prompt[:1] if keep_first else []
    return head + prompt[len(prompt) - (keep - len(head)) :]


def data_order(num_examples: int, total: int, seed: int) -> Iterator[int]:
    """Example numbers, epoch after epoch, each epoch in its own seeded order, until `total` are drawn."""
    drawn = 0
    epoch = 0
    while drawn < total:
        for index in np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_examples):
            if drawn == total:
                return
            yield int(index)
            drawn += 1
        epoch += 1


def micro_batches(examples: Sequence[Example], indices: Sequence[int], size: int) -> list[list[int]]:
    """One global batch as micro-batches of similar length, longest first (so that memory runs out at once or never)."""
    ordered = sorted(indices, key=lambda index: (-examples[index].length, index))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def collate(examples: Sequence[Example], *, pairwise: bool, device: torch.device) -> Batch:
    """Pad B examples to a batch of 2 B sequences (B for SFT)."""
    sequences = [(e.prompt, e.chosen) for e in examples]
    if pairwise:
        sequences += [(e.prompt, e.rejected) for e in examples]
    width = max(len(prompt) + len(completion) for prompt, completion in sequences)
    ids = np.zeros((len(sequences), width), dtype=np.int64)
    labels = np.full((len(sequences), width), IGNORE_INDEX, dtype=np.int64)
    for row, (prompt, completion) in enumerate(sequences):
        end = len(prompt) + len(completion)
        ids[row, : len(prompt)] = prompt
        ids[row, len(prompt) : end] = completion
        labels[row, len(prompt) : end] = completion
    return Batch(torch.from_numpy(ids).to(device), torch.from_numpy(labels).to(device))
