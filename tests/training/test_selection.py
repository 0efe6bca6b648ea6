"""Selection: worked numbers, exact budgets, expected repeats, independence of the order, and what is refused."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prefpipe.check import Checker, without_hydra
from prefpipe.config import CONF_DIR, freeze, load_run_config, to_run_config
from prefpipe.errors import ConfigError, DataError
from prefpipe.records import Pair, prompt_id
from prefpipe.settings import SelectionConfig
from prefpipe.training.selection import Selection, pair_id, pair_weight, rounded, select

STRENGTH = {-100: 1.0, 1: 2.0, 5: 0.5}


def pair(number: int = 0, margin: float | None = None, **meta: Any) -> Pair:
    messages = [{"role": "user", "content": f"Question {number}"}]
    return Pair(
        prompt_id=prompt_id(messages),
        messages=messages,
        source="t",
        chosen="a",
        rejected="b",
        chosen_score=None if margin is None else margin,
        rejected_score=None if margin is None else 0.0,
        meta=meta,
    )


def strength(apply: str = "sampling", **more: Any) -> SelectionConfig:
    return SelectionConfig(**{"name": "strength", "strength": STRENGTH, "apply": apply, **more})


def column(apply: str = "sampling", transform: str = "none", **more: Any) -> SelectionConfig:
    return SelectionConfig(**{"name": "column", "column": "w", "transform": transform, "apply": apply, **more})


def names(count: int) -> list[str]:
    return [f"{i:016x}" for i in range(count)]


def times(selection: Selection, count: int) -> list[int]:
    """How often each pair was taken."""
    taken = Counter(selection.indices)
    return [taken[i] for i in range(count)]


def weight_lists(largest: float = 5.0) -> st.SearchStrategy[list[float]]:
    weight = st.one_of(st.just(0.0), st.floats(0.01, largest), st.sampled_from([1.0, 2.0, 2.5]))
    return st.lists(weight, min_size=1, max_size=40).filter(any)


def test_strength_weights_of_the_worked_example():
    assert [pair_weight(pair(margin=m), 0, strength()) for m in range(10)] == [1, 2, 1, 1, 1, 0.5, 1, 1, 1, 1]
    assert [pair_weight(pair(margin=m), 0, strength("loss")) for m in (-1, 10, 99)] == [1, 1, 1]


def test_an_unlisted_difference_weighs_what_minus_100_says_and_1_where_it_says_nothing():
    only_listed = strength(strength={-100: 0, 1: 2})
    assert [pair_weight(pair(margin=m), 0, only_listed) for m in range(4)] == [0, 2, 0, 0]
    assert [pair_weight(pair(margin=m), 0, strength(strength={1: 2})) for m in range(3)] == [1, 2, 1]
    assert pair_weight(pair(margin=3), 0, strength(strength=None)) == 1


@pytest.mark.parametrize(
    ("difference", "whole"),
    [(0.49, 0), (0.5, 1), (1.5, 2), (2.5, 3), (-0.5, 0), (-0.51, -1), (-1.5, -1), (4.1 - 3.6, 1), (1.1 - 0.6, 1)],
)
def test_differences_are_rounded_to_the_nearest_whole_number_halves_upwards(difference, whole):
    assert rounded(difference) == whole


@pytest.mark.parametrize(
    ("transform", "number", "expected"),
    [
        ("none", 0.25, 0.25),
        ("none", "0.25", 0.25),
        ("sigmoid", 0.0, 0.5),
        ("sigmoid", math.log(3), 0.75),
        ("sigmoid", -1000.0, 0.0),
        ("sigmoid", 1000.0, 1.0),
        ("exp", math.log(2.5), 2.5),
        ("exp", -1000.0, 0.0),
    ],
)
def test_transforms_by_hand(transform, number, expected):
    assert pair_weight(pair(w=number), 0, column(transform=transform)) == pytest.approx(expected)


def test_a_margin_is_the_difference_of_the_scores():
    config = SelectionConfig(name="margin", transform="sigmoid", apply="loss")
    assert pair_weight(pair(margin=math.log(3)), 0, config) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("row", "config", "told"),
    [
        (pair(), strength(), "row 7 of inputs.pairs has no chosen_score"),
        (pair(margin=math.inf), strength(), "row 7 .* no finite number"),
        (pair(), SelectionConfig(name="margin", transform="exp", apply="loss"), "row 7 .*selection=margin reads them"),
        (pair(), column(), r"row 7 .* no meta key selection.column=w; it has \[\];.*data_mixer.columns"),
        (pair(w="heavy"), column(), "row 7 .* is 'heavy', not a finite number"),
        (pair(w=True), column(), "row 7 .* is 'True'"),
        (pair(w=None), column(), "row 7 .* is 'None'"),
        (pair(w=math.nan), column(), "row 7 .* is 'nan'"),
        (pair(w=-0.5), column(), "row 7 .* would weigh -0.5.*selection.transform=sigmoid"),
        (pair(w=1000), column(transform="exp"), "row 7 .*set selection.max_weight"),
    ],
)
def test_a_row_without_a_weight_is_named_with_the_remedy(row, config, told):
    with pytest.raises(DataError, match=told):
        pair_weight(row, 7, config)


def test_an_infinite_ratio_is_cut_where_there_is_a_bound():
    config = column(transform="exp", max_weight=3.0)
    weights = [pair_weight(pair(i, w=w), i, config) for i, w in enumerate((1000, 0, math.log(2)))]
    chosen = select(names(3), weights, config, 0)
    assert times(chosen, 3) == [3, 1, 2]
    assert chosen.counts["selection_clipped"] == 1


def test_none_takes_every_pair_as_it_is():
    assert pair_weight(pair(), 0, SelectionConfig()) == 1
    assert select(names(3), [1.0] * 3, SelectionConfig(), 0) == Selection([0, 1, 2], [1.0] * 3, Counter())


def test_weight_two_and_a_half_is_twice_and_for_half_of_the_pairs_once_more():
    chosen = select(names(4000), [2.5] * 4000, column(), 0)
    found = Counter(times(chosen, 4000))
    assert set(found) == {2, 3}
    assert abs(found[3] - 2000) < 4 * math.sqrt(4000 * 0.25)
    assert chosen.counts == {"selection_taken": 4000, "selection_repeats": 4000 + found[3]}
    assert set(chosen.weights) == {1.0}


def test_a_weight_below_one_is_the_chance_to_be_taken():
    chosen = select(names(4000), [0.25] * 4000, column(), 0)
    assert abs(len(chosen.indices) - 1000) < 4 * math.sqrt(4000 * 0.25 * 0.75)
    assert chosen.counts["selection_taken"] + chosen.counts["selection_left_out_by_chance"] == 4000
    assert not chosen.counts["selection_repeats"]


def test_the_first_pair_drawn_is_drawn_in_proportion_to_its_weight():
    """Budget 1 of weights 1, 2, 5: shares 1/8, 2/8, 5/8 over 4,000 seeds; 4 standard errors."""
    found = Counter(select(names(3), [1.0, 2.0, 5.0], column(budget=1), seed).indices[0] for seed in range(4000))
    for index, share in enumerate((1 / 8, 2 / 8, 5 / 8)):
        assert abs(found[index] / 4000 - share) < 4 * math.sqrt(share * (1 - share) / 4000)


def test_drawing_without_replacement_gives_the_chances_worked_out_by_hand():
    """Two of weights 1, 1, 2: the last is left out with chance 1/4 * 1/3 + 1/4 * 1/3 = 1/6."""
    left = sum(2 not in select(names(3), [1.0, 1.0, 2.0], column(budget=2), seed).indices for seed in range(4000))
    assert abs(left / 4000 - 1 / 6) < 4 * math.sqrt(1 / 6 * 5 / 6 / 4000)


def test_every_pair_has_the_same_chance_in_a_random_subset():
    config = SelectionConfig(name="random", budget=3)
    found = Counter(i for seed in range(4000) for i in select(names(10), [1.0] * 10, config, seed).indices)
    assert all(abs(found[i] / 4000 - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 4000) for i in range(10))


@pytest.mark.parametrize(
    "config", [SelectionConfig(name="random", budget=9), column(budget=9), column("loss", budget=9)]
)
def test_a_budget_that_cannot_be_filled_takes_everything_once_and_says_so(config, caplog):
    chosen = select(names(4), [1.0, 1.0, 2.5, 1.0], config, 0)
    assert chosen.indices == [0, 1, 2, 3]
    assert chosen.counts == {"selection_taken": 4, "selection_budget_unfilled": 5}
    assert "selection.budget=9 is not filled: only 4 pairs" in caplog.text


def test_another_seed_is_another_subset():
    config = SelectionConfig(name="random", budget=50)
    chosen = [tuple(select(names(100), [1.0] * 100, config, seed).indices) for seed in range(5)]
    assert len(set(chosen)) == 5


def test_loss_weights_do_not_bias_the_draw_of_a_budget():
    config = column("loss", budget=1)
    found = Counter(select(names(2), [1.0, 9.0], config, seed).indices[0] for seed in range(2000))
    assert abs(found[0] / 2000 - 0.5) < 4 * math.sqrt(0.25 / 2000)


def test_loss_weights_by_hand():
    chosen = select(names(4), [1.0, 0.0, 3.0, 2.0], column("loss"), 0)
    assert chosen.indices == [0, 2, 3]
    assert chosen.weights == [0.5, 1.5, 1.0]
    assert chosen.counts == {"selection_taken": 3, "selection_left_out_weight_zero": 1}


@given(st.floats(1e-300, 1e300), st.integers(1, 30))
@example(1e308, 30)
def test_equal_loss_weights_of_any_size_change_nothing(weight, count):
    assert select(names(count), [weight] * count, column("loss"), 0).weights == [1.0] * count


@given(weight_lists(), st.sampled_from([2.0, 0.5, 1024.0]))
def test_loss_weights_keep_their_ratios_and_have_mean_one(weights, factor):
    config = column("loss")
    chosen = select(names(len(weights)), weights, config, 0)
    assert math.fsum(chosen.weights) / len(chosen.weights) == pytest.approx(1)
    kept = [weights[i] for i in chosen.indices]
    assert [w / chosen.weights[0] for w in chosen.weights] == pytest.approx([w / kept[0] for w in kept])
    assert select(names(len(weights)), [factor * w for w in weights], config, 0).weights == chosen.weights


@given(weight_lists(), st.integers(1, 60), st.integers(0, 5), st.sampled_from(["sampling", "loss"]))
def test_a_budget_is_exact_and_a_smaller_one_takes_a_subset(weights, budget, seed, apply):
    ids = names(len(weights))
    chosen = select(ids, weights, column(apply, budget=budget), seed)
    allowed = [i for i, w in enumerate(weights) if w > 0]
    assert len(chosen.indices) == len(set(chosen.indices)) == min(budget, len(allowed))
    assert set(chosen.indices) <= set(allowed)
    larger = select(ids, weights, column(apply, budget=budget + 3), seed)
    assert set(chosen.indices) <= set(larger.indices)


@given(weight_lists(), st.integers(0, 5))
@example([2.0, 2.0], 0)
def test_repeats_are_the_whole_part_or_one_more(weights, seed):
    chosen = select(names(len(weights)), [w + 1 for w in weights], column(), seed)
    assert chosen.indices == sorted(chosen.indices)
    for taken, weight in zip(times(chosen, len(weights)), weights, strict=True):
        assert taken in {math.floor(weight + 1), math.ceil(weight + 1)}


@settings(max_examples=200)
@given(
    rows=st.lists(st.tuples(st.sampled_from(names(15)), st.sampled_from([0.5, 1.0, 2.5])), min_size=1, max_size=30),
    budget=st.one_of(st.none(), st.integers(1, 20)),
    apply=st.sampled_from(["sampling", "loss"]),
    data=st.data(),
)
def test_the_order_of_the_pairs_changes_nothing(rows, budget, apply, data):
    """Copies of one pair too, whose weights may differ."""
    config = column(apply, budget=budget)
    shuffled = data.draw(st.permutations(rows))

    def taken(order: list[tuple[str, float]]) -> tuple[Counter[tuple[Any, ...]], Counter[str]] | None:
        try:
            chosen = select([name for name, _ in order], [weight for _, weight in order], config, 3)
        except DataError:
            return None
        found = zip(chosen.indices, chosen.weights, strict=True)
        return Counter((*order[i], factor) for i, factor in found), chosen.counts

    assert taken(rows) == taken(shuffled)


@given(weight_lists(), st.one_of(st.none(), st.integers(1, 60)), st.sampled_from(["sampling", "loss"]))
def test_counts_add_up_to_the_pairs(weights, budget, apply):
    try:
        chosen = select(names(len(weights)), weights, column(apply, budget=budget), 0)
    except DataError as error:
        assert "takes none" in str(error)
        return
    counts = chosen.counts
    left_out = sum(count for key, count in counts.items() if key.startswith("selection_left_out"))
    assert counts["selection_taken"] + left_out == len(weights)
    assert counts["selection_taken"] + counts["selection_repeats"] == len(chosen.indices) == len(chosen.weights)
    if budget is not None:
        assert counts["selection_taken"] + counts["selection_budget_unfilled"] == budget


def test_an_id_is_of_the_texts_alone():
    assert pair_id(pair(1, margin=3.0, w=2)) == pair_id(pair(1))
    assert pair_id(pair(1)) != pair_id(pair(2))


def test_nothing_left_and_a_flood_of_repeats_are_refused():
    with pytest.raises(DataError, match="each of the 2 pairs the weight 0"):
        select(names(2), [0.0, 0.0], column("loss"), 0)
    with pytest.raises(DataError, match=r"takes none of 2 pairs.*selection.apply=loss"):
        select(names(2), [1e-9, 1e-9], column(), 0)
    for weight in (1e6, 1e308):
        with pytest.raises(DataError, match=r"over 100 times as many.*lower selection.max_weight"):
            select(names(2), [weight, weight], column(), 0)


def test_a_selection_that_changes_nothing_says_so(caplog):
    select(names(2), [1.0, 1.0], strength(), 0)
    assert "changes nothing" in caplog.text


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"budget": 3}, "selection.budget=3 would be ignored with selection=none; .* use selection=random or"),
        ({"apply": "loss"}, "selection.apply=loss would be ignored with selection=none"),
        (
            {"name": "random", "budget": 3, "strength": {1: 2}},
            "selection.strength={1: 2} would be ignored with selection=random; drop it, or use selection=strength",
        ),
        ({"name": "random", "budget": 3, "apply": "loss"}, "selection.apply=loss would be ignored"),
        ({"name": "random"}, "selection.budget=null"),
        ({"name": "random", "budget": 0}, "selection.budget=0 must be at least 1"),
        ({"name": "best"}, "selection.name=best must be one of none, random"),
        ({"name": "strength"}, "selection.apply=null must be one of sampling, loss"),
        ({"name": "strength", "apply": "loss", "max_weight": 2.0}, "selection.max_weight=2.0 would be ignored"),
        ({"name": "strength", "apply": "loss", "strength": {1: -1}}, "difference 1 the weight -1, .* at least 0"),
        ({"name": "strength", "apply": "loss", "strength": {1: math.nan}}, "difference 1 the weight nan"),
        ({"name": "strength", "apply": "loss", "strength": {1: "x"}}, "difference 1 the weight 'x'"),
        ({"name": "strength", "apply": "loss", "strength": {0.5: 1}}, "difference 0.5, which must be a whole"),
        ({"name": "strength", "apply": "loss", "strength": 3}, "selection.strength=3 must map"),
        ({"name": "margin", "apply": "loss", "transform": "log"}, "selection.transform=log must be one of"),
        ({"name": "margin", "apply": "loss", "transform": "exp", "column": "w"}, "use selection=column"),
        ({"name": "column", "apply": "loss", "transform": "exp"}, "selection.column=null must be"),
        (
            {"name": "margin", "apply": "loss", "transform": "sigmoid", "max_weight": 2.0},
            "selection.max_weight=2.0 would be ignored with selection.transform=sigmoid",
        ),
        ({"name": "margin", "apply": "loss", "transform": "exp", "max_weight": 0.0}, "selection.max_weight=0.0 must"),
    ],
)
def test_what_would_be_ignored_or_cannot_work_is_refused(fields, told):
    with pytest.raises(ConfigError, match=told):
        SelectionConfig(**fields)


def test_strengths_come_from_the_command_line_and_survive_freezing(tmp_path):
    checker = Checker(CONF_DIR, [CONF_DIR], "config", multirun=False)
    (cfg,) = checker.check(["stage=train", "selection=strength", "selection.strength={-100: 1.0, 1: 2.0, 5: 0.5}"])
    given = to_run_config(without_hydra(cfg)).selection
    assert given == strength()
    assert replace(given) == given
    assert orjson.loads(orjson.dumps(given))["strength"] == {"-100": 1.0, "1": 2.0, "5": 0.5}, "as in a manifest"
    freeze(without_hydra(cfg), tmp_path / "config.yaml")
    assert load_run_config(tmp_path / "config.yaml").selection == strength()
    with pytest.raises(ConfigError, match=r"selection.budget=3 would be ignored with selection=none"):
        checker.check(["stage=train", "selection.budget=3"])
