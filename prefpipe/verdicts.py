"""Verdicts in a judge's text: strict, so that an unclear one is a status and never a number.

A verdict stands in double brackets, as in MT-Bench (Zheng et al. 2023, arXiv:2306.05685). It may be repeated; two
different ones leave nobody knowing which was meant, and the last word is not always the judge's conclusion.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

BRACKETS = re.compile(r"\[\[([^\[\]]*)\]\]")
NUMBER = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")


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


def _words(text: str) -> list[str]:
    """What stands in double brackets, after the judge's thoughts where the server leaves those in the text."""
    return [word.strip() for word in BRACKETS.findall(text.rpartition("</think>")[2])]


def _numbers(word: str) -> str:
    """7 and 7.0 are one verdict."""
    return f"{float(word):g}" if NUMBER.fullmatch(word) else word


def _only(words: Iterable[str]) -> str | Unclear:
    different = set(words)
    if len(different) > 1:
        return Unclear("two_verdicts")
    return different.pop() if different else Unclear("no_verdict")
