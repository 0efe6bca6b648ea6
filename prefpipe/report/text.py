"""Text for people: nothing invisible, nothing secret, numbers of one shape everywhere."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

# Controls (but tab and newline), bidi overrides, zero-width and other characters that render as nothing, and lone
# surrogates. U+FE0E and U+FE0F stay: they choose between the text and the emoji form of the character before them.
HIDDEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u070f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    r"\u2060-\u206f\u2800\u3164\ud800-\udfff\ufe00-\ufe0d\ufeff\uffa0\ufff0-\ufffb"
    r"\U00013430-\U0001345f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
SECRET = re.compile(r"((?:[\w.]*(?:token|secret|password|passwd|api_?key|credential)\w*)=)(\S+)", re.IGNORECASE)
URL_LOGIN = re.compile(r"(\w+://)[^/\s@]+@")
COUNTS_OF_TOKENS = re.compile(r"tokens\w*=$|_env=$", re.IGNORECASE)


def mark(match: re.Match[str]) -> str:
    """The visible stand-in of one hidden character: its code point in white square brackets."""
    return f"\u27e6U+{ord(match.group()):04X}\u27e7"


def visible(text: str) -> str:
    """The text with every hidden character replaced by its mark; what is left can neither reorder nor hide anything."""
    return HIDDEN.sub(mark, text)


def pieces(text: str) -> Iterator[tuple[bool, str]]:
    """The visible text in pieces: (whether this piece is a mark, the piece)."""
    start = 0
    for match in HIDDEN.finditer(text):
        if match.start() > start:
            yield False, text[start : match.start()]
        yield True, mark(match)
        start = match.end()
    if start < len(text):
        yield False, text[start:]


def redact(text: str) -> str:
    """A command line without the values of keys that sound secret and without the logins in URLs."""

    def hide(match: re.Match[str]) -> str:
        return match.group() if COUNTS_OF_TOKENS.search(match.group(1)) else f"{match.group(1)}[hidden]"

    return URL_LOGIN.sub(r"\1[hidden]@", SECRET.sub(hide, text))


def number(value: float | None, *, sign: bool = False) -> str:
    """Four significant digits, or a dash for no number."""
    if value is None or not math.isfinite(value):
        return "\u2013"
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{int(value):+,}" if sign else f"{int(value):,}"
    size = abs(value)
    digits = f"{value:{'+' if sign else ''}.4g}" if size < 1000 else f"{value:{'+' if sign else ''},.1f}"
    return digits


def fixed(value: float | None, *, sign: bool = False) -> str:
    """Three decimals for values of the size of a proportion, so that a column lines up; else as `number`."""
    if value is None or not math.isfinite(value):
        return "\u2013"
    return f"{value:{'+' if sign else ''}.3f}" if abs(value) < 10 else number(value, sign=sign)


def percent(share: float | None) -> str:
    """A share as per cent, one decimal."""
    return "\u2013" if share is None else f"{100 * share:.1f} %"


def duration(seconds: float | None) -> str:
    """Seconds as a person would say it."""
    if seconds is None:
        return "\u2013"
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def outline(data: Any, indent: int = 0) -> str:
    """Plain data as indented `key: value` lines, for reading, not for parsing back."""
    pad = "  " * indent
    if isinstance(data, Mapping):
        return "".join(_entry(f"{pad}{key}:", data[key], indent) for key in data)
    if isinstance(data, list):
        return "".join(_entry(f"{pad}-", item, indent) for item in data)
    return f"{pad}{_scalar(data)}\n"


def _entry(head: str, value: Any, indent: int) -> str:
    if isinstance(value, Mapping | list) and value:
        return f"{head}\n{outline(value, indent + 1)}"
    return f"{head} {_scalar(value)}\n"


def _scalar(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return {"{}": "{}", "[]": "[]"}.get(str(value), redact(str(value)))
