"""The client against a real server that misbehaves: bounded, patient, never over budget, nothing paid for twice."""

import base64
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fault_server import FaultServer, Script

from prefpipe.api import ApiConfig
from prefpipe.api.client import Client, Outcome
from prefpipe.api.replies import Answer, Failure
from prefpipe.errors import ApiError, ArtifactError, ConfigError

KEY = "sk-canary-4/f7A+b2"
PRICES = {"prompt_price": 1e4, "completion_price": 1e5}
"""An answer of 100 + 10 tokens costs 1 + 1."""


def config(server: FaultServer, folder: Path, **other: Any) -> ApiConfig:
    settings = {"model": "m", "max_attempts": 3, "backoff_seconds": 0.01, "cache": str(folder), **other}
    return ApiConfig(base_url=server.url, **settings)


def ask(api: ApiConfig, texts: Sequence[str], **sampling: Any) -> list[Outcome]:
    with Client(api, component="scorer=judge") as client:
        settings = {"max_new_tokens": 10, "temperature": 0.0, **sampling}
        return client.complete([client.body([{"role": "user", "content": text}], **settings) for text in texts])


def reasons(outcomes: Sequence[Outcome]) -> Counter[str]:
    return Counter(outcome.reason if isinstance(outcome, Failure) else "answer" for outcome in outcomes)


def content(request: dict[str, Any]) -> str:
    return str(request["messages"][-1]["content"])


def test_answers_come_in_the_order_of_the_requests_with_bounded_concurrency(tmp_path):
    def slow_first(request: dict[str, Any], attempt: int) -> Script:
        return Script(content(request), silent_seconds=0.001 * (40 - int(content(request))))

    with FaultServer(slow_first) as server:
        outcomes = ask(config(server, tmp_path, max_concurrency=8), [str(i) for i in range(40)])
    assert [o.choices[0].text for o in outcomes if isinstance(o, Answer)] == [str(i) for i in range(40)]
    assert 2 <= server.most_at_once <= 8


def test_what_was_answered_is_never_asked_again_and_twins_are_asked_once(tmp_path):
    with FaultServer(lambda request, attempt: Script(content(request))) as server:
        first = ask(config(server, tmp_path), ["a", "b", "a"])
        assert ask(config(server, tmp_path, timeout_seconds=9.0, max_concurrency=1), ["b", "a", "a"]) == [
            first[1], first[0], first[0],
        ]  # fmt: skip
        assert sorted(server.attempts.values()) == [1, 1]
        ask(config(server, tmp_path), ["a"], temperature=0.5)
        ask(config(server, tmp_path, extra_body={"min_p": 0.1}), ["a"])
        ask(config(server, tmp_path, endpoint="after a new release"), ["a"])
        assert sum(server.attempts.values()) == 5
        ask(config(server, tmp_path, endpoint="after a new release"), ["a"])
        assert sum(server.attempts.values()) == 5


def test_what_is_sent(tmp_path):
    seen: list[dict[str, Any]] = []

    def remember(request: dict[str, Any], attempt: int) -> Script:
        seen.append(request)
        return Script()

    with FaultServer(remember) as server:
        ask(config(server, tmp_path), ["a"])
        api = config(server, tmp_path, max_tokens_key="max_completion_tokens", extra_body={"a": {"b": 1}})
        ask(api, ["a"], top_p=0.9, top_k=5, seed=7, num_samples=2, temperature=1.0)
    always = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
    assert seen[0] == {**always, "max_tokens": 10, "temperature": 0.0}
    assert seen[1] == {
        **always, "max_completion_tokens": 10, "temperature": 1.0, "top_p": 0.9, "top_k": 5, "seed": 7, "n": 2,
        "a": {"b": 1},
    }  # fmt: skip
    assert all(b"authorization" not in head.lower() for head in server.received)


def test_retry_after_holds_back_every_request(tmp_path):
    times: list[float] = []

    def limited_once(request: dict[str, Any], attempt: int) -> Script:
        times.append(time.monotonic())
        return Script(status=429, headers={"Retry-After": "1"}) if len(times) == 1 else Script()

    with FaultServer(limited_once) as server:
        outcomes = ask(config(server, tmp_path, max_concurrency=1), [str(i) for i in range(4)])
    assert reasons(outcomes) == {"answer": 4}
    assert times[1] - times[0] >= 1.0


def test_a_retry_after_that_is_too_long_is_not_sat_out(tmp_path):
    def closed(request: dict[str, Any], attempt: int) -> Script:
        return Script(status=503, headers={"Retry-After": "86400"})

    with FaultServer(closed) as server:
        assert reasons(ask(config(server, tmp_path, max_failed_fraction=1.0), ["a"])) == {"server_error": 1}
        assert list(server.attempts.values()) == [1]


@pytest.mark.parametrize(
    ("script", "reason", "attempts"),
    [
        (Script(status=500), "server_error", 3),
        (Script(status=429), "rate_limited", 3),
        (Script(silent_seconds=30), "timeout", 3),
        (Script(drip=True), "timeout", 3),
        (Script(cut=20), "connection", 3),
        (Script(body=b'{"choices": [{"message": {"con'), "malformed", 3),
        (Script(body=b'{"choices": []}'), "empty_choices", 3),
        (Script(status=400), "rejected", 1),
        (Script(text="x" * 3000), "too_large", 1),
        (Script(headers={"Content-Encoding": "gzip"}, body=b"\x1f\x8b"), "malformed", 3),
    ],
)
def test_a_failure_is_a_reason_after_so_many_attempts(tmp_path, script, reason, attempts):
    with FaultServer(lambda request, attempt: script) as server:
        api = config(server, tmp_path, timeout_seconds=0.2, max_answer_bytes=2000, max_failed_fraction=1.0)
        assert reasons(ask(api, ["a"])) == {reason: 1}
        assert list(server.attempts.values()) == [attempts]


def test_a_server_that_is_not_there_is_a_failed_connection_and_costs_nothing(tmp_path):
    with FaultServer(lambda request, attempt: Script()) as server:
        pass
    with Client(config(server, tmp_path, max_failed_fraction=1.0, **PRICES), component="c=c") as client:
        body = client.body([{"role": "user", "content": "a"}], max_new_tokens=10, temperature=0.0)
        assert reasons(client.complete([body])) == {"connection": 1}
        assert client._ledger.spend().total == 0


def test_a_too_large_answer_was_paid_for_so_it_is_asked_for_again_only_with_a_higher_limit(tmp_path):
    with FaultServer(lambda request, attempt: Script(text="x" * 3000)) as server:
        for limit, reason, attempts in ((1000, "too_large", 1), (1000, "too_large", 1), (9000, "answer", 2)):
            assert reasons(ask(config(server, tmp_path, max_answer_bytes=limit), ["a"])) == {reason: 1}
            assert sum(server.attempts.values()) == attempts


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_so_the_key_stays_here(tmp_path, monkeypatch, status):
    monkeypatch.setenv("SOME_KEY", KEY)
    with FaultServer(lambda request, attempt: Script()) as other:
        moved = Script(status=status, headers={"Location": f"{other.url}/chat/completions"})
        with FaultServer(lambda request, attempt: moved) as server:
            assert reasons(ask(config(server, tmp_path, api_key_env="SOME_KEY"), ["a"])) == {"redirect": 1}
    assert other.received == []
    assert KEY.encode() in server.received[0]


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (Script(status=401, body=b'{"error": {"message": "Incorrect API key: %s"}}' % KEY.encode()), r"\$SOME_KEY"),
        (Script(status=403), r"check the key in \$SOME_KEY"),
        (Script(status=404), r"scorer\.api\.base_url, which ends in /v1, and scorer\.api\.model=m"),
        (Script(status=429, body=b'{"error": {"code": "insufficient_quota"}}'), "no money left"),
    ],
)
def test_what_no_request_can_pass_stops_at_once_without_showing_the_key(tmp_path, monkeypatch, script, says):
    monkeypatch.setenv("SOME_KEY", KEY)
    with FaultServer(lambda request, attempt: script, seconds=0.05) as server:
        with pytest.raises(ApiError, match=says) as error:
            ask(config(server, tmp_path, api_key_env="SOME_KEY", max_concurrency=4), [str(i) for i in range(100)])
        assert sum(server.attempts.values()) <= 4
    assert KEY not in str(error.value)


def test_a_sick_server_stops_the_stage_and_a_later_run_asks_only_for_what_failed(tmp_path):
    sick = True

    def half_sick(request: dict[str, Any], attempt: int) -> Script:
        return Script(status=500) if sick and int(content(request)) >= 20 else Script()

    with FaultServer(half_sick) as server:
        texts = [str(i) for i in range(40)]
        with pytest.raises(
            ApiError, match=r"3 of \d+ requests failed after up to 3 attempts \(server_error 3; .*0\.05"
        ):
            ask(config(server, tmp_path, max_concurrency=1), texts)
        sick = False
        assert reasons(ask(config(server, tmp_path), texts)) == {"answer": 40}
    assert set(server.answered.values()) == {1}


def test_spend_stays_below_the_limit_and_goes_on_when_it_is_raised(tmp_path):
    """Each answer costs 2; the server's own count of tokens says what was really spent."""
    with FaultServer(lambda request, attempt: Script(), seconds=0.002) as server:
        texts = [str(i) for i in range(100)]
        for limit in (30.0, 80.0):
            with pytest.raises(ApiError, match=r"scorer\.api\.max_cost=.* and the next request may cost \d"):
                ask(config(server, tmp_path, max_cost=limit, **PRICES), texts)
            spent = server.tokens["prompt"] / 100 + server.tokens["completion"] / 10
            assert limit - 10 < spent <= limit
        outcomes = ask(config(server, tmp_path, max_cost=1000.0, **PRICES), texts)
    assert reasons(outcomes) == {"answer": 100}
    assert set(server.answered.values()) == {1}
    (row,) = sqlite3.connect(tmp_path / "spend.sqlite").execute("SELECT * FROM spend").fetchall()
    assert row[:5] == ("scorer=judge", "m", 100, 10_000, 1_000)
    assert row[5:] == pytest.approx((200.0, 0.0, 0.0))


def test_clients_that_share_a_ledger_share_its_limit(tmp_path):
    with FaultServer(lambda request, attempt: Script(), seconds=0.002) as server:

        def spend(number: int) -> None:
            api = config(server, tmp_path / str(number), ledger=str(tmp_path / "spend.sqlite"), max_cost=60.0, **PRICES)
            with pytest.raises(ApiError, match="max_cost"):
                ask(api, [f"{number} {i}" for i in range(50)])

        threads = [threading.Thread(target=spend, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert 30 < 2 * sum(server.answered.values()) <= 60


def test_an_answer_that_got_lost_counts_with_the_most_it_can_have_cost(tmp_path):
    """A reset connection: it may have been charged. The prompt has fewer tokens than bytes, the answer at most 10."""
    with FaultServer(lambda request, attempt: Script(cut=5)) as server:
        api = config(server, tmp_path, max_failed_fraction=1.0, max_attempts=2, **PRICES)
        assert reasons(ask(api, ["a"])) == {"connection": 1}
        (sent,) = server.attempts
    ((cost, unknown, reserved),) = sqlite3.connect(tmp_path / "spend.sqlite").execute(
        "SELECT cost, unknown, reserved FROM spend"
    )
    assert (cost, reserved) == (0.0, 0.0)
    assert unknown == pytest.approx(2 * ((len(sent) + 256) * 1e4 + 10 * 1e5) / 1e6)


def test_an_answer_without_usage_counts_with_the_most_it_can_have_cost(tmp_path):
    with FaultServer(lambda request, attempt: Script(usage=None)) as server:
        assert reasons(ask(config(server, tmp_path, **PRICES), ["a"])) == {"answer": 1}
    ((cost, unknown),) = sqlite3.connect(tmp_path / "spend.sqlite").execute("SELECT cost, unknown FROM spend")
    assert cost == 0.0
    assert unknown > 2.0


CHILD = """
import sys
from prefpipe.api import ApiConfig
from prefpipe.api.client import Client
api = ApiConfig(base_url=sys.argv[1], model="m", cache=sys.argv[2], max_concurrency=8, max_attempts=9,
                backoff_seconds=0.01, prompt_price=1e4, completion_price=1e5, max_cost=100000.0)
with Client(api, component="scorer=judge") as client:
    client.complete([client.body([{"role": "user", "content": str(i)}], max_new_tokens=10, temperature=0.0)
                     for i in range(300)])
"""


def test_after_a_kill_nothing_that_was_kept_is_paid_for_again(tmp_path):
    """Four SIGKILLs at random moments. The server's own count is the oracle: only what was in flight may come twice."""

    def faulty(request: dict[str, Any], attempt: int) -> Script:
        return Script(status=503) if int(content(request)) % 10 == attempt else Script()

    chance = random.Random(0)
    with FaultServer(faulty, seconds=0.01) as server:
        kept: set[bytes] = set()
        for kills in range(5):
            before = sum(server.answered.values())
            answered_before = dict(server.answered)
            child = subprocess.Popen([sys.executable, "-c", CHILD, server.url, str(tmp_path)], env=dict(os.environ))
            if kills < 4:
                target = before + chance.randint(20, 60)
                deadline = time.monotonic() + 60
                while sum(server.answered.values()) < target and time.monotonic() < deadline:
                    time.sleep(0.002)
                child.send_signal(signal.SIGKILL)
                assert child.wait(60) == -signal.SIGKILL
            else:
                assert child.wait(60) == 0
            again = {raw for raw, count in server.answered.items() if count > answered_before.get(raw, 0)} & kept
            assert again == set()
            kept = _kept(tmp_path, server)
        extra = sum(server.answered.values()) - 300
        assert len(server.answered) == 300
        assert 0 <= extra <= 4 * 8
        ((cost, reserved),) = sqlite3.connect(tmp_path / "spend.sqlite").execute("SELECT cost, reserved FROM spend")
        assert cost + reserved >= 2 * sum(server.answered.values())  # what was in flight is never forgotten


def _kept(folder: Path, server: FaultServer) -> set[bytes]:
    """Requests whose answer is on disk, recognized as the client does: sha256 of the endpoint and the body."""
    import hashlib

    keys = {key for (key,) in sqlite3.connect(folder / "answers.sqlite").execute("SELECT key FROM answers")}
    return {raw for raw in server.attempts if hashlib.sha256(server.url.encode() + b"\n" + raw).digest() in keys}


def test_a_key_that_is_echoed_is_kept_nowhere(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SOME_KEY", KEY)
    encoded = base64.b64encode(KEY.encode()).decode()
    with FaultServer(lambda request, attempt: Script(text=f"You sent {KEY}, that is {encoded}.")) as server:
        (answer,) = ask(config(server, tmp_path, api_key_env="SOME_KEY"), ["a"])
    assert isinstance(answer, Answer)
    assert answer.choices[0].text == "You sent [key], that is [key]."
    stored = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert KEY.encode() not in stored
    assert KEY not in caplog.text


def test_a_damaged_cache_is_named(tmp_path):
    (tmp_path / "answers.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(ArtifactError, match=r"answers\.sqlite: file is not a database.*move it away"):
        Client(ApiConfig(model="m", cache=str(tmp_path)), component="scorer=judge")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"base_url": "http://judge.example/v1"}, "allow_http=true"),
        ({"base_url": "ftp://judge.example"}, "must be a URL"),
        ({"base_url": f"https://me:{KEY}@judge.example/v1"}, "no user, password"),
        ({"base_url": f"https://judge.example/v1?key={KEY}"}, "no user, password"),
        ({"api_key_env": KEY}, "the name of an environment variable"),
        ({"api_key_env": "hf_AbCdEf"}, "the name of an environment variable"),
        ({"max_concurrency": 0}, r"max_concurrency=0 must be at least 1"),
        ({"timeout_seconds": 0.0}, "timeout_seconds=0.0 must be above 0"),
        ({"backoff_seconds": float("nan")}, "backoff_seconds=nan"),
        ({"max_failed_fraction": 1.5}, "between 0 and 1"),
        ({"max_cost": 5.0}, "would be ignored, as tokens cost nothing"),
        ({"max_cost": 0.0, "prompt_price": 1.0}, "must be above 0"),
        ({"extra_body": [1]}, "must be a mapping"),
        ({"extra_body": {"n": 2, "seed": 1}}, "holds n, seed"),
        ({"max_tokens_key": "limit"}, "max_completion_tokens"),
    ],
)
def test_settings_that_cannot_work_are_refused_without_repeating_a_secret(settings, says):
    with pytest.raises(ConfigError, match=says) as error:
        ApiConfig(**settings)
    assert KEY not in str(error.value)
    assert "AbCdEf" not in str(error.value)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "127.8.9.1"])
def test_this_machine_may_be_asked_over_plain_http(host):
    assert ApiConfig(base_url=f"http://{host}:8000/v1").is_local
    assert not ApiConfig(base_url="http://10.0.0.5:8000/v1", allow_http=True).is_local


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"scorer=judge needs scorer\.api\.model"):
        Client(ApiConfig(cache=str(tmp_path)), component="scorer=judge")
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"api_key_env=SOME_KEY: that environment variable is not set"):
        Client(ApiConfig(model="m", api_key_env="SOME_KEY", cache=str(tmp_path)), component="scorer=judge")
    monkeypatch.setenv("SOME_KEY", "sk-two\nlines")
    with pytest.raises(ConfigError, match="cannot be a key") as error:
        Client(ApiConfig(model="m", api_key_env="SOME_KEY", cache=str(tmp_path)), component="scorer=judge")
    assert "sk-two" not in str(error.value)
