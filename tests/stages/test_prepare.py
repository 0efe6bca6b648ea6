"""stage=prepare on real files, on crafted bad ones, on garbage, and through kills."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefpipe import artifacts
from prefpipe.errors import ArtifactError, ConfigError, DataError, PrefpipeError
from prefpipe.records import Pair, Prompt, ScoredCompletion
from prefpipe.settings import DataMixerConfig, SourceConfig
from prefpipe.sources.adapters import ADAPTERS
from prefpipe.stages.prepare import BAD_ROWS, prepare

UF = "preference/ultrafeedback_prompt_chosen_rejected.400rows.jsonl.gz"
ZH, EN = "preference/llamafactory__dpo_zh_demo.json.gz", "preference/llamafactory__dpo_en_demo.json.gz"
HH = "preference/hh_rlhf__harmless-base_test.first600.jsonl.gz"


def pair(i: int, **other) -> dict:
    return {"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}", **other}


def write(path: Path, rows) -> Path:
    path.write_bytes(b"".join(row if isinstance(row, bytes) else orjson.dumps(row) + b"\n" for row in rows))
    return path


def mixture(weights=None, *, heldout_fraction=0.1, max_bad_fraction=0.01, **paths) -> DataMixerConfig:
    sources = {
        name: path if isinstance(path, SourceConfig) else SourceConfig(str(path)) for name, path in paths.items()
    }
    return DataMixerConfig(
        "test", sources, weights or {}, heldout_fraction=heldout_fraction, max_bad_fraction=max_bad_fraction
    )


def rows_of(folder: Path, record) -> list:
    return list(artifacts.read(folder, record, key="test"))


def accounts(out: Path) -> dict:
    """The counts of the manifest, after checking that nothing is lost: in all, and source by source."""
    found = artifacts.manifest(out / "prompts")
    counts = found["counts"]
    left_out = sum(counts["filtered"].values()) + sum(counts["quarantined"].values())
    assert counts["rows_in"] == counts["rows_out"] + left_out
    for source in found["sources"].values():
        assert source["rows_in"] == source["used"] + source["not_selected"] + sum(source["quarantined"].values())
    assert counts["rows_in"] == sum(source["rows_in"] for source in found["sources"].values())
    listed = Counter(row["code"] for row in quarantine(out))
    assert dict(listed) == counts["quarantined"]
    return found


def quarantine(out: Path) -> list[dict]:
    files = artifacts.manifest(out / "prompts")["quarantine"]
    return [orjson.loads(line) for file in files for line in (out / "prompts" / file["name"]).read_bytes().splitlines()]


# ------------------------------------------------------------------------------------------------ real data


@pytest.fixture(scope="module")
def real(shared_data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("real")
    mixer = mixture(
        uf=shared_data / UF,
        zh=shared_data / ZH,
        en=shared_data / EN,
        hh=shared_data / HH,
        gsm8k=shared_data / "gsm8k/train.jsonl.gz",
        gsm8k_test=SourceConfig(str(shared_data / "gsm8k/test.jsonl.gz"), heldout="all"),
    )
    prepare(out, mixer=mixer, seed=0)
    return out


def test_real_files_in_one_mixture_are_counted_exactly(real):
    found = accounts(real)
    assert found["counts"] == {
        "rows_in": 10392,
        "rows_out": 10373,
        "filtered": {},
        "quarantined": {"DUP": 16, "EMP": 2, "EQL": 1},
    }
    assert {name: (s["format"], s["rows_in"], s["used"], s["quarantined"]) for name, s in found["sources"].items()} == {
        "uf": ("pair_text", 400, 399, {"EQL": 1}),
        "zh": ("sharegpt", 300, 289, {"DUP": 11}),
        "en": ("sharegpt", 300, 295, {"DUP": 5}),
        "hh": ("hh", 600, 598, {"EMP": 2}),
        "gsm8k": ("question_answer", 7473, 7473, {}),
        "gsm8k_test": ("question_answer", 1319, 1319, {}),
    }
    bad = {(row["source"], row["line"], row["code"]) for row in quarantine(real) if row["code"] != "DUP"}
    assert bad == {("hh", 87, "EMP"), ("hh", 517, "EMP"), ("uf", 307, "EQL")}


def test_real_files_are_split_exactly(real):
    pairs = Counter((row.source, row.split) for row in rows_of(real / "pairs", Pair))
    preferences = {
        ("uf", "train"): 356, ("uf", "heldout"): 43,
        ("zh", "train"): 262, ("zh", "heldout"): 27,
        ("en", "train"): 269, ("en", "heldout"): 26,
        ("hh", "train"): 536, ("hh", "heldout"): 62,
    }  # fmt: skip
    assert pairs == preferences
    prompts = Counter((row.source, row.split) for row in rows_of(real / "prompts", Prompt))
    problems = {("gsm8k", "train"): 6715, ("gsm8k", "heldout"): 758, ("gsm8k_test", "heldout"): 1319}
    assert prompts == {**preferences, **problems}
    assert artifacts.manifest(real / "prompts")["splits"] == {"train": 8138, "heldout": 2235}
    assert not (real / "scored").exists()


def test_real_conversations_keep_their_turns(real):
    pairs = rows_of(real / "pairs", Pair)
    turns = Counter((row.source, len(row.messages), row.messages[0]["role"]) for row in pairs)
    english = {(length, first): n for (source, length, first), n in turns.items() if source == "en"}
    assert english == {
        (1, "user"): 112, (2, "system"): 80, (3, "user"): 1, (5, "user"): 55, (7, "user"): 45, (9, "user"): 1,
        (13, "user"): 1,
    }  # fmt: skip
    assert max(length for source, length, _ in turns if source == "hh") == 23
    assert all(row.messages[-1]["role"] == "user" for row in pairs)


def test_sources_are_mixed(real):
    sources = [row.source for row in rows_of(real / "prompts", Prompt)]
    for start in range(0, 10_000, 1000):
        assert 600 < Counter(sources[start : start + 1000])["gsm8k"] < 850


# ------------------------------------------------------------------------------------------------ shares and duplicates


@pytest.mark.parametrize(("weight", "written", "used"), [(0.1, 1, 1), (1.0, 10, 10), (2.5, 25, 10)])
def test_weights_take_a_part_or_repeat_rows(tmp_path, weight, written, used):
    file = write(tmp_path / "a.jsonl", [pair(i) for i in range(10)])
    prepare(tmp_path / "out", mixer=mixture({"a": weight}, a=file), seed=0)
    pairs = rows_of(tmp_path / "out" / "pairs", Pair)
    assert (len(pairs), len({row.prompt_id for row in pairs})) == (written, used)
    found = accounts(tmp_path / "out")
    assert found["counts"]["rows_out"] == found["num_records"] == used  # each prompt once
    assert max(Counter(row.prompt_id for row in pairs).values()) == -int(-weight // 1)


def test_duplicates_go_before_repeats_are_made(tmp_path):
    first = write(tmp_path / "a.jsonl", [pair(0), pair(1), pair(0), pair(2)])
    second = write(tmp_path / "b.jsonl", [pair(2), pair(3), {**pair(0), "rejected": ["bad 0", "worse"]}])
    prepare(tmp_path / "out", mixer=mixture({"a": 2.0}, a=first, b=second), seed=0)
    pairs = Counter((row.source, row.chosen, row.rejected) for row in rows_of(tmp_path / "out" / "pairs", Pair))
    assert pairs == {
        ("a", "good 0", "bad 0"): 2,
        ("a", "good 1", "bad 1"): 2,
        ("a", "good 2", "bad 2"): 2,
        ("b", "good 3", "bad 3"): 1,
        ("b", "good 0", "worse"): 1,
    }
    accounts(tmp_path / "out")
    assert [(r["source"], r["line"], r["code"], r["raw"]) for r in quarantine(tmp_path / "out")] == [
        ("a", 3, "DUP", ""),
        ("b", 1, "DUP", ""),
    ]


def test_a_spec_of_files_takes_a_fraction_and_a_number(tmp_path, caplog):
    write(tmp_path / "a.jsonl", [pair(i) for i in range(100)])
    write(tmp_path / "b.jsonl", [{"question": f"q{i}", "answer": "#### 1"} for i in range(100)])
    mixer = DataMixerConfig("files", spec=f"{tmp_path}/a.jsonl:0.5;{tmp_path}/b.jsonl:7")
    with caplog.at_level("INFO"):
        prepare(tmp_path / "out", mixer=mixer, seed=0)
    assert "a.jsonl: 100 rows as pair_text; 0.5 is a fraction: 50 of 100 rows, chosen by seed" in caplog.text
    assert "b.jsonl: 100 rows as question_answer; 7 is a number of rows: 7 of 100, chosen by seed" in caplog.text
    found = accounts(tmp_path / "out")
    assert found["counts"]["filtered"] == {"not_selected": 143}
    assert Counter(row.source for row in rows_of(tmp_path / "out/prompts", Prompt)) == {"a.jsonl": 50, "b.jsonl": 7}
    with pytest.raises(ConfigError, match="asks for 101 rows, but only 100 can be used"):
        prepare(tmp_path / "more", mixer=DataMixerConfig("files", spec=f"{tmp_path}/a.jsonl:101"), seed=0)


def test_one_prompt_in_rows_of_all_kinds_is_one_prompt_with_its_answer(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"prompt": "q", "chosen": "x", "rejected": "y"}])
    b = write(tmp_path / "b.jsonl", [{"prompt": "q", "completion": "x", "label": True}])
    c = write(tmp_path / "c.jsonl", [{"question": "q", "answer": "#### 3"}])
    prepare(tmp_path / "out", mixer=mixture(a=a, b=b, c=c), seed=0)
    (prompt,) = rows_of(tmp_path / "out/prompts", Prompt)
    assert (prompt.answer, prompt.source) == ("#### 3", "c")
    assert [row.scores for row in rows_of(tmp_path / "out/scored", ScoredCompletion)] == [{"label": 1.0}]
    assert len(rows_of(tmp_path / "out/pairs", Pair)) == 1


def test_repeated_bare_prompts_are_written_once_with_a_warning(tmp_path, caplog):
    file = write(tmp_path / "a.jsonl", [{"prompt": f"q{i}"} for i in range(4)])
    prepare(tmp_path / "out", mixer=mixture({"a": 2.0}, a=file), seed=0)
    assert artifacts.manifest(tmp_path / "out/prompts")["num_records"] == 4
    assert "data_mixer.weights.a repeats bare prompts; each is written once" in caplog.text


# ------------------------------------------------------------------------------------------------ held out


def test_a_prompt_of_a_test_set_is_held_out_everywhere_even_if_it_is_not_selected(tmp_path):
    train = write(tmp_path / "a.jsonl", [pair(i) for i in range(100)])
    test = write(tmp_path / "b.jsonl", [{"prompt": f"question {i}"} for i in range(50)])
    sources = {"train": SourceConfig(str(train), heldout="none"), "test": SourceConfig(str(test), heldout="all")}
    prepare(tmp_path / "out", mixer=mixture({"test": 0.1}, **sources), seed=0)
    splits = {row.messages[0]["content"]: row.split for row in rows_of(tmp_path / "out/pairs", Pair)}
    assert splits == {f"question {i}": "heldout" if i < 50 else "train" for i in range(100)}


texts = st.text(alphabet="abc", min_size=1, max_size=2)
some_rows = st.lists(st.builds(lambda p, c, r: {"prompt": p, "chosen": c, "rejected": r + "!"}, texts, texts, texts))
some_prompts = st.lists(st.builds(lambda p: {"prompt": p}, texts))
kinds = st.sampled_from(["by_hash", "all", "none"])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sources=st.lists(
        st.tuples(some_rows | some_prompts, kinds, st.sampled_from([0.5, 1.0, 1.7])), min_size=1, max_size=3
    ),
    fraction=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_no_prompt_is_on_both_sides_of_the_split(tmp_path_factory, sources, fraction):
    folder = tmp_path_factory.mktemp("split")
    mixer = mixture(heldout_fraction=fraction, max_bad_fraction=1.0)
    for i, (rows, heldout, weight) in enumerate(sources):
        mixer.sources[f"s{i}"] = SourceConfig(str(write(folder / f"{i}.jsonl", rows)), heldout=heldout)
        mixer.weights[f"s{i}"] = weight
    try:
        prepare(folder / "out", mixer=mixer, seed=0)
    except PrefpipeError as error:
        assert "has no rows" in str(error) or "is no row" in str(error)
        return
    accounts(folder / "out")
    sides: dict[str, set[str]] = {}
    for name, record in (("prompts", Prompt), ("pairs", Pair)):
        if artifacts.is_complete(folder / "out" / name):
            for row in rows_of(folder / "out" / name, record):
                sides.setdefault(row.prompt_id, set()).add(row.split)
    assert all(len(found) == 1 for found in sides.values())


# ------------------------------------------------------------------------------------------------ near-duplicates


LONG = "tell me in a few short words how {} go from the town to the far side of the old bridge number {}"


def cleaned(tmp_path, *, heldout_fraction=0.0, weights=None, decontaminate=(), near_duplicates=None, **sources):
    mixer = DataMixerConfig(
        "test",
        sources,
        weights or {},
        heldout_fraction=heldout_fraction,
        near_duplicates=near_duplicates,
        decontaminate=list(decontaminate),
    )
    prepare(tmp_path / "out", mixer=mixer, seed=0)
    return accounts(tmp_path / "out")


def test_near_duplicate_prompts_are_quarantined_with_what_they_resemble(tmp_path):
    """Of 14 words the 14th differs: 11 of 13 runs of three words are alike."""
    texts = [
        "a b c d e f g h i j k l m n",
        "a b c d e f g h i j k l m x",
        "quite another thing",
        "a B c d e f g h i j k l m",
    ]
    file = write(tmp_path / "a.jsonl", [{"prompt": t, "chosen": "yes", "rejected": "no"} for t in texts])
    found = cleaned(tmp_path, near_duplicates=0.8, a=SourceConfig(str(file)))
    kept = {row.messages[0]["content"] for row in rows_of(tmp_path / "out/pairs", Pair)}
    assert kept == {texts[0], texts[2]}
    assert kept == {row.messages[0]["content"] for row in rows_of(tmp_path / "out/prompts", Prompt)}
    assert found["near_duplicates"] == {"prompts": 4, "removed": 2}
    listed = quarantine(tmp_path / "out")
    assert [(row["line"], row["code"]) for row in listed] == [(2, "SIM"), (4, "SIM")]
    assert listed[0]["message"] == f"{file}:2: the prompt is 0.85 similar to that at {file}:1"
    # 2 of 4 rows are no fault of the file: max_bad_fraction=0.01 lets them pass.
    assert found["sources"]["a"]["quarantined"] == {"SIM": 2}


def test_a_held_out_prompt_stays_and_the_one_to_train_on_goes(tmp_path):
    rows = [pair(i) | {"prompt": LONG.format(f"they{i}", i)} for i in range(60)]
    near = [pair(i) | {"prompt": row["prompt"] + " then"} for i, row in enumerate(rows)]
    sources = {"a": SourceConfig(str(write(tmp_path / "a.jsonl", [*rows, *near])))}
    found = cleaned(tmp_path, near_duplicates=0.75, heldout_fraction=0.5, **sources)
    pairs = rows_of(tmp_path / "out/pairs", Pair)
    assert found["counts"]["quarantined"] == {"SIM": 60}
    by_number = {row.messages[0]["content"].removesuffix(" then"): row.split for row in pairs}
    assert len(by_number) == len(pairs) == 60
    # Of two that are alike one is held out three times in four, and then that one is kept.
    assert 35 <= Counter(by_number.values())["heldout"] <= 55


def test_training_prompts_in_an_evaluation_set_are_removed_and_counted_for_each_set(tmp_path):
    tests = [{"prompt": LONG.format(f"we{i}", i)} for i in range(20)]
    more = [{"prompt": f"count from {i} up to the number {i} times seven hundred and say it"} for i in range(5)]
    train = [
        pair(0) | {"prompt": tests[0]["prompt"]},  # the same: held out, not removed
        pair(1) | {"prompt": "First. " + tests[1]["prompt"].upper() + " " + " ".join("qrstuvwxyz")},
        pair(2) | {"prompt": tests[2]["prompt"] + " please"},
        pair(3) | {"prompt": "something else altogether, and long enough to have runs of eight words"},
        pair(4) | {"prompt": more[4]["prompt"] + " now"},
    ]
    sources = {
        "train": SourceConfig(str(write(tmp_path / "train.jsonl", train))),
        "tests": SourceConfig(str(write(tmp_path / "tests.jsonl", tests)), heldout="all"),
        "more": SourceConfig(str(write(tmp_path / "more.jsonl", more)), heldout="all"),
    }
    weights = {"tests": 0}
    found = cleaned(tmp_path, decontaminate=["tests", "more"], weights=weights, near_duplicates=0.9, **sources)
    splits = {row.chosen: row.split for row in rows_of(tmp_path / "out/pairs", Pair)}
    assert splits == {"good 0": "heldout", "good 3": "train"}
    report = found["decontamination"]
    assert {name: counts["prompts"] for name, counts in report.items()} == {"tests": 20, "more": 5}
    assert report["tests"]["by_words"] + report["tests"]["by_similarity"] == 2
    assert report["more"]["by_words"] + report["more"]["by_similarity"] == 1
    assert found["sources"]["train"]["quarantined"] == {"LEK": 3}
    assert found["sources"]["tests"] | {"path": ""} == {
        "path": "", "format": "prompt", "rows_in": 20, "used": 0, "not_selected": 20, "quarantined": {},
        "selection": "0 takes none of 20 rows: read for data_mixer.decontaminate alone",
    }  # fmt: skip
    message = quarantine(tmp_path / "out")[0]["message"]
    assert f"the prompt at {tmp_path / 'tests.jsonl'}:2 of the evaluation set tests is in this one" in message
    assert "train.jsonl:2: " in message


def test_test_sets_are_kept_whole_however_alike_their_prompts_are(tmp_path):
    tests = [{"prompt": LONG.format("they", i)} for i in range(10)]
    sources = {
        "tests": SourceConfig(str(write(tmp_path / "tests.jsonl", tests)), heldout="all"),
        "train": SourceConfig(str(write(tmp_path / "train.jsonl", [pair(0) | {"prompt": LONG.format("they", 99)}]))),
    }
    found = cleaned(tmp_path, near_duplicates=0.8, **sources)
    assert {name: source["used"] for name, source in found["sources"].items()} == {"tests": 10, "train": 0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"near_duplicates": 1.5}, "data_mixer.near_duplicates=1.5 must be above 0 and at most 1"),
        ({"decontaminate_share": 0.2}, "data_mixer.decontaminate_share=0.2 would be ignored"),
        ({"decontaminate": ["b"]}, "data_mixer.decontaminate names b, which is none of data_mixer.sources"),
        ({"decontaminate": ["a"]}, "data_mixer.decontaminate names a, which has heldout=by_hash"),
        ({"weights": {"a": 0}}, "data_mixer.weights.a=0 must be above 0; leave the source out instead"),
    ],
)
def test_settings_of_cleaning_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message):
        DataMixerConfig("test", {"a": SourceConfig("a.jsonl")}, **settings)


def test_documents_are_shortened_to_what_is_cited_where_a_source_says_so(tmp_path):
    document = "".join(f"<C{i}>sentence number {i} " for i in range(50))
    long = {"question": f"[Document Start]\n{document}\n[Document End]\n\nWhy?", "answer": "<cite>[9-9]</cite>"}
    short = {"question": "[Document Start]\n<C0>one\n[Document End]\n\nWhy?", "answer": "<cite>[0-0]</cite>"}
    rows = [long, short, {"question": "no document", "answer": "x"}]
    source = SourceConfig(str(write(tmp_path / "a.jsonl", rows)), evidence_tokens=40, evidence_reserved_tokens=8)

    def make_counter():
        return lambda texts: [len(text.split()) for text in texts]

    mixer = mixture(max_bad_fraction=1.0, a=source)
    with pytest.raises(ConfigError, match="stage=prepare needs a tokenizer"):
        prepare(tmp_path / "out", mixer=mixer, seed=0)
    prepare(tmp_path / "out", mixer=mixer, seed=0, count_tokens=("words", make_counter))
    found = accounts(tmp_path / "out")
    assert found["uses"]["tokenizer"] == "words"
    assert found["counts"]["quarantined"] == {"CIT": 1}
    dropped = found["sources"]["a"]["shortened_to_evidence"]
    assert (dropped["rows"], dropped["over_budget"]) == (1, 0)
    prompts = {row.answer: row for row in rows_of(tmp_path / "out/prompts", Prompt)}
    (changed,) = (row for row in prompts.values() if "sentences" in row.meta)
    assert 9 in changed.meta["sentences"]
    assert changed.meta["num_sentences"] == 50 - dropped["sentences_dropped"]
    assert changed.answer == f"<cite>[{changed.meta['sentences'].index(9)}-{changed.meta['sentences'].index(9)}]</cite>"
    with pytest.raises(ConfigError, match=r"evidence_reserved_tokens=1024 must be at least 0 and below"):
        SourceConfig("a", evidence_tokens=500)
    with pytest.raises(ConfigError, match=r"evidence_reserved_tokens=5 would be ignored"):
        SourceConfig("a", evidence_reserved_tokens=5)


# ------------------------------------------------------------------------------------------------ bad rows


BAD = {
    1: (b'{"prompt": "caf\xe9", "chosen": "a", "rejected": "b"}\n', "ENC"),
    2: (b'{"prompt": "a", "chosen": "b", "rejected": "c"\n', "JSN"),
    3: ({"prompt": "a", "choosen": "b", "rejected": "c"}, "KEY"),
    4: ({"prompt": "a", "chosen": "b"}, "KEY"),
    5: ({"prompt": "a", "chosen": 1, "rejected": "c"}, "TYP"),
    6: ({"prompt": "a", "chosen": "  ", "rejected": "c"}, "EMP"),
    7: ({"prompt": "a", "chosen": "b", "rejected": "b"}, "EQL"),
    8: ({"prompt": [{"role": "wizard", "content": "a"}], "chosen": "b", "rejected": "c"}, "ROL"),
    9: (b'{"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": NaN}\n', "NAN"),
    10: ({"prompt": "a\x00", "chosen": "b", "rejected": "c"}, "CTL"),
    11: (pair(0), "DUP"),
}  # fmt: skip


def test_each_bad_row_is_quarantined_with_file_line_and_code(tmp_path):
    rows = [row for row, _ in BAD.values()]
    file = write(tmp_path / "a.jsonl", [pair(0), *rows, *(pair(i) for i in range(1, 1000))])
    prepare(tmp_path / "out", mixer=mixture(a=file), seed=0)
    found = accounts(tmp_path / "out")
    assert found["counts"]["rows_out"] == 1000
    assert [(row["file"], row["line"], row["code"]) for row in quarantine(tmp_path / "out")] == [
        (str(file), 1 + number, code) for number, (_, code) in BAD.items()
    ]
    assert all(row["message"].startswith(f"{file}:{row['line']}: ") for row in quarantine(tmp_path / "out"))
    assert "did you mean 'choosen'" in quarantine(tmp_path / "out")[2]["message"]
    # 10 of 1011 rows are bad, 0.99 %; the duplicate does not count.
    assert not (tmp_path / "out" / BAD_ROWS).exists()


def test_more_than_one_percent_is_refused_and_listed(tmp_path):
    file = write(tmp_path / "a.jsonl", [*(pair(i) for i in range(98)), {"prompt": "a"}, {"prompt": "b"}])
    with pytest.raises(DataError) as caught:
        prepare(tmp_path / "out", mixer=mixture(a=file), seed=0)
    message = str(caught.value)
    assert "2 of 100 rows are bad (2.00%), more than data_mixer.max_bad_fraction=0.01 allows: KEY 2" in message
    assert f"First: KEY {file}:99: no key 'chosen'" in message
    assert "data_mixer.max_bad_fraction=0.02" in message
    listed = [json.loads(line) for line in (tmp_path / "out" / BAD_ROWS).read_text().splitlines()]
    assert [row["line"] for row in listed] == [99, 100]
    assert not artifacts.is_complete(tmp_path / "out/prompts")
    prepare(tmp_path / "out", mixer=mixture(a=file, max_bad_fraction=0.02), seed=0)
    assert accounts(tmp_path / "out")["counts"]["quarantined"] == {"KEY": 2}
    assert not (tmp_path / "out" / BAD_ROWS).exists()


def test_exactly_one_percent_is_accepted(tmp_path):
    file = write(tmp_path / "a.jsonl", [*(pair(i) for i in range(99)), {"prompt": "a"}])
    prepare(tmp_path / "out", mixer=mixture(a=file), seed=0)
    assert accounts(tmp_path / "out")["counts"]["rows_out"] == 99


def test_a_source_without_a_good_row_is_refused_however_small(tmp_path):
    good = write(tmp_path / "a.jsonl", [pair(i) for i in range(1000)])
    bad = write(tmp_path / "b.jsonl", [{"prompt": "a", "chosen": "", "rejected": "b"}])
    with pytest.raises(DataError, match="among them every row of b: EMP 1"):
        prepare(tmp_path / "out", mixer=mixture(a=good, b=bad), seed=0)
    with pytest.raises(DataError, match="has no rows"):
        prepare(tmp_path / "out", mixer=mixture(a=good, b=write(tmp_path / "c.jsonl", [])), seed=0)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
words = st.text(max_size=4) | st.sampled_from(["\n\nHuman: a\n\nAssistant: b", "\n\nHuman:", " ", "\x00"])
turns = st.lists(
    st.fixed_dictionaries(
        {}, optional={
            "role": st.sampled_from(["user", "assistant", "system", "wizard"]) | json_values,
            "content": words | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": words})) | json_values,
            "from": st.sampled_from(["human", "gpt"]),
            "value": words,
        },
    ),
    max_size=4,
)  # fmt: skip
fields = ["prompt", "chosen", "rejected", "reject", "conversations", "messages", "instruction", "input", "output",
          "label", "history", "system", "completion", "completions", "question", "answer", "score_chosen", "meta",
          "chosen_messages", "rejected_messages"]  # fmt: skip
near_rows = st.dictionaries(st.sampled_from(fields), words | turns | json_values, max_size=6)
lines = st.one_of(
    near_rows.map(lambda row: json.dumps(row).encode()),
    json_values.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=20).map(lambda raw: raw.replace(b"\n", b"")),
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(lines, max_size=25), format_=st.sampled_from(["auto", *ADAPTERS]))
def test_garbage_is_accounted_for_and_never_crashes(tmp_path_factory, rows, format_):
    folder = tmp_path_factory.mktemp("garbage")
    good = {"a": write(folder / "a.jsonl", [pair(i) for i in range(3)])}
    garbage = SourceConfig(str(write(folder / "b.jsonl", [row + b"\n" for row in rows])), format=format_)
    try:
        prepare(folder / "out", mixer=mixture(max_bad_fraction=1.0, b=garbage, **good), seed=0)
    except DataError as error:
        assert any(why in str(error) for why in ("every row of b", "has no rows", "of no known format"))
        return
    found = accounts(folder / "out")
    # str.strip would also take control characters that are no JSON white space.
    assert found["sources"]["b"]["rows_in"] == sum(bool(row.strip()) for row in rows)
    assert Counter(row["source"] for row in quarantine(folder / "out"))["a"] == 0


# ------------------------------------------------------------------------------------------------ again, and killed


def test_the_same_command_again_changes_nothing(tmp_path, folder_of_parts):
    file = write(tmp_path / "a.jsonl", [pair(i) for i in range(20)])
    for _ in range(2):
        prepare(tmp_path / "out", mixer=mixture(a=file), seed=0)
        before = folder_of_parts(tmp_path / "out")
    assert folder_of_parts(tmp_path / "out") == before
    with pytest.raises(ArtifactError, match="seed 0 -> 1"):
        prepare(tmp_path / "out", mixer=mixture(a=file), seed=1)


def test_a_changed_input_file_is_noticed_and_named(tmp_path):
    file = write(tmp_path / "a.jsonl", [pair(i) for i in range(20)])
    prepare(tmp_path / "out", mixer=mixture(a=file), seed=0)
    write(file, [{"prompt": f"only a prompt {i}"} for i in range(20)])
    with pytest.raises(ArtifactError, match=rf"files\.{file}"):
        prepare(tmp_path / "out", mixer=mixture(a=file), seed=0)
    prepare(tmp_path / "out", mixer=mixture(a=file), seed=0, overwrite=True)
    assert not (tmp_path / "out/pairs").exists()  # they were of the other data
    prepare(tmp_path / "out", mixer=mixture(a=file), seed=0)


def test_lost_companions_are_noticed(tmp_path):
    file = write(tmp_path / "a.jsonl", [pair(i) for i in range(20)])
    prepare(tmp_path / "out", mixer=mixture(a=file), seed=0)
    (tmp_path / "out/pairs").rename(tmp_path / "moved")
    with pytest.raises(ArtifactError, match=r"pairs is missing .* overwrite=true"):
        prepare(tmp_path / "out", mixer=mixture(a=file), seed=0)


def test_parts_are_streamed_in_order(tmp_path, monkeypatch, folder_of_parts):
    file = write(tmp_path / "a.jsonl", [pair(i) for i in range(25)])
    prepare(tmp_path / "whole", mixer=mixture(a=file), seed=0)
    monkeypatch.setattr("prefpipe.stages.prepare.RECORDS_PER_PART", 10)
    prepare(tmp_path / "parts", mixer=mixture(a=file), seed=0)
    accounts(tmp_path / "parts")
    for name, record in (("prompts", Prompt), ("pairs", Pair)):
        assert len(artifacts.manifest(tmp_path / "parts" / name)["parts"]) == 3
        assert rows_of(tmp_path / "parts" / name, record) == rows_of(tmp_path / "whole" / name, record)


RUN = """
import os, signal, sys
from pathlib import Path
from prefpipe import artifacts
from prefpipe.settings import DataMixerConfig
from prefpipe.stages import prepare

folder, out, kill_at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
prepare.RECORDS_PER_PART = 20
os.chdir(folder)
done = 0

def dying(real):
    def call(*args, **kwargs):
        global done
        done += 1
        if done == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call

os.fsync, Path.rename = dying(os.fsync), dying(Path.rename)
mixer = DataMixerConfig(
    "files", spec="pairs.jsonl:1.5;scored.jsonl:0.5;prompts.jsonl:30", heldout_fraction=0.2, max_bad_fraction=0.1
)
prepare.prepare(out, mixer=mixer, seed=1)
print(done)
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data/pairs.jsonl", [pair(i // 2) for i in range(100)] + [{"prompt": "x"}])
    labelled = [{"prompt": f"question {i}", "completion": "yes", "label": i % 3 == 0} for i in range(60)]
    write(tmp_path / "data/scored.jsonl", labelled)
    write(tmp_path / "data/prompts.jsonl", [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(40)])

    def start(out: str, *, kill_at: int = 0, hash_seed: str = "0") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", RUN, str(tmp_path / "data"), str(tmp_path / out), str(kill_at)]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    return start


def test_the_bytes_do_not_depend_on_the_hash_seed(tmp_path, run, folder_of_parts):
    for name in ("1", "2"):
        done = run(name, hash_seed=name)
        assert done.returncode == 0, done.stderr
    assert folder_of_parts(tmp_path / "1") == folder_of_parts(tmp_path / "2")
    assert set(artifacts.manifest(tmp_path / "1/prompts")["companions"]) == {"pairs", "scored", "demonstrations"}


def test_a_run_killed_anywhere_and_started_again_writes_the_same_bytes(tmp_path, run, folder_of_parts):
    """One kill at every sixth durable operation (fsync or rename); each run is then simply started again."""
    operations = int(run("whole").stdout)
    whole = folder_of_parts(tmp_path / "whole")
    assert operations > 40
    for kill_at in range(2, operations + 1, 6):
        killed = run(str(kill_at), kill_at=kill_at)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        again = run(str(kill_at))
        assert again.returncode == 0, again.stderr
        assert folder_of_parts(tmp_path / str(kill_at)) == whole, kill_at
