"""A search of a function in closed form, killed at one write of its journal after the other. Run by test_search.py."""

import math
import os
import signal
import sys
from pathlib import Path

from optuna.storages.journal import JournalFileBackend

from prefpipe.settings import SweepConfig
from prefpipe.trials import Choices, Interval, Trial, Trials, open_trials

SPACE = {
    "rate": Interval(1e-6, 1e-4, log=True),
    "beta": Choices(("0.1", "0.3")),
    "epochs": Interval(1, 5, whole=True),
}
SWEEP = SweepConfig(name="optuna", objective="a/b", trials=14, parallel=3)


def value(trial: Trial) -> float | None:
    """Best at a rate of 1e-5, a beta of 0.3 and 3 epochs; every seventh trial fails."""
    if trial.number % 7 == 5:
        return None
    rate, epochs = float(trial.values["rate"]), int(trial.values["epochs"])
    return (trial.values["beta"] == "0.3") - abs(math.log10(rate / 1e-5)) - 0.1 * abs(epochs - 3)


def run(trials: Trials) -> None:
    while (left := 14 - len(trials.of("complete"))) > 0:
        for trial in trials.batch(min(3, left)):
            found = value(trial)
            if found is None:
                trials.fail(trial, "every seventh")
            else:
                trials.finish(trial, found)


def die_at_write(number: int) -> None:
    """Killed before, in the middle of, or after a write, in turn."""
    real, writes = JournalFileBackend.append_logs, 0

    def append_logs(self: JournalFileBackend, logs: list[dict[str, object]]) -> None:
        nonlocal writes
        writes += 1
        if writes == number:
            if number % 3 == 1:
                with open(self._file_path, "ab") as file:
                    file.write(b'{"op_code":5,"worker')
            elif number % 3 == 2:
                real(self, logs)
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, logs)

    JournalFileBackend.append_logs = append_logs  # type: ignore[method-assign]


def main(folder: Path) -> None:
    """Kill the first attempt at its first write, the next at its second, and so on, until one comes to the end."""
    number = 0
    while True:
        number += 1
        child = os.fork()
        if child == 0:
            die_at_write(number)
            with open_trials(folder, SWEEP, SPACE, {}) as trials:
                run(trials)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            print(number - 1)
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]))
