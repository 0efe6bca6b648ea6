"""One artifact as a page to browse: rows as inert JSON, written as they are read, and one small script that shows them.

No text of a row becomes markup: hidden characters are replaced by marks, JSON's `<` is spelt \\u003c so that no tag can
end the block that holds it, the page's policy allows but the script of this hash, and that one sets text alone.
"""

import base64
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson

from prefpipe import __version__
from prefpipe.errors import ConfigError
from prefpipe.records import Completion, Demonstration, Message, Pair, Prompt, ScoredCompletion
from prefpipe.report import text
from prefpipe.report.page import environment
from prefpipe.settings import BrowseConfig

Row = Prompt | Pair | Demonstration
BLOCK = 200
"""Items in one block of JSON, which the page parses when one of them is shown or searched."""


class Item(NamedTuple):
    """What stands in one card.

    row: of the artifact; None for completions of a prompt. numbers: to filter and sort by; None where there is none.
    """

    row: int | None
    prompt: "Row | Completion"
    completions: list[dict[str, Any]]
    more: dict[str, Any]
    numbers: dict[str, float | None]


class Cutter:
    """Cuts texts to a number of characters, and counts the texts that it cut."""

    def __init__(self, max_characters: int) -> None:
        self.max_characters = max_characters
        self.num_cut = 0

    def __call__(self, whole: str, limit: int | None = None) -> tuple[str, int]:
        """(the visible beginning of a text, how many characters are missing)."""
        limit = self.max_characters if limit is None else limit
        missing = max(0, len(whole) - limit)
        self.num_cut += missing > 0
        return text.visible(whole[:limit]), missing

    def messages(self, messages: Sequence[Message]) -> list[tuple[str, tuple[str, int]]]:
        """A conversation: each turn cut, and earlier turns more than later ones when there are many."""
        made, room = [], 4 * self.max_characters
        for message in reversed(messages):
            shown = self(message["content"], min(self.max_characters, room))
            room -= len(message["content"]) - shown[1]
            made.append((text.visible(message["role"]), shown))
        return made[::-1]


def items(rows: Iterable[tuple[int, Row]], cut: Cutter) -> Iterator[Item]:
    """One for each pair, demonstration or prompt, given with its number in the artifact."""
    for number, row in rows:
        if isinstance(row, Pair):
            sides = [_completion("chosen", row.chosen, _score(row.chosen_score), cut)]
            sides.append(_completion("rejected", row.rejected, _score(row.rejected_score), cut))
            known = row.chosen_score is not None and row.rejected_score is not None
            numbers = {
                "margin": row.chosen_score - row.rejected_score if known else None,  # type: ignore[operator]
                "chosen score": row.chosen_score,
                "rejected score": row.rejected_score,
                "chosen characters": len(row.chosen),
                "rejected characters": len(row.rejected),
                "chosen minus rejected, characters": len(row.chosen) - len(row.rejected),
            }
            yield Item(number, row, sides, {"meta": row.meta}, numbers)
        elif isinstance(row, Demonstration):
            sides = [_completion("demonstration", row.text, _score(row.score), cut)]
            numbers = {"score": row.score, "characters": len(row.text)}
            yield Item(number, row, sides, {"answer": row.answer, "meta": row.meta}, numbers)
        else:
            yield Item(number, row, [], {"answer": row.answer, "meta": row.meta}, {})


def group_items(groups: Iterable[Sequence[Completion]], cut: Cutter) -> Iterator[Item]:
    """One for each prompt with its completions; numbers are the highest, lowest and spread of each score."""
    for group in groups:
        scores: dict[str, list[float]] = {}
        sides = []
        for index, completion in enumerate(group, 1):
            own = completion.scores if isinstance(completion, ScoredCompletion) else {}
            for name, value in own.items():
                scores.setdefault(name, []).append(value)
            facts = [f"{name} {text.number(value)}" for name, value in own.items()]
            facts += [] if completion.logp is None else [f"log p {text.number(completion.logp)}"]
            facts.append(completion.finish_reason)
            sides.append(_completion(f"{index} of {len(group)}", completion.text, ", ".join(facts), cut))
        numbers: dict[str, float | None] = {}
        for name, values in scores.items():
            numbers |= {f"{name}, highest": max(values), f"{name}, lowest": min(values)}
            numbers[f"{name}, spread"] = max(values) - min(values)
        longest = max(len(completion.text) for completion in group)
        numbers |= {"completions": len(group), "longest, characters": longest}
        yield Item(None, group[0], sides, {"answer": group[0].answer, "meta": group[0].meta}, numbers)


class Source(NamedTuple):
    """The artifact of a page. kind: "pair" has two sides. unit: what a card holds. notes: what the page leaves out."""

    title: str
    path: Path
    schema: str
    digest: str
    kind: str
    unit: str
    notes: list[str]


def write_page(out: BinaryIO, source: Source, found: Iterable[Item], cut: Cutter, settings: BrowseConfig) -> int:
    """Write the page while the items come, a block in memory; returns how many. Raises ConfigError at max_megabytes."""
    script = (Path(__file__).parent / "browser.js").read_text(encoding="utf-8")
    page = environment().get_template("browser.html.j2")
    named = {name: getattr(source, name) for name in ("title", "schema", "digest")}
    head, tail = page.render(**named, path=str(source.path), version=__version__, script_hash=_hash_of(script)).split(
        "\nROWS\n"
    )
    limit = settings.max_megabytes * 1_000_000
    index: list[tuple[int, int, list[float | None]]] = []
    sources, splits, columns = dict[str, int](), dict[str, int](), dict[str, int]()
    block: list[dict[str, Any]] = []
    written = out.write(head.encode() + b"\n")

    def flush() -> int:
        return out.write(b'<script type="application/json" class="rows">' + inert(block) + b"</script>\n")

    for item in found:
        shown = _shown(item, cut)
        block.append(shown)
        places = [names.setdefault(shown[key], len(names)) for names, key in ((sources, "source"), (splits, "split"))]
        for name in item.numbers:
            columns.setdefault(text.visible(name), len(columns))
        by_name = {text.visible(name): value for name, value in item.numbers.items()}
        index.append((places[0], places[1], [by_name.get(name) for name in columns]))
        if len(block) == BLOCK:
            written += flush()
            block = []
            if written > limit:
                raise ConfigError(
                    f"browse.max_megabytes={settings.max_megabytes}: {source.path} gives a larger page, as its first "
                    f"{len(index)} {source.unit} fill it; lower browse.max_characters={settings.max_characters} or "
                    f"browse.max_rows={settings.max_rows}, or raise it"
                )
    if block:
        flush()
    notes = list(source.notes)
    if cut.num_cut:
        notes.append(
            f"{cut.num_cut:,} texts are cut to browse.max_characters={settings.max_characters} characters or less; "
            f"searching sees what is shown."
        )
    data = {
        "kind": source.kind,
        "unit": source.unit,
        "notes": [text.visible(note) for note in notes],
        "sources": list(sources),
        "splits": list(splits),
        "columns": list(columns),
        "items": index,
    }
    out.write(
        f'<script type="application/json" id="index" data-size="{BLOCK}">'.encode() + inert(data) + b"</script>\n"
    )
    out.write(f"<script>{script}</script>\n{tail}".encode())
    return len(index)


def inert(data: Any) -> bytes:
    """JSON that no HTML parser sees a tag or a comment in."""
    return orjson.dumps(data).replace(b"<", b"\\u003c")


def _shown(item: Item, cut: Cutter) -> dict[str, Any]:
    row = item.prompt
    more = [(name, cut(_plain(value))) for name, value in item.more.items() if value not in (None, {}, "")]
    return {
        "id": text.visible(row.prompt_id),
        "row": item.row,
        "source": text.visible(row.source),
        "split": text.visible(str(row.split)),
        "messages": cut.messages(row.messages),
        "completions": item.completions,
        "more": more,
    }


def _completion(label: str, whole: str, facts: str, cut: Cutter) -> dict[str, Any]:
    size = f"{text.number(len(whole))} characters"
    return {"label": label, "facts": text.visible(f"{facts}, {size}" if facts else size), "text": cut(whole)}


def _score(value: float | None) -> str:
    return "" if value is None else f"score {text.number(value)}"


def _plain(value: Any) -> str:
    return text.outline(value) if isinstance(value, Mapping | list) else str(value)


def _hash_of(script: str) -> str:
    """As a Content-Security-Policy names an inline script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
