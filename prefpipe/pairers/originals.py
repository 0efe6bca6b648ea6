"""Pairs in which one side is the answer that was there first."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from prefpipe.citations import CITE, balanced, with_citation
from prefpipe.components import register
from prefpipe.errors import ConfigError, DataError
from prefpipe.pairers.base import Pairer, distinct, from_meta
from prefpipe.records import Message, Pair, ScoredCompletion, prompt_id
from prefpipe.settings import check_choice

BRANCH_KEYS = ("is_original", "branch_of", "statement", "branch", "citation", "original_citation")
"""What sampling=citation_branches writes of a branch; no pair keeps it."""


@register("pairer")
@dataclass
class OriginalBest(Pairer):
    """The best completion against the original one, where it is better: SelfCite, Chuang et al. 2025, arXiv:2502.09604.

    Completions with meta.statement (sampling=citation_branches) are an answer with one other citation, and their score
    is of that statement alone. Of them chosen is made: the answer with the best citation of each statement, the first
    of equal ones. Its scores and rejected's are means over these statements; rejected has no part in the mean for what
    it does not cite. One pair for each answer; reads meta.branch_of, statement, branch, citation, original_citation.

    original: "first" is the completion written first, "meta" the one whose meta.is_original is true.
    balance: "citations" makes chosen and rejected cite equally much (prefpipe/citations.py), reading
        meta.num_sentences, the document's, where it is there; "none" leaves the texts alone.
    """

    name: str = "original_best"
    original: str = "first"
    balance: str = "none"

    def __post_init__(self) -> None:
        check_choice("pairer.original", self.original, ("first", "meta"))
        check_choice("pairer.balance", self.balance, ("none", "citations"))

    def pair(self, group: Sequence[ScoredCompletion], rng: random.Random) -> list[Pair] | str:
        branches = [completion for completion in group if "statement" in completion.meta]
        if branches:
            return self._best_citations(branches, rng)
        texts = distinct(group)
        if len(texts) < 2:
            return "single_completion"
        original = next((c for c in group if self.original == "first" or c.meta.get("is_original") is True), None)
        if original is None:
            return "no_original"
        if not original.text.strip():
            return "blank_original"
        best = max(texts, key=self.value)
        if self.value(best) == self.value(original):
            return "original_is_best"
        made = self.make(best, original)
        return [made] if self.balance == "none" else self._balanced(made, best, rng)

    def _best_citations(self, branches: Sequence[ScoredCompletion], rng: random.Random) -> list[Pair] | str:
        answers: dict[str, list[ScoredCompletion]] = {}
        for branch in branches:
            answers.setdefault(from_meta(branch, "branch_of", str, pairer=self.name), []).append(branch)
        pairs: dict[tuple[str, str], Pair] = {}
        reason = "original_is_best"
        for of_answer in answers.values():
            made = self._spliced(of_answer)
            if made.chosen == made.rejected:
                continue
            found = [made] if self.balance == "none" else self._balanced(made, of_answer[0], rng)
            if isinstance(found, str):
                reason = found
            else:  # answers may be the same
                pairs.update({(pair.chosen, pair.rejected): pair for pair in found})
        return list(pairs.values()) or reason

    def _spliced(self, branches: Sequence[ScoredCompletion]) -> Pair:
        """One answer with the best of its branches against itself."""
        first = branches[0]
        statements: dict[int, list[ScoredCompletion]] = {}
        for branch in branches:
            statements.setdefault(from_meta(branch, "statement", int, pairer=self.name), []).append(branch)
        own = from_meta(first, "original_citation", str, pairer=self.name)
        chosen = rejected = with_citation(first.text, first.meta["statement"], own)
        best = {statement: max(found, key=self.value) for statement, found in statements.items()}
        for statement, branch in best.items():
            chosen = with_citation(chosen, statement, from_meta(branch, "citation", str, pairer=self.name))
        before = [self.value(branch) for branch in branches if branch.meta["branch"] == 0]
        return replace(
            self.make(first, first),
            chosen=chosen,
            rejected=rejected,
            chosen_score=sum(map(self.value, best.values())) / len(best),
            rejected_score=sum(before) / len(before) if before else None,
            chosen_id="",
            rejected_id=first.meta["branch_of"],
            meta={key: value for key, value in first.meta.items() if key not in BRANCH_KEYS}
            | {"branches": [branch.completion_id for branch in best.values()]},
        )

    def _balanced(self, made: Pair, best: ScoredCompletion, rng: random.Random) -> list[Pair] | str:
        if not CITE.search(made.chosen) and not CITE.search(made.rejected):
            raise DataError(
                f"completions {made.chosen_id} and {made.rejected_id} have no <cite>, so pairer.balance=citations has "
                f"nothing to balance; use pairer.balance=none"
            )
        num_sentences = best.meta.get("num_sentences")
        texts = balanced(
            made.chosen, made.rejected, rng, num_sentences=num_sentences if isinstance(num_sentences, int) else None
        )
        if texts is None:  # statements that do not correspond: SelfCite keeps such answers as they are
            return [made]
        if texts[0].strip() == texts[1].strip():
            return "same_once_balanced"
        return [replace(made, chosen=texts[0], rejected=texts[1])]


@register("pairer")
@dataclass
class RoleByThreshold(Pairer):
    """An answer to all claims against one to fewer, the roles by a threshold: PIC, He et al. 2025 (tau).

    With a the score (the mean log-probability of an answer's last tokens under the instruction alone), an original
    answer y and a perturbed one y', norm = sigma(a(y) - a(y')). Above tau the original is chosen and the prompt holds
    the claims C; otherwise the perturbed is, and the prompt is the one that holds its claims C'. This gives every pair
    a role and leaves none out; equal texts make none. As the score does not order the two, pairs carry no scores.

    Reads meta.pic_type ("full" or "partial") and meta.claims of the original; perturbed completions are those of the
    same prompt with meta.is_perturbed true, and carry meta.perturbed_claims and meta.perturbed_messages, the prompt
    with C'. Writes meta.claims, is_perturbed, tau_threshold, norm_score, prob_drop, log_prob_original and
    log_prob_perturbed.

    tau_full, tau_partial: the thresholds of the two types, in (0, 1).
    """

    draws: ClassVar[bool] = False

    name: str = "role_by_threshold"
    tau_full: float = 0.5
    tau_partial: float = 0.3

    def __post_init__(self) -> None:
        for key in ("tau_full", "tau_partial"):
            if not 0 < getattr(self, key) < 1:
                raise ConfigError(
                    f"pairer.{key}={getattr(self, key)} must be in (0, 1), as what it is compared with is"
                )

    def pair(self, group: Sequence[ScoredCompletion], rng: random.Random) -> list[Pair] | str:
        texts = distinct(group)
        if len(texts) < 2:
            return "single_completion"
        original = next((c for c in texts if not c.meta.get("is_perturbed")), None)
        perturbed = [c for c in texts if c.meta.get("is_perturbed")]
        if original is None or not perturbed:
            return "no_original" if original is None else "no_perturbed"
        return [self._assigned(original, other) for other in perturbed]

    def _assigned(self, original: ScoredCompletion, perturbed: ScoredCompletion) -> Pair:
        pic_type = from_meta(original, "pic_type", str, pairer=self.name)
        taus = {"full": self.tau_full, "partial": self.tau_partial}
        if pic_type not in taus:
            raise DataError(
                f"completion {original.completion_id} has meta pic_type={pic_type}, which must be full or partial; "
                f"mend it where the data is prepared"
            )
        claims = from_meta(original, "claims", list, pairer=self.name)
        drop = self.value(original) - self.value(perturbed)
        norm = 1 / (1 + math.exp(-drop)) if drop >= 0 else math.exp(drop) / (1 + math.exp(drop))
        meta = {key: value for key, value in original.meta.items() if key not in ("is_perturbed", "is_original")}
        meta |= {"tau_threshold": taus[pic_type], "norm_score": norm, "prob_drop": drop}
        meta |= {"log_prob_original": self.value(original), "log_prob_perturbed": self.value(perturbed)}
        if norm > taus[pic_type]:
            made = self.make(original, perturbed)
            return replace(
                made, chosen_score=None, rejected_score=None, meta=meta | {"claims": claims, "is_perturbed": False}
            )
        claims = from_meta(perturbed, "perturbed_claims", list, pairer=self.name)
        messages = _messages(from_meta(perturbed, "perturbed_messages", list, pairer=self.name), perturbed)
        return replace(
            self.make(perturbed, original),
            prompt_id=prompt_id(messages),
            messages=messages,
            chosen_score=None,
            rejected_score=None,
            meta=meta | {"claims": claims, "is_perturbed": True},
        )


def _messages(found: list[Any], completion: ScoredCompletion) -> list[Message]:
    roles = [turn.get("role") for turn in found if isinstance(turn, Mapping) and isinstance(turn.get("content"), str)]
    if len(roles) != len(found) or roles[-1:] != ["user"]:
        raise DataError(
            f"completion {completion.completion_id} has a meta perturbed_messages that is no prompt; it must be a list "
            f"of role and content, the last role user"
        )
    return [Message(role=str(turn["role"]), content=turn["content"]) for turn in found]
