"""A process that waits too long ends itself and says where; the real thing, in a process of its own."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest

from prefpipe.processes import ERROR_FILE, KILLED, ChildError, run_process

BEGINNING = """
import sys, time
from prefpipe.logs import set_up_logging
from prefpipe.training.watchdog import Watchdog
set_up_logging()
def waits_for_others():
    time.sleep(60)
"""


def run(code: str, told: Path) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {ERROR_FILE: str(told)}
    command = [sys.executable, "-c", BEGINNING + code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=50, check=False)


def test_it_ends_a_process_and_shows_its_stack(tmp_path):
    code = "dog = Watchdog(watches=True, patience=1)\nfor _ in range(5): dog.beat(); time.sleep(0.1)\n"
    code += "waits_for_others()"
    ended = run(code, tmp_path / "told")
    assert ended.returncode == 1
    assert re.search(r"no micro-batch has ended for [12] s, where the longest before took 0 s", ended.stderr)
    assert "in waits_for_others" in ended.stderr
    told = orjson.loads((tmp_path / "told").read_bytes())
    assert told["kind"] == "hang"
    assert "the same command again goes on from the last state" in told["reason"]


@pytest.mark.parametrize(
    "code",
    [
        "dog = Watchdog(watches=True, patience=0.5)\ntime.sleep(2)",
        "dog = Watchdog(watches=False, patience=0.5)\ndog.beat()\ntime.sleep(2)",
        "dog = Watchdog(watches=True, patience=0.5)\ndog.beat()\nwith dog.paused(): time.sleep(2)",
        "dog = Watchdog(watches=True, patience=0.5)\ndog.beat()\ndog.stop()\ntime.sleep(2)",
        "dog = Watchdog(watches=True, patience=0.5)\nfor _ in range(8): dog.beat(); time.sleep(0.3)",
        # Ten times the longest wait is longer than its patience.
        "dog = Watchdog(watches=True, patience=1)\ndog.beat()\ntime.sleep(0.7)\ndog.beat()\ntime.sleep(3)",
    ],
    ids=["not begun", "alone", "paused", "over", "beating", "slow"],
)
def test_it_lets_others_live(tmp_path, code):
    ended = run(code, tmp_path / "told")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert not (tmp_path / "told").exists()


def test_seconds_of_suspension_do_not_count(tmp_path):
    code = "dog = Watchdog(watches=True, patience=1.5)\ndog.beat()\nprint('on', flush=True)\n"
    code += "for _ in range(9): time.sleep(0.5); dog.beat()"
    child = subprocess.Popen([sys.executable, "-c", BEGINNING + code], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"on\n"
    child.send_signal(signal.SIGSTOP)
    time.sleep(4)
    child.send_signal(signal.SIGCONT)
    assert child.wait(30) == 0


PARENT = """
import os, signal, subprocess, sys, time
children = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) for _ in range(2)]
for child in children[: int(sys.argv[1])]:
    child.send_signal(signal.SIGSTOP)
if sys.argv[2] == "waits":
    sys.exit(children[0].wait() and 1)
time.sleep(18)
for child in children:
    child.kill()
"""


def test_of_processes_in_step_one_that_is_stopped_ends_all():
    begun = time.monotonic()
    with pytest.raises(ChildError, match=r"^process \d+ of training was stopped by a signal for 15 s, while") as caught:
        run_process([sys.executable, "-c", PARENT, "1", "waits"], "training", in_step=True)
    assert caught.value.kind == "hang" != KILLED
    assert time.monotonic() - begun < 30


def test_all_of_them_may_pause():
    run_process([sys.executable, "-c", PARENT, "2", "ends"], "training", in_step=True)
