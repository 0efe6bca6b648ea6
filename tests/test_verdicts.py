"""Verdict grammars, on texts that judges write."""

import pytest

from prefpipe.verdicts import Unclear, choice, items, numbers, rating, ratings

NONE, TWO, BAD = Unclear("no_verdict"), Unclear("two_verdicts"), Unclear("bad_verdict")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Good. Rating: [[7]]", 7.0),
        ("[[7.5]]", 7.5),
        ("[[ 10 ]]", 10.0),
        ("[[7]] ... as I said: [[7.0]]", 7.0),
        ("<think>perhaps [[3]]</think> Rating: [[8]]", 8.0),
        ("It claims `[[10]]`. Rating: [[2]]", TWO),
        ("[[7]] or [[8]]", TWO),
        ("[[rating]] means [[7]]", TWO),
        ("", NONE),
        ("Rating: 7", NONE),
        ("Rating: [7]", NONE),
        ("<think>[[7]]</think> I cannot say.", NONE),
        ("[[11]]", BAD),
        ("[[0]]", BAD),
        ("[[72.44]]", BAD),
        ("[[-7]]", BAD),
        ("[[7/10]]", BAD),
        ("[[nan]]", BAD),
        ("[[]]", BAD),
        ("[[٧]]", BAD),
        ("[[A]]", BAD),
    ],
)
def test_a_rating_is_one_number_in_range_or_unclear(text, expected):
    assert rating(text, 1, 10) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[[A]]", "A"),
        ("better, so [[b]]", "B"),
        ("[[C]]. Yes, [[C]].", "C"),
        ("[[A]] was said, but [[B]]", TWO),
        ("A is better", NONE),
        ("[[AB]]", BAD),
        ("[[D]]", BAD),
        ("[[A>B]]", BAD),
    ],
)
def test_a_choice_is_one_letter_or_unclear(text, expected):
    assert choice(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[[1: 7]]\n[[2: 4.5]]\n[[3:10]]", [7.0, 4.5, 10.0]),
        ("[[3: 1]] [[1: 2]] [[2: 3]]", [2.0, 3.0, 1.0]),
        ("[[1: 7]] [[3: 2]]", [7.0, NONE, 2.0]),
        ("[[1: 7]] [[1: 8]] [[2: 2]] [[2: 2.0]] [[3: 11]]", [TWO, 2.0, BAD]),
        ("[[1: 7]] [[2: 7]] [[3: 7]] [[4: 7]]", [BAD] * 3),
        ("[[1: 7]] [[7]]", [BAD] * 3),
        ("nothing", [NONE] * 3),
    ],
)
def test_ratings_belong_to_numbers(text, expected):
    assert ratings(text, 3, 1, 10) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[[2]]", [2]),
        ("supported: [[4, 1,4]]", [1, 4]),
        ("[[1, 4]], that is [[4,1]]", [1, 4]),
        ("[[None]]", []),
        ("[[none]] but perhaps [[2]]", TWO),
        ("2, 4", NONE),
        ("[[0, 2]]", BAD),
        ("[[5]]", BAD),
        ("[[1-3]]", BAD),
        ("[[1,]]", BAD),
        ("[[supported]]", BAD),
        ("<think>[[2]]</think> [[none]]", []),
    ],
)
def test_numbers_are_a_set_none_or_unclear(text, expected):
    assert numbers(text, 4) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- one thing\n- another [2]\n", ["one thing", "another [2]"]),
        ("The claims:\n\n 1. one\n 2) two\n\n* one", ["one", "two"]),
        ("[[none]]", []),
        ("There is no claim: [[None]].", []),
        ("<think>- one</think>\n- two", ["two"]),
        ("- one\n[[none]]", TWO),
        ("- one\nwhich goes on here", BAD),
        ("- one\n\nNote: that was all.", BAD),
        ("one\ntwo", NONE),
        ("-one", NONE),
        ("- ", NONE),
        ("", NONE),
    ],
)
def test_items_are_lines_none_or_unclear(text, expected):
    assert items(text) == expected


def test_a_long_text_of_brackets_or_blanks_is_read_at_once():
    assert rating("[[" * 500_000, 1, 10) == NONE
    assert rating("[[a" * 500_000, 1, 10) == NONE
    assert items("-" + " " * 500_000 + "\n" + " " * 500_000) == NONE
