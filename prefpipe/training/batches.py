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
from prefpipe.records import Pair, Split
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
    """R rows of token ids that hold S completions, and where the logits that predict them stand.

    Letters: T columns, K of them with logits, C the longest completion. The S completions are all chosen ones, then all
    rejected ones (for SFT chosen ones only).

    input_ids: [R, T] int64.
    position_ids: [R, T]; None where they count from 0 at each row's start.
    mask: [R, 1, T, T] bool, True where a query (third axis) may look; None where plain causal attention does.
    columns: [K] int64, the columns whose logits are needed; no others are computed.
    rows: [S, 1] int64, the row of each completion. places: [S, C] int64, which of the K predicts each token.
    targets: [S, C] int64, the token, IGNORE_INDEX behind the end of a completion.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    mask: Tensor | None
    columns: Tensor
    rows: Tensor
    places: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        positions = None if self.position_ids is None else self.position_ids.to(device, non_blocking=True)
        mask = None if self.mask is None else self.mask.to(device, non_blocking=True)
        others = (self.columns, self.rows, self.places, self.targets)
        moved = (tensor.to(device, non_blocking=True) for tensor in others)
        return Batch(self.input_ids.to(device, non_blocking=True), positions, mask, *moved)


def encode(
    pairs: Iterable[Pair],
    template: ChatTemplate,
    training: TrainingConfig,
    *,
    pairwise: bool,
    split: Split = Split.train,
) -> tuple[list[Example], Counter[str]]:
    """Token ids of every pair of one split, and how many were truncated, dropped or refused, by reason.

    Raises DataError when nothing is left.
    """
    examples: list[Example] = []
    counts: Counter[str] = Counter()
    first_refusal = ""
    for row, pair in enumerate(pairs):
        counts["pairs"] += 1
        if pair.split != split:
            counts["other_split"] += 1
            continue
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


def collate(examples: Sequence[Example], *, pairwise: bool) -> Batch:
    """One completion to a row, padded on the right: R = S = 2 B rows (B for SFT).

    Causal attention from right-padded rows needs no mask: no real token can see the padding behind it. Logits start at
    the last token of the shortest prompt.
    """
    sides = [(e.prompt, e.chosen) for e in examples]
    if pairwise:
        sides += [(e.prompt, e.rejected) for e in examples]
    first = min(len(prompt) for prompt, _ in sides) - 1
    ids = _right_padded([np.concatenate(side) for side in sides], 0)
    targets = _right_padded([completion for _, completion in sides], IGNORE_INDEX)
    starts = np.array([[len(prompt) - 1 - first] for prompt, _ in sides])
    num_columns = ids.shape[1] - 1 - first
    places = np.minimum(starts + np.arange(targets.shape[1]), num_columns - 1)
    columns = np.arange(first, first + num_columns)
    rows = np.arange(len(sides))[:, None]
    return Batch(torch.from_numpy(ids), None, None, *map(torch.from_numpy, (columns, rows, places, targets)))


def collate_shared(examples: Sequence[Example]) -> Batch:
    """One pair to a row, its prompt computed once: [prompt | chosen | rejected], R = B rows.

    Prompts are padded on the left, so that completions start in the same column of every row and only their columns get
    logits. Both completions look at the prompt and at themselves, never at each other, and their positions both go on
    from the prompt's. Padding looks at itself alone, as a softmax over nothing is not a number.
    """
    prompt_width = max(len(e.prompt) for e in examples)
    chosen = _right_padded([e.chosen for e in examples], IGNORE_INDEX)
    rejected = _right_padded([e.rejected for e in examples], IGNORE_INDEX)
    prompts = np.full((len(examples), prompt_width), IGNORE_INDEX, dtype=np.int64)
    for row, example in enumerate(examples):
        prompts[row, prompt_width - len(example.prompt) :] = example.prompt
    ids = np.concatenate([prompts, chosen, rejected], axis=1)
    real = ids != IGNORE_INDEX
    part = np.repeat([0, 1, 2], [prompt_width, chosen.shape[1], rejected.shape[1]])

    causal = np.tril(np.ones((len(part), len(part)), dtype=bool))
    visible = causal & ((part[:, None] == part[None, :]) | (part[None, :] == 0))
    mask = visible[None] & real[:, None, :] & real[:, :, None] | np.eye(len(part), dtype=bool)[None]
    prompt_lengths = np.array([[len(e.prompt)] for e in examples])
    positions = np.concatenate(
        [
            np.maximum(np.arange(prompt_width) - (prompt_width - prompt_lengths), 0),
            prompt_lengths + np.arange(chosen.shape[1]),
            prompt_lengths + np.arange(rejected.shape[1]),
        ],
        axis=1,
    )
    # The prompt's last column predicts the first token of both; a completion's own last column predicts nothing.
    after_chosen = prompt_width + chosen.shape[1]
    of_chosen = np.arange(prompt_width - 1, after_chosen - 1)
    columns = np.concatenate([of_chosen, np.arange(after_chosen, ids.shape[1] - 1)])
    width = max(chosen.shape[1], rejected.shape[1])
    places_chosen = np.minimum(np.arange(width), chosen.shape[1] - 1)
    places_rejected = np.minimum(
        np.where(np.arange(width) == 0, 0, chosen.shape[1] - 1 + np.arange(width)), len(columns) - 1
    )
    places = np.repeat([places_chosen, places_rejected], len(examples), axis=0)
    targets = np.concatenate([_widened(chosen, width), _widened(rejected, width)])
    rows = np.tile(np.arange(len(examples)), 2)[:, None]
    tensors = (np.where(real, ids, 0), positions, mask[:, None], columns, rows, places, targets)
    return Batch(*map(torch.from_numpy, tensors))


def _right_padded(sequences: Sequence[np.ndarray], fill: int) -> np.ndarray:
    """[S, longest] int64."""
    padded = np.full((len(sequences), max(map(len, sequences))), fill, dtype=np.int64)
    for row, sequence in enumerate(sequences):
        padded[row, : len(sequence)] = sequence
    return padded


def _widened(targets: np.ndarray, width: int) -> np.ndarray:
    return np.pad(targets, ((0, 0), (0, width - targets.shape[1])), constant_values=IGNORE_INDEX)
