"""Compares answers with math-verify as a process: JSON lines in, JSON lines out. `python -P worker.py`.

The first line is its limits, each further one a question (see `main`). It needs math-verify, and nothing of prefpipe.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
from typing import Any

SUDDEN, FULL = 0.25, 0.5
"""Of the memory that is left at the start. A question that took more than the first may have met the limit, which the
library does not tell; at the second a new process goes on, so that one that meets it has taken more than the first."""


def main() -> None:
    """Answer questions until stdin ends, or until memory has grown so much that a new process should go on.

    Lines in: {"seconds", "max_bytes"}, then {"rule", "reference", "answer"} and so on. Lines out: {"ready": true}, then
    for each question {"verdict", "more"}: a verdict of `compare` or "out_of_memory", and whether this process takes
    another question. One that takes more CPU time than `seconds` kills the process (SIGPROF): an exception in the midst
    of sympy could be caught there, and calls into C would not see it.
    """
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    limits = json.loads(sys.stdin.buffer.readline())
    most = int(limits["max_bytes"])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    import math_verify  # noqa: F401

    start = _peak_bytes()
    spare = most - start
    _say(answers, {"ready": True})
    more = True
    while more:
        before = _peak_bytes()
        try:
            line = sys.stdin.buffer.readline()
            if not line:
                break
            signal.setitimer(signal.ITIMER_PROF, limits["seconds"])
            verdict = compare(**json.loads(line))
        except MemoryError:
            verdict = "out_of_memory"
        signal.setitimer(signal.ITIMER_PROF, 0)
        sudden = _peak_bytes() - before > SUDDEN * spare
        # The library takes every exception for "different", a MemoryError, too.
        if verdict != "equal" and sudden:
            verdict = "out_of_memory"
        more = verdict != "out_of_memory" and not sudden and _peak_bytes() - start <= FULL * spare
        _say(answers, {"verdict": verdict, "more": more})


def compare(rule: str, reference: str, answer: str) -> str:
    """One of "equal", "different", "without_answer"; "unreadable_reference" where there is no mathematics to be found.

    rule: "boxed": the answer is LaTeX, or blank. "stated", "anywhere": it is looked for in a text (scorer=math_verify).
    The reference is LaTeX.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    def read(text: str, anchored: bool, mode: Any) -> list[Any]:
        latex = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=not anchored)
        plain = ExprExtractionConfig(try_extract_without_anchor=not anchored)
        found: list[Any] = parse(text, [latex, plain], extraction_mode=mode, parsing_timeout=None)
        return found

    gold = read(_text(reference), False, "any_match")
    if all(isinstance(value, str) for value in gold):
        return "unreadable_reference"
    # The first match is the last in the text; an earlier one is no final answer, though it may be easier to read.
    text = _text(answer) if rule == "boxed" else answer
    found = read(text, rule == "stated", "first_match") if answer.strip() else []
    if not found:
        return "without_answer"
    return "equal" if verify(gold, found, timeout_seconds=None) else "different"


def _text(latex: str) -> str:
    """A text in which the library finds that LaTeX, read as it is meant."""
    # 1\,234 would be 1 + 234.
    latex = re.sub(r"(?<=\d)\\[,:;! ](?=\d{3}(?!\d))", "", latex)
    # Its grammar for antlr 4.9 cannot read a percentage; behind the mathematics it is found without the grammar.
    number = re.fullmatch(r"([^$]*?)\s*\\?%\s*", latex, flags=re.DOTALL)
    return f"${' '.join(number[1].split())}$%" if number else f"\\boxed{{{latex}}}"


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _say(answers: Any, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message).encode() + b"\n")
    answers.flush()


if __name__ == "__main__":
    main()
