"""Weights & Biases: the runs of a sweep are a group, and W&B's own process looks after disk and network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from prefpipe.components import register
from prefpipe.settings import check_choice
from prefpipe.tracking import Row, Sink
from prefpipe.tracking.records import Record

if TYPE_CHECKING:
    import wandb


@register("tracking")
@dataclass
class WandB(Sink):
    """https://wandb.ai; `pip install 'prefpipe[wandb]'`, and WANDB_API_KEY in the environment, or `wandb login`.

    project, entity: where the runs go; entity null is the user's own.
    mode: "online", or "offline", which writes into the folder wandb/ what `wandb sync --append` uploads later.
    """

    name: str = "wandb"
    project: str = "prefpipe"
    entity: str | None = None
    mode: str = "online"
    needs: ClassVar[str] = "wandb"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("tracking.mode", self.mode, ("online", "offline"))

    def open(self, record: Record, parent: str | None) -> str:
        """A sweep is the name of a group, and no run."""
        if record.kind == "sweep" or record.id in self._runs:
            return record.id
        import wandb

        self._runs[record.id] = wandb.init(
            id=record.id,
            resume="allow",
            project=self.project,
            entity=self.entity,
            mode="online" if self.mode == "online" else "offline",
            name=record.name,
            group=parent,
            job_type=record.kind,
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True, init_timeout=20, disable_git=True, disable_code=True),
        )
        return record.id

    def describe(self, run: str, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Both are W&B's config: its tags are words without a value."""
        if run in self._runs:
            self._runs[run].config.update({**params, "tags": dict(tags)}, allow_val_change=True)

    def log(self, run: str, rows: Sequence[Row], time: int) -> None:
        """W&B leaves out steps that it has."""
        for row in rows:
            self._runs[run].log(row.values, step=row.step)

    def summarize(self, run: str, row: Row, time: int) -> None:
        """Not as a step, which W&B would leave out once it has a later one."""
        if run in self._runs:
            self._runs[run].summary.update(row.values)

    def set_status(self, run: str, status: str, time: int) -> None:
        """W&B itself says that a run goes on, and what has ended waits for its upload."""
        if status != "RUNNING" and run in self._runs:
            self._runs.pop(run).finish(exit_code=0 if status == "FINISHED" else 1)

    @cached_property
    def _runs(self) -> "dict[str, wandb.Run]":
        return {}
