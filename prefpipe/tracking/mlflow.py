"""MLflow: a tree of runs, sweep above points above stages, in a database or on a server."""

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from filelock import FileLock

from prefpipe.components import register
from prefpipe.errors import ConfigError
from prefpipe.files import chunks
from prefpipe.tracking import Row, Sink
from prefpipe.tracking.records import Record

if TYPE_CHECKING:
    from mlflow import MlflowClient

DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # a repeated `create run` would make two; who calls repeats, after a look
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
ID_TAG = "prefpipe.id"
MAX_METRICS, MAX_PARAMS = 1000, 100
"""Of one request, MLflow's own limits."""


@register("tracking")
@dataclass
class MLflow(Sink):
    """https://mlflow.org. `mlflow ui` in the working folder shows what is written by default.

    uri: a server, or a database such as sqlite:///mlflow.db; null is $MLFLOW_TRACKING_URI, or else that file in the
        working folder. Names and passwords belong into $MLFLOW_TRACKING_USERNAME and $MLFLOW_TRACKING_PASSWORD.
    experiment: of MLflow, made where it is missing.
    """

    name: str = "mlflow"
    uri: str | None = None
    experiment: str = "prefpipe"
    needs: ClassVar[str] = "mlflow"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.uri is None:
            return
        if re.search(r"://[^/]*@", self.uri):
            shown = re.sub(r"://[^/]*@", "://***@", self.uri)
            raise ConfigError(
                f"tracking.uri={shown} holds a name or a password, and configs are written to files; set "
                f"MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or the whole as MLFLOW_TRACKING_URI"
            )
        if not re.match(r"(https?|sqlite|postgresql|mysql|mssql)(\+\w+)?://|databricks", self.uri):
            raise ConfigError(
                f"tracking.uri={self.uri} must be a server (http://HOST:PORT) or a database (sqlite:///FILE), as "
                f"MLflow keeps no more runs in plain folders"
            )

    @property
    def store(self) -> str:
        """Where runs go."""
        return self.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"

    def prepare(self) -> None:
        """Client, store and experiment."""
        self._connection  # noqa: B018

    def open(self, record: Record, parent: str | None) -> str:
        """A run that was deleted there is not made again. Raises LookupError for it."""
        from mlflow.entities import ViewType

        client, experiment = self._connection
        # The first of them, should two machines whose locks do not see each other have made one each.
        found = client.search_runs(
            [experiment],
            f"tags.`{ID_TAG}` = '{record.id}'",
            run_view_type=ViewType.ALL,
            max_results=1,
            order_by=["attributes.start_time ASC", "attributes.run_id ASC"],
        )
        if found:
            run = found[0].info
            if run.lifecycle_stage == "deleted":
                raise LookupError(f"run {run.run_id} was deleted there; `mlflow runs restore` brings it back")
            return str(run.run_id)
        tags = {ID_TAG: record.id, "mlflow.source.name": "prefpipe"}
        tags |= {"mlflow.parentRunId": parent} if parent else {}
        created = client.create_run(experiment, run_name=record.name, start_time=record.started, tags=tags)
        return str(created.info.run_id)

    def describe(self, run: str, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Some tags have a name that MLflow's pages know."""
        from mlflow.entities import Param, RunTag

        client, _ = self._connection
        for chunk in chunks(params.items(), MAX_PARAMS):
            client.log_batch(run, params=[Param(_allowed(key), value) for key, value in chunk])
        known = {"git": "mlflow.source.git.commit", "user": "mlflow.user"}
        named = {**tags, **{known[key]: value for key, value in tags.items() if key in known}}
        for chunk in chunks(named.items(), MAX_PARAMS):
            client.log_batch(run, tags=[RunTag(_allowed(key), value) for key, value in chunk])

    def log(self, run: str, rows: Sequence[Row], time: int) -> None:
        """MLflow takes the same value, step and time of a metric once, however often it comes."""
        from mlflow.entities import Metric

        client, _ = self._connection
        metrics = [Metric(_allowed(key), value, time, row.step) for row in rows for key, value in row.values.items()]
        for chunk in chunks(metrics, MAX_METRICS):
            client.log_batch(run, metrics=chunk)

    def summarize(self, run: str, row: Row, time: int) -> None:
        """At the step that the run has come to."""
        self.log(run, [row], time)

    def set_status(self, run: str, status: str, time: int) -> None:
        """MLflow keeps the time of an end."""
        client, _ = self._connection
        if status == "RUNNING":
            client.update_run(run, status=status)
        else:
            client.set_terminated(run, status, end_time=time)

    def is_busy(self, error: Exception) -> bool:
        """SQLite lets one process write at a time."""
        return self.store.startswith("sqlite") and "locked" in str(error)

    @cached_property
    def _connection(self) -> "tuple[MlflowClient, str]":
        """The client, and the id of the experiment."""
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self._make_store()
        client = MlflowClient(self.store)
        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            # Another process may have been faster.
            with contextlib.suppress(MlflowException):
                return client, str(client.create_experiment(self.experiment))
            found = client.get_experiment_by_name(self.experiment)
        if found is None:
            raise LookupError(f"experiment {self.experiment} is not there, and cannot be made")
        if found.lifecycle_stage == "deleted":
            raise LookupError(f"experiment {self.experiment} was deleted there; choose another tracking.experiment")
        return client, str(found.experiment_id)

    def _make_store(self) -> None:
        """Where a SQLite file is missing, make it: under a lock, and whole or not at all.

        Processes that make one at once break its migration: 7 of 8 fail; and one that is killed while it does leaves a
        file that no other can use.
        """
        scheme, _, name = self.store.partition(":///")
        file = Path(name.partition("?")[0])
        if not scheme.startswith("sqlite") or file.exists():
            return
        from mlflow import MlflowClient

        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_name(f".{file.name}.lock")):
            if not file.exists():
                new = file.with_name(f".{file.name}.new")
                new.unlink(missing_ok=True)
                MlflowClient(f"{scheme}:///{new}").get_experiment_by_name(self.experiment)
                new.rename(file)


def _allowed(name: str) -> str:
    """With the characters that MLflow takes in a name: pass@4 is pass_at_4."""
    return re.sub(r"[^\w\-./ :]", "_", name.replace("@", "_at_"))
