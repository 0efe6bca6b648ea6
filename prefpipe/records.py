"""The typed rows of artifacts. Text only: never templated, never tokenized (but for the ids that were sampled)."""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, ClassVar, TypedDict, TypeVar

import orjson

R = TypeVar("R")


class Message(TypedDict):
    """One turn of a conversation; role is "system", "user" or "assistant"."""

    role: str
    content: str


class Split(StrEnum):
    """Which side of the fence a prompt is on. Held-out prompts enter evaluation and nothing else."""

    train = "train"
    heldout = "heldout"


def prompt_id(messages: list[Message]) -> str:
    """16 hex digits: sha256 of the canonical JSON of the prompt's messages."""
    canonical = orjson.dumps(
        [{"content": m["content"], "role": m["role"]} for m in messages], option=orjson.OPT_SORT_KEYS
    )
    return hashlib.sha256(canonical).hexdigest()[:16]


def completion_id(prompt: str, text: str, index: int, round_: int) -> str:
    """16 hex digits, stable over reruns: the prompt's id, the sample's number, the round and the text."""
    return hashlib.sha256(f"{prompt}/{round_}/{index}/{text}".encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What a completion answers.

    messages: the last role is "user".
    source: key under data_mixer.sources, or the file's name for data_mixer=files.
    answer: what a verifier compares with (the reference solution), or None.
    meta: what only some systems need (claims, sentence offsets, difficulty).
    """

    schema: ClassVar[str] = "prompt/1"

    prompt_id: str
    messages: list[Message]
    source: str
    split: Split = Split.train
    answer: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One text that a model wrote for a prompt.

    text: without the stop token. token_ids: as sampled, stop token included; empty for replayed or given text.
    logp: sum over token_ids of log p under the sampling model at temperature 1, nats; None when unknown. Tokens that a
        calculator forced are in it; meta.calculator says which they are and what they add (Generator.calculator).
    finish_reason: "stop" (the model ended its turn), "length" (cut at generator.max_new_tokens) or "given".
    seed: of this request alone. model: digest of the weights that wrote it, or "" for given text.
    """

    schema: ClassVar[str] = "completion/1"

    prompt_id: str
    completion_id: str
    messages: list[Message]
    source: str
    split: Split = Split.train
    answer: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    text: str
    token_ids: list[int] = field(default_factory=list)
    logp: float | None = None
    finish_reason: str = "given"
    seed: int | None = None
    round: int = 0
    model: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredCompletion(Completion):
    """A completion with one number per scorer; scoring twice adds a key.

    scores: finite numbers only; orjson would write NaN as null, so it is refused here.
    """

    schema: ClassVar[str] = "scored/1"

    scores: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.scores.items():
            if not math.isfinite(value):
                raise ValueError(f"score {name!r} of completion {self.completion_id} is {value}")


def with_scores(completion: Completion, scores: Mapping[str, float]) -> ScoredCompletion:
    """The completion with these scores, besides those that it has."""
    known = completion.scores if isinstance(completion, ScoredCompletion) else {}
    values = {part.name: getattr(completion, part.name) for part in fields(Completion)}
    return ScoredCompletion(**values, scores={**known, **scores})


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two completions of one prompt, one preferred.

    chosen_score, rejected_score: in the scorer's own unit; None for human labels.
    chosen_id, rejected_id: completion ids, or "" for given data.
    """

    schema: ClassVar[str] = "pair/1"

    prompt_id: str
    messages: list[Message]
    source: str
    split: Split = Split.train
    chosen: str
    rejected: str
    chosen_score: float | None = None
    rejected_score: float | None = None
    chosen_id: str = ""
    rejected_id: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Demonstration:
    """A conversation to imitate: what supervised fine-tuning reads.

    messages: all turns but the last, which may hold earlier ones of the assistant. text: the assistant's last turn.
    answer: what a verifier compares with (the reference solution), or None.
    score: what the scorer that chose it said; None for given data and for majority votes.
    completion_id: of the completion it was made of, or "" for given data.
    """

    schema: ClassVar[str] = "demonstration/1"

    prompt_id: str
    messages: list[Message]
    source: str
    split: Split = Split.train
    text: str
    answer: str | None = None
    score: float | None = None
    completion_id: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


def demonstration(completion: Completion, *, score: float | None = None) -> Demonstration:
    """A completion as something to imitate."""
    return Demonstration(
        prompt_id=completion.prompt_id,
        messages=completion.messages,
        source=completion.source,
        split=completion.split,
        text=completion.text,
        answer=completion.answer,
        score=score,
        completion_id=completion.completion_id,
        meta=completion.meta,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalResult:
    """One number of one evaluation task with a 95 % confidence interval over its n prompts (or pairs)."""

    schema: ClassVar[str] = "eval/1"

    task: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    details: dict[str, Any] = field(default_factory=dict)


Record = Prompt | Completion | ScoredCompletion | Pair | Demonstration | EvalResult
RECORDS: dict[str, type[Any]] = {
    r.schema: r for r in (Prompt, Completion, ScoredCompletion, Pair, Demonstration, EvalResult)
}


def row_reader(record: type[R]) -> Callable[[dict[str, Any]], R]:
    """A function from a row's fields to the record: record(**row), in half its time where the row has every field.

    A frozen dataclass sets each field through object.__setattr__, which is most of what reading a row takes.
    """
    setters = [(part.name, getattr(record, part.name).__set__) for part in fields(record)]  # type: ignore[arg-type]
    check = getattr(record, "__post_init__", None)

    def read(row: dict[str, Any]) -> R:
        if len(row) != len(setters):
            return record(**row)  # which fills in defaults, and names a field that it does not know
        made = object.__new__(record)
        try:
            for name, put in setters:
                put(made, row[name])
        except KeyError:
            return record(**row)
        if check is not None:
            check(made)
        return made

    return read
