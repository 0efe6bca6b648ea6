"""Conversations: turns in the formats that data sets use, as messages that a chat template can render."""

import re
from collections.abc import Mapping, Sequence

from prefpipe.records import Message
from prefpipe.sources.codes import BadRow
from prefpipe.sources.values import Row, as_list, need, present, text, wrong_type

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


def instruction(row: Row) -> list[Message]:
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


def prompt_and_completion(row: Row) -> tuple[list[Message], str]:
    """Of `messages` or `conversations`, or of `prompt` and `completion`."""
    key = next((name for name in ("completion", "messages", "conversations") if row.get(name) is not None), "messages")
    given = need(row, key)
    turns = conversation(row, given, key) if isinstance(given, list) else _answered(row, given)
    return split_conversation(turns, key)


def _answered(row: Row, completion: object) -> list[Message]:
    given = need(row, "prompt")
    before = messages(given, "prompt") if isinstance(given, list) else [turn("user", given, "prompt")]
    return with_system(row, [*before, turn("assistant", completion, "completion")])
