"""What can be wrong with a row. Every bad row has one code, and a message with the key, the value and the remedy."""

import difflib
from collections.abc import Iterable

CODES = {
    "ENC": "not UTF-8",
    "JSN": "not JSON (or not CSV)",
    "BIG": "longer than 16 MiB",
    "KEY": "a key is missing or misspelt",
    "TYP": "a value has another type than its key asks for",
    "EMP": "a text is empty or blank, or a list has no turns",
    "CTL": "a text holds NUL or half a surrogate pair, which most tokenizers cannot take",
    "ROL": "an unknown role, or turns in an order that no chat template renders",
    "PFX": "chosen and rejected answer different prompts",
    "EQL": "chosen and rejected are the same text",
    "NAN": "a number is NaN or infinite",
    "CIT": "no document of numbered sentences, where one is to be shortened to what is cited",
    "DUP": "the same row came before, in this source or in another",
    "SIM": "its prompt is nearly the same as one that stays (data_mixer.near_duplicates)",
    "LEK": "its prompt is in an evaluation set (data_mixer.decontaminate)",
}

NOT_BAD = ("DUP", "SIM", "LEK")
"""Left out, but no fault of the row: these say nothing about a file's health."""


class BadRow(Exception):  # noqa: N818 (it is a value as well: a row's data, or what is wrong with it)
    """A row that cannot be used. Raised by the reader and by adapters, caught once where rows are read."""

    def __init__(self, code: str, message: str) -> None:
        assert code in CODES, code
        super().__init__(message)
        self.code, self.message = code, message


def missing_key(key: str, present: Iterable[str]) -> BadRow:
    """KEY, with the key that was probably meant."""
    keys = [str(name) for name in present]
    near = difflib.get_close_matches(key, keys, n=1)
    hint = f"; did you mean {near[0]!r}? Then set columns={{{key}: {near[0]}}}" if near else f"; it has {_some(keys)}"
    return BadRow("KEY", f"no key {key!r}{hint}")


def _some(keys: list[str]) -> str:
    """The keys of a row for a message: quoted, and not more than a line of them."""
    shown = ", ".join(repr(key[:40]) for key in keys[:12])
    return (shown + (", …" if len(keys) > 12 else "")) or "no keys at all"
