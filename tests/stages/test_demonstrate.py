"""stage=pair pairer=pseudo_label: RFT's cap in worked numbers, where prompts went, and on to loss=sft."""

from collections import Counter
from pathlib import Path

import orjson
import pytest

from prefpipe import artifacts
from prefpipe.artifacts import Plan
from prefpipe.pairers import PseudoLabel
from prefpipe.records import Demonstration, ScoredCompletion, Split, completion_id, prompt_id
from prefpipe.stages.demonstrate import cap_of, demonstrate


def row(question: int, sample: int, right: bool = True, split: Split = Split.train) -> ScoredCompletion:
    text = f"{question} + {sample} = <<{question}+{sample}={question + sample}>>\n#### {question}"
    messages = [{"role": "user", "content": f"question {question}"}]
    identity = prompt_id(messages)
    return ScoredCompletion(
        prompt_id=identity,
        completion_id=completion_id(identity, text, sample, 0),
        messages=messages,
        source="t",
        split=split,
        answer=str(question),
        text=text,
        finish_reason="stop",
        scores={"exact_answer": float(right)},
    )


def write(out: Path, rows: list[ScoredCompletion]) -> Path:
    with artifacts.draft(out, Plan("score", ScoredCompletion.schema, uses={})) as draft:
        draft.commit(0, rows, rows_in=len(rows), rows_out=len(rows))
    return out


def made(folder: Path) -> list[Demonstration]:
    return list(artifacts.read(folder, Demonstration, key="k"))


@pytest.mark.parametrize(
    ("counts", "cap"),
    [
        (list(range(1, 11)), 9),  # place 0.9 * 9 = 8.1 of 1 .. 10: 9 + 0.1 * 1 = 9.1, rounded down
        ([1] * 9 + [8], 1),  # place 8.1: 1 + 0.1 * 7 = 1.7
        ([4], 4),
        ([2, 5], 4),  # place 0.9: 2 + 0.9 * 3 = 4.7
    ],
)
def test_the_cap_is_the_90th_percentile_over_prompts_rounded_down(tmp_path, counts, cap):
    rows = [row(q, s) for q, count in enumerate(counts) for s in range(count)]
    rows += [row(100 + q, 0, right=False) for q in range(20)]  # prompts without a solution are not among them
    demonstrate([write(tmp_path / "scored", rows)], tmp_path / "out", pairer=PseudoLabel(), seed=0)
    found = Counter(record.prompt_id for record in made(tmp_path / "out"))
    assert sorted(found.values()) == sorted(min(count, cap) for count in counts)
    assert artifacts.manifest(tmp_path / "out")["demonstration_stats"] == {
        "num_demonstrations": sum(found.values()),
        "num_over_cap": sum(counts) - sum(found.values()),
        "cap": cap,
        "mean_per_prompt": round(sum(found.values()) / len(counts), 6),
    }


def test_without_a_cap_all_are_kept(tmp_path):
    rows = [row(q, s) for q in range(9) for s in range(1 if q else 8)]
    demonstrate([write(tmp_path / "scored", rows)], tmp_path / "out", pairer=PseudoLabel(cap_percentile=None), seed=0)
    assert len(made(tmp_path / "out")) == 16
    assert cap_of(Counter(), 90.0) is None


def test_counts_say_where_prompts_went_and_heldout_ones_stay_out(tmp_path):
    rows = [row(q, s, split=Split.heldout if q < 2 else Split.train) for q in range(6) for s in range(2)]
    rows += [row(q, 0, right=False) for q in range(6, 9)]
    demonstrate([write(tmp_path / "scored", rows)], tmp_path / "out", pairer=PseudoLabel(), seed=0)
    assert [record.prompt_id for record in made(tmp_path / "out")[::2]] == [row(q, 0).prompt_id for q in range(2, 6)]
    found = artifacts.manifest(tmp_path / "out")
    left_out = {"all_wrong": 3, "heldout": 2}
    assert found["counts"] == {"rows_in": 9, "rows_out": 4, "filtered": left_out, "quarantined": {}}
    assert (found["unit"], found["stage"]) == ("prompts", "pair")


def test_rows_spread_over_two_artifacts_give_the_same_demonstrations(tmp_path):
    """As in DPO-ST, whose RFT data gathers the samples of all its rounds."""
    together = [write(tmp_path / "together", [row(q, s) for q in range(20) for s in range(1 + q % 4)])]
    spread = [
        write(tmp_path / f"{part}", [row(q, s) for s in range(4) for q in range(20) if s <= q % 4 and s % 2 == part])
        for part in (0, 1)
    ]
    for name, scored in (("a", together), ("b", spread)):
        demonstrate(scored, tmp_path / name, pairer=PseudoLabel(), seed=0)
    found = [sorted((record.prompt_id, record.text) for record in made(tmp_path / name)) for name in "ab"]
    assert Counter(prompt for prompt, _ in found[0]) == Counter(prompt for prompt, _ in found[1])
    assert len(set(found[1])) == len(found[1])
    assert artifacts.manifest(tmp_path / "a")["counts"] == artifacts.manifest(tmp_path / "b")["counts"]


def test_the_pass_rate_is_written_where_it_is_asked_for(tmp_path):
    rows = [row(0, 0), row(0, 1), row(0, 2, right=False), row(0, 3, right=False)]
    pairer = PseudoLabel(pass_threshold=0.5)
    demonstrate([write(tmp_path / "scored", rows)], tmp_path / "out", pairer=pairer, seed=0)
    assert [record.meta for record in made(tmp_path / "out")] == [{"pass_rate": 0.5}] * 2


def test_scored_samples_become_demonstrations_and_a_checkpoint(tmp_path, cli):
    """stage=pair pairer=pseudo_label, then stage=train loss=sft finds what it wrote."""
    round_ = tmp_path / "runs" / "x" / "round_0"
    round_.mkdir(parents=True)
    write(round_ / "scored", [row(q, s, right=s < 2) for q in range(12) for s in range(4)])
    cli("stage=pair", "exp_name=x", "pairer=pseudo_label")
    assert len(made(round_ / "demonstrations")) == 24
    assert not (round_ / "pairs").exists()
    training = ["training.max_steps=8", "training.learning_rate=3e-3", "training.global_batch_size=8"]
    cli("stage=train", "exp_name=x", "loss=sft", "hardware=cpu", *training)
    losses = [orjson.loads(line)["train/loss"] for line in (round_ / "checkpoint" / "metrics.jsonl").open("rb")]
    assert losses[-1] < losses[0] / 2
    assert orjson.loads((round_ / "checkpoint" / "data_counts.json").read_bytes()) == {"demonstrations": 24}
