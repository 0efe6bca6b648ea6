"""Slurm's notice that a job will be stopped: training writes a state first, then the job is queued again.

One file passes the word between the process that Slurm tells and the one that writes states. Its name says whose turn
it is, and it is only ever renamed:

    <place>.listening   training takes its steps, and looks for the notice every training.log_every_steps
    <place>.notice      the notice was given; the name goes back when a state is on disk

Where nobody listens, as in another stage or while a model is loaded, there is nothing to wait for.
"""

import logging
import os
import time
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

VARIABLE = "PREFPIPE_NOTICE"
"""Names the place for all processes of a job."""

SECONDS_BETWEEN_LOOKS = 0.05


def expect(place: Path) -> None:
    """In the first process of a job: have training that it starts look for a notice here."""
    for file in (_listening(place), _given(place)):  # of an attempt that was killed
        file.unlink(missing_ok=True)
    os.environ[VARIABLE] = str(place.absolute())


def give(place: Path, seconds: float) -> bool:
    """Ask training for a state, and wait for it; False where none is at work, or none came in that time."""
    with suppress(FileNotFoundError):
        _listening(place).rename(_given(place))
    if not _given(place).exists():
        return False
    deadline = time.monotonic() + seconds
    while _given(place).exists():
        if time.monotonic() > deadline:
            log.warning("training wrote no state within %.0f s of Slurm's notice (launch.save_seconds)", seconds)
            return False
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return True


class Listener:
    """Training's side. Only the process that writes states listens, and outside of a job there is nothing to hear."""

    def __init__(self, *, listens: bool) -> None:
        name = os.environ.get(VARIABLE)
        self.place = Path(name) if listens and name else None

    def __enter__(self) -> "Listener":
        if self.place is not None:
            with suppress(OSError):  # a full disk, say: the run is worth more than the notice
                _listening(self.place).touch()
        return self

    def __exit__(self, *_: object) -> None:
        if self.place is not None:
            for file in (_listening(self.place), _given(self.place)):
                file.unlink(missing_ok=True)

    def heard(self) -> bool:
        """Whether the notice was given, and not answered yet."""
        return self.place is not None and _given(self.place).exists()

    def answer(self) -> None:
        """A state was written just now."""
        if self.place is not None:
            with suppress(FileNotFoundError):
                _given(self.place).rename(_listening(self.place))
                log.info("Slurm's notice: the state is written")


def _listening(place: Path) -> Path:
    return place.with_name(f"{place.name}.listening")


def _given(place: Path) -> Path:
    return place.with_name(f"{place.name}.notice")
