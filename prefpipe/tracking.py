"""MLflow as a sink: metrics.jsonl comes first, MLflow is told afterwards, and nothing here can end a run."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from prefpipe import artifacts
from prefpipe.files import chunks, write_json
from prefpipe.records import EvalResult
from prefpipe.settings import TrackingConfig

log = logging.getLogger(__name__)

MLFLOW_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # its own default keeps a finished run waiting for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
MAX_VALUE = 500
"""Characters of a parameter; MLflow cuts longer ones without a word."""


def send_to_mlflow(checkpoint: Path, evals: Path, tracking: TrackingConfig, params: dict[str, Any]) -> None:
    """Log a checkpoint's training metrics, and its evaluation into the same MLflow run, each once.

    The run's id lies beside the checkpoint, in <checkpoint>.mlflow.json, with what was sent already.
    A server that is down, slow or wrong costs a warning; the next stage, or the same command again, sends the rest.
    """
    try:
        _send(checkpoint, evals, tracking, params)
    except Exception as error:  # whatever a tracker throws, the run is worth more than its record
        log.warning(
            "MLflow did not take the metrics (%s: %s); they stay in %s", type(error).__name__, error, checkpoint
        )


def _send(checkpoint: Path, evals: Path, tracking: TrackingConfig, params: dict[str, Any]) -> None:
    if not artifacts.is_complete(checkpoint):
        return
    for name, value in MLFLOW_DEFAULTS.items():
        os.environ.setdefault(name, value)
    from filelock import FileLock
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, RunTag

    uri = tracking.mlflow_uri or "sqlite:///mlflow.db"
    # Several processes that create one SQLite store at once break its migration; the first makes it alone.
    with FileLock(".mlflow.lock"):
        client = MlflowClient(uri)
        found = client.get_experiment_by_name(tracking.mlflow_experiment)
        experiment = found.experiment_id if found else client.create_experiment(tracking.mlflow_experiment)
    note = checkpoint.with_name(f"{checkpoint.name}.mlflow.json")
    state: dict[str, Any] = orjson.loads(note.read_bytes()) if note.is_file() else {}
    digest = artifacts.digest(checkpoint)
    if state.get("digest") != digest:
        manifest = artifacts.manifest(checkpoint)
        run = client.create_run(experiment, run_name=str(params.get("exp_name")))
        state = {"run_id": run.info.run_id, "digest": digest, "sent": []}
        write_json(note, state)
        tags = [
            RunTag("checkpoint", digest),
            RunTag("git", str(manifest.get("git"))),
            RunTag("folder", str(checkpoint)),
        ]
        kept = [Param(key, str(value)) for key, value in params.items() if len(str(value)) <= MAX_VALUE]
        client.log_batch(state["run_id"], params=kept[:100], tags=tags)
        for chunk in chunks(kept[100:], 100):
            client.log_batch(state["run_id"], params=chunk)
    if "training" not in state["sent"]:
        rows = [orjson.loads(line) for line in (checkpoint / "metrics.jsonl").read_bytes().splitlines()]
        metrics = [
            Metric(key, value, 0, row["step"]) for row in rows for key, value in row.items() if key.startswith("train/")
        ]
        for batch in chunks(metrics, 1000):
            client.log_batch(state["run_id"], metrics=batch)
        state["sent"].append("training")
        write_json(note, state)
    if artifacts.is_complete(evals) and (sent := f"evals-{artifacts.digest(evals)[:16]}") not in state["sent"]:
        results = artifacts.read(evals, EvalResult, key="evals")
        client.log_batch(
            state["run_id"], metrics=[Metric(f"eval/{r.task}/{_plain(r.metric)}", r.value, 0, 0) for r in results]
        )
        client.set_terminated(state["run_id"])
        state["sent"].append(sent)
        write_json(note, state)


def flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and leaf values of nested dicts and lists."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if items is None:
        yield prefix, node
        return
    for key, value in items:
        yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))


def _plain(metric: str) -> str:
    return metric.replace("@", "_at_")
