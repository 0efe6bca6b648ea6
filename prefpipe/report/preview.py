"""Token previews for people: the same content in a terminal and as one HTML file. Model text is inert in both."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple, TextIO

from prefpipe import __version__
from prefpipe.report import text
from prefpipe.report.page import environment
from prefpipe.training.views import Side, Stretch, Token

STYLES = {
    "prompt": "36",
    "chosen": "32",
    "rejected": "31",
    "masked": "33",
    "special": "1;35",
    "trained special": "1;4;35",
    "cut": "2;9",
    "heading": "1",
    "note": "2",
}
"""Numbers of ECMA-48's "select graphic rendition"; 4 underlines, 9 strikes out, 2 is faint."""

LEGEND = {
    "prompt": "prompt",
    "chosen": "chosen completion",
    "rejected": "rejected completion",
    "masked": "behind the prompt, not trained",
    "special": "special token, underlined where trained",
    "cut": "cut away",
}
MARKS = {"masked": ("{", "}"), "cut": ("[-", "-]")}
"""What stands around such tokens where there is no colour."""


class Shown(NamedTuple):
    """One example. row: of its artifact. sides: with the text of each token. problems: what to know about it."""

    row: int
    pair_id: str
    source: str
    weight: float | None
    sides: list[tuple[Side, list[str]]]


class ShownBatch(NamedTuple):
    """One micro-batch: examples, by their number in the preview, and how their tokens are laid out."""

    batching: str
    shape: tuple[int, int]
    num_padding: int
    prompts: tuple[int, int] | None
    numbers: list[int]
    stretches: list[Stretch]


class Preview(NamedTuple):
    """What a preview shows. title: what was read; facts: the settings that shape it; notes: what it leaves out."""

    title: str
    facts: dict[str, str]
    notes: list[str]
    examples: list[Shown]
    batches: list[ShownBatch]


def token_texts(decode: Callable[[list[int]], str], ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it, "" where a character goes on in the next token.

    A token alone may decode to less (sentencepiece's leading space, half of a character), so each is decoded behind
    those that the text before it needed.
    """
    texts = []
    start = read = 0
    for place in range(len(ids)):
        before, now = decode(list(ids[start:read])), decode(list(ids[start : place + 1]))
        if now.endswith("\ufffd") and place + 1 < len(ids):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        start, read = read, place + 1
    return texts


def kind_of(token: Token) -> str:
    """How a token is coloured: what truncation took and special tokens before the token's role."""
    return "cut" if token.cut else "special" if token.special else token.role


def is_coloured(stream: TextIO, variables: Mapping[str, str] = os.environ) -> bool:
    """Whether to write colours to a stream: a terminal that has them, and no NO_COLOR (no-color.org)."""
    return stream.isatty() and not variables.get("NO_COLOR") and variables.get("TERM") != "dumb"


# ---------------------------------------------------------------------------------- terminal


def terminal(preview: Preview, *, coloured: bool) -> str:
    """The preview as lines of text; the only escape sequences in it are our own colours, and without them none."""

    def styled(style: str, words: str) -> str:
        return f"\x1b[{STYLES[style]}m{words}\x1b[0m" if coloured else words

    lines = [styled("heading", text.visible(preview.title))]
    lines += [f"{name}: {text.visible(value)}" for name, value in preview.facts.items()]
    marks = {name: "".join(MARKS[name]) if name in MARKS and not coloured else "" for name in LEGEND}
    lines.append(", ".join(f"{styled(name, marks[name] or name)} = {LEGEND[name]}" for name in _used(preview)))
    lines += [styled("note", text.visible(note)) for note in preview.notes]
    for number, example in enumerate(preview.examples, 1):
        weight = "" if example.weight is None else f", weight {text.number(example.weight)}"
        head = f"example {number}: row {example.row} of {example.source}, {example.pair_id}{weight}"
        lines += ["", styled("heading", text.visible(head))]
        for name, counts, tokens, texts in _parts(example):
            lines.append(f"{styled('heading', name)}, {counts}")
            lines.append("".join(_runs(tokens, texts, coloured=coloured, styled=styled)))
    for batch in preview.batches:
        lines += ["", styled("heading", _batch_line(batch))]
        lines += [f"  {place:<13} {what}" for place, what in _layout(batch)]
    return "\n".join(lines) + "\n"


def _runs(
    tokens: Sequence[Token], texts: Sequence[str], *, coloured: bool, styled: Callable[[str, str], str]
) -> Iterable[str]:
    for kind, run in groupby(zip(tokens, texts, strict=True), key=lambda pair: _style_of(pair[0])):
        words = "".join(_text(token, words) for token, words in run)
        before, after = ("", "") if coloured else MARKS.get(kind, ("", ""))
        # Colours end before a line does: pagers and terminals that wrap would carry them over.
        yield "\n".join(styled(kind, line) if line else "" for line in f"{before}{words}{after}".split("\n"))


def _style_of(token: Token) -> str:
    """Of a special token it shows, too, whether it is trained: an end of turn must be."""
    kind = kind_of(token)
    return "trained special" if kind == "special" and token.trained else kind


def _text(token: Token, words: str) -> str:
    """A token's text with nothing hidden in it; of half a character its id."""
    if not words:
        return f"⟨{token.id}⟩"
    return text.visible(words).replace("\t", "⇥").replace("\n", "↵\n")


# ---------------------------------------------------------------------------------- HTML


def html(preview: Preview) -> str:
    """The preview as one page: each token is a box whose tooltip says its id, its place and its role."""
    examples = [
        {
            "number": number,
            "example": example,
            "parts": [
                {"name": name, "counts": counts, "tokens": [_box(*pair) for pair in zip(tokens, texts, strict=True)]}
                for name, counts, tokens, texts in _parts(example)
            ],
        }
        for number, example in enumerate(preview.examples, 1)
    ]
    batches = [{"line": _batch_line(batch), "layout": _layout(batch)} for batch in preview.batches]
    legend = {name: LEGEND[name] for name in _used(preview)}
    template = environment().get_template("preview.html.j2")
    return template.render(preview=preview, legend=legend, examples=examples, batches=batches, version=__version__)


def _box(token: Token, words: str) -> dict[str, Any]:
    place = "cut away" if token.cut else f"place {token.place}" if token.place is not None else "encoder or target"
    trained = "trained" if token.trained else "not trained"
    return {
        "classes": f"{kind_of(token)}{' trained' if token.trained else ''}",
        "title": f"token {token.id}, {token.role}, {trained}, {place}",
        "text": _text(token, words),
    }


# ---------------------------------------------------------------------------------- both


def _used(preview: Preview) -> list[str]:
    kinds = {kind_of(token) for example in preview.examples for side, _ in example.sides for token in side.tokens}
    return [name for name in LEGEND if name in kinds]


def _parts(example: Shown) -> Iterable[tuple[str, str, Sequence[Token], Sequence[str]]]:
    """(name, counts, tokens, their texts): the prompt once, as all sides have the same, then each completion."""
    first, texts = example.sides[0]
    size = len(first.prompt)
    yield "prompt", _counts(first.prompt), first.prompt, texts[:size]
    for side, words in example.sides:
        yield side.name, _counts(side.completion), side.completion, words[len(side.prompt) :]


def _counts(tokens: Sequence[Token]) -> str:
    kept, cut = sum(not token.cut for token in tokens), sum(token.cut for token in tokens)
    trained = sum(token.trained for token in tokens)
    return f"{text.number(kept)} tokens, {text.number(trained)} trained, {text.number(cut)} cut away"


def _batch_line(batch: ShownBatch) -> str:
    rows, width = batch.shape
    encoder = f", encoder {batch.prompts[0]} × {batch.prompts[1]}" if batch.prompts else ""
    numbers = ", ".join(map(str, batch.numbers))
    return (
        f"micro-batch of examples {numbers}: {batch.batching}, {rows} × {width} tokens{encoder}, "
        f"{text.number(batch.num_padding)} of padding"
    )


def _layout(batch: ShownBatch) -> list[tuple[str, str]]:
    """One line for each document: which places it takes, what ends in it, and what it sees besides."""
    lines = []
    width = batch.shape[1]
    for stretch in batch.stretches:
        row = f"row {stretch.start // width} " if batch.shape[0] > 1 else ""
        first = stretch.start % width if batch.shape[0] > 1 else stretch.start
        place = f"{row}{first}–{first + stretch.end - stretch.start - 1}"
        what = ", ".join(f"{name} of {batch.numbers[example]}" for example, name in stretch.sides)
        seen = f"; sees the prompt at {stretch.sees[0]}–{stretch.sees[1] - 1}" if stretch.sees else ""
        has_prompt = "" if stretch.sees or batch.prompts else "prompt, "
        lines.append((place, f"{has_prompt}{what}{seen}"))
    return lines
