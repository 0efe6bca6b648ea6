"""Values of a row, checked one at a time: what cannot be used raises BadRow with the key, the value and the rule."""

import math
from collections.abc import Mapping

from prefpipe.sources.codes import BadRow, missing_key

Row = Mapping[str, object]


def need(row: Row, key: str) -> object:
    """The value of a key that must be there."""
    if key not in row:
        raise missing_key(key, row)
    return row[key]


def present(row: Row, key: str) -> bool:
    """Whether an optional key holds anything: data sets write "" and null for nothing."""
    value = row.get(key)
    return value is not None and value != ""


def text(value: object, name: str) -> str:
    """A text that says something, white space kept."""
    if not isinstance(value, str):
        raise wrong_type(name, value, "a text")
    if not value.strip():
        raise BadRow("EMP", f"{name} is {'empty' if not value else 'blank'}")
    if "\x00" in value:
        raise BadRow("CTL", f"{name} holds a NUL character")
    return value


def number(value: object, name: str) -> float:
    """A finite number; CSV cells and some exports hold it as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise wrong_type(name, value, "a number")
    try:
        found = float(value)
    except (ValueError, OverflowError):
        raise wrong_type(name, value, "a number") from None
    if not math.isfinite(found):
        raise BadRow("NAN", f"{name} is {found}")
    return found


def flag(value: object, name: str) -> bool:
    """True or false, also as 1 or 0, and as the words that CSV holds."""
    words = {"true": True, "1": True, "false": False, "0": False}
    found = words.get(value.strip().lower()) if isinstance(value, str) else None
    if found is None and isinstance(value, int) and value in (0, 1):
        found = bool(value)
    if found is None:
        raise wrong_type(name, value, "true or false")
    return found


def as_list(value: object) -> list[object]:
    """A list as it is, anything else as a list of one."""
    return value if isinstance(value, list) else [value]


def wrong_type(name: str, value: object, wanted: str) -> BadRow:
    """TYP, with what was found."""
    shown = "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
    return BadRow("TYP", f"{name} is {shown}, it must be {wanted}")
