"""What a server's reply means: an answer, or a failure with a reason, never an answer by default."""

import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

import orjson

FINISH_REASONS = {
    **dict.fromkeys(("stop", "eos", "eos_token", "end_turn", "stop_sequence"), "stop"),
    **dict.fromkeys(("length", "max_tokens", "max_new_tokens"), "length"),
    "content_filter": "refused",
}
"""The server's word for why a choice ended → ours; any other is "unknown_finish_reason"."""

TRANSIENT = {"rate_limited", "server_error", "timeout", "connection", "malformed", "empty_choices"}
"""Failures that another attempt may mend."""


class Choice(NamedTuple):
    """One text of an answer.

    finish_reason: "stop" or "length"; or "refused", "unknown_finish_reason": then the text is no whole answer.
    token_ids: where the server returns them.
    """

    text: str
    finish_reason: str
    token_ids: list[int]


class Answer(NamedTuple):
    """What a request was answered with. prompt_tokens, completion_tokens: None where the server does not say."""

    choices: list[Choice]
    model: str
    prompt_tokens: int | None
    completion_tokens: int | None


class Failure(NamedTuple):
    """A request without an answer.

    reason: one of TRANSIENT, or "redirect", "too_large", "rejected", "refused", "prompt_too_long". detail: for the log.
    """

    reason: str
    detail: str = ""


class Reply(NamedTuple):
    """One attempt's outcome.

    paid: "usage" as the answer says, "nothing", or "unknown". wait_seconds: what the server asks for, or None.
    fatal: why no other request will fare better, or "".
    """

    outcome: Answer | Failure
    paid: str
    wait_seconds: float | None = None
    fatal: str = ""


def read_reply(status: int, headers: Mapping[str, str], body: bytes) -> Reply:
    """The meaning of a complete HTTP response."""
    if status == 200:
        outcome = read_answer(body)
        paid = "usage" if isinstance(outcome, Answer) else "nothing" if outcome.reason == "server_error" else "unknown"
        return Reply(outcome, paid)
    if 300 <= status < 400:
        # Never followed: the key would travel to wherever it points.
        return Reply(Failure("redirect", f"{status} to {_plain(headers.get('location', ''))}"), "nothing")
    code, message = _error(body)
    detail = f"{status} {message}".strip()
    if status in (401, 403):
        return Reply(Failure("rejected", detail), "nothing", fatal="key")
    if status in (404, 405):
        return Reply(Failure("rejected", detail), "nothing", fatal="address")
    if status == 402 or code == "insufficient_quota":
        return Reply(Failure("rejected", detail), "nothing", fatal="quota")
    if status == 429:
        return Reply(Failure("rate_limited", detail), "nothing", retry_after(headers))
    if status >= 500 or status in (408, 409, 425):
        return Reply(Failure("server_error", detail), "nothing", retry_after(headers))
    if code == "content_filter":
        return Reply(Failure("refused", detail), "nothing")
    if code == "context_length_exceeded" or "maximum context length" in message or "context window" in message:
        return Reply(Failure("prompt_too_long", detail), "nothing")
    return Reply(Failure("rejected", detail), "nothing")


def read_answer(body: bytes) -> Answer | Failure:
    """A chat completion as JSON, as OpenAI, vLLM and SGLang write it."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        return Failure("malformed", f"no JSON: {error}")
    if not isinstance(data, dict):
        return Failure("malformed", "JSON, but no object")
    if data.get("error"):
        # Some proxies say so with status 200.
        return Failure("server_error", _error(body)[1])
    choices = data.get("choices")
    if choices == [] or choices is None:
        return Failure("empty_choices", "no choices")
    if not isinstance(choices, list):
        return Failure("malformed", "choices is no list")
    read = [_choice(choice) for choice in choices]
    if None in read:
        return Failure("malformed", "a choice has no message with text")
    usage = data.get("usage")
    if not isinstance(usage, dict):
        usage = {}
    return Answer(
        [choice for choice in read if choice is not None],
        str(data.get("model") or ""),
        _count(usage.get("prompt_tokens")),
        _count(usage.get("completion_tokens")),
    )


def retry_after(headers: Mapping[str, str]) -> float | None:
    """How many seconds the server asks to wait, from retry-after-ms or Retry-After (RFC 9110, 10.2.3); else None."""
    if re.fullmatch(r"\d{1,12}(\.\d+)?", milliseconds := headers.get("retry-after-ms", "")):
        return float(milliseconds) / 1000
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d+)?", value):
        return float(value)
    try:
        until = parsedate_to_datetime(value).timestamp()
    except ValueError:
        return None
    try:
        # By the server's own clock, so that a wrong one here does no harm.
        now = parsedate_to_datetime(headers.get("date", "")).timestamp()
    except ValueError:
        now = time.time()
    return max(0.0, until - now)


def _choice(data: Any) -> Choice | None:
    message = data.get("message") if isinstance(data, dict) else None
    if not isinstance(message, dict):
        return None
    text = message.get("content")
    if text is None:  # a refusal, or a thought that took all tokens
        text = ""
    reason = FINISH_REASONS.get(str(data.get("finish_reason")), "unknown_finish_reason")
    if message.get("refusal"):
        reason = "refused"
    ids = data.get("token_ids")
    known = isinstance(ids, list) and all(type(token) is int for token in ids)
    if not isinstance(text, str):
        return None
    return Choice(text, reason, list(ids) if known else [])


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _error(body: bytes) -> tuple[str, str]:
    """(code, message) of an error's body, whatever it is; short and on one line."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError:
        return "", _plain(body[:200].decode("utf-8", errors="replace"))
    error = data.get("error", data) if isinstance(data, dict) else data
    if not isinstance(error, dict):
        return "", _plain(str(error))
    return str(error.get("code") or error.get("type") or ""), _plain(str(error.get("message") or error))


def _plain(text: str) -> str:
    """For logs and terminals: one line, no control characters."""
    return "".join(char if char.isprintable() else " " for char in text[:200]).strip()
