"""Right completions to imitate, in place of pairs."""

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from prefpipe.answers import check_rule, final_answer
from prefpipe.components import register
from prefpipe.errors import ConfigError
from prefpipe.pairers.base import Demonstrator, check_at_least, distinct
from prefpipe.records import Demonstration, ScoredCompletion, demonstration
from prefpipe.settings import check_choice
from prefpipe.words import jaccard, words

ANNOTATION = re.compile(r"<<([^<>]*=[^<>]*)>>")
NUMBER = r"-?[$€£]?\d[\d,]*\.?\d*%?"
EQUATION = re.compile(rf"{NUMBER}(?:\s*[-+*/×÷]\s*\(?{NUMBER}\)?)+\s*=\s*{NUMBER}")


@register("pairer")
@dataclass
class PseudoLabel(Demonstrator):
    """Every way in which a prompt was solved, once: rejection-sampling fine-tuning (RFT), Yuan et al. 2023,
    arXiv:2308.01825, and the pseudo-labels of DPO-ST, Wang et al. 2024, arXiv:2407.18248.

    A completion that was cut at generator.max_new_tokens is none of them. Order: as the completions were written.

    labels: what is right. "verified": a score of at least `threshold`. "majority": the final answer of most of the
        prompt's completions (Huang et al. 2022, arXiv:2210.11610), which reads no scores; a tie is no label. Repeats
        of a text vote each. "verified_or_majority": majority for prompts without a reference answer. Majority writes
        meta.agreement, the share of the completions that end in the answer.
    threshold: of verified; 0.5 when null.
    rule: of majority: how a final answer is found, see prefpipe/answers.py; last_hash when null.
    min_agreement: of majority: leave the prompt out below it; 0 when null.
    distinct: which solutions are the same. "equations": those with the same equations in the same order, as RFT has it
        (without equations, the same text); "words": those whose word sets have a Jaccard similarity above
        max_similarity to one kept before (DPO-ST, by tokens); "texts": those with the same text.
    max_similarity: of words; 0.7 when null, as DPO-ST.
    with_answer: the prompt's reference answer is a demonstration too, and the first one (DPO-ST, RFT); for data whose
        answers are worked solutions.
    max_per_prompt: at most so many of a prompt; null: no limit but that of cap_percentile.
    """

    name: str = "pseudo_label"
    labels: str = "verified"
    threshold: float | None = None
    rule: str | None = None
    min_agreement: float | None = None
    distinct: str = "equations"
    max_similarity: float | None = None
    with_answer: bool = False
    max_per_prompt: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("pairer.labels", self.labels, ("verified", "majority", "verified_or_majority"))
        check_choice("pairer.distinct", self.distinct, ("equations", "words", "texts"))
        self.threshold = self._default("threshold", 0.5, f"labels={self.labels}", "verified" in self.labels)
        votes = "majority" in self.labels
        self.rule = self._default("rule", "last_hash", f"labels={self.labels}", votes)
        self.min_agreement = self._default("min_agreement", 0.0, f"labels={self.labels}", votes)
        by_words = self.distinct == "words"
        self.max_similarity = self._default("max_similarity", 0.7, f"distinct={self.distinct}", by_words)
        if self.labels == "majority" and self.score is not None:
            raise ConfigError(f"pairer.score={self.score} would be ignored with pairer.labels=majority; drop it")
        if self.rule is not None:
            check_rule("pairer.rule", self.rule)
        for key in ("min_agreement", "max_similarity"):
            if getattr(self, key) is not None and not 0 <= getattr(self, key) <= 1:
                raise ConfigError(f"pairer.{key}={getattr(self, key)} must be between 0 and 1")
        if self.max_per_prompt is not None:
            check_at_least("max_per_prompt", self.max_per_prompt, 1)

    def _default(self, key: str, default: Any, choice: str, used: bool) -> Any:
        """The key's value, or its default; None, and nothing else, where the choice does not use it."""
        value = getattr(self, key)
        if value is not None and not used:
            raise ConfigError(f"pairer.{key}={value} would be ignored with pairer.{choice}; drop it")
        return default if value is None and used else value

    def demonstrations(self, group: Sequence[ScoredCompletion], rng: random.Random) -> list[Demonstration] | str:
        whole = [completion for completion in distinct(group) if completion.finish_reason != "length"]
        right = self._right(group, whole) if whole else "no_whole_completion"
        answer = group[0].answer if self.with_answer else None
        given = [] if answer is None else [replace(demonstration(group[0]), text=answer, completion_id="")]
        if isinstance(right, str):
            return given or right
        return self._unlike([*given, *right])[: self.max_per_prompt]

    def _right(self, group: Sequence[ScoredCompletion], whole: Sequence[ScoredCompletion]) -> list[Demonstration] | str:
        """Of the whole completions those that are right, or why there are none."""
        if self.labels == "majority" or (self.labels == "verified_or_majority" and group[0].answer is None):
            return self._agreeing(group, whole)
        assert self.threshold is not None
        values = [(completion, self.value(completion)) for completion in whole]
        right = [demonstration(completion, score=value) for completion, value in values if value >= self.threshold]
        return right or "all_wrong"

    def _agreeing(
        self, group: Sequence[ScoredCompletion], whole: Sequence[ScoredCompletion]
    ) -> list[Demonstration] | str:
        assert self.rule is not None
        assert self.min_agreement is not None
        answers = [final_answer(completion.text, self.rule) for completion in group]
        votes = Counter(answer for answer in answers if answer is not None).most_common(2)
        if not votes:
            return "no_final_answer"
        (label, num), *others = votes
        if others and others[0][1] == num:
            return "tied_vote"
        agreement = num / len(group)
        if agreement < self.min_agreement:
            return "low_agreement"
        agreeing = [completion for completion in whole if final_answer(completion.text, self.rule) == label]
        meta = {"agreement": round(agreement, 6)}
        return [replace(demonstration(c), meta={**c.meta, **meta}) for c in agreeing] or "no_whole_completion"

    def _unlike(self, solutions: Sequence[Demonstration]) -> list[Demonstration]:
        """Those that are no repeat of one before."""
        kept: list[Demonstration] = []
        seen: list[frozenset[str]] = []
        known = set[tuple[str, ...]]()
        for solution in solutions:
            if self.distinct == "words":
                found = frozenset(words(solution.text))
                assert self.max_similarity is not None
                if any(jaccard(found, other) > self.max_similarity for other in seen):
                    continue
                seen.append(found)
            else:
                steps = equations(solution.text) if self.distinct == "equations" else ()
                key = steps or (solution.text.strip(),)
                if key in known:
                    continue
                known.add(key)
            kept.append(solution)
        return kept


def equations(text: str) -> tuple[str, ...]:
    """The equations of a solution in order, without spaces, currency marks and commas: ("16-3=13", "13*2=26").

    Those in <<...>> where there are some, as in GSM8K, else every a + b = c in the text.
    """
    found = ANNOTATION.findall(text) or EQUATION.findall(text)
    return tuple(re.sub(r"[\s$€£,]", "", equation).rstrip(".") for equation in found)
