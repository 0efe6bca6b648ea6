"""The benchmarks themselves, tiny: that they run, agree with their peers and write what they promise."""

import importlib.util
from itertools import pairwise
from pathlib import Path

import orjson
import pytest

from benchmarks import deduplicate, driver, generation, pairing, scoring
from benchmarks.harness import compare, report
from benchmarks.profiles import PROFILES, SHAPES, build_tokenizer, make_pairs, padding

needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="trl is absent; `make bench` installs it (extra `bench`)"
)


def test_sides_take_turns_and_the_first_round_does_not_count() -> None:
    called: list[str] = []

    def side(name: str, seconds: list[float]) -> float:
        called.append(name)
        return seconds.pop(0)

    ours, theirs = [9.0, 1.0, 2.0, 1.0], [9.0, 4.0, 4.0, 3.0]
    row = compare("p", ours=lambda: side("ours", ours), theirs=lambda: side("theirs", theirs), repeats=3, target=2.0)
    assert called == ["ours", "theirs", "ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert (row.ratio, row.ratio_min, row.ratio_max) == (3.0, 2.0, 4.0)
    assert (row.ours_seconds, row.theirs_seconds, row.target) == (1.0, 4.0, 2.0)


def test_report_names_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = compare("p", ours=lambda: 1.0, theirs=lambda: 3.0, repeats=1, target=4.0, threads=1)
    report([row], tmp_path / "results" / "out.json")
    written = (tmp_path / "results" / "out.json").read_text()
    data = orjson.loads(written)
    assert data["rows"][0]["ratio"] == 3.0
    assert data["machine"]["cpu_count"]
    assert "torch" in data["versions"]
    assert str(Path.home()) not in written
    assert str(Path(__file__).parents[1]) not in written
    assert "missed" in capsys.readouterr().out


@pytest.mark.parametrize("name", PROFILES)
def test_lengths_are_in_tokens(name: str) -> None:
    profile, vocabulary = PROFILES[name], SHAPES["7m"].vocabulary
    tokenizer = build_tokenizer(vocabulary)
    assert len(tokenizer) == vocabulary
    pairs = make_pairs(profile, 40, vocabulary)
    lengths = []
    for pair in pairs:
        prompt = tokenizer.apply_chat_template(pair.messages, add_generation_prompt=True, tokenize=False)
        ids = [tokenizer(text).input_ids for text in (prompt, f"{pair.chosen}<|end|>", f"{pair.rejected}<|end|>")]
        lengths.append(tuple(map(len, ids)))
    assert all(p + max(c, r) <= profile.max_tokens for p, c, r in lengths)
    figures = padding(lengths, profile.batch_size)
    if profile.spread == (0.0, 0.0):
        assert set(lengths) == {(profile.prompt, profile.completion, profile.completion)}
        assert figures["padded_tokens"] == figures["tokens"]
    else:
        assert 1.5 < figures["padded_tokens"] / figures["tokens"] < 3


def test_generation() -> None:
    rows = generation.run(repeats=1, num_prompts=4, num_samples=2, threads=1)
    assert [row.peer for row in rows] == ["transformers", "without, s per 1000 tokens"]
    assert all(row.ratio > 0 for row in rows)
    assert rows[1].details["results"] > 0


def test_a_calculator_that_is_wrong_is_refused() -> None:
    generation.refuse_wrong_results(["3 <<2*3=6>>6", "none", "<<2-3=-1>>"])
    with pytest.raises(SystemExit, match=r"gate: 2\*3=7"):
        generation.refuse_wrong_results(["<<2*3=7>>"])


def test_vllm_that_samples_other_tokens_is_refused(tmp_path: Path) -> None:
    from benchmarks.vllm_generation import refuse_other_tokens
    from prefpipe.records import Completion

    common = {"prompt_id": "p", "messages": [], "source": "t", "text": ""}
    ours = [Completion(completion_id=str(i), token_ids=[i, 7], **common) for i in range(100)]
    theirs = [[i, 7] for i in range(99)] + [[0]]
    file = tmp_path / "theirs.jsonl"
    file.write_bytes(b"".join(orjson.dumps({"ids": ids}) + b"\n" for ids in theirs))
    assert refuse_other_tokens(ours, file) == 0.99
    file.write_bytes(b"".join(orjson.dumps({"ids": ids}) + b"\n" for ids in theirs[1:] + theirs[:1]))
    with pytest.raises(SystemExit, match="gate: only"):
        refuse_other_tokens(ours, file)


@pytest.mark.parametrize("name", pairing.PROFILES)
def test_pairing(name: str) -> None:
    (row,) = pairing.run(repeats=1, num_completions=64, names=[name])
    assert row.ratio > 0
    assert 20 < row.details["theirs_peak_mib"] < row.details["allowed_peak_mib"]


def test_seconds_are_held_against_what_is_allowed() -> None:
    row = driver.against_allowed("plan", [1.0, 2.0, 4.0], {})
    assert (row.ratio, row.ratio_min, row.ratio_max, row.target) == (0.75, 0.375, 1.5, 1.0)
    assert (row.ours_seconds, row.theirs_seconds, row.details["max_seconds"]) == (2.0, 1.5, 4.0)


def test_deduplicate() -> None:
    (row,) = deduplicate.run(repeats=1, num_prompts=400)
    assert row.ratio > 0
    assert row.details["ours_removed"] > 50


@needs_trl
def test_train_step_against_trl() -> None:
    from benchmarks import train_step

    rows = train_step.run(
        ["tiny", "tiny_simpo"],
        threads=[1],
        repeats=1,
        references=["cached", "online"],
        shape="tiny",
        memory_shape=None,
        warm_up=False,
    )
    assert [row.peer for row in rows] == ["trl cached", "trl online", "trl"]
    assert all(row.ratio > 0 for row in rows)


@needs_trl
def test_adapters_against_trl() -> None:
    from benchmarks import train_step

    (row,) = train_step.run(
        ["tiny"], threads=[1], repeats=1, shape="tiny_lora", memory_shape=None, batching="shared", warm_up=False
    )
    assert row.ratio > 0
    assert row.details["lora_rank"] == 4


@needs_trl
def test_sides_that_train_on_other_tokens_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import sides
    from benchmarks.profiles import TINY, build_model

    race = sides.Race(TINY["dpo"], build_model(SHAPES["tiny"], tmp_path), threads=1)
    ids = sides.our_ids(race)
    monkeypatch.setattr(sides, "our_ids", lambda _: [*ids[:-1], (*ids[-1][:2], [7])])
    with pytest.raises(SystemExit, match="other tokens at place 5"):
        sides.trl(race)


def test_losses_that_differ_are_refused() -> None:
    from benchmarks import train_step

    assert train_step.refuse_other_losses("p", [0.7], [0.7003], gpu=False) < 1e-3
    with pytest.raises(SystemExit, match="losses differ"):
        train_step.refuse_other_losses("p", [0.7, 0.69], [0.7, 0.70], gpu=False)
    with pytest.raises(SystemExit, match="losses differ"):
        train_step.refuse_other_losses("p", [float("nan")], [0.7], gpu=False)


def test_memory_of_one_side(tmp_path: Path) -> None:
    from benchmarks.memory import measure
    from benchmarks.profiles import build_model

    found = measure("ours", "tiny", build_model(SHAPES["tiny"], tmp_path), threads=1)
    assert 0 <= found["training"] == found["peak"] - found["before"]
    assert found["before"] > 100 * 2**20


def test_scoring_in_small_agrees_and_gives_a_row_for_each_spread(capsys: pytest.CaptureFixture[str]) -> None:
    rows = scoring.run(1, context=300, candidates=3, shape="tiny")
    assert [row.profile for row in rows] == ["context_ablation_anywhere", "context_ablation_nearby"]
    assert all(row.details["largest_difference"] <= scoring.TOLERANCE for row in rows)
    assert capsys.readouterr().out.count("3 scores agree") == 2


@pytest.mark.parametrize("spread", [None, 10])
def test_candidates_cite_apart_ranges_inside_the_document(spread: int | None) -> None:
    given = scoring.citation(256, context=2048, candidates=10, spread=spread)
    assert len(given.candidates) == len({tuple(candidate) for candidate in given.candidates}) == 10
    for candidate in given.candidates:
        assert all(0 <= a <= b < len(given.sentences) for a, b in candidate)
        assert all(b + 1 < c for (_, b), (c, _) in pairwise(candidate))
    cited = [number for candidate in given.candidates for number in given.cited(candidate)]
    assert max(cited) - min(cited) <= (12 if spread else len(given.sentences))
