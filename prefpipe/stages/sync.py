"""Tells a tracker of what it was not told yet of a run folder: after an outage, or runs without a network."""

import logging
from pathlib import Path

from prefpipe.errors import ConfigError
from prefpipe.tracking import Sink, Tracking, records
from prefpipe.tracking.sending import TrackingError, tell_patiently

log = logging.getLogger(__name__)


def sync(root: Path, *, tracking: Tracking) -> None:
    """Tell of every record below a folder, each thing once, however often this runs.

    Raises:
        TrackingError: the tracker did not take everything.
    """
    if not isinstance(tracking, Sink):
        raise ConfigError(f"stage=sync tells a tracker what it does not know, and tracking={tracking.name}: name one")
    paths = sorted(root.rglob(f"*{records.SUFFIX}"))
    problems = {path: tell_patiently(path, tracking) for path in paths}
    failed = {path: problem for path, problem in problems.items() if problem}
    log.info("tracking=%s knows %d of %d records in %s", tracking.name, len(paths) - len(failed), len(paths), root)
    for path, problem in failed.items():
        raise TrackingError(
            f"tracking={tracking.name} did not take {len(failed)} of {len(paths)} records: {path}: {problem}"
        )
