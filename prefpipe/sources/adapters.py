"""Rows to records: one small function for each format that preference data comes in.

To add a format: a function here, in ADAPTERS under its name, and `format: <name>` in conf/source/<data set>.yaml; a
line in `recognise` as well if its keys alone give it away. An adapter returns the records of one row, all of one kind
and of one prompt; source and split are filled in later. It raises BadRow for what it cannot use, and repairs nothing:
texts keep their white space, but for the one space after "Human:" and "Assistant:", which belongs to that format.
"""

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prefpipe.records import Demonstration, Message, Pair, Prompt, ScoredCompletion, completion_id, prompt_id
from prefpipe.sources.codes import BadRow, missing_key

Row = Mapping[str, object]
Record = Prompt | ScoredCompletion | Pair | Demonstration

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
}
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}


# ------------------------------------------------------------------------------------------------ adapters


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
    return pairs(row, _instruction(row), answer(need(row, key), key), several(rejected(row)))


def alpaca_prompt(row: Row) -> list[Record]:
    """`instruction`, `input` and one `output`, for supervised fine-tuning; it is the reference answer too."""
    return [demonstration(row, _instruction(row), text(need(row, "output"), "output"))]


def labelled(row: Row) -> list[Record]:
    """`messages` (or `prompt` and `completion`) with a boolean `label`: one completion, scored 1 or 0."""
    prompt, completion = _prompt_and_completion(row)
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
    return [demonstration(row, *_prompt_and_completion(row))]


def bare_prompt(row: Row) -> list[Record]:
    """`prompt` (or `messages`, `conversations`) alone; `answer`, or a last assistant turn, is the reference answer."""
    key = next((name for name in ("prompt", "messages", "conversations") if row.get(name) is not None), "prompt")
    given = need(row, key)
    turns = messages(given, key) if isinstance(given, list) else [turn("user", given, key)]
    reference = _reference(row)
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


# ------------------------------------------------------------------------------------------------ values


def need(row: Row, key: str) -> object:
    """The value of a key that must be there."""
    if key not in row:
        raise missing_key(key, row)
    return row[key]


def present(row: Row, key: str) -> bool:
    """Whether an optional key holds anything: data sets write "" and null for nothing."""
    value = row.get(key)
    return value is not None and value != ""


def text(value: object, name: str) -> str:
    """A text that says something, white space kept."""
    if not isinstance(value, str):
        raise wrong_type(name, value, "a text")
    if not value.strip():
        raise BadRow("EMP", f"{name} is {'empty' if not value else 'blank'}")
    if "\x00" in value:
        raise BadRow("CTL", f"{name} holds a NUL character")
    return value


def number(value: object, name: str) -> float:
    """A finite number; CSV cells and some exports hold it as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise wrong_type(name, value, "a number")
    try:
        found = float(value)
    except (ValueError, OverflowError):
        raise wrong_type(name, value, "a number") from None
    if not math.isfinite(found):
        raise BadRow("NAN", f"{name} is {found}")
    return found


def flag(value: object, name: str) -> bool:
    """True or false, also as 1 or 0, and as the words that CSV holds."""
    words = {"true": True, "1": True, "false": False, "0": False}
    found = words.get(value.strip().lower()) if isinstance(value, str) else None
    if found is None and isinstance(value, int) and value in (0, 1):
        found = bool(value)
    if found is None:
        raise wrong_type(name, value, "true or false")
    return found


def as_list(value: object) -> list[object]:
    """A list as it is, anything else as a list of one."""
    return value if isinstance(value, list) else [value]


def wrong_type(name: str, value: object, wanted: str) -> BadRow:
    """TYP, with what was found."""
    shown = "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
    return BadRow("TYP", f"{name} is {shown}, it must be {wanted}")


# ------------------------------------------------------------------------------------------------ turns


def turn(role: object, content: object, name: str) -> Message:
    """One message. Role names of other formats are translated; content may be a list of parts of type "text"."""
    if not isinstance(role, str):
        raise wrong_type(f"{name}.role", role, f"one of {', '.join(ROLES)}")
    if role not in ROLES:
        raise BadRow("ROL", f"{name}.role {role[:40]!r} is none of {', '.join(ROLES)}")
    if isinstance(content, list):
        content = "".join(_part(part, name) for part in content)
    if role == "system" and content == "":
        return Message(role="system", content="")
    return Message(role=ROLES[role], content=text(content, name))


def messages(value: object, name: str) -> list[Message]:
    """A list of {role, content} or {from, value}. An empty system turn says nothing and is left out."""
    if not isinstance(value, list):
        raise wrong_type(name, value, "a list of messages")
    found = []
    for index, item in enumerate(value):
        where = f"{name}[{index}]"
        if not isinstance(item, Mapping):
            raise wrong_type(where, item, "an object with role and content")
        role = item["from"] if item.get("from") is not None and item.get("role") is None else need(item, "role")
        content = (
            item["value"] if item.get("value") is not None and item.get("content") is None else need(item, "content")
        )
        found.append(turn(role, content, where))
    found = [m for m in found if m["content"]]
    if not found:
        raise BadRow("EMP", f"{name} has no turns")
    return found


def ordered(turns: list[Message], name: str) -> list[Message]:
    """Turns in an order that every chat template renders: a system turn first or none, then user and assistant."""
    expected = "user"
    for index, message in enumerate(turns):
        role = message["role"]
        if role == "system" and index == 0:
            continue
        if role != expected:
            raise BadRow("ROL", f"turn {index + 1} of {name} is of {role}, it must be of {expected}")
        expected = "assistant" if role == "user" else "user"
    if expected != "assistant":
        raise BadRow("ROL", f"{name} must end with a user turn")
    return turns


def with_system(row: Row, turns: list[Message]) -> list[Message]:
    """The turns below the row's `system` text, if it has one and they have none."""
    if (turns and turns[0]["role"] == "system") or not present(row, "system"):
        return turns
    return [turn("system", row["system"], "system"), *turns]


def split_conversation(turns: list[Message], name: str) -> tuple[list[Message], str]:
    """All turns but the last, in order, and the text of the last, which must be the assistant's."""
    if turns[-1]["role"] != "assistant":
        raise BadRow("ROL", f"{name} ends with a turn of {turns[-1]['role']}, it must end with the assistant's answer")
    return ordered(turns[:-1], name), turns[-1]["content"]


def conversation(row: Row, value: object, name: str) -> list[Message]:
    """A whole conversation: `value` as it is, or after the row's `prompt` when it holds only what follows that."""
    turns = messages(value, name)
    given = row.get("prompt")
    if given is None:
        return with_system(row, turns)
    before = messages(given, "prompt") if isinstance(given, list) else [turn("user", given, "prompt")]
    if turns[0]["role"] == "assistant":
        return with_system(row, before + turns)
    if isinstance(given, list) and turns[: len(before)] != before:
        raise BadRow("PFX", f"{name} does not begin with the turns of prompt")
    return with_system(row, turns)


def dialogue(start: str, value: object, name: str) -> list[Message]:
    r"""The turns of a "\n\nHuman: … \n\nAssistant: …" text."""
    whole = text(value, name)
    whole = whole if whole.startswith("\n\nHuman:") else start + whole
    head, *pieces = HH_TURN.split(whole)
    if head or not pieces:
        raise BadRow("ROL", f'{name} begins with {whole[:30]!r}, it must begin with "\\n\\nHuman:"')
    return [
        turn(HH_ROLES[who], said.removeprefix(" "), f"turn {index} of {name}")
        for index, (who, said) in enumerate(zip(pieces[::2], pieces[1::2], strict=True), 1)
    ]


def answer(value: object, name: str) -> str:
    """The text of one answer: a text, an assistant message, or a list of just one."""
    if isinstance(value, str):
        return text(value, name)
    turns = messages([value] if isinstance(value, Mapping) else value, name)
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise BadRow("ROL", f"{name} must be one turn of the assistant; it is {[m['role'] for m in turns][:5]}")
    return turns[0]["content"]


def rejected(row: Row) -> object:
    """The rejected side, which some data sets call `reject`."""
    return row["reject"] if "rejected" not in row and "reject" in row else need(row, "rejected")


def several(value: object) -> list[str]:
    """The texts of one rejected answer or of a list of them."""
    if isinstance(value, list) and not value:
        raise BadRow("EMP", "rejected is an empty list")
    return [answer(item, "rejected") for item in as_list(value)]


def _part(part: object, name: str) -> str:
    if not isinstance(part, Mapping):
        raise wrong_type(f"a part of {name}", part, "an object with type and text")
    if need(part, "type") != "text":
        raise BadRow("TYP", f"a part of {name} is of type {str(part['type'])[:40]!r}; only text can be trained on")
    words = need(part, "text")
    if not isinstance(words, str):
        raise wrong_type(f"a part of {name}", words, "a text")
    return words


def _instruction(row: Row) -> list[Message]:
    question = text(need(row, "instruction"), "instruction")
    if present(row, "input"):
        question += "\n" + text(row["input"], "input")
    return [*_history(row.get("history")), Message(role="user", content=question)]


def _history(value: object) -> list[Message]:
    turns: list[Message] = []
    for index, exchange in enumerate(as_list(value) if value is not None else []):
        name = f"history[{index}]"
        if not isinstance(exchange, Sequence) or isinstance(exchange, str) or len(exchange) != 2:
            raise wrong_type(name, exchange, "a question and an answer")
        turns += [turn("user", exchange[0], name), turn("assistant", exchange[1], name)]
    return turns


def _prompt_and_completion(row: Row) -> tuple[list[Message], str]:
    """Of `messages` or `conversations`, or of `prompt` and `completion`."""
    key = next((name for name in ("completion", "messages", "conversations") if row.get(name) is not None), "messages")
    given = need(row, key)
    turns = conversation(row, given, key) if isinstance(given, list) else _answered(row, given)
    return split_conversation(turns, key)


def _answered(row: Row, completion: object) -> list[Message]:
    given = need(row, "prompt")
    before = messages(given, "prompt") if isinstance(given, list) else [turn("user", given, "prompt")]
    return with_system(row, [*before, turn("assistant", completion, "completion")])


def _reference(row: Row) -> str | None:
    """The reference answer; a number, as some arithmetic sets have it, becomes its text."""
    if not present(row, "answer"):
        return None
    value = row["answer"]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{number(value, 'answer'):.15g}"
    return text(value, "answer")


# ------------------------------------------------------------------------------------------------ records


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
        answer=_reference(row),
        meta=_meta(row),
        text=completion,
        scores=scores,
    )


def demonstration(row: Row, turns: list[Message], last: str) -> Demonstration:
    """An answer to imitate after the turns of its prompt."""
    prompt = prompt_record(row, turns, _reference(row) or last)
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
