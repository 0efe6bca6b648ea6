"""The whole loop through the command line: two rounds, chained by digests, each round from the checkpoint before."""

from pathlib import Path

import orjson
import pytest

from prefpipe import artifacts
from prefpipe.models import weights_digest
from prefpipe.records import Completion, Pair, Prompt, ScoredCompletion, Split

TINY = ("stage=loop", "debug=tiny", "data_mixer.sources.arithmetic.num=40")


@pytest.fixture(scope="module")
def two_rounds(tmp_path_factory) -> Path:
    """One run of two rounds, made once; tests only read it."""
    import os
    import subprocess
    import sys

    runs = tmp_path_factory.mktemp("loop") / "runs"
    command = [sys.executable, "-m", "prefpipe", *TINY, "recipe.rounds=2", f"paths.runs={runs}", "exp_name=two"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    return runs / "two"


def test_every_stage_left_its_artifact(two_rounds):
    for round_ in (0, 1):
        for name in ("completions", "scored", "pairs", "checkpoint", "evals", "eval_samples"):
            artifacts.verify(two_rounds / f"round_{round_}" / name)
    assert (two_rounds / "report.html").stat().st_size > 10_000


def test_every_stage_left_its_log(two_rounds):
    names = {file.name for file in (two_rounds / "logs").iterdir()}
    assert {"loop-round_0.log", "prepare-round_0.log", "generate-round_1.log", "train-round_1.log"} <= names
    training = (two_rounds / "logs" / "train-round_0.log").read_text()
    assert "dpo beta=0.1" in training
    assert "stage=train done" in training


def test_manifests_chain(two_rounds):
    links = {"completions": "prompts", "scored": "completions", "pairs": "scored", "checkpoint": "pairs"}
    for round_ in (0, 1):
        folder = two_rounds / f"round_{round_}"
        for child, parent in links.items():
            source = two_rounds / "prompts" if parent == "prompts" else folder / parent
            (entry,) = artifacts.manifest(folder / child)["parents"][parent]
            assert entry["digest"] == artifacts.digest(source)


def test_round_1_samples_and_trains_from_the_checkpoint_of_round_0(two_rounds, tiny_folder):
    checkpoint = weights_digest(two_rounds / "round_0" / "checkpoint")
    policies = [
        artifacts.manifest(two_rounds / f"round_{r}" / name)["uses"]["model"]["weights"]
        for r in (0, 1)
        for name in ("completions", "checkpoint")
    ]
    assert policies == [weights_digest(tiny_folder)] * 2 + [checkpoint] * 2
    sampled = next(artifacts.read(two_rounds / "round_1" / "completions", Completion, key="k"))
    assert (sampled.model, sampled.round) == (checkpoint, 1)


def test_heldout_prompts_never_enter_training(two_rounds):
    splits = {p.prompt_id: p.split for p in artifacts.read(two_rounds / "prompts", Prompt, key="k")}
    assert set(splits.values()) == {Split.train, Split.heldout}
    for round_ in (0, 1):
        folder = two_rounds / f"round_{round_}"
        for record, name in ((Completion, "completions"), (ScoredCompletion, "scored"), (Pair, "pairs")):
            assert {splits[row.prompt_id] for row in artifacts.read(folder / name, record, key="k")} == {Split.train}
        samples = artifacts.read(folder / "eval_samples", ScoredCompletion, key="k")
        assert {splits[row.prompt_id] for row in samples} == {Split.heldout}


def test_rows_in_are_rows_out_and_rows_left_out(two_rounds):
    for manifest in two_rounds.rglob("manifest.json"):
        counts = orjson.loads(manifest.read_bytes())["counts"]
        left_out = sum(counts["filtered"].values()) + sum(counts["quarantined"].values())
        assert counts["rows_in"] == counts["rows_out"] + left_out, manifest


def test_summary_has_the_promised_keys(two_rounds):
    summary = orjson.loads((two_rounds / "summary.json").read_bytes())
    assert {"accuracy_before", "accuracy_after", "num_eval", "seconds", "num_pairs"} <= set(summary)
    assert summary["num_eval"] == artifacts.manifest(two_rounds / "base" / "eval_samples")["num_records"]


def test_a_recipe_can_start_each_round_from_the_base_model(cli, tmp_path, tiny_folder):
    """DPO-ST's way: sample from the newest checkpoint, train the base again."""
    recipe = ("recipe.rounds=2", "recipe.start_from=base", "recipe.before=[prepare]", "recipe.after=[]")
    stages = "recipe.stages=[generate,score,pair,train]"
    cli(*TINY, *recipe, stages, "loss=sft", "training.max_steps=1")
    uses = artifacts.manifest(tmp_path / "runs" / "default" / "round_1" / "checkpoint")["uses"]
    assert uses["model"]["weights"] == weights_digest(tiny_folder)
    sampled = artifacts.manifest(tmp_path / "runs" / "default" / "round_1" / "completions")["uses"]["model"]["weights"]
    assert sampled == weights_digest(tmp_path / "runs" / "default" / "round_0" / "checkpoint")


def test_the_same_command_again_does_nothing_and_a_change_is_named(cli, tmp_path):
    cli("stage=prepare", *TINY[1:])
    first = (tmp_path / "runs" / "default" / "prompts" / "provenance.json").read_bytes()
    cli("stage=prepare", *TINY[1:])
    assert (tmp_path / "runs" / "default" / "prompts" / "provenance.json").read_bytes() == first
    changed = cli("stage=prepare", *TINY[1:], "data_mixer.heldout_fraction=0.5", check=False)
    assert changed.returncode == 1
    assert "heldout_fraction 0.3 -> 0.5" in changed.stderr
    assert len(changed.stderr.strip().splitlines()) <= 3


def test_a_stage_without_its_input_says_what_to_run(cli, tmp_path):
    done = cli("stage=pair", check=False)
    assert done.returncode == 1
    assert "run stage=score first" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    (log,) = (tmp_path / "runs" / "default" / "logs").iterdir()
    assert "Traceback" in log.read_text()


def test_a_sweep_over_losses_shares_the_data_and_keeps_points_apart(cli, tmp_path):
    stages = "recipe.stages=[generate,score,pair]"
    cli(*TINY, "recipe.before=[prepare]", stages, "recipe.after=[]")
    cli("loss=dpo,simpo,ipo", "debug=tiny", "-m", "stage=train", "training.max_steps=1")
    points = sorted((tmp_path / "runs" / "default" / "points").iterdir())
    assert len(points) == 3
    pairs = artifacts.digest(tmp_path / "runs" / "default" / "round_0" / "pairs")
    names = set()
    for point in points:
        manifest = artifacts.manifest(point / "round_0" / "checkpoint")
        assert manifest["parents"]["pairs"][0]["digest"] == pairs
        names.add(manifest["uses"]["loss"]["name"])
    assert names == {"dpo", "simpo", "ipo"}
