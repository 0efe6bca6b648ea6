"""metrics.jsonl and nothing else."""

from dataclasses import dataclass

from prefpipe.components import register
from prefpipe.tracking import Tracking


@register("tracking")
@dataclass
class NoTracking(Tracking):
    """No tracker is told."""

    name: str = "none"
