"""Tasks measure a policy on held-out data. One file each; add conf/task/<name>.yaml; several can be given at once."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from prefpipe.answers import final_answer, gold_answer
from prefpipe.errors import DataError
from prefpipe.records import Completion, EvalResult, Pair, Prompt


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

    def metrics(self) -> list[str]:
        """The metrics of the results of `evaluate`, in order."""
        raise NotImplementedError(f"{type(self).__name__} names no metrics")

    def evaluate(
        self, policy: Policy, prompts: list[Prompt], pairs: list[Pair]
    ) -> tuple[list[EvalResult], list[Completion]]:
        """Results, and the completions they rest on (for the report), from held-out prompts and pairs."""
        raise NotImplementedError(f"{type(self).__name__} evaluates nothing")


def with_answer(task: str, prompts: list[Prompt]) -> list[Prompt]:
    """The prompts whose reference answer is a number. Raises DataError when there are none."""
    problems = [prompt for prompt in prompts if prompt.answer is not None and gold_answer(prompt.answer) is not None]
    if not problems:
        raise DataError(
            f"task={task} needs held-out prompts with a reference number, and none of the {len(prompts)} has one: "
            f"raise data_mixer.heldout_fraction, or choose another task, such as task=pair_accuracy"
        )
    return problems


def correct(completion: Completion, rule: str) -> bool | None:
    """Whether a completion ends in the right number; None where it ends in none."""
    found = final_answer(completion.text, rule)
    return None if found is None else found == gold_answer(completion.answer or "")


def grouped(completions: list[Completion]) -> list[list[Completion]]:
    """Completions by prompt; those of one prompt stand together."""
    return [list(group) for _, group in groupby(completions, key=lambda completion: completion.prompt_id)]
