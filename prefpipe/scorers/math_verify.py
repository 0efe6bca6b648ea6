"""1 for a final answer that is equal to the reference as mathematics, 0 for another one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from prefpipe.components import register, runtime
from prefpipe.equivalence.answers import (
    DIFFERENT,
    EQUAL,
    WITHOUT_ANSWER,
    MathVerified,
    math_verify_packages,
)
from prefpipe.equivalence.client import RULES, Limits
from prefpipe.errors import ConfigError
from prefpipe.records import Completion
from prefpipe.scorers import Missing, Score, Scorer, ScoringContext
from prefpipe.settings import check_choice


@register("scorer")
@dataclass
class MathVerify(Scorer):
    r"""Equivalence of LaTeX answers by the library math-verify (Kydlíček 2025): 1/2 = 0.5 = \frac{1}{2}, x+1 = 1+x.

    The reference is the prompt's answer: what stands in its last \boxed{}, behind its last ####, or all of it. A
    completion without a final answer is wrong, as for scorer=exact_answer, and counted in the manifest's report
    ("without_answer"). It has no score where there is no reference ("no_answer") or none that can be read
    ("unreadable_reference"), nor where the comparison takes more than its time or memory ("time_out",
    "out_of_memory") or crashes ("crashed"): sympy may take for ever over an answer of a few characters.

    math-verify is not symmetric, takes 10% for equal to 10, and 0.333333 to 1/3.

    rule: where the final answer stands. "boxed" is the last \boxed{}, as prompts for MATH ask for; "stated" is a box,
        or LaTeX or a number behind "answer"; "anywhere" is also the last LaTeX or number of the text, which may be one
        that the solution only mentions.
    timeout_seconds: CPU time of one comparison, so that other work on the machine changes no score. max_memory_gb: of
        the process that makes it. num_processes: null is one for each core.
    """

    rows_per_part: ClassVar[int] = 2_000

    name: str = "math_verify"
    rule: str = "boxed"
    timeout_seconds: float = 10.0
    max_memory_gb: float = 1.0
    num_processes: int | None = runtime(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("scorer.rule", self.rule, RULES)
        for key in ("timeout_seconds", "max_memory_gb"):
            if not 0 < getattr(self, key) < math.inf:
                raise ConfigError(f"scorer.{key}={getattr(self, key)} must be above 0")
        if self.num_processes is not None and self.num_processes < 1:
            raise ConfigError(f"scorer.num_processes={self.num_processes} must be at least 1, or null for all cores")

    def identity(self, context: ScoringContext) -> dict[str, Any]:
        return {"packages": math_verify_packages(f"scorer={self.name}")}

    def score(self, completions: Sequence[Completion], context: ScoringContext) -> list[Score | Missing]:
        limits = Limits(self.timeout_seconds, self.max_memory_gb)
        verdicts = MathVerified(self.rule, limits, self.num_processes).verdicts(completions)
        context.counts["without_answer"] += verdicts.count(WITHOUT_ANSWER)
        return [_score(verdict) for verdict in verdicts]


def _score(verdict: str) -> float | Missing:
    known = {EQUAL: 1.0, DIFFERENT: 0.0, WITHOUT_ANSWER: 0.0}
    return known[verdict] if verdict in known else Missing(verdict)
