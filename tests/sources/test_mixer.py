"""How much of which source, in which order."""

from collections import Counter

import pytest

from prefpipe.errors import ConfigError
from prefpipe.settings import DataMixerConfig, SourceConfig
from prefpipe.sources.mixer import Share, ingredients, is_heldout, mixed_order


def times(weight: float) -> Share:
    return Share("key", weight=weight)


def rows(number: int) -> Share:
    return Share("key", num_rows=number)


@pytest.mark.parametrize(
    ("share", "available", "total"),
    [
        (times(0.1), 10, 1),
        (times(1.0), 10, 10),
        (times(2.5), 10, 25),
        (times(2.1), 10, 21),
        (times(0.5), 399, 200),
        (times(0.3), 10, 3),
        (rows(1), 10, 1),
        (rows(10), 10, 10),
        (times(0.5), 0, 0),
    ],
)
def test_how_many_rows_a_share_takes(share, available, total):
    order = mixed_order({"a": share}, {"a": available}, seed=0)
    assert len(order) == total
    copies = Counter(order).values()
    assert not copies or max(copies) - min(copies) <= 1


def test_too_few_rows_name_both_numbers():
    with pytest.raises(ConfigError, match="asks for 11 rows, but only 10 can be used"):
        rows(11).counts(10)
    with pytest.raises(ConfigError, match=r"0\.01 of 10 rows is no row"):
        times(0.01).counts(10)


def test_the_order_mixes_sources_and_follows_the_seed():
    shares = {"a": times(1.0), "b": rows(50)}
    order = mixed_order(shares, {"a": 100, "b": 100}, seed=0)
    assert list(order) == list(mixed_order(shares, {"a": 100, "b": 100}, seed=0))
    assert list(order) != list(mixed_order(shares, {"a": 100, "b": 100}, seed=1))
    first_half = sum(row >= 100 for row in order[:75])
    assert 15 <= first_half <= 35  # 25 expected


def test_what_is_chosen_of_a_source_does_not_depend_on_the_others():
    alone = set(mixed_order({"a": rows(5)}, {"a": 100}, seed=3))
    behind = {row - 7 for row in mixed_order({"z": times(1.0), "a": rows(5)}, {"z": 7, "a": 100}, seed=3) if row >= 7}
    assert alone == behind


def test_a_point_makes_a_fraction_and_an_integer_a_number():
    mixer = DataMixerConfig(name="files", spec=" a.jsonl:0.5; b.json.gz:1000;c.csv:1;d.csv:1.0;hub:org/name:.25; ")
    found = ingredients(mixer)
    assert [(i.name, i.source.path, i.share.weight, i.share.num_rows) for i in found] == [
        ("a.jsonl", "a.jsonl", 0.5, None),
        ("b.json.gz", "b.json.gz", 1.0, 1000),
        ("c.csv", "c.csv", 1.0, 1),
        ("d.csv", "d.csv", 1.0, None),
        ("hub:org/name", "hub:org/name", 0.25, None),
    ]
    said = [share.described(1000) for share in (i.share for i in found)]
    assert said[:4] == [
        "0.5 is a fraction: 500 of 1000 rows, chosen by seed",
        "1000 is a number of rows: 1000 of 1000, chosen by seed",
        "1 is a number of rows: 1 of 1000, chosen by seed",
        "1.0 is a fraction: all 1000 rows",
    ]
    assert times(2.5).described(10) == "2.5 is a weight: all 10 rows 2 times and 5 of them, chosen by seed, once more"


@pytest.mark.parametrize(
    "spec", ["a.jsonl", "a.jsonl:", "a.jsonl:half", "a.jsonl:0", "a.jsonl:0.0", "a.jsonl:-1", ":5"]
)
def test_a_wrong_spec_shows_a_right_one(spec):
    with pytest.raises(ConfigError, match=r"e\.g\. data_mixer\.spec='a\.jsonl:0\.5;b\.json\.gz:1000'"):
        ingredients(DataMixerConfig(name="files", spec=spec))


def test_files_of_one_name_keep_their_folders():
    mixer = DataMixerConfig(name="files", spec="x/train.jsonl:1.0;y/train.jsonl:1.0;x/test.jsonl:1.0")
    assert [i.name for i in ingredients(mixer)] == ["x/train.jsonl", "y/train.jsonl", "test.jsonl"]
    with pytest.raises(ConfigError, match="two sources are named"):
        ingredients(DataMixerConfig(name="files", spec="x/a.jsonl:1.0;x/a.jsonl:1.0"))
    with pytest.raises(ConfigError, match="has no sources"):
        ingredients(DataMixerConfig(name="files"))


def test_named_sources_come_in_the_order_of_their_names():
    sources = {name: SourceConfig(path=f"{name}.jsonl") for name in ("b", "a")}
    mixer = DataMixerConfig(name="x", sources=sources, weights={"b": 2.0})
    assert [(i.name, i.share.weight) for i in ingredients(mixer)] == [("a", 1.0), ("b", 2.0)]


def test_holding_out_by_hash_takes_the_fraction_and_only_grows_with_it():
    ids = [f"{i * 0x9E3779B97F4A7C15 % 2**64:016x}" for i in range(10_000)]
    tenth, fifth = ({i for i in ids if is_heldout(i, fraction)} for fraction in (0.1, 0.2))
    assert abs(len(tenth) - 1000) < 20
    assert tenth < fifth
    assert all(is_heldout(i, 1.0) and not is_heldout(i, 0.0) for i in ids)
