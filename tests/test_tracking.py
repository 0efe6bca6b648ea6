"""Trackers get everything once, whatever happens to them, and nothing that happens to them is noticed by a run."""

import contextlib
import os
import random
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pytest

from prefpipe import artifacts
from prefpipe.artifacts import Plan
from prefpipe.errors import ConfigError
from prefpipe.files import sha256_of
from prefpipe.tracking import Row, Sink, flatten, records
from prefpipe.tracking.mlflow import MLflow
from prefpipe.tracking.records import Record
from prefpipe.tracking.sending import Follower, tell, tell_patiently
from prefpipe.tracking.tracker import Tracker

ROW_KEYS = ("train/loss", "train/rewards/margin")


def test_flatten_gives_dotted_keys():
    assert dict(flatten({"a": {"b": 1, "c": [2, {"d": None}]}})) == {"a.b": 1, "a.c.0": 2, "a.c.1.d": None}


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("http://me:secret@host:5000", r"tracking\.uri=http://\*\*\*@host:5000 holds a name or a password"),
        ("./mlruns", r"tracking\.uri=\./mlruns must be a server"),
    ],
)
def test_a_store_that_cannot_be_is_refused(uri, reason):
    with pytest.raises(ConfigError, match=reason) as refused:
        MLflow(uri=uri)
    assert "secret" not in str(refused.value)


# ------------------------------------------------------------------------------------- exactly once


@dataclass
class Ledger(Sink):
    """A tracker in memory with the promise of one: what comes again is there once. It loses calls, and answers."""

    name: str = "ledger"
    fails: Callable[[], bool] = field(default=lambda: False)
    store: str = ""
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: set[tuple[str, str, int, float, int]] = field(default_factory=set)

    def open(self, record: Record, parent: str | None) -> str:
        with self._losing():
            run = self.runs.setdefault(self.store + record.id, {"name": record.name, "parent": parent})
            assert run["parent"] == parent
            return self.store + record.id

    def describe(self, run: str, params: Any, tags: Any) -> None:
        with self._losing():
            assert self.runs[run].setdefault("params", dict(params)) == params
            self.runs[run]["tags"] = dict(tags)

    def log(self, run: str, rows: Any, time: int) -> None:
        with self._losing():
            self.metrics |= {(run, key, row.step, value, time) for row in rows for key, value in row.values.items()}

    def summarize(self, run: str, row: Row, time: int) -> None:
        self.log(run, [row], time)

    def set_status(self, run: str, status: str, time: int) -> None:
        with self._losing():
            self.runs[run]["status"] = status

    @contextlib.contextmanager
    def _losing(self) -> Iterator[None]:
        """Before the call is taken, or after it."""
        if self.fails():
            raise ConnectionError("the call got lost")
        yield
        if self.fails():
            raise ConnectionError("the answer got lost")

    def history(self, run: str, key: str) -> list[tuple[int, float]]:
        """(step, value), by step; a value that was taken twice is there twice."""
        return sorted((step, value) for of, name, step, value, _ in self.metrics if (of, name) == (run, key))


def metric_lines(count: int, first: int = 1) -> bytes:
    rows = [{"step": n, "epoch": n / 10, **dict.fromkeys(ROW_KEYS, n * 1.5)} for n in range(first, first + count)]
    return b"".join(orjson.dumps(row) + b"\n" for row in rows)


def checkpoint(out: Path, num_steps: int, **uses: object) -> Path:
    """An artifact as stage=train leaves it, but for the weights."""
    with artifacts.draft(out, Plan("train", "checkpoint/1", uses=uses), overwrite=True) as draft:
        (draft.work / "metrics.jsonl").write_bytes(metric_lines(num_steps))
        draft.add_files(["metrics.jsonl"])
    return out


def evaluation(out: Path, value: float) -> Path:
    from prefpipe.records import EvalResult

    with artifacts.draft(out, Plan("evaluate", EvalResult.schema, uses={}), overwrite=True) as draft:
        result = EvalResult(task="accuracy", metric="pass@1", value=value, low=0.0, high=1.0, n=3)
        draft.commit_stream([result])
    return out


def record_of(artifact: Path, *, made: bool = True, parent: Path | None = None, **known: Any) -> Path:
    given = {"params": {"loss.beta": "0.1"}, "tags": {"host": "here"}} | known
    return records.begin(artifact, artifact.name, artifact.name, made=made, parent=parent, **given)


@pytest.mark.parametrize("seed", range(8))
def test_everything_comes_once_whatever_calls_and_answers_get_lost(tmp_path, seed):
    """A checkpoint below a sweep, and its evaluation; each attempt is a process of its own, as far as notes tell."""
    rng = random.Random(seed)
    sink = Ledger(fails=lambda: rng.random() < 0.3)
    num_steps = [0, 1, 499, 1000][seed % 4]
    sweep = records.ensure_group(tmp_path / "multirun" / "sweep.tracking.json", "sweep", "mine")
    trained = record_of(checkpoint(tmp_path / "train", num_steps), parent=sweep)
    into = {trained.name: num_steps}
    evaluated = record_of(evaluation(tmp_path / "evals", 0.75), own_run=False, into=into)
    attempts = 0
    while tell_patiently(trained, sink) or tell_patiently(evaluated, sink):
        attempts += 1
        assert attempts < 500
    sink.fails = lambda: True  # no call is made once all is told but for the look whether the runs are there
    known = set(sink.metrics)
    assert all("ConnectionError" in tell_patiently(path, sink) for path in (trained, evaluated))
    assert sink.metrics == known
    root, run = sorted(sink.runs.values(), key=lambda run: run["parent"] is not None)
    assert (root["name"], root["status"]) == ("mine", "FINISHED")
    assert (run["status"], run["params"]) == ("FINISHED", {"loss.beta": "0.1"})
    assert run["tags"]["train"] == artifacts.digest(tmp_path / "train")
    (of,) = [key for key, value in sink.runs.items() if value is run]
    assert run["parent"] == next(key for key, value in sink.runs.items() if value is root)
    for key in ROW_KEYS:
        assert sink.history(of, key) == [(n, n * 1.5) for n in range(1, num_steps + 1)]
    assert sink.history(of, "eval/accuracy/pass@1") == [(num_steps, 0.75)]


def test_a_run_is_followed_over_its_kills_into_one_run(tmp_path):
    """The file is cut back to the last state, once in the middle of a line; steps that come again are told once."""
    sink, out = Ledger(), tmp_path / "train"
    work = artifacts.partial_path(out)
    metrics = work / "metrics.jsonl"
    told: list[int] = []

    def attempt(*contents: bytes) -> None:
        with contextlib.suppress(KeyError), artifacts.draft(out, Plan("train", "checkpoint/1", uses={})):
            follower = Follower(record_of(out, made=False, params={"threads": str(len(told))}), sink)
            for content in contents:
                metrics.write_bytes(content)
                follower.look()
                told.append(len(sink.history(next(iter(sink.runs)), "train/loss")))
            raise KeyError

    attempt(b"", metric_lines(3), metric_lines(8)[:-20])
    attempt(metric_lines(2), metric_lines(9))
    attempt(metric_lines(12)[:-1], metric_lines(12))
    assert told == [0, 3, 7, 7, 9, 11, 12]
    (run,) = sink.runs
    assert sink.runs[run]["params"] == {"threads": "0"}
    assert sink.runs[run]["tags"]["resume.2.threads"] == "5"
    assert sink.history(run, "train/loss") == [(n, n * 1.5) for n in range(1, 13)]


def test_rows_whose_answer_got_lost_wait_until_all_are_there_again(tmp_path):
    """A killed run is cut back to before them: the shorter call would not be taken for the one that came through."""
    sink, out = Ledger(), tmp_path / "train"
    metrics = artifacts.partial_path(out) / "metrics.jsonl"
    lost = iter([False] * 7 + [True])  # of the calls: opened, described, running, and the answer to the first rows
    sink.fails = lambda: next(lost, False)
    with contextlib.suppress(KeyError), artifacts.draft(out, Plan("train", "checkpoint/1", uses={})):
        path = record_of(out, made=False)
        metrics.write_bytes(metric_lines(6))
        with pytest.raises(ConnectionError, match="the answer got lost"):
            Follower(path, sink).look()
        assert len(sink.metrics) == 6 * (1 + len(ROW_KEYS))
        for count in (4, 6, 7):
            metrics.write_bytes(metric_lines(count))
            Follower(path, sink).look()
        raise KeyError
    assert len(sink.metrics) == 7 * (1 + len(ROW_KEYS))


def test_other_settings_are_another_run_and_a_lost_store_gets_all_again(tmp_path):
    sink = Ledger()
    tell(record_of(checkpoint(tmp_path / "train", 3, beta=0.1)), sink)
    tell(record_of(checkpoint(tmp_path / "train", 4, beta=0.2)), sink)
    assert [len(sink.history(run, "train/loss")) for run in sink.runs] == [3, 4]
    emptied = Ledger(store="other-")
    tell(records.path_of(tmp_path / "train"), emptied)
    (run,) = emptied.runs
    assert len(emptied.history(run, "train/loss")) == 4


# ------------------------------------------------------------------------------------- MLflow itself


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs to train on, given ones: no model is needed to make them."""
    file = tmp_path_factory.mktemp("tracking") / "pairs.jsonl"
    rows = [{"prompt": f"{i} + 1?", "chosen": f"#### {i + 1}", "rejected": f"#### {i}"} for i in range(20)]
    file.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return file


def small(pairs_file: Path, steps: int = 2) -> list[str]:
    """Settings of a training run of seconds."""
    data = ["data_mixer=files", f"data_mixer.spec={pairs_file}:1.0", "data_mixer.heldout_fraction=0.3"]
    return [*data, "training=debug", f"training.max_steps={steps}", "hardware=cpu", "hardware.num_threads=1"]


def all_runs(uri: str, experiment: str = "prefpipe") -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id])) if found else []


def history(uri: str, run: str, key: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    return [(metric.step, metric.value) for metric in MlflowClient(uri).get_metric_history(run, key)]


def logged(folder: Path, key: str = "train/loss") -> list[tuple[int, float]]:
    """(step, value) as metrics.jsonl has them."""
    rows = [orjson.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]
    return [(row["step"], row[key]) for row in rows]


def test_a_sweep_is_a_tree_and_an_evaluation_goes_into_the_run_of_its_checkpoint(cli, tmp_path, pairs_file):
    common = [*small(pairs_file), "tracking=mlflow", "tracking.wait_seconds=300", "task=[pair_accuracy]"]
    cli("stage=prepare", *common)
    cli("-m", "stage=train", "loss=dpo,ipo", *common, timeout=1800)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert len(all_runs(uri)) == 1 + 2
    point = ["-m", "stage=evaluate", "loss=dpo", *common]
    cli(*point)
    told = all_runs(uri)
    cli(*point)
    again = all_runs(uri)
    assert [run.to_dictionary() for run in told] == [run.to_dictionary() for run in again]
    (sweep,) = [run for run in told if "mlflow.parentRunId" not in run.data.tags]
    below = [run for run in told if run.data.tags.get("mlflow.parentRunId") == sweep.info.run_id]
    points = {run.data.params["loss.name"]: run for run in below}
    assert (sweep.info.run_name, sorted(points)) == ("default", ["dpo", "ipo"])
    run = points["dpo"]
    folder = Path(run.data.tags["folder"]) / "round_0"
    assert folder.parent == tmp_path / "runs" / "default" / "points" / run.info.run_name
    assert orjson.loads((folder / "checkpoint.mlflow.json").read_bytes())["run"] == run.info.run_id
    assert run.info.status == "FINISHED"
    assert run.data.params["loss.beta"] == "0.1"
    manifest = artifacts.manifest(folder / "checkpoint")
    assert run.data.tags["checkpoint"] == artifacts.digest(folder / "checkpoint")
    assert run.data.tags["data.pairs"] == manifest["parents"]["pairs"][0]["digest"]
    assert run.data.tags["config"] != points["ipo"].data.tags["config"]
    assert run.data.tags["mlflow.source.git.commit"] == manifest["git"]
    assert history(uri, run.info.run_id, "train/loss") == logged(folder / "checkpoint")
    (result,) = [
        orjson.loads(line)
        for line in (folder / "evals" / "part-00000.jsonl").read_bytes().splitlines()
        if b'"pair_accuracy_mean"' in line
    ]
    assert history(uri, run.info.run_id, "eval/pair_accuracy/pair_accuracy_mean") == [(2, result["value"])]


def test_a_server_that_is_not_there_costs_a_warning_and_sync_makes_up_for_it(cli, tmp_path, pairs_file):
    common = small(pairs_file, steps=1)
    cli("stage=prepare", *common)
    done = cli("stage=train", *common, "tracking=mlflow", "tracking.uri=http://127.0.0.1:9")
    assert "tracking=mlflow did not take everything" in done.stderr
    assert "127.0.0.1" in done.stderr.partition("did not take everything")[2]
    folder = tmp_path / "runs" / "default" / "round_0" / "checkpoint"
    assert artifacts.is_complete(folder)
    refused = cli("stage=sync", "tracking=mlflow", "tracking.uri=http://127.0.0.1:9", check=False)
    assert (refused.returncode, "did not take 1 of 1 records" in refused.stderr) == (1, True)
    for _ in range(2):
        cli("stage=sync", "tracking=mlflow")
        (run,) = all_runs(f"sqlite:///{tmp_path / 'mlflow.db'}")
        assert history(f"sqlite:///{tmp_path / 'mlflow.db'}", run.info.run_id, "train/loss") == logged(folder)


# ------------------------------------------------------------------------------------- processes that fight


def start_at_once(folder: Path, count: int) -> None:
    """So many processes tell of a checkpoint each, below one sweep, in a store that is not there."""
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    sweep = records.ensure_group(folder / "multirun" / "sweep.tracking.json", "sweep", "mine")
    told = [record_of(checkpoint(folder / str(n) / "train", 30), parent=sweep) for n in range(count)]
    trackers = [Tracker(MLflow(uri=uri, wait_seconds=3600), folder / str(n) / "log") for n in range(count)]
    for tracker in trackers:
        tracker.start()
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(lambda both: both[0].finish([both[1]], "FINISHED"), zip(trackers, told, strict=True)))
    runs = {run.info.run_id: run for run in all_runs(uri)}
    logs = "".join((folder / str(n) / "log").read_text()[-2000:] for n in range(count))
    assert len(runs) == 1 + count, logs
    (root,) = [key for key, run in runs.items() if "mlflow.parentRunId" not in run.data.tags]
    assert [run.data.tags["mlflow.parentRunId"] for key, run in runs.items() if key != root] == [root] * count
    assert all(run.info.status == "FINISHED" for run in runs.values())
    for key in runs.keys() - {root}:
        assert history(uri, key, "train/loss") == [(n, n * 1.5) for n in range(1, 31)]


@pytest.mark.integration
def test_8_processes_start_at_once_on_no_database(tmp_path):
    start_at_once(tmp_path, 8)


@pytest.mark.soak
@pytest.mark.parametrize("round_", range(10))
def test_16_processes_start_at_once_on_no_database(tmp_path, round_):
    start_at_once(tmp_path, 16)


# ------------------------------------------------------------------------------------- servers that fail


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """The first true answer."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if found := condition():
                return found
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} s")


@contextlib.contextmanager
def mlflow_server(folder: Path, port: int, command: str = "server") -> Iterator["subprocess.Popen[bytes]"]:
    """A real one, on folder/mlflow.db; ended with all its workers."""
    from urllib.request import urlopen

    store = ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"] if command == "server" else []
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1", *store],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
        start_new_session=True,
    )
    try:
        wait_for(lambda: urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200, 400)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, 9)
        server.wait()


def start(folder: Path, *args: str) -> "subprocess.Popen[str]":
    """prefpipe in a folder, not waited for."""
    environment = {**os.environ, "PREFPIPE_RUNS": str(folder / "runs")}
    command = [sys.executable, "-m", "prefpipe", *args]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def untracked(tmp_path_factory: pytest.TempPathFactory, pairs_file: Path) -> tuple[Path, str]:
    """Prepared pairs, and the digest of the weights that 300 steps without a tracker make of them."""
    folder = tmp_path_factory.mktemp("untracked")
    for stage in ("prepare", "train"):
        assert start(folder, f"stage={stage}", *small(pairs_file, 300)).wait() == 0
    pairs = folder / "runs" / "default" / "pairs"
    return pairs, sha256_of(folder / "runs" / "default" / "round_0" / "checkpoint" / "model.safetensors")


@pytest.mark.integration
def test_a_server_killed_during_training_changes_no_weight_and_gets_every_metric_once(
    cli, tmp_path, pairs_file, untracked
):
    pairs, weights = untracked
    port = free_port()
    tracking = ["tracking=mlflow", f"tracking.uri=http://127.0.0.1:{port}", "tracking.every_seconds=0.2"]
    folder = tmp_path / "runs" / "default" / "round_0" / "checkpoint"

    def trained() -> int:
        return len((artifacts.partial_path(folder) / "metrics.jsonl").read_bytes().splitlines())

    with mlflow_server(tmp_path, port) as server:
        run = start(tmp_path, "stage=train", f"inputs.pairs={pairs}", *small(pairs_file, 300), *tracking)
        note = folder.with_name("checkpoint.mlflow.json")
        told = wait_for(lambda: orjson.loads(note.read_bytes())["steps"] if note.is_file() else 0)
        assert trained() < 300, "some metrics arrive while training runs"
        os.killpg(server.pid, 9)
    _, stderr = run.communicate(timeout=300)
    assert run.returncode == 0, stderr
    assert "tracking=mlflow did not take everything" in stderr
    assert sha256_of(folder / "model.safetensors") == weights
    assert 0 < told < 300
    with mlflow_server(tmp_path, port):
        for _ in range(2):
            cli("stage=sync", *tracking)
            (found,) = all_runs(f"http://127.0.0.1:{port}")
            assert found.info.status == "FINISHED"
            for key in ("train/loss", "train/grad_norm", "train/rewards/margin"):
                assert history(f"http://127.0.0.1:{port}", found.info.run_id, key) == logged(folder, key)


def _silent(folder: Path, port: int) -> Iterator[str]:
    """Accepts, and never answers."""
    with socket.create_server(("127.0.0.1", port)):
        yield f"http://127.0.0.1:{port}"


def _failing(status: int) -> Callable[[Path, int], Iterator[str]]:
    """Answers everything with a page of a status."""

    def serve(folder: Path, port: int) -> Iterator[str]:
        from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(b"<html>no</html>")

            do_POST = do_GET  # noqa: N815

            def log_message(self, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{port}"
        server.shutdown()
        server.server_close()

    return serve


def _locked(folder: Path, port: int) -> Iterator[str]:
    """A database that somebody else writes to, and does not let go of."""
    MLflow(uri=f"sqlite:///{folder / 'mlflow.db'}").prepare()
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db", isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        yield f"sqlite:///{folder / 'mlflow.db'}"


def _read_only(folder: Path, port: int) -> Iterator[str]:
    """A place where no database can be made."""
    (folder / "file").write_text("")
    yield f"sqlite:///{folder / 'file' / 'mlflow.db'}"


def _damaged(folder: Path, port: int) -> Iterator[str]:
    (folder / "mlflow.db").write_bytes(b"no database " * 1000)
    yield f"sqlite:///{folder / 'mlflow.db'}"


@pytest.mark.integration
@pytest.mark.parametrize(
    "fault",
    [
        _silent,
        _failing(500),
        *(pytest.param(fault, marks=pytest.mark.soak) for fault in (_failing(429), _failing(404), _failing(200))),
        *(pytest.param(fault, marks=pytest.mark.soak) for fault in (_locked, _read_only, _damaged)),
    ],
    ids=["silent", "500", "429", "404", "html", "locked", "read_only", "damaged"],
)
def test_a_tracker_that_fails_changes_no_weight_and_loses_nothing(cli, tmp_path, pairs_file, untracked, fault):
    pairs, weights = untracked
    serving = contextlib.contextmanager(fault)
    folder = tmp_path / "runs" / "default" / "round_0" / "checkpoint"
    with serving(tmp_path, free_port()) as uri:
        settings = [f"inputs.pairs={pairs}", *small(pairs_file, 300), "tracking=mlflow", f"tracking.uri={uri}"]
        run = start(tmp_path, "stage=train", *settings, "tracking.every_seconds=0.2", "tracking.wait_seconds=3")
        wait_for(lambda: artifacts.is_complete(folder), 900)
        published = time.monotonic()
        _, stderr = run.communicate(timeout=120)
        assert time.monotonic() - published < 3 + 15
    assert run.returncode == 0, stderr
    assert "tracking=mlflow did not take everything" in stderr
    assert sha256_of(folder / "model.safetensors") == weights
    store = f"sqlite:///{tmp_path / 'other.db'}"
    cli("stage=sync", "tracking=mlflow", f"tracking.uri={store}")
    (found,) = all_runs(store)
    assert history(store, found.info.run_id, "train/loss") == logged(folder)


@pytest.mark.integration
def test_mlflow_ui_in_the_working_folder_shows_the_runs(cli, tmp_path, pairs_file):
    """A loop, whose stages hang under its run, and whose evaluations show on it by round."""
    from urllib.request import Request, urlopen

    tracking = ["tracking=mlflow", "tracking.wait_seconds=300"]
    cli("stage=loop", "recipe=offline", *small(pairs_file), "task=[pair_accuracy]", *tracking, timeout=1800)
    port = free_port()
    with mlflow_server(tmp_path, port, command="ui"):
        base = f"http://127.0.0.1:{port}"
        assert b"<title>MLflow</title>" in urlopen(base, timeout=30).read()

        def ask(path: str, **body: Any) -> Any:
            request = Request(f"{base}/api/2.0/mlflow/{path}", data=orjson.dumps(body) if body else None)
            request.add_header("content-type", "application/json")
            return orjson.loads(urlopen(request, timeout=30).read())

        experiment = ask("experiments/get-by-name?experiment_name=prefpipe")["experiment"]["experiment_id"]
        runs = ask("runs/search", experiment_ids=[experiment])["runs"]
    by_name = {run["info"]["run_name"]: run for run in runs}
    root = by_name.pop("default")
    tags = [{tag["key"]: tag["value"] for tag in run["data"]["tags"]} for run in by_name.values()]
    assert {tag["mlflow.parentRunId"] for tag in tags} == {root["info"]["run_id"]}
    assert {"prepare", "train round_0"} <= set(by_name)
    assert [run["info"]["status"] for run in runs] == ["FINISHED"] * len(runs)
    metrics = {metric["key"]: metric["step"] for metric in root["data"]["metrics"]}
    assert metrics["eval/pair_accuracy/pair_accuracy_mean"] == 1


# ------------------------------------------------------------------------------------- Weights & Biases


@pytest.mark.integration
def test_wandb_offline_writes_the_same_runs(tmp_path, pairs_file):
    """The real package, without a network: what it wrote to disk is read back with its own reader."""
    from environments import wandb_folder

    path = os.pathsep.join(filter(None, [str(wandb_folder()), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PREFPIPE_RUNS": str(tmp_path / "runs"), "PYTHONPATH": path}
    tracking = ["tracking=wandb", "tracking.mode=offline", "tracking.wait_seconds=300"]
    for stage in ("stage=prepare", "stage=train", "stage=evaluate"):
        command = [sys.executable, "-m", "prefpipe", stage, *small(pairs_file, 3), "task=[pair_accuracy]", *tracking]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "did not take" not in done.stderr, (
            done.stderr + (tmp_path / "runs" / "default" / "logs" / "tracking-round_0.log").read_text()
        )
    code = """
import glob, json, struct
from pathlib import Path
from wandb.proto import wandb_internal_pb2 as pb

def records(data, offset=7, whole=b""):
    while offset + 7 <= len(data):  # LevelDB's log format, behind a header of 7 bytes
        left = 32768 - offset % 32768
        if left < 7:
            offset += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, offset)
        whole += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""

def values(items):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}

rows, summary, ids, config = [], {}, set(), {}
for name in sorted(glob.glob("wandb/offline-run-*/*.wandb")):
    for data in records(Path(name).read_bytes()):
        record = pb.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            rows.append({"_step": record.history.step.num, **values(record.history.item)})
        elif kind == "summary":
            summary.update(values(record.summary.update))
        elif kind == "config":
            config.update(values(record.config.update))
        elif kind == "run":
            ids.add(record.run.run_id)
            config.update(values(record.run.config.update))
print(json.dumps({"rows": rows, "summary": summary, "ids": sorted(ids), "config": config}))
"""
    read = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert read.returncode == 0, read.stderr
    found = orjson.loads(read.stdout.splitlines()[-1])
    folder = tmp_path / "runs" / "default" / "round_0"
    assert found["ids"] == [orjson.loads((folder / "checkpoint.tracking.json").read_bytes())["id"]]
    assert found["config"]["loss.beta"] == "0.1"
    losses = [(row["_step"], row["train/loss"]) for row in found["rows"] if "train/loss" in row]
    assert losses == logged(folder / "checkpoint")
    assert "eval/pair_accuracy/pair_accuracy_mean" in found["summary"]


def test_wandb_that_is_not_installed_is_refused_before_anything_runs(cli, tmp_path):
    if subprocess.run([sys.executable, "-c", "import wandb"], capture_output=True).returncode == 0:
        pytest.skip("wandb is installed")
    done = cli("stage=train", "tracking=wandb", check=False)
    assert done.returncode == 2
    assert "tracking=wandb needs the package wandb: pip install 'prefpipe[wandb]'" in done.stderr
