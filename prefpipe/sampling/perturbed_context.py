"""Answers to a prompt from which some of its claims are gone."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from prefpipe.components import register
from prefpipe.errors import ConfigError, DataError
from prefpipe.generators import Generator, Skipped, request_seed
from prefpipe.records import Completion, Message, Prompt, completion_id, prompt_id
from prefpipe.sampling import Answers, Ask, Sampling
from prefpipe.settings import check_choice

_BULLET = r"[ \t]*(?:[-*•][ \t]+)?"


@register("sampling")
@dataclass
class PerturbedContext(Sampling):
    """An answer to all claims of a prompt and generator.num_samples answers to fewer, PIC, He et al. 2025.

    Of n claims k are dropped, k drawn evenly from k_min to k_max and the claims evenly of all, the others keep their
    order: k_max = min(n - 1, floor(max_dropped n)), k_min = min(k_max, max(1, floor(f n))), where f is
    min_dropped_full or min_dropped_partial, by meta.pic_type. Prompts of fewer than two claims are left out
    ("too_few_claims"). The perturbed answers are sampled from the prompt without the dropped claims' lines.

    Reads meta.claims, a list of texts, each of them on a line of its own in the last user turn, in that order, behind a
    bullet (-, *, •) or none; and meta.pic_type, "full" or "partial". Writes what pairer=role_by_threshold reads:
    meta.is_perturbed; for perturbed answers also perturbed_claims, perturbed_messages (the prompt that was answered;
    the record's own messages are the whole prompt, as for the answer to all claims) and dropped_claims, the numbers of
    the claims that are gone.

    original: where the answer to all claims is from. "given" takes the prompt's reference answer, as PIC does,
        "sampled" has the generator write one.
    min_dropped_full, min_dropped_partial, max_dropped: fractions in [0, 1], as PIC has them.
    """

    name: str = "perturbed_context"
    original: str = "given"
    min_dropped_full: float = 0.1
    min_dropped_partial: float = 0.4
    max_dropped: float = 0.8

    def __post_init__(self) -> None:
        check_choice("sampling.original", self.original, ("given", "sampled"))
        for key in ("min_dropped_full", "min_dropped_partial", "max_dropped"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(f"sampling.{key}={getattr(self, key)} must be in [0, 1], a share of the claims")

    def rows_per_prompt(self, generator: Generator) -> int | None:
        return 1 + generator.num_samples

    def sample(self, prompts: Sequence[Prompt], generator: Generator, ask: Ask, *, seed: int, round_: int) -> Answers:
        reduced = {
            prompt.prompt_id: self._reduced(prompt, random.Random(request_seed(seed, round_, prompt.prompt_id, -1)))
            for prompt in prompts
            if len(_claims(prompt)) > 1
        }
        perturbed = _by_prompt(ask(generator, list({p.prompt_id: p for p in reduced.values()}.values())))
        # The whole prompt is asked where there is something to compare its answer with.
        whole = [
            prompt
            for prompt in prompts
            if prompt.prompt_id in reduced and _answered(perturbed.get(reduced[prompt.prompt_id].prompt_id, []))
        ]
        if self.original == "given":
            originals: dict[str, list[Completion | Skipped]] = {p.prompt_id: [_given(p, round_)] for p in whole}
        else:
            originals = _by_prompt(ask(replace(generator, num_samples=1), whole))
        for prompt in prompts:
            if prompt.prompt_id not in reduced:
                yield Skipped(prompt.prompt_id, "too_few_claims")
                continue
            asked = reduced[prompt.prompt_id]
            first = originals.get(prompt.prompt_id, [])
            for answer in first:
                yield _named(answer, prompt, 0, {"is_perturbed": False})
            known = {
                "is_perturbed": True,
                "perturbed_claims": asked.meta["claims"],
                "perturbed_messages": asked.messages,
                "dropped_claims": asked.meta["dropped_claims"],
            }
            for number, answer in enumerate(perturbed.get(asked.prompt_id, []), start=1):
                # Without an answer to all claims, those to fewer have nothing to be compared with.
                if isinstance(answer, Skipped) or _answered(first):
                    yield _named(answer, prompt, number, known)

    def num_dropped(self, num_claims: int, pic_type: str) -> tuple[int, int]:
        """The least and the most claims that are dropped of two or more."""
        least = {"full": self.min_dropped_full, "partial": self.min_dropped_partial}[pic_type]
        most = max(1, min(num_claims - 1, int(num_claims * self.max_dropped)))
        return min(most, max(1, int(num_claims * least))), most

    def _reduced(self, prompt: Prompt, rng: random.Random) -> Prompt:
        """The prompt without some claims. meta.claims are those that stay, meta.dropped_claims the others' numbers."""
        pic_type = prompt.meta.get("pic_type")
        if pic_type not in ("full", "partial"):
            raise DataError(
                f"prompt {prompt.prompt_id} has meta pic_type={pic_type!r}, and sampling={self.name} needs full or "
                f"partial there; data_mixer.columns='{{meta.pic_type: COLUMN}}' takes it from a file"
            )
        claims = _claims(prompt)
        dropped = sorted(rng.sample(range(len(claims)), rng.randint(*self.num_dropped(len(claims), pic_type))))
        messages = without_claims(prompt, claims, set(dropped))
        kept = [claim for number, claim in enumerate(claims) if number not in dropped]
        meta = prompt.meta | {"claims": kept, "dropped_claims": dropped}
        return replace(prompt, prompt_id=prompt_id(messages), messages=messages, meta=meta)


def without_claims(prompt: Prompt, claims: Sequence[str], dropped: set[int]) -> list[Message]:
    """The prompt's messages without the lines of some claims, by number. Raises DataError where a claim has no line."""
    *before, last = prompt.messages
    text, parts, place, end = last["content"], [], 0, 0
    for number, claim in enumerate(claims):
        line = re.compile(rf"^{_BULLET}{re.escape(claim.strip())}[ \t]*(?:\n|\Z)", re.MULTILINE)
        found = line.search(text, end)
        if found is None or not claim.strip():
            raise DataError(
                f"prompt {prompt.prompt_id} has a meta claims[{number}]={claim!r:.60} that is no line of its last turn "
                f"behind the claims before it; each must stand on a line of its own, as it is or behind a bullet"
            )
        end = found.end()
        if number in dropped:
            parts.append(text[place : found.start()])
            place = end
    return [*before, Message(role=last["role"], content="".join([*parts, text[place:]]))]


def _claims(prompt: Prompt) -> list[str]:
    claims = prompt.meta.get("claims")
    if not isinstance(claims, list) or not all(isinstance(claim, str) for claim in claims):
        found = f"has meta claims={claims!r:.60}" if "claims" in prompt.meta else "has no meta claims"
        raise DataError(
            f"prompt {prompt.prompt_id} {found}, and sampling=perturbed_context needs a list of texts there; "
            f"data_mixer.columns='{{meta.claims: COLUMN}}' takes it from a file"
        )
    return claims


def _given(prompt: Prompt, round_: int) -> Completion:
    if not prompt.answer:
        raise DataError(
            f"prompt {prompt.prompt_id} has no answer, and sampling.original=given takes it for the answer to all "
            f"claims; give it in the column `answer`, or set sampling.original=sampled"
        )
    return Completion(
        prompt_id=prompt.prompt_id,
        completion_id="",
        messages=prompt.messages,
        source=prompt.source,
        split=prompt.split,
        answer=prompt.answer,
        text=prompt.answer,
        round=round_,
    )


def _by_prompt(answers: Answers) -> dict[str, list[Completion | Skipped]]:
    found: dict[str, list[Completion | Skipped]] = {}
    for answer in answers:
        found.setdefault(answer.prompt_id, []).append(answer)
    return found


def _answered(answers: Sequence[Completion | Skipped]) -> bool:
    return any(isinstance(answer, Completion) for answer in answers)


def _named(answer: Completion | Skipped, prompt: Prompt, number: int, known: dict[str, Any]) -> Completion | Skipped:
    """An answer as one to the whole prompt."""
    if isinstance(answer, Skipped):
        return Skipped(prompt.prompt_id, answer.reason)
    return replace(
        answer,
        prompt_id=prompt.prompt_id,
        completion_id=completion_id(prompt.prompt_id, answer.text, number, answer.round),
        messages=prompt.messages,
        meta=prompt.meta | known,
    )
