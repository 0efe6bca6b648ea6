"""stage=pair: the same pairs however the rows are spread, held-out prompts stay out, the statistics add up."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from prefpipe import artifacts, grouping
from prefpipe.artifacts import Plan
from prefpipe.components import COMPONENTS
from prefpipe.errors import ArtifactError, DataError
from prefpipe.grouping import Runs
from prefpipe.pairers import BestWorst, CorrectIncorrect, Demonstrator
from prefpipe.records import Completion, Pair, ScoredCompletion, Split, completion_id, prompt_id
from prefpipe.stages import pair as stage
from prefpipe.stages.pair import pair


def row(question: int, sample: int, value: float, *, text: str | None = None, split: Split = Split.train):
    messages = [{"role": "user", "content": f"question {question}"}]
    prompt, text = prompt_id(messages), f"answer {sample} of {question}" if text is None else text
    return ScoredCompletion(
        prompt_id=prompt,
        completion_id=completion_id(prompt, text, sample, 0),
        messages=messages,
        source="test",
        split=split,
        text=text,
        scores={"s": value},
        meta={  # what pairer=role_by_threshold reads
            "pic_type": "full",
            "claims": ["one", "two"],
            "is_perturbed": sample % 2 == 1,
            "perturbed_claims": ["one"],
            "perturbed_messages": [{"role": "user", "content": f"question {question}, one claim"}],
        },
    )


def write(out: Path, rows: Sequence[ScoredCompletion]) -> Path:
    with artifacts.draft(out, Plan("score", ScoredCompletion.schema, uses={})) as draft:
        draft.commit(0, rows, rows_in=len(rows), rows_out=len(rows))
    return out


def pairs_of(folder: Path) -> list[Pair]:
    return list(artifacts.read(folder, Pair, key="k"))


@pytest.mark.parametrize(
    "name", sorted(name for name, cls in COMPONENTS["pairer"].items() if not issubclass(cls, Demonstrator))
)
def test_rows_interleaved_over_two_artifacts_give_the_same_pairs(tmp_path, name):
    """60 prompts with 4 samples each: prompt after prompt, or all first samples first and the others elsewhere."""
    rng = random.Random(0)
    values = {(question, sample): float(rng.randrange(3)) for question in range(60) for sample in range(4)}
    together = [write(tmp_path / "together", [row(q, s, v) for (q, s), v in values.items()])]
    dealt = sorted(values, key=lambda key: (key[1], key[0]))
    spread = [
        write(tmp_path / "first", [row(q, s, values[q, s]) for q, s in dealt if s < 2]),
        write(tmp_path / "second", [row(q, s, values[q, s]) for q, s in dealt if s >= 2]),
    ]
    assert Runs.of(together, ScoredCompletion, key="k").together
    assert not Runs.of(spread, ScoredCompletion, key="k").together
    pairer = COMPONENTS["pairer"][name]()
    pair(together, tmp_path / "a", pairer=pairer, seed=3)
    pair(spread, tmp_path / "b", pairer=pairer, seed=3)
    expected = sorted(pairs_of(tmp_path / "a"), key=lambda p: (p.prompt_id, p.chosen_id, p.rejected_id))
    assert len(expected) > 30
    assert sorted(pairs_of(tmp_path / "b"), key=lambda p: (p.prompt_id, p.chosen_id, p.rejected_id)) == expected
    a, b = artifacts.manifest(tmp_path / "a"), artifacts.manifest(tmp_path / "b")
    assert a["counts"] == b["counts"]
    assert a["counts"]["rows_in"] == 60
    assert a["pair_stats"] == b["pair_stats"]


def test_spread_rows_give_the_same_bytes_every_time_and_leave_no_scratch(tmp_path):
    spread = [write(tmp_path / f"{s}", [row(q, s, float(s)) for q in range(20)]) for s in range(2)]
    pair(spread, tmp_path / "a", pairer=BestWorst(), seed=0)
    pair(spread, tmp_path / "b", pairer=BestWorst(), seed=0)
    assert artifacts.digest(tmp_path / "a") == artifacts.digest(tmp_path / "b")
    names = {file.name for file in (tmp_path / "a").iterdir()}
    assert names == {"manifest.json", "part-00000.jsonl", "provenance.json"}


def test_heldout_prompts_are_counted_and_left_out(tmp_path):
    rows = [row(q, s, float(s), split=Split.heldout if q < 3 else Split.train) for q in range(8) for s in range(2)]
    rows += [row(8, s, 1.0) for s in range(2)] + [row(9, 0, 1.0)]
    pair([write(tmp_path / "scored", rows)], tmp_path / "pairs", pairer=BestWorst(), seed=0)
    assert [p.prompt_id for p in pairs_of(tmp_path / "pairs")] == [row(q, 0, 0.0).prompt_id for q in range(3, 8)]
    found = artifacts.manifest(tmp_path / "pairs")
    left_out = {"heldout": 3, "single_completion": 1, "tie": 1}
    assert found["counts"] == {"rows_in": 10, "rows_out": 5, "filtered": left_out, "quarantined": {}}
    assert found["unit"] == "prompts"


def test_a_prompt_that_is_held_out_in_any_row_is_left_out(tmp_path):
    first = write(tmp_path / "first", [row(0, 0, 0.0), row(1, 0, 0.0)])
    second = write(tmp_path / "second", [row(0, 1, 1.0, split=Split.heldout), row(1, 1, 1.0)])
    pair([first, second], tmp_path / "pairs", pairer=BestWorst(), seed=0)
    assert [p.prompt_id for p in pairs_of(tmp_path / "pairs")] == [row(1, 0, 0.0).prompt_id]
    assert artifacts.manifest(tmp_path / "pairs")["counts"]["filtered"] == {"heldout": 1}


def test_blank_repeated_and_tied_completions_are_counted(tmp_path):
    texts = ["a", " a", "", "b", "c", "d"]  # a repeat, a blank; of the scores 0 1 1 2 one is there again
    rows = [row(0, s, value, text=text) for s, (text, value) in enumerate(zip(texts, [0, 9, 9, 1, 1, 2], strict=True))]
    pair([write(tmp_path / "scored", rows)], tmp_path / "pairs", pairer=BestWorst(), seed=0)
    found = artifacts.manifest(tmp_path / "pairs")["pair_stats"]
    assert {key: found[key] for key in ("completions", "blank", "duplicate", "tied", "num_pairs")} == {
        "completions": 6, "blank": 1, "duplicate": 1, "tied": 1, "num_pairs": 1,
    }  # fmt: skip


def test_pairs_carry_the_pass_rate_of_their_prompt(tmp_path):
    rows = [row(q, s, float(s < right)) for q, right in enumerate((1, 3, 0)) for s in range(4)]
    pair([write(tmp_path / "scored", rows)], tmp_path / "pairs", pairer=CorrectIncorrect(), seed=0)
    assert [p.meta["pass_rate"] for p in pairs_of(tmp_path / "pairs")] == [0.25, 0.75]
    assert artifacts.manifest(tmp_path / "pairs")["pair_stats"]["mean_pass_rate"] == pytest.approx(1 / 3, abs=1e-6)


def test_many_parts_and_many_windows_give_the_same_pairs(tmp_path, monkeypatch):
    scored = [write(tmp_path / "scored", [row(q, s, float(s)) for s in range(2) for q in range(40)])]
    pair(scored, tmp_path / "a", pairer=BestWorst(), seed=0)
    monkeypatch.setattr(stage, "PROMPTS_PER_PART", 7)
    monkeypatch.setattr(grouping, "WINDOW_BYTES", 4000)
    pair(scored, tmp_path / "b", pairer=BestWorst(), seed=0)
    assert len(artifacts.manifest(tmp_path / "b")["parts"]) == 6
    assert sorted(pairs_of(tmp_path / "b"), key=repr) == sorted(pairs_of(tmp_path / "a"), key=repr)
    assert artifacts.manifest(tmp_path / "a")["counts"] == artifacts.manifest(tmp_path / "b")["counts"]


def test_pair_statistics_by_hand(tmp_path):
    """chosen: 6 and 2 characters; rejected: 3 and 5; margins: 4 and 1.5."""
    rows = [row(0, 0, 5.0, text="sixsix"), row(0, 1, 1.0, text="low"), row(0, 2, 2.0, text="between")]
    rows += [row(1, 0, 0.5, text="fives"), row(1, 1, 2.0, text="ok")]
    pair([write(tmp_path / "scored", rows)], tmp_path / "pairs", pairer=BestWorst(), seed=0)
    assert [(p.chosen, p.rejected) for p in pairs_of(tmp_path / "pairs")] == [("sixsix", "low"), ("ok", "fives")]
    assert artifacts.manifest(tmp_path / "pairs")["pair_stats"] == {
        "completions": 5,
        "blank": 0,
        "duplicate": 0,
        "tied": 0,
        "num_pairs": 2,
        "mean_chosen_characters": 4.0,
        "mean_rejected_characters": 4.0,
        "chosen_longer": 0.5,
        "length_difference": {"min": -3.0, "p10": -2.4, "median": 0.0, "p90": 2.4, "max": 3.0},
        "margin": {"mean": 2.75, "min": 1.5, "max": 4.0},
    }


def test_no_pairs_at_all_is_an_empty_artifact_that_says_why(tmp_path):
    rows = [row(q, s, 0.0) for q in range(4) for s in range(3)]
    pair([write(tmp_path / "scored", rows)], tmp_path / "pairs", pairer=CorrectIncorrect(), seed=0)
    found = artifacts.manifest(tmp_path / "pairs")
    assert (found["num_records"], found["counts"]["filtered"]) == (0, {"all_wrong": 4})
    counts = {"completions": 12, "blank": 0, "duplicate": 0, "tied": 8, "num_pairs": 0, "mean_pass_rate": 0.0}
    assert found["pair_stats"] == counts


def test_a_prompts_pairs_do_not_depend_on_the_other_prompts(tmp_path):
    pairer = COMPONENTS["pairer"]["random_pair"]()
    rows = [row(q, s, float(s)) for q in range(10) for s in range(5)]
    pair([write(tmp_path / "all", rows)], tmp_path / "a", pairer=pairer, seed=1)
    pair([write(tmp_path / "half", rows[25:])], tmp_path / "b", pairer=pairer, seed=1)
    assert pairs_of(tmp_path / "a")[5:] == pairs_of(tmp_path / "b")


def test_a_score_that_is_not_there_is_named_with_those_that_are(tmp_path):
    scored = write(tmp_path / "scored", [row(0, s, float(s)) for s in range(2)])
    with pytest.raises(DataError, match=r"has no score pairer\.score=length; it has \['s'\]; run stage=score"):
        pair([scored], tmp_path / "pairs", pairer=BestWorst(score="length"), seed=0)
    assert not artifacts.is_complete(tmp_path / "pairs")


def test_unscored_completions_are_refused_by_their_schema(tmp_path):
    given = row(0, 0, 1.0)
    plain = Completion(**{name: getattr(given, name) for name in Completion.__slots__})
    with artifacts.draft(tmp_path / "completions", Plan("generate", Completion.schema, uses={})) as draft:
        draft.commit(0, [plain], rows_in=1, rows_out=1)
    with pytest.raises(ArtifactError, match=r"inputs\.scored=.* holds completion/1, but scored/1 is read here"):
        pair([tmp_path / "completions"], tmp_path / "pairs", pairer=BestWorst(), seed=0)
