"""A batch read back: which tokens of each example its tensors hold, what each is, and which ones are trained on."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from prefpipe.prompts import Encoded
from prefpipe.training.attention import Document
from prefpipe.training.batches import Batch, Fitted


class Token(NamedTuple):
    """One token of an example.

    role: "prompt", "chosen", "rejected", or "masked": behind the prompt, but not the assistant's (turns of the user,
    the token that a decoder starts with). trained: the loss reads its log-probability; or of a reward model the reward
    at it. cut: truncation left it out, so that no tensor holds it. place: in the flattened batch; None: in none.
    """

    id: int
    role: str
    trained: bool = False
    special: bool = False
    cut: bool = False
    place: int | None = None


class Side(NamedTuple):
    """A prompt with one completion, what was cut in its place. name: "chosen" or "rejected"."""

    name: str
    prompt: list[Token]
    completion: list[Token]

    @property
    def tokens(self) -> list[Token]:
        return [*self.prompt, *self.completion]

    @property
    def num_tokens(self) -> int:
        """That the batch holds."""
        return sum(not token.cut for token in self.tokens)

    @property
    def num_trained(self) -> int:
        return sum(token.trained for token in self.tokens)

    @property
    def num_cut(self) -> int:
        return sum(token.cut for token in self.tokens)


class Stretch(NamedTuple):
    """Places start .. end of a batch (of an encoder-decoder model: of its decoder) that form one document.

    sides: (number of the example in the batch, "chosen" or "rejected") of the completions that end in it. sees: places
    of an earlier prompt that it sees too.
    """

    start: int
    end: int
    sides: list[tuple[int, str]]
    sees: tuple[int, int] | None = None


def sides_of(
    batch: Batch, fitted: Sequence[Fitted], *, special: frozenset[int], keep_first: bool, of_rewards: bool = False
) -> list[list[Side]]:
    """Of each of the B examples that `collate` made a batch of, its sides (SFT: one), read from the batch's tensors.

    fitted: the examples before truncation. special: ids of special tokens. keep_first: as in `cut_prompt`.
    """
    found = []
    for example, one in enumerate(fitted):
        sides = []
        for name, whole, sequence in _sequences(batch, example, one, len(fitted)):
            prompt, completion = _side(batch, sequence, name, of_rewards=of_rewards)
            num_kept = len(completion) - (batch.encoder_ids is not None)  # a decoder has its start token before them
            sides.append(Side(name, *_with_cut(name, prompt, completion, whole, num_kept, keep_first=keep_first)))
        found.append([_with_special(side, special) for side in sides])
    return found


def stretches(batch: Batch, num_examples: int) -> list[Stretch]:
    """The documents of a batch in order, whatever its batching."""
    found: dict[int, Stretch] = {}
    for sequence in range(len(batch.lengths)):
        name = "chosen" if sequence < num_examples else "rejected"
        document = _document(batch, sequence)
        sees = (document.prompt, document.prompt + document.shared) if document.shared else None
        made = found.setdefault(document.start, Stretch(document.start, document.end, [], sees))
        made.sides.append((sequence % num_examples, name))
    return [found[start] for start in sorted(found)]


def _sequences(batch: Batch, example: int, one: Fitted, num: int) -> Iterator[tuple[str, Encoded, int]]:
    yield "chosen", one.chosen, example
    if len(batch.lengths) > num:
        yield "rejected", one.rejected, num + example


def _document(batch: Batch, sequence: int) -> Document:
    """Where a completion and what stands before it lie in the flattened rows."""
    width = batch.input_ids.shape[1]
    if batch.ends is None:
        last = int(batch.positions[batch.sequences == sequence][-1])
        return Document(last // width * width, last + 1)
    end = int(batch.ends[sequence])
    if batch.documents is None:
        return Document(end // width * width, end + 1)
    return next(document for document in batch.documents if document.start <= end < document.end)


def _side(batch: Batch, sequence: int, name: str, *, of_rewards: bool) -> tuple[list[Token], list[Token]]:
    """The tokens of one completion's prompt, and its own."""
    own = batch.sequences == sequence
    positions, targets = batch.positions[own], batch.targets[own]
    document, ids = _document(batch, sequence), batch.input_ids.flatten()
    if batch.encoder_ids is not None:
        assert batch.encoder_mask is not None
        assert batch.encoder_rows is not None
        row = batch.encoder_rows[document.start // batch.input_ids.shape[1]]
        read = batch.encoder_ids[row][batch.encoder_mask[row].bool()].tolist()
        # Each token is predicted at the place before its own, and the last one is given to no decoder at all.
        assert torch.equal(ids[positions[1:]], targets[:-1])
        start = Token(int(ids[document.start]), "masked", place=document.start)
        written = [Token(token, name, trained=True) for token in targets.tolist()]
        return [Token(token, "prompt") for token in read], [start, *written]
    # The first token of a further completion of a shared prompt is predicted at that prompt's end, any other one at
    # the token before it.
    here = (positions + 1 >= document.start) & (positions + 1 < document.end)
    places = torch.where(here, positions + 1, document.start)
    assert torch.equal(ids[places], targets)
    end = document.end - 1 if batch.ends is None else int(batch.ends[sequence])
    trained = {end} if of_rewards else set(places.tolist())
    targeted, first = set(places.tolist()), int(places.min())
    before = [*range(document.prompt, document.prompt + document.shared), *range(document.start, first)]
    prompt = [Token(int(ids[place]), "prompt", place=place) for place in before]
    completion = [
        Token(int(ids[place]), name if place in targeted else "masked", place in trained, place=place)
        for place in range(first, end + 1)
    ]
    return prompt, completion


def _with_cut(
    name: str, prompt: list[Token], completion: list[Token], whole: Encoded, num_kept: int, *, keep_first: bool
) -> tuple[list[Token], list[Token]]:
    """Both with the tokens that truncation took: from the prompt's start, behind BOS, and from the completion's end."""
    num_cut = len(whole.prompt) - len(prompt)
    head = 1 if keep_first and num_cut else 0
    cut = [Token(token, "prompt", cut=True) for token in whole.prompt[head : head + num_cut]]
    rest = [Token(token, name, cut=True) for token in whole.completion[num_kept:]]
    return [*prompt[:head], *cut, *prompt[head:]], [*completion, *rest]


def _with_special(side: Side, special: frozenset[int]) -> Side:
    def marked(tokens: list[Token]) -> list[Token]:
        return [token._replace(special=token.id in special) for token in tokens]

    return Side(side.name, marked(side.prompt), marked(side.completion))
