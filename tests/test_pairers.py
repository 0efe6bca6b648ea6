"""Pairers: a tie, a duplicate, a blank text: none of them ever becomes a pair."""

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe.components import COMPONENTS
from prefpipe.errors import ConfigError, DataError
from prefpipe.pairers import (
    AllPairs,
    BestWorst,
    CorrectIncorrect,
    Demonstrator,
    MarginThreshold,
    MaxMin,
    OriginalBest,
    Pairer,
    RandomPair,
    RoleByThreshold,
    distinct,
)
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


def with_claims(completion: ScoredCompletion, *, is_perturbed: bool, pic_type: str = "full") -> ScoredCompletion:
    """With the meta that PIC's pairs are made of."""
    meta = {
        "pic_type": pic_type,
        "claims": ["one", "two"],
        "is_perturbed": is_perturbed,
        "perturbed_claims": ["one"],
        "perturbed_messages": [{"role": "user", "content": "q, one claim"}],
    }
    return replace(completion, meta=meta)


CITED = ["<statement>a<cite>[1-2]</cite></statement>", "<statement>a<cite>[9-9]</cite></statement>", "<cite></cite>"]
VARIANTS = {
    "original_best, balanced": lambda: OriginalBest(balance="citations"),
    "correct_incorrect, least similar": lambda: CorrectIncorrect(order="least_similar", max_pairs=3),
    "correct_incorrect, unlike": lambda: CorrectIncorrect(max_similarity=0.3, max_pairs=3),
    "max_min, steep": lambda: MaxMin(length_penalty=1.0),
}
PAIRERS = {n: cls for n, cls in COMPONENTS["pairer"].items() if not issubclass(cls, Demonstrator)} | VARIANTS


@pytest.mark.parametrize("name", sorted(PAIRERS))
@settings(max_examples=100, deadline=None)
@given(
    scored=st.lists(
        st.tuples(st.sampled_from(["a", "b", " a", "", "\n", "c c", "c d", "d"]), st.integers(-2, 2).map(float))
    ),
    seed=st.integers(0, 9),
    perturbed=st.lists(st.booleans(), min_size=40, max_size=40),
)
def test_no_tie_no_duplicate_no_blank_ever_becomes_a_pair(name, scored, seed, perturbed):
    if not scored:
        return
    cites = name == "original_best, balanced"
    completions = [
        with_claims(
            replace(c, text=CITED[i % 3] + c.text if cites and c.text.strip() else c.text),
            is_perturbed=perturbed[i % 40],
        )
        for i, c in enumerate(group(*scored))
    ]
    known = {c.completion_id: c for c in completions}
    made = PAIRERS[name]().pair(completions, random.Random(seed))
    assert isinstance(made, str) or made
    for pair in made if isinstance(made, list) else []:
        assert pair.chosen.strip() != pair.rejected.strip()
        assert pair.chosen.strip()
        assert pair.rejected.strip()
        assert pair.chosen_id != pair.rejected_id
        assert {pair.chosen_id, pair.rejected_id} <= known.keys()
        if name == "role_by_threshold":  # the only one whose roles are not the order of two scores
            assert (pair.chosen_score, pair.rejected_score) == (None, None)
            assert known[pair.chosen_id].meta["is_perturbed"] == pair.meta["is_perturbed"]
            assert known[pair.rejected_id].meta["is_perturbed"] != pair.meta["is_perturbed"]
        else:
            assert pair.chosen_score > pair.rejected_score
    if isinstance(made, list):
        texts_of = [(pair.chosen, pair.rejected) for pair in made]
        assert len(set(texts_of)) == len(texts_of)
    assert PAIRERS[name]().pair(completions, random.Random(seed)) == made


def test_least_similar_pairs_of_dpo_st_by_hand():
    """Jaccard by words: a b c / c d = 1/4, a b c / x = 0, a y / c d = 0, a y / x = 0."""
    scored = [("a b c", 1), ("a y", 1), ("c d", 0), ("x", 0)]
    made = run(CorrectIncorrect(order="least_similar", max_pairs=3), *scored)
    assert made == [("a b c", "x"), ("a y", "c d"), ("a y", "x")]
    assert len(run(CorrectIncorrect(order="least_similar", max_pairs=9), *scored)) == 4


def test_similar_completions_are_left_out_on_their_own_side_only():
    """a b c d / a b c is 3/4; above 0.7 it goes, and at 0.75 it stays. The wrong one may be as similar as it likes."""
    scored = [("a b c d", 1), ("a b c", 1), ("a b d", 0)]
    keep = CorrectIncorrect(order="least_similar", max_pairs=9, max_similarity=0.75)
    assert run(keep, *scored) == [("a b c", "a b d"), ("a b c d", "a b d")]
    drop = CorrectIncorrect(order="least_similar", max_pairs=9, max_similarity=0.7)
    assert run(drop, *scored) == [("a b c d", "a b d")]


def test_max_min_takes_a_price_for_each_character():
    """3 - 0.5 * 6 = 0, 2 - 0.5 = 1.5, 1 - 1 = 0 - and the first of equals."""
    (pair,) = MaxMin(length_penalty=0.5).pair(group(("longer", 3), ("b", 2), ("cc", 1)), random.Random(0))
    assert (pair.chosen, pair.chosen_score, pair.rejected, pair.rejected_score) == ("b", 1.5, "longer", 0.0)
    assert run(MaxMin(length_penalty=0), ("longer", 3), ("b", 2), ("cc", 1)) == [("longer", "cc")]
    assert run(MaxMin(length_penalty=1), ("aa", 2), ("b", 1)) == "tie"


def test_all_pairs_are_every_two_of_different_scores_up_to_a_number():
    scored = [("a", 0), ("b", 1), ("c", 1), ("d", 2)]
    expected = {("b", "a"), ("c", "a"), ("d", "a"), ("d", "b"), ("d", "c")}
    assert set(run(AllPairs(max_pairs=5), *scored)) == expected
    drawn = {tuple(run(AllPairs(max_pairs=2), *scored, seed=seed)) for seed in range(30)}
    assert len(drawn) > 5
    assert all(len(set(made)) == 2 and set(made) <= expected for made in drawn)
    assert run(AllPairs(), ("a", 1), ("b", 1)) == "tie"


def test_original_best_needs_something_better_than_the_original():
    assert run(OriginalBest(), ("o", 1), ("b", 3), ("c", 2)) == [("b", "o")]
    assert run(OriginalBest(), ("o", 3), ("b", 3), ("c", 2)) == "original_is_best"
    assert run(OriginalBest(), (" ", 0), ("b", 3), ("c", 2)) == "blank_original"
    completions = group(("a", 1), ("o", 2), ("b", 3))
    assert OriginalBest(original="meta").pair(completions, random.Random(0)) == "no_original"
    completions[1] = replace(completions[1], meta={"is_original": True})
    assert texts(OriginalBest(original="meta").pair(completions, random.Random(0))) == [("b", "o")]


def test_original_best_balances_what_both_sides_cite():
    original, best = "<statement>s<cite>[30-30]</cite></statement>", "<statement>s<cite>[3-5]</cite></statement>"
    made = {run(OriginalBest(balance="citations"), (original, 0), (best, 1), seed=seed)[0] for seed in range(40)}
    expected = {(best, original.replace("30-30", ends)) for ends in ("28-30", "29-31", "30-32")}
    assert made == expected
    same = run(OriginalBest(balance="citations"), (original, 0), (original.replace("30-30", "30-30 "), 1))
    assert same == [(original.replace("[30-30]", ""), original)] or isinstance(same, str)
    with pytest.raises(DataError, match=r"have no <cite>, so pairer\.balance=citations has nothing to balance"):
        run(OriginalBest(balance="citations"), ("a", 0), ("b", 1))


@pytest.mark.parametrize(
    ("pic_type", "drop", "perturbed_is_chosen"),
    [("full", 0.0, True), ("full", 0.001, False), ("partial", 0.0, False), ("partial", -0.8472, False),
     ("partial", -0.8474, True), ("full", -800.0, True), ("full", 800.0, False)],
)  # fmt: skip
def test_roles_by_threshold_as_pic_has_them(pic_type, drop, perturbed_is_chosen):
    """norm > 0.3 is drop > -0.8473; a drop of 0 gives 0.5, which is not above 0.5."""
    first, second = group(("original", -1.0 + drop), ("perturbed", -1.0))
    completions = [
        with_claims(second, is_perturbed=True, pic_type=pic_type),
        with_claims(first, is_perturbed=False, pic_type=pic_type),
    ]
    (pair,) = RoleByThreshold().pair(completions, random.Random(0))
    sides = ("perturbed", "original") if perturbed_is_chosen else ("original", "perturbed")
    assert (pair.chosen, pair.rejected) == sides
    assert pair.meta["is_perturbed"] is perturbed_is_chosen
    assert pair.meta["claims"] == (["one"] if perturbed_is_chosen else ["one", "two"])
    assert pair.messages == [{"role": "user", "content": "q, one claim"}] if perturbed_is_chosen else MESSAGES
    assert pair.prompt_id == prompt_id(pair.messages)
    assert pair.meta["prob_drop"] == pytest.approx(drop)
    assert pair.meta["norm_score"] == pytest.approx(0.5 * (1 + math.tanh(drop / 2)), abs=1e-12)
    assert pair.meta["tau_threshold"] == {"full": 0.5, "partial": 0.3}[pic_type]


def test_claims_that_are_missing_are_named():
    completions = [with_claims(c, is_perturbed=i == 1) for i, c in enumerate(group(("a", 0), ("b", 1)))]
    assert run(RoleByThreshold(), ("a", 0), ("b", 1)) == "no_perturbed"
    meta = {key: value for key, value in completions[1].meta.items() if key != "perturbed_messages"}
    completions[1] = replace(completions[1], meta=meta)
    with pytest.raises(DataError, match="completion 0001 has no meta perturbed_messages, and pairer=role_by_threshold"):
        RoleByThreshold().pair(completions, random.Random(0))


def test_pass_rate_counts_repeats():
    scored = group(("a", 1), ("a", 1), ("b", 0), ("", 0))
    assert CorrectIncorrect().pass_rate(scored) == 0.5
    assert BestWorst().pass_rate(scored) is None
    assert BestWorst(pass_threshold=0.0).pass_rate(scored) == 1.0


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
    [
        (BestWorst, {"min_margin": -1}),
        (MarginThreshold, {"min_margin": 0}),
        (MaxMin, {"length_penalty": -0.1}),
        (AllPairs, {"max_pairs": 0}),
        (CorrectIncorrect, {"max_pairs": 0}),
        (CorrectIncorrect, {"order": "sorted"}),
        (CorrectIncorrect, {"max_similarity": 1.0}),
        (CorrectIncorrect, {"pass_threshold": 0.7}),
        (OriginalBest, {"balance": "length"}),
        (RoleByThreshold, {"tau_full": 1.0}),
    ],
)
def test_knobs_are_checked(knobs):
    cls, values = knobs
    with pytest.raises(ConfigError, match=r"pairer\.\w+="):
        cls(**values)


def test_a_score_that_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match="score 's' of completion 0000 is nan"):
        group(("a", float("nan")))
