"""Pairers: a tie, a duplicate, a blank text: none of them ever becomes a pair."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe.components import COMPONENTS
from prefpipe.errors import ConfigError, DataError
from prefpipe.pairers import BestWorst, CorrectIncorrect, MarginThreshold, Pairer, RandomPair, distinct
from prefpipe.records import Pair, ScoredCompletion, prompt_id

MESSAGES = [{"role": "user", "content": "q"}]


def group(*scored: tuple[str, float]) -> list[ScoredCompletion]:
    return [
        ScoredCompletion(
            prompt_id=prompt_id(MESSAGES),
            completion_id=f"{i:04d}",
            messages=MESSAGES,
            source="t",
            text=text,
            scores={"s": score},
        )
        for i, (text, score) in enumerate(scored)
    ]


def texts(made: list[Pair] | str) -> list[tuple[str, str]] | str:
    return made if isinstance(made, str) else [(pair.chosen, pair.rejected) for pair in made]


def run(pairer: Pairer, *scored: tuple[str, float], seed: int = 0) -> list[tuple[str, str]] | str:
    return texts(pairer.pair(group(*scored), random.Random(seed)))


def test_best_worst_takes_the_extremes_and_the_first_of_equals():
    assert run(BestWorst(), ("a", 1), ("b", 3), ("c", 3), ("d", 0), ("e", 0)) == [("b", "d")]


def test_best_worst_counts_why_there_is_no_pair():
    assert run(BestWorst(), ("a", 1), ("b", 1)) == "tie"
    assert run(BestWorst(), ("a", 1), (" a\n", 5)) == "single_completion"
    assert run(BestWorst(min_margin=2), ("a", 1), ("b", 3)) == "too_close"
    assert run(BestWorst(min_margin=2), ("a", 1), ("b", 3.5)) == [("b", "a")]


def test_correct_incorrect_pairs_right_with_wrong():
    assert run(CorrectIncorrect(), ("a", 1), ("b", 0)) == [("a", "b")]
    assert run(CorrectIncorrect(), ("a", 1), ("b", 1)) == "all_right"
    assert run(CorrectIncorrect(), ("a", 0), ("b", 0)) == "all_wrong"


def test_correct_incorrect_uses_every_completion_evenly():
    right, wrong = [(f"r{i}", 1.0) for i in range(4)], [(f"w{i}", 0.0) for i in range(2)]
    made = run(CorrectIncorrect(max_pairs=4), *right, *wrong)
    assert isinstance(made, list)
    assert sorted(chosen for chosen, _ in made) == ["r0", "r1", "r2", "r3"]
    assert sorted(rejected for _, rejected in made) == ["w0", "w0", "w1", "w1"]
    everything = run(CorrectIncorrect(max_pairs=99), *right, *wrong)
    assert isinstance(everything, list)
    assert len(everything) == len(set(everything)) == 8


def test_margin_threshold_takes_the_widest_first():
    made = run(MarginThreshold(min_margin=2, max_pairs=2), ("a", 0), ("b", 2), ("c", 5))
    assert made == [("c", "a"), ("c", "b")]
    assert run(MarginThreshold(min_margin=9), ("a", 0), ("b", 2)) == "too_close"


def test_random_pair_prefers_the_higher_score_and_depends_on_the_seed():
    scored = [(f"t{i}", float(i)) for i in range(20)]
    made = {str(run(RandomPair(), *scored, seed=seed)) for seed in range(20)}
    assert len(made) > 10
    assert run(RandomPair(), ("a", 1), ("b", 1)) == "tie"


@pytest.mark.parametrize("name", sorted(COMPONENTS["pairer"]))
@settings(max_examples=150, deadline=None)
@given(
    scored=st.lists(st.tuples(st.sampled_from(["a", "b", " a", "", "\n", "c", "d"]), st.integers(-2, 2).map(float))),
    seed=st.integers(0, 9),
)
def test_no_tie_no_duplicate_no_blank_ever_becomes_a_pair(name, scored, seed):
    if not scored:
        return
    made = COMPONENTS["pairer"][name]().pair(group(*scored), random.Random(seed))
    assert isinstance(made, str) or made
    for pair in made if isinstance(made, list) else []:
        assert pair.chosen.strip() != pair.rejected.strip()
        assert pair.chosen.strip()
        assert pair.rejected.strip()
        assert pair.chosen_id != pair.rejected_id
        assert pair.chosen_score is not None
        assert pair.rejected_score is not None
        assert pair.chosen_score > pair.rejected_score
    again = COMPONENTS["pairer"][name]().pair(group(*scored), random.Random(seed))
    assert again == made


def test_the_deciding_score_must_be_clear():
    (one,) = group(("a", 1.0))
    both = replace(one, scores={"s": 1.0, "t": 2.0})
    with pytest.raises(DataError, match=r"has the scores \['s', 't'\]; say which one decides with pairer\.score="):
        BestWorst().value(both)
    assert BestWorst(score="t").value(both) == 2.0
    with pytest.raises(DataError, match=r"has no score pairer\.score=u"):
        BestWorst(score="u").value(both)


def test_distinct_keeps_the_first_of_equal_texts():
    assert [c.completion_id for c in distinct(group(("a", 1), ("a ", 2), ("", 3), ("b", 4)))] == ["0000", "0003"]


@pytest.mark.parametrize(
    "knobs",
    [(BestWorst, {"min_margin": -1}), (MarginThreshold, {"min_margin": 0}), (CorrectIncorrect, {"max_pairs": 0})],
)
def test_knobs_are_checked(knobs):
    cls, values = knobs
    with pytest.raises(ConfigError, match=r"pairer\.\w+="):
        cls(**values)


def test_a_score_that_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match="score 's' of completion 0000 is nan"):
        group(("a", float("nan")))
