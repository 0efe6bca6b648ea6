"""What a reply means, by status, headers and body."""

import orjson
import pytest

from prefpipe.api.replies import Answer, Choice, Failure, read_answer, read_reply, retry_after


def error(code: str = "", message: str = "no") -> bytes:
    return orjson.dumps({"error": {"code": code, "message": message}})


@pytest.mark.parametrize(
    ("status", "body", "reason", "fatal"),
    [
        (429, error(), "rate_limited", ""),
        (429, error("insufficient_quota"), "rejected", "quota"),
        (402, b"", "rejected", "quota"),
        (401, error(), "rejected", "key"),
        (403, error(), "rejected", "key"),
        (404, error(), "rejected", "address"),
        (408, b"", "server_error", ""),
        (500, b"<html>", "server_error", ""),
        (529, b"\xff\xfe", "server_error", ""),
        (400, error(), "rejected", ""),
        (422, b"[]", "rejected", ""),
        (400, error("content_filter"), "refused", ""),
        (400, error("context_length_exceeded"), "prompt_too_long", ""),
        (400, error("", "This model's maximum context length is 256 tokens."), "prompt_too_long", ""),
        (302, b"", "redirect", ""),
        (200, error("server_error"), "server_error", ""),
        (200, b'{"choices": [{"mess', "malformed", ""),
        (200, b"3", "malformed", ""),
        (200, b'{"choices": [{"text": "completions API"}]}', "malformed", ""),
        (200, b'{"choices": []}', "empty_choices", ""),
        (200, b"{}", "empty_choices", ""),
    ],
)
def test_what_is_no_answer_is_a_failure_with_its_reason(status, body, reason, fatal):
    reply = read_reply(status, {}, body)
    assert isinstance(reply.outcome, Failure)
    assert (reply.outcome.reason, reply.fatal) == (reason, fatal)
    assert reply.paid == ("unknown" if status == 200 and reason != "server_error" else "nothing")


def test_an_answer_with_what_servers_add():
    """token_ids as vLLM returns them on request; a refusal as OpenAI says it; a thought that took all tokens."""
    choices = [
        {"message": {"content": "Hi"}, "finish_reason": "stop", "token_ids": [5, 2]},
        {"message": {"content": None, "refusal": "I cannot"}, "finish_reason": "stop"},
        {"message": {"content": None, "reasoning_content": "hm"}, "finish_reason": "length"},
        {"message": {"content": "x"}, "finish_reason": "content_filter"},
        {"message": {"content": "x"}, "finish_reason": "abort", "token_ids": ["5"]},
        {"message": {"content": "x"}, "finish_reason": None},
    ]
    usage = {"prompt_tokens": 12, "completion_tokens": 30}
    answer = read_answer(orjson.dumps({"model": "m-1", "choices": choices, "usage": usage}))
    assert answer == Answer(
        [
            Choice("Hi", "stop", [5, 2]),
            Choice("", "refused", []),
            Choice("", "length", []),
            Choice("x", "refused", []),
            Choice("x", "unknown_finish_reason", []),
            Choice("x", "unknown_finish_reason", []),
        ],
        "m-1",
        12,
        30,
    )
    silent = read_answer(orjson.dumps({"choices": choices, "usage": {"prompt_tokens": -1, "completion_tokens": True}}))
    assert isinstance(silent, Answer)
    assert (silent.prompt_tokens, silent.completion_tokens) == (None, None)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "3", "retry-after-ms": "250"}, 0.25),
        # By the server's clock, which here is far from ours.
        ({"retry-after": "Wed, 21 Oct 2015 07:28:30 GMT", "date": "Wed, 21 Oct 2015 07:28:00 GMT"}, 30.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
        ({}, None),
    ],
)
def test_how_long_to_wait(headers, seconds):
    assert retry_after(headers) == seconds


def test_an_error_is_one_printable_line():
    reply = read_reply(400, {}, error("", "two\nlines \x1b[31mred\u202e"))
    assert isinstance(reply.outcome, Failure)
    assert reply.outcome.detail == "400 two lines  [31mred"
