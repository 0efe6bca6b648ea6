"""What became of each time that a stage was started.

    runs/<exp_name>/attempts/<point>/<stage>-round_<r>.0001.json    the first attempt, and how it ended
                                     <stage>-round_<r>.yaml         its frozen config, written when a sweep is started
                                     <stage>-round_<r>.queue.json   since when, by whom, and as which Slurm job

An attempt that was killed cannot say so: its file still says "running" and names a process that is gone.
"""

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import orjson
import psutil

from prefpipe.errors import kind_of
from prefpipe.files import now, write_json
from prefpipe.processes import ChildError

RUNNING, DONE, FAILED, PREEMPTED = "running", "done", "failed", "preempted"

FILE = re.compile(
    r"(?P<stage>[a-z_]+?)(-shard-(?P<shard>\d+-of-\d+))?-round_(?P<round>\d+)\.(\d{4}\.json|queue\.json|yaml)"
)

EVALUATE_BASE = "evaluate_base"
"""The stage of a unit that evaluates the starting model, which a loop does besides evaluating its rounds."""

R = TypeVar("R")


@dataclass(frozen=True, order=True)
class Unit:
    """One stage and round of a run, or of a point of a sweep: what is started, retried, and a row of the status table.

    run: runs/<exp_name>. point: "" where there is none. shard: as in "3-of-8", of stage=generate, else "".
    """

    run: Path
    point: str
    round: int
    stage: str
    shard: str = ""

    @property
    def name(self) -> str:
        return self.stage + (f"-shard-{self.shard}" if self.shard else "") + f"-round_{self.round}"

    @property
    def config(self) -> Path:
        """The frozen config of a unit that a sweep started."""
        return self._file("yaml")

    def attempts(self) -> list["Attempt"]:
        """In their order; a file that cannot be read is left out."""
        files = sorted(self.config.parent.glob(f"{self.name}.[0-9][0-9][0-9][0-9].json"))
        return [attempt for file in files if (attempt := _read(file, Attempt)) is not None]

    def queued(self) -> "Queued | None":
        """How it was last put in line by a sweep; None where it never was."""
        return _read(self._file("queue.json"), Queued)

    def put_in_line(self, queued: "Queued") -> None:
        write_json(self._file("queue.json"), asdict(queued))

    def begin(self) -> "Attempt":
        """Write that an attempt has begun, under the next number, also where others do the same at the same time."""
        self.config.parent.mkdir(parents=True, exist_ok=True)
        taken = self.config.parent.glob(f"{self.name}.[0-9][0-9][0-9][0-9].json")
        number = max((int(file.name.split(".")[-2]) for file in taken), default=0) + 1
        while True:
            try:
                self._file(f"{number:04d}.json").open("xb").close()
                break
            except FileExistsError:
                number += 1
        attempt = Attempt(number, **_process(), job=slurm_job(), started=now())
        self.write(attempt)
        return attempt

    def write(self, attempt: "Attempt") -> None:
        write_json(self._file(f"{attempt.number:04d}.json"), asdict(attempt))

    def _file(self, ending: str) -> Path:
        return self.run / "attempts" / self.point / f"{self.name}.{ending}"


@dataclass
class Attempt:
    """One attempt at a unit.

    pid, pid_started: its process, and that one's start in seconds since 1970, as numbers of processes are used again.
    job: of Slurm, as 12 or 12_3. outcome: "running", "done", "failed", or "preempted", which Slurm starts again.
    kind, reason: of a failure, see errors.kind_of; or what preempted it.
    """

    number: int
    host: str
    pid: int
    pid_started: float
    job: str | None
    started: str
    ended: str | None = None
    outcome: str = RUNNING
    kind: str = ""
    reason: str = ""

    def end(self, outcome: str, kind: str = "", reason: str = "") -> None:
        self.outcome, self.kind, self.reason, self.ended = outcome, kind, reason, now()


@dataclass(frozen=True)
class Queued:
    """A unit that a sweep will start, or has started.

    since: when. host, pid, pid_started: who starts it, where job is None, and else who gave it to Slurm as that job.
    folder: the working directory. launcher: the settings of the Slurm job, to start another one alike.
    """

    since: str
    host: str
    pid: int
    pid_started: float
    folder: str
    job: str | None = None
    launcher: dict[str, Any] | None = None


_open: list[tuple[Unit, Attempt]] = []
"""The attempts of this process, the innermost last."""


@contextmanager
def attempt_at(unit: Unit) -> Iterator[None]:
    """Keep a record of what happens inside. On several nodes the first one keeps it."""
    if os.environ.get("SLURM_PROCID", "0") != "0":
        yield
        return
    attempt = unit.begin()
    _open.append((unit, attempt))
    try:
        yield
    except BaseException as error:
        if attempt.outcome == PREEMPTED and isinstance(error, SystemExit):
            raise
        reason = error.reason if isinstance(error, ChildError) and error.reason else str(error)
        attempt.end(FAILED, _kind(error), reason or type(error).__name__)
        raise
    else:
        attempt.end(DONE)
    finally:
        _open.remove((unit, attempt))
        unit.write(attempt)


def preempt(why: str) -> None:
    """Write that Slurm will stop this process, and start it again. The process may be killed right afterwards."""
    for unit, attempt in _open:
        attempt.end(PREEMPTED, reason=why)
        unit.write(attempt)


def queued_now(folder: str, *, job: str | None = None, launcher: dict[str, Any] | None = None) -> Queued:
    """Put in line now, by this process, to run in a folder."""
    return Queued(now(), **_process(), folder=folder, job=job, launcher=launcher)


def lives(process: Attempt | Queued) -> bool | None:
    """Whether a process still runs; None where that cannot be told, as it belongs to another machine."""
    if process.host != socket.gethostname():
        return None
    try:
        return bool(abs(psutil.Process(process.pid).create_time() - process.pid_started) < 1)
    except psutil.Error:
        return False


def units_of(run: Path) -> list[Unit]:
    """All units of a run of which something is known, points in the order of their names."""
    found = set()
    root = run / "attempts"
    for file in root.rglob("*"):
        match = FILE.fullmatch(file.name)
        if match:
            point = file.parent.relative_to(root).as_posix()
            found.add(
                Unit(run, "" if point == "." else point, int(match["round"]), match["stage"], match["shard"] or "")
            )
    return sorted(found)


def slurm_job() -> str | None:
    """The Slurm job that this process is part of, an array's element as 12_3."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID")


def _process() -> dict[str, Any]:
    own = psutil.Process()
    return {"host": socket.gethostname(), "pid": own.pid, "pid_started": own.create_time()}


def _kind(error: BaseException) -> str:
    """Of submitit's errors, one is raised in the middle of a stage: when its job may not be queued once more."""
    return "timeout" if type(error).__name__ == "UncompletedJobError" else kind_of(error)


def _read(file: Path, kind: type[R]) -> R | None:
    with suppress(OSError, orjson.JSONDecodeError, TypeError):
        return kind(**orjson.loads(file.read_bytes()))
    return None
