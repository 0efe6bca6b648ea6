"""Results of arithmetic annotations while a text is being written: after `<<48/2=` the tokens of `24>>` must come.

As DPO-ST decodes GSM8K (arXiv:2407.18248), in no engine's terms: token ids in, the next forced id out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from prefpipe.calculator import ExpressionError, evaluate, written
from prefpipe.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Marks(NamedTuple):
    """What an annotation stands between."""

    opening: str
    closing: str


MARKS = (Marks("<<", ">>"), Marks("[", "]"))
"""GSM8K's <<48/2=24>>, and [ 48 / 2 = 24] as DPO-ST writes it for T5, whose vocabulary has no "<"."""

FREE = -1
"""No token: the model chooses."""

ANCHORS = ("=", " =", "(", "\n")
"""Texts that the result's tokens are looked up behind; one of them does not merge with its first character."""


class Annotations:
    """The annotations of one tokenizer; the marks are the first of MARKS that it can write.

    Raises ConfigError for a tokenizer that can write none of them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.marks = self._marks()
        self.anchors = [(anchor, self._ids(anchor)) for anchor in ANCHORS]
        opening, closing = (re.escape(mark[0]) for mark in (self.marks.opening, self.marks.closing))
        self.pattern = re.compile(
            rf"{re.escape(self.marks.opening)}([^{opening}{closing}=]*)=([^{opening}{closing}=]*)$"
        )
        self.opens, self.equals = self._ids_with(self.marks.opening[0]), self._ids_with("=")
        self.seen = self.opens | self.equals

    def result(self, ids: Sequence[int]) -> list[int] | None:
        """The ids that must follow, up to the closing mark, when the text ends in an annotation's "="; else None.

        ids: from the token with the opening mark (or a few before) to the one with "=", which may hold the start of
            the result too: what it holds stays, if it is right. A space before "=" asks for one behind it.

        Raises:
            ExpressionError: by `evaluate` and `written`; fused_token, when the token with "=" goes on with something
                else than the result; no_tokens, when the tokenizer cannot write the result in this place.
        """
        found = self.pattern.search(self._text(ids))
        if found is None:
            return None
        expression, begun = found.groups()
        result = written(evaluate(expression))
        begun = begun.lstrip(" $€£¥")
        if not result.startswith(begun):
            raise ExpressionError("fused_token", f"{found.group()!r} goes on with another result than {result}")
        space = " " if found.group().endswith(" =") else ""
        return self._encode(ids[-1], space + result[len(begun) :] + self.marks.closing)

    def _encode(self, last: int, text: str) -> list[int]:
        """Ids that continue a text whose last token is `last` by exactly `text`, as the tokenizer itself splits it."""
        for pieces in ([text], re.findall(" ?.", text)):
            ids = [token for piece in pieces for token in self._behind_an_anchor(piece)]
            if self._text([last, *ids]) == self._text([last]) + text:
                return ids
        raise ExpressionError("no_tokens", f"the tokenizer cannot write {text!r} behind {self._text([last])!r}")

    def _behind_an_anchor(self, text: str) -> list[int]:
        """Ids of a text inside of another; alone, it could get the space that many tokenizers put before a text."""
        for anchor, start in self.anchors:
            whole = self._ids(anchor + text)
            if whole[: len(start)] == start:
                return whole[len(start) :]
        return self._ids(text)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _text(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _marks(self) -> Marks:
        for marks in MARKS:
            example = f"1{marks.opening}1+2=3{marks.closing}"
            if self._text(self._ids(example)).strip() == example:
                return marks
        raise ConfigError(
            "generator.calculator=true, but the model's tokenizer can write neither <<1+2=3>> nor [1+2=3]; "
            "set generator.calculator=false"
        )

    def _ids_with(self, character: str) -> frozenset[int]:
        """Tokens that hold an ASCII character. Vocabularies spell these as they are, or as a byte like <0x3D>."""
        byte = f"<0x{ord(character):02X}>"
        return frozenset(i for token, i in self.tokenizer.get_vocab().items() if character in token or token == byte)


class Writer:
    """One completion as it is being written.

    ids: its tokens so far. forced: [start, end) places of tokens in it that were not free. refused: the codes of the
        annotations whose result the model had to write itself.
    """

    def __init__(self, annotations: Annotations) -> None:
        self.annotations = annotations
        self.ids: list[int] = []
        self.forced: list[list[int]] = []
        self.refused: list[str] = []
        self._opened: int | None = None  # place of the last token that may open an annotation
        self._pending: list[int] = []  # last one first

    def push(self, token: int) -> int:
        """Take the token that was written; returns the one that must come next, or FREE."""
        self.ids.append(token)
        if token in self.annotations.seen and not self._pending:
            self._look(token)
        return self._pending.pop() if self._pending else FREE

    def meta(self, num_tokens: int) -> dict[str, Any]:
        """What a record keeps of it, for its first num_tokens tokens."""
        spans = [[start, min(end, num_tokens)] for start, end in self.forced if start < num_tokens]
        return {"forced": spans, "refused": self.refused}

    def _look(self, token: int) -> None:
        """Every token is decoded once at most: what is not the annotation's result ends the search for it."""
        opens = token in self.annotations.opens
        if token in self.annotations.equals and (opens or self._opened is not None):
            start = len(self.ids) - 1 if self._opened is None else self._opened
            self._opened = None
            try:
                # One before, for an opening mark of two tokens.
                result = self.annotations.result(self.ids[max(start - 1, 0) :])
            except ExpressionError as error:
                self.refused.append(error.code)
                return
            if result is not None:
                self.forced.append([len(self.ids), len(self.ids) + len(result)])
                self._pending = result[::-1]
                return
        if opens:
            self._opened = len(self.ids) - 1
