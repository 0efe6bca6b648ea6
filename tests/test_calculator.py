"""Arithmetic of annotations: against trees that know their value, GSM8K's annotators, and texts that want to harm."""

import gzip
import json
import random
import re
import time
from collections import Counter
from decimal import ROUND_HALF_UP, Decimal, localcontext
from fractions import Fraction

import pytest

from prefpipe.calculator import ExpressionError, evaluate, written

PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}


def number(rng: random.Random) -> tuple[str, Fraction]:
    """A number in one of the spellings that are understood, and its value."""
    whole, digits = rng.randint(0, 10 ** rng.randint(1, 6)), rng.randint(1, 3)
    decimals = rng.randint(0, 10**digits - 1)
    part = Fraction(decimals, 10**digits)
    return rng.choice(
        [
            (str(whole), Fraction(whole)),
            (f"{whole}.{decimals:0{digits}}", whole + part),
            (f".{decimals:0{digits}}", part),
            (f"{whole}.", Fraction(whole)),
            (f"{whole:,}", Fraction(whole)),
            (f"{whole:,}.{decimals:0{digits}}", whole + part),
            (f"${whole}", Fraction(whole)),
            (f"{whole}%", Fraction(whole, 100)),
            (f"{whole}.{decimals:0{digits}} %", (whole + part) / 100),
        ]
    )


def tree(rng: random.Random, leaves: int) -> tuple[str, Fraction | None, int]:
    """(text, value, precedence of its outermost operator); the value is worked out here, None where it divides by 0."""
    if leaves == 1:
        text, value = number(rng)
        return (text, value, 3) if rng.random() < 0.9 else (f"-{text}", -value, 3)
    operator, split = rng.choice("+-*/"), rng.randint(1, leaves - 1)
    left, a, left_precedence = tree(rng, split)
    right, b, right_precedence = tree(rng, leaves - split)
    own = PRECEDENCE[operator]
    if left_precedence < own or rng.random() < 0.1:
        left = f"({left})"
    if right_precedence <= own or rng.random() < 0.1:
        right = f"({right})"
    space = " " if rng.random() < 0.3 else ""
    text = f"{left}{space}{operator}{space}{right}"
    if a is None or b is None or (operator == "/" and b == 0):
        return text, None, own
    value = a + b if operator == "+" else a - b if operator == "-" else a * b if operator == "*" else a / b
    if rng.random() < 0.05:
        return f"-({text})", -value, 3
    return text, value, own


def test_100_000_expressions_have_the_values_of_their_trees():
    rng, refused = random.Random(0), 0
    for _ in range(100_000):
        text, value, _ = tree(rng, rng.randint(1, 7))
        if value is None:
            refused += 1
            with pytest.raises(ExpressionError, match="divides by zero"):
                evaluate(text)
        else:
            assert evaluate(text) == value, text
    assert 500 < refused < 20_000


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("15+7", "22"),
        ("7/2", "3.5"),
        ("10/3", "3.33"),
        ("20/3", "6.67"),
        ("-10/3", "-3.33"),
        ("2-5", "-3"),
        ("1/8", "0.125"),
        ("1/300", "0.0033"),
        ("10/3*3", "10"),
        ("2.99999", "3"),
        ("5*1.20", "6"),
        ("1,200*3", "3600"),
        ("$50*20%", "10"),
        ("+3+4", "7"),
        ("2--3", "5"),
        ("0/7", "0"),
        ("0*-1", "0"),
    ],
)
def test_results_by_hand(expression: str, result: str):
    assert written(evaluate(expression)) == result


def test_results_are_written_as_decimal_rounds_them():
    """Exact with up to 4 decimals, else 2 of them; below 0.1, 2 significant digits. decimal is the oracle."""
    rng = random.Random(0)
    for _ in range(5_000):
        value = Fraction(
            rng.randint(-(10**6), 10**6), rng.choice([1, 2, 3, 7, 8, 16, 30, 125, 999, 1000, 10**4, 10**7])
        )
        with localcontext(prec=60) as context:
            context.rounding = ROUND_HALF_UP
            exact = Decimal(value.numerator) / value.denominator
            if value * 10**4 == int(value * 10**4):
                expected = exact
            elif abs(value) >= Fraction(1, 10):
                expected = exact.quantize(Decimal("0.01"))
            else:
                expected = exact.quantize(Decimal(1).scaleb(exact.adjusted() - 1))
            assert Decimal(written(value)) == expected, value
        assert re.fullmatch(r"-?(0|[1-9][0-9]*)(\.[0-9]*[1-9])?", written(value)), value


HOSTILE = {
    "names": ("__import__('os').system('true')", "syntax"),
    "a variable": ("x+56", "syntax"),
    "powers": ("9**9**9**9", "syntax"),
    "carets": ("9^9^9^9", "syntax"),
    "floor division": ("560//10", "syntax"),
    "an exponent": ("1e999999999", "syntax"),
    "depth": ("(" * 100 + "1" + ")" * 100, "too_deep"),
    "a million parentheses": ("(" * 1_000_000, "too_long"),
    "a million digits": ("9" * 1_000_000, "too_long"),
    "a million signs": ("-" * 1_000_000 + "1", "too_long"),
    "many signs": ("-" * 255 + "+", "syntax"),
    "digits": ("9" * 40 + "*2", "too_large"),
    "decimals": ("." + "9" * 250, "too_large"),
    "digits of other scripts": ("١+٢", "syntax"),
    "nothing": ("", "syntax"),
    "spaces": (" " * 256, "syntax"),
    "an open parenthesis": ("(1+2", "syntax"),
    "a closed parenthesis": ("1+2)", "syntax"),
    "two numbers": ("1 2", "syntax"),
    "commas": ("1,2,3,4," * 30, "syntax"),
    "grouped otherwise": ("1,23", "syntax"),
    "points": ("." * 256, "syntax"),
    "modulo": ("7%3", "syntax"),
    "a null byte": ("1+\0", "syntax"),
    "a line break": ("1+\n2", "syntax"),
    "a zero": ("1/(2-2)", "division_by_zero"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_are_refused_at_once(name: str):
    expression, code = HOSTILE[name]
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        with pytest.raises(ExpressionError) as refused:
            evaluate(expression)
        seconds.append(time.perf_counter() - started)
    assert refused.value.code == code
    assert min(seconds) < 0.05


@pytest.mark.parametrize("expression", ["9" * 30 + "*" + "9" * 30, "1/" + "9" * 32, "*".join(["99999999"] * 28)])
def test_long_results_are_refused_at_once(expression: str):
    started = time.perf_counter()
    with pytest.raises(ExpressionError, match="more than 32 digits") as refused:
        written(evaluate(expression))
    assert refused.value.code == "too_large"
    assert time.perf_counter() - started < 0.05


def test_gsm8k_annotators_agree(shared_data):
    """All 27,998 annotations of train and test but the two with //, and every value is written so that it is exact."""
    found = Counter[str]()
    for split in ("train", "test"):
        with gzip.open(shared_data / "gsm8k" / f"{split}.jsonl.gz", "rt") as file:
            for line in file:
                for expression, result in re.findall(r"<<([^<>=]*)=([^<>]*)>>", json.loads(line)["answer"]):
                    try:
                        value = evaluate(expression)
                    except ExpressionError as error:
                        found[error.code] += 1
                        continue
                    found["equal"] += value == Fraction(result)
                    found["written the same"] += written(value) == result
                    assert Fraction(written(value)) == value
    assert found == {"equal": 27_996, "written the same": 27_173, "syntax": 2}
