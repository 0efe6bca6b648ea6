"""From pairs to token batches: encoding, truncation, the order of the data, micro-batches."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from prefpipe.errors import DataError
from prefpipe.prompts import ChatTemplate, Encoded, TemplateError
from prefpipe.records import Pair, Split
from prefpipe.settings import SelectionConfig, TrainingConfig
from prefpipe.training.attention import Document
from prefpipe.training.reference_cache import completion_key
from prefpipe.training.selection import pair_id, pair_weight

log = logging.getLogger(__name__)


class Example(NamedTuple):
    """One pair as token ids; for SFT the rejected side is empty.

    row: its number in the input artifact, for error messages. keys: of both sides in the reference cache. scores: of
    both sides, where they came with the pair. pair_id: of what the pair says, whatever its row. weight: of the pair,
    by SelectionConfig. length: of the longer side, prompt included.
    """

    row: int
    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    keys: tuple[bytes, bytes] = (b"", b"")
    scores: tuple[float, float] | None = None
    pair_id: str = ""
    weight: float = 1.0

    def tokens(self, *, pairwise: bool) -> int:
        """Of both sides, each with its prompt (SFT: of the chosen one)."""
        return len(self.prompt) * (1 + pairwise) + len(self.chosen) + len(self.rejected)

    @property
    def length(self) -> int:
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


class Batch(NamedTuple):
    """R rows of T token ids that hold S completions of N tokens in all, and which position predicts which token.

    The S completions are all chosen ones, then all rejected ones (SFT: chosen ones only).

    input_ids: [R, T] int64. position_ids: [R, T], or None where they count from 0 at each row's start.
    documents: of the one row, which tokens see which; None where each row is one document, padded on its right.
    positions: [N] int64, row * T + column of the hidden state that predicts each token.
    targets: [N] int64, the tokens. sequences: [N] int64, the completion that each belongs to; offsets: [N], its place
    in there. lengths: [S] int64, tokens of each completion; width: of the longest.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    documents: list[Document] | None
    positions: Tensor
    targets: Tensor
    sequences: Tensor
    offsets: Tensor
    lengths: Tensor
    width: int

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        moved = (part.to(device, non_blocking=True) if isinstance(part, Tensor) else part for part in self)
        return Batch(*moved)  # type: ignore[arg-type]


def encode(
    pairs: Iterable[Pair],
    template: ChatTemplate,
    training: TrainingConfig,
    *,
    pairwise: bool,
    split: Split = Split.train,
    selection: SelectionConfig | None = None,
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
        shown, *whole = (np.array(ids, np.int32) for ids in (prompt, chosen.completion, rejected.completion))
        keys = (completion_key(shown, whole[0]), completion_key(shown, whole[1]))
        weight = 1.0 if selection is None else pair_weight(pair, row, selection)
        completions = (whole[0][:room], whole[1][:room])
        examples.append(Example(row, shown, *completions, keys, _scores(pair), pair_id(pair), weight))
    if first_refusal:
        log.warning("some rows cannot be rendered; the first is %s", first_refusal)
    if not examples:
        raise DataError(f"no pair is left to train on; of {counts['pairs']}: {dict(counts)}. {first_refusal}".strip())
    return examples, counts


def _scores(pair: Pair) -> tuple[float, float] | None:
    if pair.chosen_score is None or pair.rejected_score is None:
        return None
    return pair.chosen_score, pair.rejected_score


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


def micro_batches(examples: Sequence[Example], indices: Sequence[int], training: TrainingConfig) -> list[list[int]]:
    """Some examples as micro-batches of similar length, longest first, so that memory runs out at once or never.

    Equal prompts come together. A pair longer than training.micro_batch_tokens stands alone.
    """
    batches: list[list[int]] = []
    tokens = 0
    for index in sorted(indices, key=lambda i: (-examples[i].length, examples[i].prompt.tobytes(), i)):
        tokens += examples[index].tokens(pairwise=True)
        full = not batches or len(batches[-1]) == training.micro_batch_size
        if full or (training.micro_batch_tokens is not None and tokens > training.micro_batch_tokens):
            batches.append([])
            tokens = examples[index].tokens(pairwise=True)
        batches[-1].append(index)
    return batches


def collate(examples: Sequence[Example], batching: str, *, pairwise: bool) -> Batch:
    """The completions of B examples as a batch: S = 2 B (SFT: B).

    batching: "padded", "packed" or "shared", as in TrainingConfig.
    """
    sides = [(e.prompt, e.chosen) for e in examples]
    if pairwise:
        sides += [(e.prompt, e.rejected) for e in examples]
    return _padded(sides) if batching == "padded" else _packed(sides, shared=batching == "shared")


def _padded(sides: Sequence[tuple[np.ndarray, np.ndarray]]) -> Batch:
    """One completion to a row, padded on the right: causal attention needs no mask, as no token sees what follows."""
    rows = [np.concatenate(side) for side in sides]
    ids = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for row, sequence in enumerate(rows):
        ids[row, : len(sequence)] = sequence
    firsts = [row * ids.shape[1] + len(prompt) - 1 for row, (prompt, _) in enumerate(sides)]
    positions = [first + np.arange(len(completion)) for first, (_, completion) in zip(firsts, sides, strict=True)]
    return _batch(ids, None, None, positions, [completion for _, completion in sides])


def _packed(sides: Sequence[tuple[np.ndarray, np.ndarray]], *, shared: bool) -> Batch:
    """All completions in one row without padding, each behind its prompt.

    shared: a prompt, and a completion of it, is there once, however many pairs hold it: its first completion follows
    it, further ones come as documents of their own which see it too.
    """
    ids: list[np.ndarray] = []
    places: list[np.ndarray] = []
    documents: list[Document] = []
    prompts: dict[bytes, int] = {}
    seen: dict[tuple[bytes, bytes], np.ndarray] = {}
    positions = []
    end = 0
    for prompt, completion in sides:
        key = (prompt.tobytes(), completion.tobytes())
        if not (shared and key in seen):
            start = prompts.get(key[0]) if shared else None
            if start is None:
                prompts[key[0]] = start = end
                parts, first_place, document = (
                    [prompt, completion],
                    0,
                    Document(end, end + len(prompt) + len(completion), read=end + len(prompt) - 1),
                )
            else:
                first_place = len(prompt)
                parts, document = [completion], Document(end, end + len(completion), start, len(prompt), read=end)
            first = document.end - len(completion)
            # The prompt's last token predicts the first one, each token of the completion the one after it.
            seen[key] = np.concatenate([[start + len(prompt) - 1], np.arange(first, document.end - 1)])
            ids += parts
            documents.append(document)
            places.append(first_place + np.arange(document.end - document.start))
            end = document.end
        positions.append(seen[key])
    row = np.concatenate(ids).astype(np.int64)[None]
    return _batch(row, np.concatenate(places)[None], documents, positions, [completion for _, completion in sides])


def _batch(
    ids: np.ndarray,
    position_ids: np.ndarray | None,
    documents: list[Document] | None,
    positions: Sequence[np.ndarray],
    completions: Sequence[np.ndarray],
) -> Batch:
    lengths = np.array([len(completion) for completion in completions])
    return Batch(
        torch.from_numpy(ids),
        None if position_ids is None else torch.from_numpy(position_ids),
        documents,
        positions=torch.from_numpy(np.concatenate(positions).astype(np.int64)),
        targets=torch.from_numpy(np.concatenate(completions).astype(np.int64)),
        sequences=torch.from_numpy(np.repeat(np.arange(len(completions)), lengths)),
        offsets=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        lengths=torch.from_numpy(lengths),
        width=int(lengths.max()),
    )
