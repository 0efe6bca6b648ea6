"""MLflow on SQLite: one run for training and its evaluation, everything once; a dead server costs a warning."""

import orjson
import pytest

from prefpipe import artifacts
from prefpipe.tracking import flatten

SMALL = ("debug=tiny", "data_mixer.sources.arithmetic.num=30", "training.max_steps=2", "task.accuracy.max_prompts=2")


def test_flatten_gives_dotted_keys():
    assert dict(flatten({"a": {"b": 1, "c": [2, {"d": None}]}})) == {"a.b": 1, "a.c.0": 2, "a.c.1.d": None}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Pairs to train on, given ones: no model is needed to make them."""
    folder = tmp_path_factory.mktemp("tracking")
    rows = [{"prompt": f"{i} + 1?", "chosen": f"#### {i + 1}", "rejected": f"#### {i}"} for i in range(20)]
    (folder / "pairs.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return folder / "pairs.jsonl"


def test_training_and_evaluation_are_one_mlflow_run_sent_once(cli, tmp_path, prepared):
    settings = ("data_mixer=files", f"data_mixer.spec={prepared}:1.0", "data_mixer.heldout_fraction=0.3")
    common = ("tracking=mlflow", "task=[pair_accuracy]", *SMALL[2:3], "training=debug", *settings)
    cli("stage=prepare", *common)
    cli("stage=train", *common)
    cli("stage=evaluate", *common)
    checkpoint = tmp_path / "runs" / "default" / "round_0" / "checkpoint"
    note = orjson.loads(checkpoint.with_name("checkpoint.mlflow.json").read_bytes())
    cli("stage=evaluate", *common)
    assert orjson.loads(checkpoint.with_name("checkpoint.mlflow.json").read_bytes()) == note

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("prefpipe")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == note["run_id"]
    assert run.info.status == "FINISHED"
    assert run.data.tags["checkpoint"] == artifacts.digest(checkpoint)
    assert run.data.params["loss.beta"] == "0.1"
    logged = client.get_metric_history(run.info.run_id, "train/loss")
    rows = [orjson.loads(line) for line in (checkpoint / "metrics.jsonl").read_bytes().splitlines()]
    assert [(m.step, m.value) for m in logged] == [(row["step"], row["train/loss"]) for row in rows]
    assert len(client.get_metric_history(run.info.run_id, "eval/pair_accuracy/pair_accuracy_mean")) == 1


def test_a_server_that_is_not_there_costs_a_warning(cli, tmp_path, prepared):
    settings = ("data_mixer=files", f"data_mixer.spec={prepared}:1.0", "training=debug", "training.max_steps=1")
    cli("stage=prepare", *settings)
    done = cli("stage=train", *settings, "tracking=mlflow", "tracking.mlflow_uri=http://127.0.0.1:9")
    assert "MLflow did not take the metrics" in done.stderr
    assert artifacts.is_complete(tmp_path / "runs" / "default" / "round_0" / "checkpoint")
