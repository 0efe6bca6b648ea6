"""Records of a row: pairs, scored completions, demonstrations and prompts, made of its turns and texts."""

from collections.abc import Mapping, Sequence
from typing import Any

from prefpipe.records import Demonstration, Message, Pair, Prompt, ScoredCompletion, completion_id, prompt_id
from prefpipe.sources.codes import BadRow
from prefpipe.sources.turns import ordered, split_conversation, with_system
from prefpipe.sources.values import Row, number, present, text, wrong_type

Record = Prompt | ScoredCompletion | Pair | Demonstration


def pairs(row: Row, turns: list[Message], chosen: str, others: Sequence[str]) -> list[Record]:
    """One pair for each rejected answer."""
    turns = ordered(with_system(row, turns), "prompt")
    identity = prompt_id(turns)
    chosen_score = _score(row, "chosen")
    rejected_score = _score(row, "rejected") if len(others) == 1 else None
    records: list[Record] = []
    for index, other in enumerate(others):
        if other == chosen:
            which = "rejected" if len(others) == 1 else f"rejected[{index}]"
            raise BadRow("EQL", f"chosen and {which} are the same text")
        records.append(
            Pair(
                prompt_id=identity,
                messages=turns,
                source="",
                chosen=chosen,
                rejected=other,
                chosen_score=chosen_score,
                rejected_score=rejected_score,
                meta=_meta(row),
            )
        )
    return records


def pairs_of_conversations(row: Row, chosen: list[Message], others: Sequence[list[Message]]) -> list[Record]:
    """Pairs of whole conversations, which must be the same up to the last answer."""
    prompt, answered = split_conversation(chosen, "chosen")
    texts = []
    for other in others:
        other_prompt, rejected_text = split_conversation(other, "rejected")
        if other_prompt != prompt:
            raise BadRow("PFX", _where_they_part(prompt, other_prompt))
        texts.append(rejected_text)
    return pairs(row, prompt, answered, texts)


def scored(row: Row, turns: list[Message], completion: str, index: int, scores: dict[str, float]) -> ScoredCompletion:
    """A completion that came with its score."""
    identity = prompt_id(turns)
    return ScoredCompletion(
        prompt_id=identity,
        completion_id=completion_id(identity, completion, index, 0),
        messages=turns,
        source="",
        answer=reference_answer(row),
        meta=_meta(row),
        text=completion,
        scores=scores,
    )


def demonstration(row: Row, turns: list[Message], last: str) -> Demonstration:
    """An answer to imitate after the turns of its prompt."""
    prompt = prompt_record(row, turns, reference_answer(row) or last)
    return Demonstration(
        prompt_id=prompt.prompt_id,
        messages=prompt.messages,
        source="",
        text=last,
        answer=prompt.answer,
        meta=prompt.meta,
    )


def prompt_record(row: Row, turns: list[Message], reference: str | None) -> Prompt:
    """A bare prompt. A row with chosen or rejected is none, and loses them nowhere: its prompt is kept anyhow."""
    if row.get("chosen") is not None or row.get("rejected") is not None:
        raise BadRow(
            "KEY", "the row has chosen or rejected, which a bare prompt has not; set format to that of the pairs"
        )
    turns = ordered(with_system(row, turns), "prompt")
    return Prompt(prompt_id=prompt_id(turns), messages=turns, source="", answer=reference, meta=_meta(row))


def reference_answer(row: Row) -> str | None:
    """The reference answer; a number, as some arithmetic sets have it, becomes its text."""
    if not present(row, "answer"):
        return None
    value = row["answer"]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # a float would round large ones
    if isinstance(value, float):
        return f"{number(value, 'answer'):.15g}"
    return text(value, "answer")


def _score(row: Row, side: str) -> float | None:
    key = next((name for name in (f"{side}_score", f"score_{side}") if present(row, name)), None)
    return None if key is None else number(row[key], key)


def _meta(row: Row) -> dict[str, Any]:
    value = row.get("meta")
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise wrong_type("meta", value, "an object")
    return dict(value)


def _where_they_part(chosen: list[Message], rejected: list[Message]) -> str:
    """The first turn in which two prompts differ."""
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if same is None:
        return f"the prompt of chosen has {len(chosen)} turns, that of rejected {len(rejected)}"
    return f"the prompts of chosen and rejected differ in turn {same + 1}"
