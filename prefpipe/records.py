"""The typed rows of artifacts. Text only: never templated, never tokenized (but for the ids that were sampled)."""

import hashlib
import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, TypedDict

import orjson


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
    logp: sum over token_ids of log p under the sampling model at temperature 1, nats; None when unknown.
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


Record = Prompt | Completion | ScoredCompletion | Pair | EvalResult
RECORDS: dict[str, type[Any]] = {r.schema: r for r in (Prompt, Completion, ScoredCompletion, Pair, EvalResult)}
