"""Completions from a file instead of a model: API dumps, another tool's samples, tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar

import orjson

from prefpipe.components import register
from prefpipe.errors import ConfigError, DataError
from prefpipe.generators import Generator, Skipped, written
from prefpipe.records import Completion, Prompt, prompt_id
from prefpipe.settings import HardwareConfig, ModelConfig


@register("generator")
@dataclass
class Replay(Generator):
    """Texts that were written elsewhere.

    path: a JSONL file; a row names its prompt by `prompt_id`, by `messages`, or by `prompt` (one user turn), and holds
        `text` or a list `texts`. Rows of one prompt add up; at most num_samples are taken, in file order.
    """

    name: str = "replay"
    path: str | None = None
    samples_policy: ClassVar[bool] = False

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        model: ModelConfig,
        folder: Path,
        hardware: HardwareConfig,
        seed: int,
        round_: int,
    ) -> Iterator[Completion | Skipped]:
        if self.path is None:
            raise ConfigError("generator=replay needs generator.path, a JSONL file of completions")
        offsets = _index(Path(self.path))
        with Path(self.path).open("rb") as file:
            for prompt in prompts:
                texts = self._texts(file, offsets.get(prompt.prompt_id, []))
                if not texts:
                    yield Skipped(prompt.prompt_id, "no_completion")
                for sample, text in enumerate(texts):
                    yield written(prompt, text, sample=sample, round_=round_)

    def _texts(self, file: BinaryIO, offsets: list[int]) -> list[str]:
        texts: list[str] = []
        for offset in offsets:
            file.seek(offset)
            row = orjson.loads(file.readline())
            texts += row["texts"] if "texts" in row else [row["text"]]
        return texts[: self.num_samples]


def _index(path: Path) -> dict[str, list[int]]:
    """prompt_id → byte offsets of its rows: about 100 bytes a row, however long the texts are."""
    offsets: dict[str, list[int]] = {}
    position = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                offsets.setdefault(_prompt_id(line, path, number), []).append(position)
                position += len(line)
    except FileNotFoundError:
        raise ConfigError(f"generator.path={path}: no such file") from None
    return offsets


def _prompt_id(line: bytes, path: Path, number: int) -> str:
    """Which prompt a row answers. Raises DataError, with file:line, for a row that cannot be used."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise DataError(f"{path}:{number} is not JSON: {error}") from None
    texts = row.get("texts", [row.get("text")]) if isinstance(row, dict) else None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{path}:{number} needs `text`, a string, or `texts`, a list of strings")
    if isinstance(row.get("prompt_id"), str):
        return str(row["prompt_id"])
    if isinstance(row.get("messages"), list):
        return prompt_id(row["messages"])
    if isinstance(row.get("prompt"), str):
        return prompt_id([{"role": "user", "content": row["prompt"]}])
    raise DataError(f"{path}:{number} names no prompt; add `prompt_id`, `messages` or `prompt`")
