"""From pairs to token batches: tokenization, truncation, data order, micro-batches."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from prefpipe.errors import DataError
from prefpipe.prompts import ChatTemplate, Encoded, TemplateError
from prefpipe.records import Demonstration, Pair, Split
from prefpipe.settings import SelectionConfig, TrainingConfig
from prefpipe.training.attention import Document
from prefpipe.training.reference_keys import completion_key
from prefpipe.training.selection import meta_number, pair_id, pair_weight

log = logging.getLogger(__name__)


class Example(NamedTuple):
    """One pair as token ids; for SFT the rejected side is empty.

    row: its number in the input artifact, for error messages. keys: of both sides in the reference cache. scores: of
    both sides, where they came with the pair. pair_id: of the pair's texts, whatever its row. weight: by
    SelectionConfig. trained: [C] bool, tokens of the chosen side that are trained on, where user turns stand between
    answers; None: all. decoder_start: the token that an encoder-decoder's decoder starts with; None for a
    causal model. rank: lower ones come first in an epoch, by training.order. length: of the longer side, prompt
    included.
    """

    row: int
    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    keys: tuple[bytes, bytes] = (b"", b"")
    scores: tuple[float, float] | None = None
    pair_id: str = ""
    weight: float = 1.0
    trained: np.ndarray | None = None
    decoder_start: int | None = None
    rank: float = 0.0

    @property
    def num_trained(self) -> int:
        """Tokens of the chosen side that are trained on."""
        return len(self.chosen) if self.trained is None else int(self.trained.sum())

    @property
    def tokens(self) -> int:
        """Number of tokens of both sides, each with its prompt (SFT: of the chosen side)."""
        sides = 2 if len(self.rejected) else 1
        return len(self.prompt) * sides + len(self.chosen) + len(self.rejected)

    @property
    def length(self) -> int:
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


class Fitted(NamedTuple):
    """Both sides of a pair as the template renders them, and the example truncated to training.max_tokens.

    example: None where training.on_too_long=drop leaves the pair out. length: of the longer side, prompt included.
    """

    chosen: Encoded
    rejected: Encoded
    example: Example | None

    @property
    def length(self) -> int:
        return len(self.chosen.prompt) + max(len(self.chosen.completion), len(self.rejected.completion))


class Batch(NamedTuple):
    """R rows of T token ids that hold S completions of N tokens in all, and which position predicts which token.

    The S completions are all chosen ones, then all rejected ones (SFT: chosen ones only). What a row holds between the
    answers of a conversation is not among the N.

    input_ids: [R, T] int64. position_ids: [R, T], or None where they count from 0 at each row's start.
    documents: of the one row, which tokens see which; None where each row is one document, padded on its right.
    positions: [N] int64, row * T + column of the hidden state that predicts each token.
    targets: [N] int64, the tokens. sequences: [N] int64, the completion that each belongs to; offsets: [N], its place
    in there. lengths: [S] int64, tokens of each completion; width: of the longest.
    ends: [S] int64, row * T + column of each completion's last token; None for an encoder-decoder model.
    encoder_ids: [P, E] int64, the distinct prompts of an encoder-decoder model, padded on their right, whose rows above
    are its decoder's input; encoder_mask: [P, E], 1 for tokens; encoder_rows: [R] int64, the prompt of each row.
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
    ends: Tensor | None = None
    encoder_ids: Tensor | None = None
    encoder_mask: Tensor | None = None
    encoder_rows: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        moved = (part.to(device, non_blocking=True) if isinstance(part, Tensor) else part for part in self)
        return Batch(*moved)  # type: ignore[arg-type]


def encode(
    pairs: Iterable[Pair | Demonstration],
    template: ChatTemplate,
    training: TrainingConfig,
    *,
    pairwise: bool,
    all_turns: bool = False,
    split: Split = Split.train,
    selection: SelectionConfig | None = None,
) -> tuple[list[Example], Counter[str]]:
    """Token ids of every pair of one split, and how many were truncated, dropped or refused, by reason.

    pairwise: read both sides. all_turns: of one side, train every turn of the assistant, as Loss.all_turns says; a
    conversation that its template renders differently as it goes on becomes an example for each (`split_into_turns`).
    Raises DataError when nothing is left.
    """
    examples: list[Example] = []
    counts: Counter[str] = Counter()
    first_refusal = ""
    for row, pair in enumerate(pairs):
        counts["pairs" if isinstance(pair, Pair) else "demonstrations"] += 1
        if pair.split != split:
            counts["other_split"] += 1
            continue
        try:
            found = encode_row(
                pair, row, template, training, pairwise=pairwise, all_turns=all_turns, split=split, selection=selection
            )
        except TemplateError as error:
            counts[error.code] += 1
            first_refusal = first_refusal or f"row {row}: {error}"
            continue
        counts["split_into_turns"] += len(found) > 1
        for fitted in found:
            if fitted.example is None:
                counts["too_long"] += 1
                continue
            counts["truncated"] += fitted.length > training.max_tokens
            examples.append(fitted.example)
    if first_refusal:
        log.warning("some rows cannot be rendered; the first is %s", first_refusal)
    if not examples:
        what, total = ("pair", counts["pairs"]) if counts["pairs"] else ("demonstration", counts["demonstrations"])
        raise DataError(f"no {what} is left to train on; of {total}: {dict(+counts)}. {first_refusal}".strip())
    return examples, +counts


def encode_row(
    pair: Pair | Demonstration,
    row: int,
    template: ChatTemplate,
    training: TrainingConfig,
    *,
    pairwise: bool,
    all_turns: bool = False,
    split: Split = Split.train,
    selection: SelectionConfig | None = None,
) -> list[Fitted]:
    """What `encode` makes of one row: one example, or with all_turns perhaps several. Raises TemplateError."""
    made = []
    found = _encoded(pair, template, pairwise=pairwise, all_turns=all_turns)
    for number, (chosen, rejected) in enumerate(found):
        fitted = Fitted(chosen, rejected, None)
        longest = fitted.length
        if longest > training.max_tokens and training.on_too_long == "drop":
            made.append(fitted)
            continue
        prompt = cut_prompt(chosen.prompt, longest, training, keep_first=template.bos is not None)
        room = training.max_tokens - len(prompt)
        shown, *whole = (np.array(ids, np.int32) for ids in (prompt, chosen.completion, rejected.completion))
        keys = (completion_key(shown, whole[0]), completion_key(shown, whole[1]))
        weight = 1.0 if selection is None else pair_weight(pair, row, selection)
        completions = (whole[0][:room], whole[1][:room])
        trained = None if chosen.trained is None else np.array(chosen.trained[:room])
        identity = pair_id(pair) + (f"/{number}" if number else "")
        example = Example(row, shown, *completions, keys, _scores(pair), identity, weight, trained)
        rank = _rank(pair, row, training) if split == Split.train else 0.0
        example = example._replace(decoder_start=template.decoder_start, rank=rank)
        made.append(fitted._replace(example=example))
    return made


def _encoded(
    pair: Pair | Demonstration, template: ChatTemplate, *, pairwise: bool, all_turns: bool
) -> list[tuple[Encoded, Encoded]]:
    """Both sides; without pairwise the rejected one is empty, and with all_turns there may be several."""
    text = pair.chosen if isinstance(pair, Pair) else pair.text
    if all_turns:
        return [(part, Encoded(part.prompt, [])) for part in template.encode_turns(pair.messages, text)]
    chosen = template.encode(pair.messages, text)
    if not pairwise:
        return [(chosen, Encoded(chosen.prompt, []))]
    assert isinstance(pair, Pair)
    return [(chosen, template.encode(pair.messages, pair.rejected))]


def _scores(pair: Pair | Demonstration) -> tuple[float, float] | None:
    if isinstance(pair, Demonstration):
        return None
    if pair.chosen_score is None or pair.rejected_score is None:
        return None
    return pair.chosen_score, pair.rejected_score


def cut_prompt(prompt: list[int], longest: int, training: TrainingConfig, *, keep_first: bool) -> list[int]:
    """The prompt, cut at its start (BOS stays) when prompt and longer completion exceed training.max_tokens.

    It is cut no further than needed, and never below training.max_prompt_tokens; what is still too much is cut from
    the ends of the completions, which keep at least max_tokens - max_prompt_tokens tokens.
    """
    excess = longest - training.max_tokens
    keep = max(training.max_prompt_tokens, len(prompt) - excess)
    if excess <= 0 or len(prompt) <= keep:
        return prompt
    head = prompt[:1] if keep_first else []
    return head + prompt[len(prompt) - (keep - len(head)) :]


def _rank(pair: Pair | Demonstration, row: int, training: TrainingConfig) -> float:
    if training.order_column is None:
        return 0.0
    number = meta_number(pair, row, training.order_column, key="training.order_column")
    return number if training.order == "ascending" else -number


def data_order(num_examples: int, total: int, seed: int, ranks: Sequence[float] = ()) -> Iterator[int]:
    """Indices of examples, epoch after epoch, each epoch in its own seeded order, until `total` are drawn.

    ranks: one per example; each epoch is sorted by rank, and only examples of equal rank are shuffled.
    """
    drawn = 0
    epoch = 0
    while drawn < total:
        shuffled = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_examples)
        if len(ranks):
            shuffled = shuffled[np.argsort(np.asarray(ranks)[shuffled], kind="stable")]
        for index in shuffled:
            if drawn == total:
                return
            yield int(index)
            drawn += 1
        epoch += 1


def micro_batches(examples: Sequence[Example], indices: Sequence[int], training: TrainingConfig) -> list[list[int]]:
    """Micro-batches of examples of similar length, longest first, so that memory runs out in the first one or never.

    Equal prompts are neighbours. A pair longer than training.micro_batch_tokens is a micro-batch of its own.
    """
    batches: list[list[int]] = []
    tokens = 0
    for index in sorted(indices, key=lambda i: (-examples[i].length, examples[i].prompt.tobytes(), i)):
        tokens += examples[index].tokens
        full = not batches or len(batches[-1]) == training.micro_batch_size
        if full or (training.micro_batch_tokens is not None and tokens > training.micro_batch_tokens):
            batches.append([])
            tokens = examples[index].tokens
        batches[-1].append(index)
    return batches


def collate(examples: Sequence[Example], batching: str, *, pairwise: bool) -> Batch:
    """The completions of B examples as a batch: S = 2 B (SFT: B).

    batching: "padded", "packed" or "shared", as in TrainingConfig.
    """
    sides = [(e.prompt, e.chosen) for e in examples]
    if pairwise:
        sides += [(e.prompt, e.rejected) for e in examples]
    start = examples[0].decoder_start
    if batching != "padded":
        assert start is None, f"an encoder-decoder model knows no batching={batching}"
        batch = _packed(sides, shared=batching == "shared")
    else:
        batch = _padded(sides) if start is None else _encoder_decoder(sides, start)
    return batch if all(e.trained is None for e in examples) else _only_trained(batch, examples)


def _only_trained(batch: Batch, examples: Sequence[Example]) -> Batch:
    """The batch without the targets that are not the assistant's; rows, documents and attention stay as they are."""
    masks = [np.ones(len(e.chosen), bool) if e.trained is None else e.trained for e in examples]
    others = [np.ones(len(e.rejected), bool) for e in examples]
    masks += others[: len(batch.lengths) - len(masks)]  # with a rejected side there are twice as many
    keep = torch.from_numpy(np.concatenate(masks))
    lengths = torch.tensor([int(mask.sum()) for mask in masks])
    return batch._replace(
        positions=batch.positions[keep],
        targets=batch.targets[keep],
        sequences=batch.sequences[keep],
        offsets=torch.cat([torch.arange(int(length)) for length in lengths]),
        lengths=lengths,
        width=int(lengths.max()),
    )


def _padded(sides: Sequence[tuple[np.ndarray, np.ndarray]]) -> Batch:
    """One completion per row, padded on the right; causal attention needs no mask, as no token sees what follows it."""
    ids, _ = _right_padded([np.concatenate(side) for side in sides])
    firsts = [row * ids.shape[1] + len(prompt) - 1 for row, (prompt, _) in enumerate(sides)]
    positions = [first + np.arange(len(completion)) for first, (_, completion) in zip(firsts, sides, strict=True)]
    ends = [first + len(completion) for first, (_, completion) in zip(firsts, sides, strict=True)]
    return _batch(ids, None, None, positions, [completion for _, completion in sides], ends)


def _encoder_decoder(sides: Sequence[tuple[np.ndarray, np.ndarray]], start: int) -> Batch:
    """One completion per decoder row, after its start token, and one distinct prompt per encoder row.

    The decoder is causal and needs no mask; the encoder does, because there every token sees every other.
    """
    prompts = list({prompt.tobytes(): prompt for prompt, _ in sides}.values())
    number = {prompt.tobytes(): row for row, prompt in enumerate(prompts)}
    encoder_ids, encoder_mask = _right_padded(prompts)
    ids, _ = _right_padded([np.concatenate([[start], completion[:-1]]) for _, completion in sides])
    positions = [row * ids.shape[1] + np.arange(len(completion)) for row, (_, completion) in enumerate(sides)]
    batch = _batch(ids, None, None, positions, [completion for _, completion in sides])
    return batch._replace(
        encoder_ids=torch.from_numpy(encoder_ids),
        encoder_mask=torch.from_numpy(encoder_mask),
        encoder_rows=torch.tensor([number[prompt.tobytes()] for prompt, _ in sides]),
    )


def _right_padded(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask), both [R, T] int64."""
    ids = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(rows):
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    return ids, mask


def _packed(sides: Sequence[tuple[np.ndarray, np.ndarray]], *, shared: bool) -> Batch:
    """All completions in one row without padding, each after its prompt.

    shared: a prompt, and a completion of it, is stored once, however many pairs hold it. Its first completion follows
    the prompt; further ones are documents of their own that also attend to the prompt.
    """
    ids: list[np.ndarray] = []
    places: list[np.ndarray] = []
    documents: list[Document] = []
    prompts: dict[bytes, int] = {}
    seen: dict[tuple[bytes, bytes], np.ndarray] = {}
    positions, ends = [], []
    last: dict[tuple[bytes, bytes], int] = {}
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
            last[key] = document.end - 1
            ids += parts
            documents.append(document)
            places.append(first_place + np.arange(document.end - document.start))
            end = document.end
        positions.append(seen[key])
        ends.append(last[key])
    row, completions = np.concatenate(ids).astype(np.int64)[None], [completion for _, completion in sides]
    return _batch(row, np.concatenate(places)[None], documents, positions, completions, ends)


def _batch(
    ids: np.ndarray,
    position_ids: np.ndarray | None,
    documents: list[Document] | None,
    positions: Sequence[np.ndarray],
    completions: Sequence[np.ndarray],
    ends: Sequence[int] | None = None,
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
        ends=None if ends is None else torch.tensor(ends),
    )
