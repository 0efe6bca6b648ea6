import itertools
import re

import pytest

from prefpipe.sources.arithmetic import KINDS, arithmetic_problems

ANNOTATION = re.compile(r"(\d+) ([-+*/]) (\d+) = <<(.*?)>>(\d+)")


def rows(number: int, seed: int = 0) -> list[dict[str, str]]:
    return list(itertools.islice(arithmetic_problems(seed), number))


def check(left: int, operator: str, right: int, result: int) -> bool:
    """The same sums by other means: no operator here is the one that made the result."""
    match operator:
        case "+":
            return result - right == left
        case "-":
            return result + right == left
        case "*":
            return sum(left for _ in range(right)) == result
        case "/":
            return right > 0 and result * right == left
    raise AssertionError(operator)


def test_the_first_problem_of_seed_0_is_what_it_was():
    assert rows(1) == [
        {
            "question": "Leo has 23 dollars. He buys 9 packs of stamps for 2 dollars each. "
            "How many dollars does Leo have left?",
            "answer": "Leo pays 9 * 2 = <<9*2=18>>18 dollars.\nHe has 23 - 18 = <<23-18=5>>5 dollars.\n#### 5",
        }
    ]


def test_same_seed_gives_the_same_rows_and_more_rows_keep_the_first_ones():
    assert rows(300, seed=7) == rows(400, seed=7)[:300]
    assert rows(300, seed=7) != rows(300, seed=8)


def test_no_question_comes_twice_in_5000():
    assert len({row["question"] for row in rows(5000)}) == 5000


@pytest.mark.parametrize("seed", [0, 1, -1])
def test_every_annotation_is_true_and_a_whole_number(seed):
    for row in rows(2000, seed):
        *steps, _ = row["answer"].splitlines()
        assert 2 <= len(steps) <= 3
        for line in steps:
            assert line.count("<<") == 1
            ((left, operator, right, annotation, shown),) = ANNOTATION.findall(line)
            assert annotation == f"{left}{operator}{right}={shown}"
            assert check(int(left), operator, int(right), int(shown)), line


def test_the_final_answer_is_the_result_of_the_last_step():
    for row in rows(2000):
        *_, last, final = row["answer"].splitlines()
        assert final == f"#### {last.split('>>')[1].split()[0]}"


def test_steps_use_the_numbers_of_the_question_and_of_earlier_steps_only():
    for row in rows(500):
        known = set(re.findall(r"\d+", row["question"]))
        for left, _, right, _, shown in ANNOTATION.findall(row["answer"]):
            assert {left, right} <= known, row
            known.add(shown)


def test_every_kind_of_problem_is_drawn():
    shapes = {re.sub(r"[A-Z][a-z]{2}\b|\d+", "", row["question"])[:40] for row in rows(500)}
    assert len(shapes) >= len(KINDS)
