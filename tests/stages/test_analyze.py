"""Analyze on real small runs: numbers, failures, staleness, seeds."""

import csv
import shutil

import orjson
import pytest
from report_runs import MODEL, build_run, publish, write_loop

from prefpipe.artifacts import manifest
from prefpipe.errors import ArtifactError, ConfigError
from prefpipe.files import write_json
from prefpipe.report.collect import load_run
from prefpipe.report.sweeps import label_points
from prefpipe.stages.analyze import aligned, analyze

DPO = {"name": "dpo", "beta": 0.1}
SIMPO = {"name": "simpo", "beta": 2.0, "gamma": 1.0}


def summarize(run, out):
    analyze([run], out=out)
    return orjson.loads((out / "summary.json").read_bytes())


def sweep(tmp_path, losses=(DPO, SIMPO), seeds=(0, 1)):
    run = build_run(tmp_path / "sweep", rounds=0)
    for loss in losses:
        for seed in seeds:
            point = run / "points" / f"loss={loss['name']},seed={seed}"
            build_run(point, rounds=1, right=(12, 20 + 4 * seed), loss=loss, seed=seed)
    return run


def test_summary_of_two_rounds(tmp_path):
    """12, 22, then 30 of 40 held-out prompts right; 20 pairs, then 19."""
    run = build_run(tmp_path / "two")
    write_loop(run, [1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 0.5])
    found = summarize(run, tmp_path / "out")
    assert (found["accuracy_before"], found["accuracy_after"], found["num_eval"]) == (0.3, 0.75, 40)
    assert (found["num_pairs"], found["seconds"], found["status"]) == (19, 25.5, "complete")
    assert (found["loss"], found["model"], found["seed"]) == ("dpo", "tiny", 0)
    assert [(r["round"], r["accuracy_after"], r["num_pairs"], r["seconds"]) for r in found["rounds"]] == [
        (0, 0.55, 20, 15.0),
        (1, 0.75, 19, 10.5),
    ]
    assert found["metrics"]["round_1"]["maj_at_k/maj@4"]["value"] == 0.375
    assert found["problems"] == []


def test_without_loop_json_the_time_is_what_the_artifacts_say(tmp_path):
    """An evaluation writes evals and eval_samples together, so only the first of them counts."""
    run = build_run(tmp_path / "r", rounds=1)
    folders = [
        "prompts",
        "base/evals",
        *(f"round_0/{x}" for x in ("completions", "scored", "pairs", "checkpoint", "evals")),
    ]
    for number, folder in enumerate([*folders, "base/eval_samples", "round_0/eval_samples"]):
        write_json(run / folder / "provenance.json", {"seconds": 2.0**number})
    assert summarize(run, tmp_path / "out")["seconds"] == 2.0 ** len(folders) - 1


def test_rows_are_the_same_in_json_and_csv(tmp_path):
    run = build_run(tmp_path / "two")
    analyze([run], out=tmp_path / "out")
    rows = orjson.loads((tmp_path / "out/analysis.json").read_bytes())
    with (tmp_path / "out/analysis.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(rows) == len(lines) == 2
    for row, line in zip(rows, lines, strict=True):
        assert float(line["accuracy_after"]) == row["accuracy_after"]
        assert float(line["accuracy/accuracy after low"]) == row["metrics"]["accuracy/accuracy"]["after"]["low"]
        assert float(line["maj_at_k/maj@4 before value"]) == 0.15


def test_csv_cells_never_start_a_formula(tmp_path):
    run = build_run(tmp_path / "r", rounds=1, loss={"name": "=HYPERLINK(1)"})
    analyze([run], out=tmp_path / "out")
    assert ",'=HYPERLINK(1)," in (tmp_path / "out/analysis.csv").read_text()


def test_a_run_without_evaluation_has_nulls_and_says_what_is_missing(tmp_path):
    run = build_run(tmp_path / "r", rounds=1)
    for folder in ("base", "round_0/evals", "round_0/eval_samples"):
        shutil.rmtree(run / folder)
    found = summarize(run, tmp_path / "out")
    assert (found["accuracy_before"], found["accuracy_after"], found["num_eval"]) == (None, None, None)
    assert (found["num_pairs"], found["status"]) == (20, "incomplete")
    assert [(p["kind"], p["artifact"]) for p in found["problems"]] == [("missing", "round_0/evals")]


def test_only_the_newest_round_needs_an_evaluation(tmp_path):
    run = build_run(tmp_path / "r", rounds=2)
    shutil.rmtree(run / "round_0/evals")
    assert summarize(run, tmp_path / "out")["status"] == "complete"


def test_a_changed_parent_makes_its_children_stale(tmp_path, capsys):
    run = build_run(tmp_path / "r", rounds=1)
    records = [{"prompt_id": "x"}]
    uses = manifest(run / "round_0/scored")["uses"]
    shutil.rmtree(run / "round_0/scored")
    publish(run / "round_0/scored", "scored/1", records, stage="score", uses=uses)
    found = summarize(run, tmp_path / "out")
    assert found["status"] == "stale"
    assert [(p["kind"], p["artifact"]) for p in found["problems"]] == [("stale", "round_0/pairs")]
    assert "round_0/pairs: stale" in capsys.readouterr().out


def test_a_parent_that_is_gone_is_only_a_note(tmp_path):
    run = build_run(tmp_path / "r", rounds=1)
    shutil.rmtree(run / "round_0/completions")
    found = summarize(run, tmp_path / "out")
    assert (found["status"], [p["kind"] for p in found["problems"]]) == ("complete", ["note"])


def test_unfinished_and_damaged_artifacts_are_failures(tmp_path):
    run = build_run(tmp_path / "r", rounds=1)
    (run / "round_0/checkpoint").rename(run / "round_0/checkpoint.partial")
    (run / "round_0/checkpoint.partial/manifest.json").unlink()
    (run / "round_0/pairs/manifest.json").write_text('{"schema":')
    with (run / "base/evals/part-00000.jsonl").open("a") as file:
        file.write('{"torn')
    found = summarize(run, tmp_path / "out")
    assert found["status"] == "failed"
    failed = {p["artifact"] for p in found["problems"] if p["kind"] == "failed"}
    assert failed == {"round_0/checkpoint", "round_0/pairs", "base/evals"}
    assert found["accuracy_before"] is None
    assert found["accuracy_after"] == 0.55


def test_seeds_are_averaged_over_everything_else(tmp_path):
    """Seeds 0 and 1 answer 20 and 24 of 40: mean 0.55, standard deviation 0.1 / sqrt(2)."""
    groups = summarize(sweep(tmp_path), tmp_path / "out")["groups"]
    assert [group["label"] for group in groups] == ["loss=dpo", "loss=simpo"]
    for group in groups:
        after = group["metrics"]["accuracy/accuracy"]["after"]
        assert (after["mean"], after["spread"], after["num"]) == (
            pytest.approx(0.55),
            pytest.approx(0.1 / 2**0.5),
            2,
        )


def test_failed_points_come_first_and_keep_the_others(tmp_path, capsys):
    run = sweep(tmp_path)
    failed = run / "points/loss=simpo,seed=1/round_0"
    (failed / "checkpoint").rename(failed / "checkpoint.partial")
    (failed / "checkpoint.partial/manifest.json").unlink()
    write_json(failed / "checkpoint.partial/plan.json", {"uses": {"loss": SIMPO, "seed": 1, "model": MODEL}})
    shutil.rmtree(failed / "evals")
    (run / "points/loss=ipo,seed=0").mkdir()
    analyze([run], out=tmp_path / "out")
    rows = orjson.loads((tmp_path / "out/analysis.json").read_bytes())
    assert [row["point"] for row in rows][:2] == ["loss=ipo,seed=0", "loss=simpo,seed=1"]
    assert [row["status"] for row in rows] == ["failed"] * 2 + ["complete"] * 3
    assert rows[1]["loss"] == "simpo"
    assert rows[2]["accuracy_after"] == 0.5
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("failed")
    assert "sweep/loss=ipo,seed=0" in lines[1]


def test_points_borrow_the_shared_evaluation_of_the_same_model_only(tmp_path):
    run = sweep(tmp_path, losses=(DPO,), seeds=(0, 1))
    for point in (run / "points").iterdir():
        shutil.rmtree(point / "base")
    assert [row["accuracy_before"] for row in summarize(run, tmp_path / "out")["points"]] == [0.3, 0.3]
    found = manifest(run / "points/loss=dpo,seed=1/round_0/checkpoint")
    found["uses"]["model"] = {"name": "other"}
    write_json(run / "points/loss=dpo,seed=1/round_0/checkpoint/manifest.json", found)
    points = summarize(run, tmp_path / "out")["points"]
    assert {row["point"]: row["accuracy_before"] for row in points} == {"loss=dpo,seed=0": 0.3, "loss=dpo,seed=1": None}


def test_several_runs_make_one_table(tmp_path):
    first, second = build_run(tmp_path / "a", rounds=1), build_run(tmp_path / "b", rounds=1, loss=SIMPO)
    analyze([first, second], out=tmp_path / "out")
    rows = orjson.loads((tmp_path / "out/analysis.json").read_bytes())
    assert [(row["run"], row["loss"]) for row in rows] == [("a", "dpo"), ("b", "simpo")]
    assert not (tmp_path / "out/summary.json").exists()


def test_no_run_is_an_error_that_names_the_folder(tmp_path):
    with pytest.raises(ArtifactError, match="nowhere"):
        analyze([tmp_path / "nowhere"], out=tmp_path / "out")
    with pytest.raises(ConfigError, match="no runs"):
        analyze([], out=tmp_path / "out")


def test_nested_points_are_found(tmp_path):
    run = build_run(tmp_path / "s", rounds=0)
    build_run(run / "points/loss=dpo/seed=0", rounds=1)
    assert [point.point for point in load_run(run).points] == ["loss=dpo/seed=0"]


def test_labels_leave_out_what_follows_from_the_name():
    """Each loss has its own beta, so beta tells nothing; the learning rate was really varied."""
    settings = [
        {"loss.name": "dpo", "loss.beta": 0.1, "training.learning_rate": 1e-6, "seed": 0},
        {"loss.name": "simpo", "loss.beta": 2.0, "loss.gamma": 1.0, "training.learning_rate": 1e-6, "seed": 1},
        {"loss.name": "simpo", "loss.beta": 2.0, "loss.gamma": 1.0, "training.learning_rate": 2e-6, "seed": 1},
    ]
    assert label_points(settings)[0] == "loss=dpo training.learning_rate=1e-06"
    settings[2]["loss.beta"] = 2.5
    assert label_points(settings)[2] == "loss.beta=2.5 loss=simpo training.learning_rate=2e-06"


def test_the_printed_table_is_aligned_and_inert():
    lines = aligned(("name", "value", "empty"), [("a\x1b[31m", 1, None), ("bb\nc", 22, None)]).splitlines()
    assert len(lines) == 3
    assert "\x1b" not in "".join(lines)
    assert "empty" not in lines[0]
    assert lines[0].index("value") == lines[1].index("1", 14) == lines[2].index("22")
