"""pairer=pseudo_label: which completions are right, which repeat another, and what is refused."""

import random

import pytest

from prefpipe.errors import ConfigError, DataError
from prefpipe.pairers import PseudoLabel
from prefpipe.pairers.demonstrations import equations
from prefpipe.records import Demonstration, ScoredCompletion, completion_id, prompt_id

MESSAGES = [{"role": "user", "content": "16 - 3, then twice that?"}]
GOLD = "16 - 3 = <<16-3=13>>13\n13 * 2 = <<13*2=26>>26\n#### 26"


def group(*rows: tuple[str, float | None], answer: str | None = GOLD, finish: str = "stop") -> list[ScoredCompletion]:
    identity = prompt_id(MESSAGES)
    return [
        ScoredCompletion(
            prompt_id=identity,
            completion_id=completion_id(identity, text, index, 0),
            messages=MESSAGES,
            source="t",
            answer=answer,
            meta={"level": 2},
            text=text,
            finish_reason=finish,
            scores={} if score is None else {"exact_answer": score},
        )
        for index, (text, score) in enumerate(rows)
    ]


def texts(pairer: PseudoLabel, rows: list[ScoredCompletion]) -> list[str] | str:
    made = pairer.demonstrations(rows, random.Random(0))
    return made if isinstance(made, str) else [record.text for record in made]


def test_right_completions_become_demonstrations_with_their_score_and_origin():
    rows = group(("wrong", 0.0), ("right", 1.0))
    assert PseudoLabel().demonstrations(rows, random.Random(0)) == [
        Demonstration(
            prompt_id=rows[1].prompt_id,
            messages=MESSAGES,
            source="t",
            text="right",
            answer=GOLD,
            score=1.0,
            completion_id=rows[1].completion_id,
            meta={"level": 2},
        )
    ]
    assert texts(PseudoLabel(), group(("wrong", 0.0), (" ", 1.0))) == "all_wrong"
    assert texts(PseudoLabel(threshold=0.0), group(("wrong", 0.0))) == ["wrong"]


def test_the_same_equations_in_the_same_order_are_one_solution():
    """RFT: other words, spaces and currency marks make no new one; another order or another step does."""
    rows = group(
        ("First <<16-3=13>>13, then <<13*2=26>>26.\n#### 26", 1.0),
        ("He has $13: << 16 - 3 = $13 >>13 and <<13*2=26>>26 in all.\n#### 26", 1.0),
        ("<<13*2=26>>26 as <<16-3=13>>13\n#### 26", 1.0),
        ("<<16*2=32>>32 <<3*2=6>>6 <<32-6=26>>26\n#### 26", 1.0),
    )
    assert texts(PseudoLabel(), rows) == [rows[0].text, rows[2].text, rows[3].text]
    assert texts(PseudoLabel(distinct="texts"), rows) == [row.text for row in rows]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("16 - 3 = <<16-3=13>>13", ("16-3=13",)),
        ("So 1,600 - 3 = $1597. Then 1597 / 2 = 798.5.", ("1600-3=1597", "1597/2=798.5")),
        ("2 * (3 + 4) is 14, x = 3", ()),
        ("no numbers", ()),
    ],
)
def test_equations_by_hand(text, expected):
    assert equations(text) == expected


def test_solutions_without_equations_are_compared_by_their_texts():
    rows = group(("Yes, a cat.", 1.0), ("Yes, a dog.", 1.0), (" Yes, a cat.\n", 1.0))
    assert texts(PseudoLabel(), rows) == ["Yes, a cat.", "Yes, a dog."]


def test_alike_by_words():
    """{a, b, c, d} against {a, b, c, e}: 3 of 5 = 0.6; against {a, b, c, d, e}: 4 of 5 = 0.8."""
    rows = group(("a b c d", 1.0), ("a b c e", 1.0), ("a b c d e", 1.0))
    assert texts(PseudoLabel(distinct="words"), rows) == ["a b c d", "a b c e"]
    assert texts(PseudoLabel(distinct="words", max_similarity=0.59), rows) == ["a b c d"]
    assert texts(PseudoLabel(distinct="words", max_similarity=0.8), rows) == ["a b c d", "a b c e", "a b c d e"]


def test_the_reference_answer_comes_first_and_what_repeats_it_is_left_out():
    rows = group(("<<16-3=13>> <<13*2=26>>\n#### 26", 1.0), ("<<16+16=32>> <<32-6=26>>\n#### 26", 1.0))
    made = PseudoLabel(with_answer=True).demonstrations(rows, random.Random(0))
    assert [(record.text, record.completion_id) for record in made] == [
        (GOLD, ""),
        (rows[1].text, rows[1].completion_id),
    ]
    assert (made[0].score, made[1].score) == (None, 1.0)
    assert texts(PseudoLabel(with_answer=True), group(("wrong", 0.0))) == [GOLD]
    assert texts(PseudoLabel(with_answer=True), group(("right", 1.0), answer=None)) == ["right"]


def test_at_most_so_many_of_a_prompt_as_they_were_written():
    rows = group(*((f"way {i}", 1.0) for i in range(5)))
    assert texts(PseudoLabel(max_per_prompt=2), rows) == ["way 0", "way 1"]


def test_a_completion_that_was_cut_is_no_demonstration():
    assert texts(PseudoLabel(), group(("right", 1.0), finish="length")) == "no_whole_completion"


def test_the_majority_is_the_label_where_there_is_no_reference_answer():
    """26, 26.0 and a repeat of the first vote for 26; 25 has one vote, one completion has none: 3 of 5."""
    said = ["a\n#### 25", "b\n#### 26", "c\n#### 26.0", "b\n#### 26", "?"]
    rows = group(*((text, None) for text in said), answer=None)
    made = PseudoLabel(labels="majority").demonstrations(rows, random.Random(0))
    assert [(record.text, record.score, record.meta) for record in made] == [
        ("b\n#### 26", None, {"level": 2, "agreement": 0.6}),
        ("c\n#### 26.0", None, {"level": 2, "agreement": 0.6}),
    ]
    assert texts(PseudoLabel(labels="majority", min_agreement=0.6), rows) == ["b\n#### 26", "c\n#### 26.0"]
    assert texts(PseudoLabel(labels="majority", min_agreement=0.61), rows) == "low_agreement"
    assert texts(PseudoLabel(labels="majority"), rows[:2]) == "tied_vote"
    assert texts(PseudoLabel(labels="majority"), rows[4:]) == "no_final_answer"
    assert texts(PseudoLabel(labels="majority", rule="last_number"), group(("so 7", None))) == ["so 7"]


def test_verified_or_majority_votes_only_without_a_reference_answer():
    pairer = PseudoLabel(labels="verified_or_majority")
    rows = [("#### 25", 0.0), ("x #### 25", 0.0), ("#### 26", 1.0)]
    assert texts(pairer, group(*rows)) == ["#### 26"]
    assert texts(pairer, group(*((text, None) for text, _ in rows), answer=None)) == ["#### 25", "x #### 25"]
    with pytest.raises(DataError, match=r"say which one decides with pairer\.score="):
        texts(pairer, group(("#### 25", None)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": "vote"}, "pairer.labels=vote must be one of verified, majority, verified_or_majority"),
        ({"rule": "last_hash"}, "pairer.rule=last_hash would be ignored with pairer.labels=verified; drop it"),
        ({"labels": "majority", "threshold": 0.5}, "pairer.threshold=0.5 would be ignored with pairer.labels=majority"),
        ({"labels": "majority", "score": "s"}, "pairer.score=s would be ignored with pairer.labels=majority"),
        ({"max_similarity": 0.5}, "pairer.max_similarity=0.5 would be ignored with pairer.distinct=equations"),
        ({"labels": "majority", "min_agreement": 2.0}, "pairer.min_agreement=2.0 must be between 0 and 1"),
        ({"max_per_prompt": 0}, "pairer.max_per_prompt=0 must be at least 1"),
        ({"cap_percentile": 0.0}, "pairer.cap_percentile=0.0 must be in (0, 100], or null"),
    ],
)
def test_what_cannot_be_or_would_be_ignored_is_refused(settings, message):
    with pytest.raises(ConfigError) as caught:
        PseudoLabel(**settings)
    assert message in str(caught.value)


def test_votes_are_numbers_not_texts():
    rows = group(("#### 1,200", None), ("#### 1200.0", None), ("#### 12", None), answer=None)
    assert texts(PseudoLabel(labels="majority"), rows) == ["#### 1,200", "#### 1200.0"]
