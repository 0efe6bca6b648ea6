"""Rows to records: one small function for each format that preference data comes in.

To add a format: a function here, in ADAPTERS under its name, and `format: <name>` in conf/source/<data set>.yaml; a
line in `recognise` as well if its keys alone give it away. An adapter returns the records of one row, all of one kind
and of one prompt; source and split are filled in later. It raises BadRow for what it cannot use, and repairs nothing:
texts keep their white space, but for the one space after "Human:" and "Assistant:", which belongs to that format.
Helpers for adapters: values.py checks single values, turns.py reads conversations, builders.py makes records.
"""

import difflib
from collections.abc import Callable, Mapping

from prefpipe.sources.builders import (
    Record,
    demonstration,
    pairs,
    pairs_of_conversations,
    prompt_record,
    reference_answer,
    scored,
)
from prefpipe.sources.codes import BadRow
from prefpipe.sources.turns import (
    ROLES,
    answer,
    conversation,
    dialogue,
    instruction,
    messages,
    ordered,
    prompt_and_completion,
    rejected,
    several,
    turn,
    with_system,
)
from prefpipe.sources.values import Row, as_list, flag, need, number, text, wrong_type


def pair_text(row: Row) -> list[Record]:
    """`prompt`, `chosen`, `rejected` are texts; rejected may be a list of several; `system` is optional."""
    prompt = need(row, "prompt")
    turns = messages(prompt, "prompt") if isinstance(prompt, list) else [turn("user", prompt, "prompt")]
    return pairs(row, turns, answer(need(row, "chosen"), "chosen"), several(rejected(row)))


def pair_messages(row: Row) -> list[Record]:
    """`chosen`, `rejected` are message lists: whole conversations, or only the answer after an explicit `prompt`.

    A prompt text beside whole conversations (as in ultrafeedback_binarized) is a label and is not read.
    """
    chosen = conversation(row, need(row, "chosen"), "chosen")
    others = rejected(row)
    lists = others if isinstance(others, list) and others and isinstance(others[0], list) else [others]
    return pairs_of_conversations(row, chosen, [conversation(row, other, "rejected") for other in lists])


def typed_messages(row: Row) -> list[Record]:
    """`chosen_messages`, `rejected_messages`: message lists, their content a text or a list of typed parts."""
    chosen = messages(need(row, "chosen_messages"), "chosen_messages")
    others = messages(need(row, "rejected_messages"), "rejected_messages")
    return pairs_of_conversations(row, chosen, [others])


def hh(row: Row) -> list[Record]:
    r"""`chosen`, `rejected` are dialogues, "\n\nHuman: … \n\nAssistant: …"; a `prompt` may hold their common start."""
    start = text(row["prompt"], "prompt") if row.get("prompt") is not None else ""
    sides = [dialogue(start, need(row, "chosen"), "chosen")]
    sides += [dialogue(start, other, "rejected") for other in as_list(rejected(row))]
    return pairs_of_conversations(row, sides[0], sides[1:])


def sharegpt(row: Row) -> list[Record]:
    """`conversations` of {from, value} up to the last question, and `chosen`, `rejected` objects of the same kind."""
    turns = messages(need(row, "conversations"), "conversations")
    return pairs(row, turns, answer(need(row, "chosen"), "chosen"), several(rejected(row)))


def alpaca(row: Row) -> list[Record]:
    """`instruction` and an optional `input` below it; `chosen` (or else `output`) and `rejected` texts.

    `history`, a list of [question, answer], is what was said before.
    """
    key = "output" if "output" in row and row.get("chosen") is None else "chosen"
    return pairs(row, instruction(row), answer(need(row, key), key), several(rejected(row)))


def alpaca_prompt(row: Row) -> list[Record]:
    """`instruction`, `input` and one `output`, for supervised fine-tuning; it is the reference answer too."""
    return [demonstration(row, instruction(row), text(need(row, "output"), "output"))]


def labelled(row: Row) -> list[Record]:
    """`messages` (or `prompt` and `completion`) with a boolean `label`: one completion, scored 1 or 0."""
    prompt, completion = prompt_and_completion(row)
    return [scored(row, prompt, completion, 0, {"label": float(flag(need(row, "label"), "label"))})]


def ratings(row: Row) -> list[Record]:
    """`instruction` (or `prompt`) and `completions`, each of a `response` and an `overall_score`, as UltraFeedback."""
    key = "instruction" if "instruction" in row else "prompt"
    turns = ordered(with_system(row, [turn("user", need(row, key), key)]), key)
    records: list[Record] = []
    for index, item in enumerate(as_list(need(row, "completions"))):
        name = f"completions[{index}]"
        if not isinstance(item, Mapping):
            raise wrong_type(name, item, "an object with a response and a score")
        response = next((k for k in ("response", "text", "completion") if k in item), "response")
        score = next((k for k in ("overall_score", "score", "rating") if k in item), "overall_score")
        value = number(need(item, score), f"{name}.{score}")
        records.append(scored(row, turns, text(need(item, response), f"{name}.{response}"), index, {"rating": value}))
    if not records:
        raise BadRow("EMP", "completions is empty")
    return records


def question_answer(row: Row) -> list[Record]:
    """`question` and the reference solution in `answer`, as GSM8K: something to imitate, and to compare with."""
    solution = text(need(row, "answer"), "answer")
    return [demonstration(row, [turn("user", need(row, "question"), "question")], solution)]


def whole_conversation(row: Row) -> list[Record]:
    """`messages` (or `conversations`, or `prompt` and `completion`) to their last answer, for supervised fine-tuning.

    The reference answer is in `answer`, or else the last turn.
    """
    return [demonstration(row, *prompt_and_completion(row))]


def bare_prompt(row: Row) -> list[Record]:
    """`prompt` (or `messages`, `conversations`) alone; `answer`, or a last assistant turn, is the reference answer."""
    key = next((name for name in ("prompt", "messages", "conversations") if row.get(name) is not None), "prompt")
    given = need(row, key)
    turns = messages(given, key) if isinstance(given, list) else [turn("user", given, key)]
    reference = reference_answer(row)
    if turns[-1]["role"] == "assistant":
        turns, last = turns[:-1], turns[-1]["content"]
        reference = last if reference is None else reference
    return [prompt_record(row, turns, reference)]


ADAPTERS: dict[str, Callable[[Row], list[Record]]] = {
    "pair_text": pair_text,
    "pair_messages": pair_messages,
    "typed_messages": typed_messages,
    "hh": hh,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
    "alpaca_prompt": alpaca_prompt,
    "labelled": labelled,
    "ratings": ratings,
    "question_answer": question_answer,
    "conversation": whole_conversation,
    "prompt": bare_prompt,
}
"""format → its adapter; `format=` in conf/source and data_mixer."""


def recognise(row: Row) -> str | None:
    """The format of a row by its keys, and by the types of chosen and prompt; None when no format has such keys."""
    keys = {key for key, value in row.items() if value is not None}
    is_pair = "chosen" in keys and bool(keys & {"rejected", "reject"})
    is_pair_of_lists = is_pair and isinstance(row["chosen"], list)
    # A pair whose keys are misspelt must not pass for a bare prompt: its answers would be lost without a word.
    near = (difflib.get_close_matches(key, ("chosen", "rejected", "label"), cutoff=0.75) for key in keys - {"label"})
    is_bare = not any(near)
    texts = [value for key in ("prompt", "chosen") if isinstance(value := row.get(key), str)]
    rules = (
        ("typed_messages", {"chosen_messages", "rejected_messages"} <= keys),
        ("sharegpt", is_pair and "conversations" in keys),
        ("pair_messages", is_pair_of_lists),
        ("hh", is_pair and any(value.startswith("\n\nHuman:") for value in texts)),
        ("alpaca", "instruction" in keys and (is_pair or {"output", "rejected"} <= keys)),
        ("pair_text", is_pair and "prompt" in keys),
        ("labelled", "label" in keys and bool(keys & {"messages", "completion", "conversations"})),
        ("ratings", "completions" in keys and bool(keys & {"instruction", "prompt"})),
        ("alpaca_prompt", is_bare and {"instruction", "output"} <= keys),
        ("question_answer", is_bare and {"question", "answer"} <= keys),
        ("conversation", is_bare and ({"prompt", "completion"} <= keys or _ends_with_answer(row))),
        ("prompt", is_bare and bool(keys & {"prompt", "messages", "conversations"})),
    )
    return next((name for name, fits in rules if fits), None)


def _ends_with_answer(row: Row) -> bool:
    """Whether `messages` or `conversations` ends with a turn of the assistant."""
    turns = row.get("messages") or row.get("conversations")
    last = turns[-1] if isinstance(turns, list) and turns else None
    role = (last.get("role") or last.get("from")) if isinstance(last, Mapping) else None
    return isinstance(role, str) and ROLES.get(role) == "assistant"
