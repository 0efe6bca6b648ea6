"""Comparisons in child processes, as seen by who asks for them, and where in a text its final answer stands."""

from __future__ import annotations

import os
import queue
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from prefpipe.processes import ChildError, Talker

WORKER = Path(__file__).with_name("worker.py")
RULES = ("boxed", "stated", "anywhere")
STALL_SECONDS, STALL_FACTOR = 60.0, 10.0
"""A child is killed after this and so many times its CPU time have passed on the clock, too: it may be stopped."""

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_WORD = re.compile(r"[^\s$]+")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)  # \{ is none
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))


class Question(NamedTuple):
    """Whether an answer is equal to a reference, LaTeX without delimiters; so is the answer with rule="boxed".

    With rule="stated" and "anywhere" the answer is a text, and its final answer is looked for.
    """

    rule: str
    reference: str
    answer: str


class Limits(NamedTuple):
    """Of one comparison: seconds of CPU time; gigabytes of the process, math-verify itself included."""

    seconds: float = 10.0
    max_memory_gb: float = 1.0


def final_box(text: str) -> str | None:
    r"""What stands in the last \boxed{} or \fbox{} of a text; None where there is none, or it does not end.

    \boxed 7 counts, too.
    """
    starts = [found.end() for found in _BOX.finditer(text)]
    if not starts:
        return None
    start = starts[-1]
    if text[start : start + 1] != "{":
        word = _WORD.match(text, start)
        return word[0].rstrip(".,;") or None if word else None
    depth = 0
    for mark in _BRACES.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0 and mark[0] == "}":
            return text[start + 1 : mark.start()].strip() or None
    return None


def reference_answer(text: str) -> str | None:
    """The LaTeX of a reference: its last box, what follows its last "####", or all of it; None where that is blank."""
    box = final_box(text)
    if box is None and _BOX.search(text) is None:
        box = text.rpartition("####")[2].strip()
        for opening, closing in _DELIMITERS:
            inner = box[len(opening) : -len(closing)]
            if box == opening + inner + closing and inner and opening not in inner:
                box = inner.strip()
                break
    return box or None


class Comparer:
    """Child processes that compare answers; one that runs out of time or memory is replaced by a new one.

    Raises ChildError where a child does not even start.
    """

    def __init__(self, limits: Limits, *, num_processes: int) -> None:
        self.limits, self.num_processes = limits, num_processes
        self._answers: queue.Queue[tuple[Talker, bytes | None]] = queue.Queue()
        self._children: set[Talker] = set()
        self._ready: set[Talker] = set()
        self._busy: dict[Talker, tuple[int, float]] = {}

    def __enter__(self) -> Comparer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Of the children."""
        return [child.pid for child in self._children]

    def compare(self, questions: Sequence[Question]) -> list[str]:
        """A verdict on each question, in order.

        "equal", "different", or "without_answer", which is different, too; and where there is none, the reason:
        "unreadable_reference", "time_out", "out_of_memory" or "crashed".
        """
        found: dict[int, str] = {}
        waiting = deque(range(len(questions)))
        while len(found) < len(questions):
            while waiting and len(self._busy) < self.num_processes:
                self._ask(waiting.popleft(), questions)
            first = min(deadline for _, deadline in self._busy.values())
            try:
                child, line = self._answers.get(timeout=max(0.0, first - time.monotonic()))
            except queue.Empty:
                for child in [child for child, (_, deadline) in self._busy.items() if deadline <= first]:
                    found[self._busy[child][0]] = "time_out"
                    self._close(child)
                continue
            if child not in self._children:
                continue  # the end of one that was closed
            if line is None:
                found.update(self._ended(child))
            elif child not in self._ready:
                self._ready.add(child)
            else:
                found.update(self._answered(child, orjson.loads(line)))
        return [found[place] for place in range(len(questions))]

    def close(self) -> None:
        """End the children, at work or not."""
        for child in list(self._children):
            self._close(child)

    def _ask(self, place: int, questions: Sequence[Question]) -> None:
        child = next((child for child in self._children if child not in self._busy), None) or self._start()
        self._busy[child] = place, time.monotonic() + STALL_SECONDS + STALL_FACTOR * self.limits.seconds
        try:
            child.ask(orjson.dumps(questions[place]._asdict(), option=orjson.OPT_APPEND_NEWLINE))
        except ChildError:
            # Something may have ended it while it was idle, so the question is not to blame: another child is asked. A
            # new one that ends while it reads the question was asked for too much; what it said is in the queue.
            if child in self._ready:
                self._close(child)
                self._ask(place, questions)

    def _start(self) -> Talker:
        # No other variable: what models write is read there, and a key is nobody's business then. A fixed hash seed, as
        # sympy's way through an expression follows the order of sets.
        kept = {key: os.environ[key] for key in ("PATH", "HOME", "LD_LIBRARY_PATH", "PYTHONPATH") if key in os.environ}
        child = Talker(
            [sys.executable, "-P", str(WORKER)],
            "a process that compares answers",
            self._answers,
            environment={**kept, "PYTHONHASHSEED": "0"},
        )
        self._children.add(child)
        limits = {"seconds": self.limits.seconds, "max_bytes": int(self.limits.max_memory_gb * 1e9)}
        child.ask(orjson.dumps(limits, option=orjson.OPT_APPEND_NEWLINE))
        return child

    def _answered(self, child: Talker, answer: dict[str, Any]) -> dict[int, str]:
        place, _ = self._busy.pop(child)
        if not answer["more"]:
            self._close(child)
        return {place: answer["verdict"]}

    def _ended(self, child: Talker) -> dict[int, str]:
        """What the end of a child means for its question. Raises ChildError where it never got ready for one."""
        if child not in self._ready:
            raise child.error()
        reasons = {-signal.SIGPROF: "time_out", -signal.SIGKILL: "out_of_memory"}
        reason = reasons.get(child.exit_code or 0, "crashed")
        found = {self._busy[child][0]: reason} if child in self._busy else {}
        self._close(child)
        return found

    def _close(self, child: Talker) -> None:
        self._children.discard(child)
        self._ready.discard(child)
        self._busy.pop(child, None)
        child.close(now=True)
