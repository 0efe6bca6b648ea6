"""Tasks measure a policy on held-out data. One file each; add conf/task/<name>.yaml; several can be given at once."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Protocol

from prefpipe.answers import check_rule
from prefpipe.equivalence.answers import DECIDED, EQUAL, Equivalence, Exact, MathVerified, math_verify_packages
from prefpipe.equivalence.client import RULES, Limits
from prefpipe.errors import ConfigError, DataError
from prefpipe.records import Completion, EvalResult, Pair, Prompt, ScoredCompletion, with_scores
from prefpipe.settings import check_choice
from prefpipe.statistics import wilson


class Policy(Protocol):
    """What a task may ask of the policy under test."""

    def sample(
        self, prompts: Iterable[Prompt], *, num_samples: int, temperature: float, max_new_tokens: int | None = None
    ) -> list[Completion]:
        """Completions in the order of the prompts, num_samples each; null max_new_tokens is the generator's."""

    def pair_logps(self, pairs: list[Pair]) -> list[tuple[float, int, float, int]]:
        """(chosen logp, chosen tokens, rejected logp, rejected tokens) of each pair; logps in nats, summed."""

    def pair_rewards(self, pairs: list[Pair]) -> list[tuple[float, float] | None]:
        """(chosen reward, rejected reward) of each pair, None where it cannot be encoded. ConfigError for a policy."""


@dataclass
class Task:
    """Base of all tasks.

    max_prompts: take at most that many held-out prompts (or pairs), from the head; null takes all.
    """

    name: str = "???"
    max_prompts: int | None = None

    def identity(self) -> dict[str, Any]:
        """What the results depend on besides the data and this component's fields, e.g. a package's version."""
        return {}

    def metrics(self) -> list[str]:
        """The metrics of the results of `evaluate`, in order."""
        raise NotImplementedError(f"{type(self).__name__} names no metrics")

    def evaluate(
        self, policy: Policy, prompts: list[Prompt], pairs: list[Pair]
    ) -> tuple[list[EvalResult], list[ScoredCompletion]]:
        """Results, and the completions they rest on (for the report), from held-out prompts and pairs.

        A completion that was compared with an answer has the score `correct`.
        """
        raise NotImplementedError(f"{type(self).__name__} evaluates nothing")


@dataclass
class AnswerTask(Task):
    r"""Base of the tasks over prompts with a reference answer.

    equivalence: which answers are the same. "exact": numbers of the same value, as exact fractions. "math_verify":
        what is equal as mathematics, LaTeX too, 1/2 = 0.5 = \frac{1}{2}, as scorer=math_verify has it, and with the
        same package. There a comparison may take more than its time or memory, or crash, or find a reference that
        cannot be read: then an answer is neither right nor wrong. Its problem is left out of the other metrics, counted
        in `not_compared`, and by reason in that one's details.
    rule: where the final answer stands; null is last_hash (exact, see prefpipe/answers.py) or boxed (math_verify).
    timeout_seconds: of math_verify, CPU time of one comparison; 10 when null.
    max_new_tokens: null takes the generator's.
    """

    equivalence: str = "exact"
    rule: str | None = None
    timeout_seconds: float | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        check_choice(self._key("equivalence"), self.equivalence, ("exact", "math_verify"))
        if self.equivalence == "exact":
            self.rule = self.rule or "last_hash"
            check_rule(self._key("rule"), self.rule)
            if self.timeout_seconds is not None:
                raise ConfigError(
                    f"{self._key('timeout_seconds')}={self.timeout_seconds} would be ignored with "
                    f"{self._key('equivalence')}=exact; drop it"
                )
            return
        self.rule = self.rule or "boxed"
        check_choice(self._key("rule"), self.rule, RULES)
        self.timeout_seconds = Limits().seconds if self.timeout_seconds is None else self.timeout_seconds
        if not 0 < self.timeout_seconds < math.inf:
            raise ConfigError(f"{self._key('timeout_seconds')}={self.timeout_seconds} must be above 0")

    def identity(self) -> dict[str, Any]:
        if self.equivalence == "exact":
            return {}
        return {"packages": math_verify_packages(f"{self._key('equivalence')}=math_verify")}

    @property
    def answers(self) -> Equivalence:
        """How answers are compared."""
        assert self.rule is not None
        if self.equivalence == "exact":
            return Exact(self.rule)
        assert self.timeout_seconds is not None
        return MathVerified(self.rule, Limits(self.timeout_seconds))

    def problems(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts whose reference answer can be compared with. Raises DataError when there are none."""
        found = [p for p in prompts if p.answer is not None and self.answers.is_reference(p.answer)]
        if not found:
            kind = "number" if self.equivalence == "exact" else "answer"
            raise DataError(
                f"task={self.name} needs held-out prompts with a reference {kind}, and none of the {len(prompts)} has "
                f"one: raise data_mixer.heldout_fraction, or choose another task, such as task=pair_accuracy"
            )
        return found

    def of_problems(self, metric: str, count: int, n: int, *, details: Mapping[str, Any] | None = None) -> EvalResult:
        """A share of n problems with Wilson's 95 % interval."""
        low, high = wilson(count, n)
        return EvalResult(
            task=self.name, metric=metric, value=count / n, low=low, high=high, n=n, details=dict(details or {})
        )

    def not_compared(self, verdicts: Sequence[str]) -> list[EvalResult]:
        """The metric of that name, from one verdict for each problem; none where every answer can be compared.

        Raises DataError where no problem is left.
        """
        if self.equivalence == "exact":
            return []
        reasons = Counter(verdict for verdict in verdicts if verdict not in DECIDED)
        if reasons.total() == len(verdicts):
            raise DataError(f"task={self.name}: no answer to {len(verdicts)} problems can be compared: {dict(reasons)}")
        return [self.of_problems("not_compared", reasons.total(), len(verdicts), details=reasons)]

    def _with_not_compared(self, *metrics: str) -> list[str]:
        return [*metrics, *(["not_compared"] if self.equivalence != "exact" else [])]

    def _key(self, field: str) -> str:
        return f"task.{self.name}.{field}"


def judged(completions: Sequence[Completion], verdicts: Sequence[str]) -> list[ScoredCompletion]:
    """Completions with the score `correct`, or without it and with the reason in meta.not_compared."""
    return [
        with_scores(completion, {"correct": float(verdict == EQUAL)})
        if verdict in DECIDED
        else with_scores(replace(completion, meta={**completion.meta, "not_compared": verdict}), {})
        for completion, verdict in zip(completions, verdicts, strict=True)
    ]


def grouped(completions: Sequence[Completion]) -> list[list[Completion]]:
    """Completions by prompt; those of one prompt stand together."""
    return [list(group) for _, group in groupby(completions, key=lambda completion: completion.prompt_id)]
