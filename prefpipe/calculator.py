"""Arithmetic as GSM8K's annotations `<<48/2=24>>` write it: exact fractions, a bounded parser, never `eval`.

A text may come from a model, so every expression is either worked out within fixed bounds or refused with a code.
"""

import re
from fractions import Fraction

from prefpipe.errors import DataError

MAX_CHARACTERS, MAX_DEPTH, MAX_DIGITS = 256, 32, 32
"""Of an expression, its parentheses in each other, a number in it and the result. GSM8K's longest: 30, 2, 10 and 10."""

EXACT_DECIMALS = 4
NUMBER = r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])(?:\.[0-9]+)?|[0-9]+\.?[0-9]*|\.[0-9]+"
TOKEN = re.compile(rf" *(?:[$€£¥]? ?(?P<number>{NUMBER}) ?(?P<percent>%?)|(?P<sign>[-+*/()])) *")


class ExpressionError(DataError):
    """An expression that is refused. `code` is counted: too_long, too_deep, syntax, division_by_zero or too_large."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def evaluate(expression: str) -> Fraction:
    """The exact value of an expression of numbers, + - * /, parentheses and signs in front (-5), as in arithmetic.

    A number may have a point, thousands separators (1,200), a currency sign before it ($5) and a percent sign behind
    it (20% is 0.2). Of GSM8K's 27,998 human annotations 27,996 evaluate to exactly the annotated result; the other two
    write //. Time is linear in the length, which is bounded.

    Raises:
        ExpressionError: for anything else, such as names, powers and //, for a division by zero, and beyond the bounds.
    """
    if len(expression) > MAX_CHARACTERS:
        raise ExpressionError("too_long", f"the expression has {len(expression)} characters; at most {MAX_CHARACTERS}")
    parser = _Parser(expression)
    value = parser.sum(depth=0)
    if parser.next is not None:
        raise parser.unexpected()
    return value


def written(value: Fraction) -> str:
    """A value as GSM8K writes results: 24, 3.5, -0.125; without separators, units and trailing zeros.

    Exact where 4 decimals are enough (the human annotations need at most 3); otherwise rounded half up to 2 decimals,
    as DPO-ST does (10/3 is 3.33), or to 2 significant digits where 2 decimals would leave less (1/300 is 0.0033).

    Raises:
        ExpressionError: too_large, for a result of more than 32 digits.
    """
    decimals = EXACT_DECIMALS
    if (value * 10**decimals).denominator != 1:
        decimals = 2
        while abs(value) * 10**decimals < 10 and decimals < MAX_DIGITS:
            decimals += 1
    scaled = (abs(value) * 10**decimals + Fraction(1, 2)).__floor__()
    digits = str(scaled).rjust(decimals + 1, "0")
    if len(digits) - decimals > MAX_DIGITS or decimals == MAX_DIGITS:
        raise ExpressionError("too_large", f"the result has more than {MAX_DIGITS} digits")
    text = f"{digits[:-decimals]}.{digits[-decimals:]}".rstrip("0").rstrip(".")
    return f"-{text}" if value < 0 else text


class _Parser:
    """Recursive descent; every level of recursion costs a parenthesis, and those are bounded."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.next: re.Match[str] | None = None
        self.advance()

    def advance(self) -> None:
        """Read one token into `next`, which is None at the end."""
        if self.position == len(self.text):
            self.next = None
            return
        self.next = TOKEN.match(self.text, self.position)
        if self.next is None:
            raise self.unexpected()
        self.position = self.next.end()

    def sign(self) -> str | None:
        return self.next["sign"] if self.next is not None else None

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while (sign := self.sign()) in ("+", "-"):
            self.advance()
            term = self.product(depth)
            value = value + term if sign == "+" else value - term
        return value

    def product(self, depth: int) -> Fraction:
        value = self.factor(depth)
        while (sign := self.sign()) in ("*", "/"):
            self.advance()
            factor = self.factor(depth)
            if sign == "/" and factor == 0:
                raise ExpressionError("division_by_zero", f"{self.text!r} divides by zero")
            value = value * factor if sign == "*" else value / factor
        return value

    def factor(self, depth: int) -> Fraction:
        negative = False
        while (sign := self.sign()) in ("+", "-"):
            negative ^= sign == "-"
            self.advance()
        value = self.group(depth) if self.sign() == "(" else self.number()
        return -value if negative else value

    def group(self, depth: int) -> Fraction:
        if depth == MAX_DEPTH:
            raise ExpressionError("too_deep", f"more than {MAX_DEPTH} parentheses in each other")
        self.advance()
        value = self.sum(depth + 1)
        if self.sign() != ")":
            raise self.unexpected()
        self.advance()
        return value

    def number(self) -> Fraction:
        if self.next is None or self.next["number"] is None:
            raise self.unexpected()
        digits = self.next["number"].replace(",", "")
        if len(digits) > MAX_DIGITS:
            raise ExpressionError("too_large", f"a number of {len(digits)} characters; at most {MAX_DIGITS}")
        whole, _, decimals = digits.partition(".")
        value = Fraction(int(whole + decimals), 10 ** len(decimals))
        if self.next["percent"]:
            value /= 100
        self.advance()
        return value

    def unexpected(self) -> ExpressionError:
        at = self.next.start() if self.next is not None else self.position
        found = repr(self.text[at : at + 10]) if at < len(self.text) else "the end"
        return ExpressionError("syntax", f"{self.text!r} has {found} where arithmetic does not")
