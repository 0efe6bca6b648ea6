"""Whether completions end in the reference answer, and which answer most end in: by numbers, or by mathematics.

Both ways give the same verdicts: EQUAL, DIFFERENT, or WITHOUT_ANSWER, which is different, too. Any other word is the
reason why there is no verdict, and neither right nor wrong.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

from prefpipe.answers import final_answer, gold_answer
from prefpipe.equivalence.client import Comparer, Limits, Question, final_box, reference_answer
from prefpipe.errors import ConfigError
from prefpipe.records import Completion

EQUAL, DIFFERENT, WITHOUT_ANSWER = "equal", "different", "without_answer"
DECIDED = (EQUAL, DIFFERENT, WITHOUT_ANSWER)
UNREADABLE = "unreadable_reference"
PACKAGES = ("math-verify", "latex2sympy2_extended", "sympy")


class Equivalence(Protocol):
    """A way to compare answers."""

    def is_reference(self, answer: str) -> bool:
        """Whether a prompt's answer is one to compare with, as far as its text tells."""

    def verdicts(self, completions: Sequence[Completion]) -> list[str]:
        """Of each completion whether its final answer is that of its prompt; "no_answer" where that has none."""

    def majorities(self, groups: Sequence[Sequence[Completion]]) -> list[int | str]:
        """Of each prompt's completions the place of the first that ends in the most frequent answer.

        Those without an answer do not vote; of equally frequent answers the one seen first wins. WITHOUT_ANSWER where
        nobody votes; another word is why the votes cannot be counted.
        """


@dataclass(frozen=True)
class Exact:
    """Numbers as exact fractions. rule: see prefpipe/answers.py."""

    rule: str

    def is_reference(self, answer: str) -> bool:
        return gold_answer(answer) is not None

    def verdicts(self, completions: Sequence[Completion]) -> list[str]:
        return [self._verdict(completion) for completion in completions]

    def _verdict(self, completion: Completion) -> str:
        gold, found = gold_answer(completion.answer or ""), final_answer(completion.text, self.rule)
        if gold is None:
            return "no_answer"
        return WITHOUT_ANSWER if found is None else EQUAL if found == gold else DIFFERENT

    def majorities(self, groups: Sequence[Sequence[Completion]]) -> list[int | str]:
        found: list[int | str] = []
        for group in groups:
            answers = [final_answer(completion.text, self.rule) for completion in group]
            votes = Counter(answer for answer in answers if answer is not None)
            found.append(answers.index(votes.most_common(1)[0][0]) if votes else WITHOUT_ANSWER)
        return found


@dataclass(frozen=True)
class MathVerified:
    r"""Mathematics, LaTeX too, by the library math-verify: 1/2 = 0.5 = \frac{1}{2}; see scorer=math_verify.

    rule: one of client.RULES. limits: of each comparison. num_processes: None is one for each core.
    """

    rule: str = "boxed"
    limits: Limits = field(default_factory=Limits)
    num_processes: int | None = None

    def is_reference(self, answer: str) -> bool:
        return reference_answer(answer) is not None

    def verdicts(self, completions: Sequence[Completion]) -> list[str]:
        asked = [self._question(completion) for completion in completions]
        with self._comparer() as comparer:
            found = iter(_compared(comparer, [question for question in asked if question is not None]))
        return ["no_answer" if question is None else next(found) for question in asked]

    def _question(self, completion: Completion) -> Question | None:
        """None where there is no reference."""
        reference = reference_answer(completion.answer or "")
        answer = final_box(completion.text) if self.rule == "boxed" else completion.text
        return None if reference is None else Question(self.rule, reference, answer or "")

    def majorities(self, groups: Sequence[Sequence[Completion]]) -> list[int | str]:
        """Answers that are spelt alike are one; the first that is in no class yet is compared with all behind it, and
        so on: at most k (k - 1) / 2 comparisons for k completions. An answer that is no mathematics does not vote."""
        assert self.rule == "boxed", "answers are compared with each other only where they are given as LaTeX"
        spelt = [[final_box(completion.text) for completion in group] for group in groups]
        votes = [Counter(answer for answer in answers if answer is not None) for answers in spelt]
        left = [list(answers) for answers in votes]  # those in no class yet, by first appearance
        classes: list[Counter[str]] = [Counter() for _ in groups]  # a class's first answer → its votes
        failed: dict[int, str] = {}
        with self._comparer() as comparer:
            while any(left):
                questions = [Question("boxed", row[0], other) for row in left for other in row[1:]]
                found = iter(_compared(comparer, questions))
                for number, row in enumerate(left):
                    verdicts = {other: next(found) for other in row[1:]}
                    left[number] = [other for other in row[1:] if verdicts[other] in (DIFFERENT, UNREADABLE)]
                    if row and UNREADABLE not in verdicts.values():
                        alike = [other for other in row[1:] if verdicts[other] == EQUAL]
                        classes[number][row[0]] = sum(votes[number][answer] for answer in (row[0], *alike))
                    reasons = [verdict for verdict in verdicts.values() if verdict not in (*DECIDED, UNREADABLE)]
                    if reasons:
                        failed[number], left[number] = reasons[0], []
        return [
            failed[number] if number in failed else answers.index(_first_of_most(known)) if known else WITHOUT_ANSWER
            for number, (answers, known) in enumerate(zip(spelt, classes, strict=True))
        ]

    def _comparer(self) -> Comparer:
        return Comparer(self.limits, num_processes=self.num_processes or _num_cores())


def math_verify_packages(key: str) -> dict[str, str]:
    """Versions of what decides equality. Raises ConfigError, naming the config key that asks for it, without them."""
    try:
        return {package: version(package) for package in PACKAGES}
    except PackageNotFoundError as error:
        raise ConfigError(f"{key} needs the package {error.name}; pip install 'prefpipe[eval]'") from None


def _compared(comparer: Comparer, questions: Sequence[Question]) -> list[str]:
    """Verdicts. Samples of one prompt often end in the same answer, so each question is asked once."""
    different = list(dict.fromkeys(questions))
    verdicts = dict(zip(different, comparer.compare(different), strict=True))
    return [verdicts[question] for question in questions]


def _first_of_most(votes: Counter[str]) -> str:
    return votes.most_common(1)[0][0]


def _num_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
