"""Verdicts in a judge's text: strict, so that an unclear one is a status and never a number.

A verdict stands in double brackets, as in MT-Bench (Zheng et al. 2023, arXiv:2306.05685). It may be repeated; two
different ones leave nobody knowing which was meant, and the last word is not always the judge's conclusion.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

BRACKETS = re.compile(r"\[\[([^\[\]]*)\]\]")
NUMBER = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")
ITEM = re.compile(r"(?:[-*•]|[0-9]{1,4}[.)])\s+(\S.*)")


class Unclear(NamedTuple):
    """reason: "no_verdict", "two_verdicts", or "bad_verdict" (out of range, or not in the grammar)."""

    reason: str


def rating(text: str, low: float, high: float) -> float | Unclear:
    """`[[7]]` or `[[7.5]]`, from low to high."""
    found = _only(_numbers(word) for word in _words(text))
    if isinstance(found, Unclear):
        return found
    value = float(found) if NUMBER.fullmatch(found) else float("nan")
    return value if low <= value <= high else Unclear("bad_verdict")


def choice(text: str, allowed: str = "ABC") -> str | Unclear:
    """`[[A]]`, one of the allowed letters."""
    found = _only(word.upper() for word in _words(text))
    if isinstance(found, Unclear):
        return found
    return found if len(found) == 1 and found in allowed else Unclear("bad_verdict")


def ratings(text: str, count: int, low: float, high: float) -> list[float | Unclear]:
    """`[[1: 7]] [[2: 4.5]]`: one rating for each of the numbers 1 to count. Any other verdict spoils all of them."""
    given: list[list[str]] = [[] for _ in range(count)]
    for word in _words(text):
        label, _, value = word.partition(":")
        if not (re.fullmatch(r"[0-9]{1,4}", label.strip()) and 1 <= int(label) <= count):
            return [Unclear("bad_verdict")] * count
        given[int(label) - 1].append(value.strip())
    return [rating("".join(f"[[{value}]]" for value in values), low, high) for values in given]


def numbers(text: str, count: int) -> list[int] | Unclear:
    """`[[2]]` or `[[1, 4]]`, some of the numbers 1 to count, read in ascending order; `[[none]]` is the empty list."""
    found = _only(_number_list(word) for word in _words(text))
    if isinstance(found, Unclear):
        return found
    if found == "none":
        return []
    if not re.fullmatch(r"[0-9]{1,4}(,[0-9]{1,4})*", found):
        return Unclear("bad_verdict")
    places = [int(number) for number in found.split(",")]
    return places if places[0] >= 1 and places[-1] <= count else Unclear("bad_verdict")


def items(text: str) -> list[str] | Unclear:
    """The different items of a list, one a line behind `- `, `* ` or `1. `; or `[[none]]`, which is the empty list.

    Before the list there may be other lines, in it and behind it there are none.
    """
    lines = [line.strip() for line in _answer(text).splitlines() if line.strip()]
    matches = [ITEM.fullmatch(line) for line in lines]
    first = next((place for place, match in enumerate(matches) if match), len(lines))
    found = [match[1] for match in matches[first:] if match]
    none = any(word.casefold() == "none" for word in _words(text))
    if found and none:
        return Unclear("two_verdicts")
    if len(found) < len(lines) - first:
        return Unclear("bad_verdict")
    return list(dict.fromkeys(found)) if found or none else Unclear("no_verdict")


def _number_list(word: str) -> str:
    """1,4 and 4, 1 are one verdict."""
    if word.casefold() == "none":
        return "none"
    parts = [part.strip() for part in word.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,4}", part) for part in parts):
        return word
    return ",".join(map(str, sorted({int(part) for part in parts})))


def _words(text: str) -> list[str]:
    """What stands in double brackets, after the judge's thoughts where the server leaves those in the text."""
    return [word.strip() for word in BRACKETS.findall(_answer(text))]


def _answer(text: str) -> str:
    return text.rpartition("</think>")[2]


def _numbers(word: str) -> str:
    """7 and 7.0 are one verdict."""
    return f"{float(word):g}" if NUMBER.fullmatch(word) else word


def _only(words: Iterable[str]) -> str | Unclear:
    different = set(words)
    if len(different) > 1:
        return Unclear("two_verdicts")
    return different.pop() if different else Unclear("no_verdict")
