"""The client: bounded concurrency, patient retries, no answer paid for twice, no spend above the limit."""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import anyio
import orjson
from anyio.from_thread import start_blocking_portal

from prefpipe import __version__
from prefpipe.api import ApiConfig
from prefpipe.api.replies import TRANSIENT, Answer, Failure, Reply, read_answer, read_reply
from prefpipe.api.store import Answers, Ledger
from prefpipe.errors import ApiError, ConfigError, PrefpipeError
from prefpipe.progress import Progress, progress
from prefpipe.records import Message

if TYPE_CHECKING:
    import httpx2

log = logging.getLogger(__name__)

Body = Mapping[str, Any]
Outcome = Answer | Failure

CONNECT_SECONDS = 30.0
KEEPALIVE_SECONDS = 2.0  # below the 5 s after which uvicorn hangs up, or a request may meet a closed connection
TEMPLATE_TOKENS = 256  # more than a chat template adds to a conversation
SHORTEST_KEY = 8  # shorter ones, such as vLLM's EMPTY, are no secret, and words of ordinary text


class Client:
    """Asks one server; use as a context manager.

    Args:
        component: who asks, e.g. "scorer=judge": for errors, and for the ledger.
    Raises:
        ConfigError: no model is named, or the key's variable is not set.
    """

    def __init__(self, api: ApiConfig, *, component: str) -> None:
        self.api, self.component = api.with_endpoint(), component
        kind = component.partition("=")[0]
        if not api.model:
            raise ConfigError(f"{component} needs {kind}.api.model, the name that {api.base_url} knows its model by")
        self._key = _key(api.api_key_env, f"{kind}.api.api_key_env")
        self._secrets = _spellings(self._key)
        cache = Path(api.cache).expanduser()
        self._answers = Answers(cache / "answers.sqlite")
        ledger = Path(api.ledger).expanduser() if api.ledger else cache / "spend.sqlite"
        self._ledger = Ledger(ledger, component, api.model)
        self._counts = Counter[str]()
        self._open = ExitStack()
        self._not_before = 0.0  # on the event loop's clock: nothing is sent earlier, as the server said so
        self._in_flight = self._num_settled = 0

    def __enter__(self) -> Client:
        import httpx2

        headers = {"User-Agent": f"prefpipe/{__version__}", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        most = self.api.max_concurrency
        try:
            self._portal = self._open.enter_context(start_blocking_portal())
            self._settled = self._portal.call(anyio.Condition)
            http = httpx2.AsyncClient(
                headers=headers,
                timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),  # an attempt as a whole is timed in _send
                limits=httpx2.Limits(
                    max_connections=most, max_keepalive_connections=most, keepalive_expiry=KEEPALIVE_SECONDS
                ),
                follow_redirects=False,
                # A proxy sees what goes to a plain http address, the key too.
                trust_env=self.api.base_url.startswith("https:"),
            )
            self._http = self._open.enter_context(self._portal.wrap_async_context_manager(http))
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._open.__exit__(kind, error, trace)
        finally:
            self._log_summary()
            self._answers.close()
            self._ledger.close()

    def body(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        num_samples: int = 1,
        continues: bool = False,
    ) -> Body:
        """A request of /v1/chat/completions. What is switched off is left out, as not every server knows every key.

        continues: go on with the last message, the assistant's, in place of answering (vLLM, SGLang).
        """
        body: dict[str, Any] = {
            **(self.api.extra_body or {}),
            "model": self.api.model,
            "messages": [{"role": m["role"], "content": m["content"]} for m in messages],
            self.api.max_tokens_key: max_new_tokens,
            "temperature": temperature,
        }
        if top_p < 1:
            body["top_p"] = top_p
        if top_k:
            body["top_k"] = top_k
        if seed is not None:
            body["seed"] = seed
        if num_samples > 1:
            body["n"] = num_samples
        if continues:
            body |= {"add_generation_prompt": False, "continue_final_message": True}
        return body

    def complete(self, bodies: Sequence[Body]) -> list[Outcome]:
        """The outcomes of requests, in their order. What was answered before, in any run, is not sent again.

        Raises ApiError when the server refuses every request, when more than api.max_failed_fraction of them fail, or
        when the next one might exceed api.max_cost. Answers that came before that are kept.
        """
        sent = [orjson.dumps(body, option=orjson.OPT_SORT_KEYS) for body in bodies]
        keys = [hashlib.sha256(self.api.endpoint.encode() + b"\n" + body).digest() for body in sent]
        outcomes = self._known(keys)
        todo = {key: body for key, body in zip(keys, sent, strict=True) if key not in outcomes}
        self._counts["from the cache"] += len(outcomes)
        with progress(self.component, unit="request", total=len(outcomes) + len(todo), done=len(outcomes)) as shown:
            if todo:
                future = self._portal.start_task_soon(self._ask_all, todo, outcomes, shown)
                try:
                    future.result()
                except BaseException:
                    future.cancel()
                    raise
        return [outcomes[key] for key in keys]

    def _known(self, keys: Sequence[bytes]) -> dict[bytes, Outcome]:
        known: dict[bytes, Outcome] = {}
        for key, body in self._answers.get(set(keys)).items():
            if not body.startswith(_TOO_LARGE):
                known[key] = read_answer(body)
            elif int(body.removeprefix(_TOO_LARGE)) >= self.api.max_answer_bytes:
                known[key] = Failure("too_large")
        return known

    async def _ask_all(self, todo: Mapping[bytes, bytes], outcomes: dict[bytes, Outcome], shown: Progress) -> None:
        """Ask with api.max_concurrency workers; the first error of ours ends all of them."""
        allowed = int(self.api.max_failed_fraction * (len(outcomes) + len(todo)))
        waiting = iter(todo.items())
        failed = Counter[str]()

        async def worker() -> None:
            for key, body in waiting:
                outcome = outcomes[key] = await self._ask(key, body)
                shown.update()
                if isinstance(outcome, Failure):
                    self._counts[outcome.reason] += 1
                    log.debug("%s: %s: %s", self.component, outcome.reason, outcome.detail)
                    failed[outcome.reason] += outcome.reason in TRANSIENT or outcome.reason == "rejected"
                    if failed.total() > allowed:
                        raise self._too_many(failed, len(outcomes), outcome)

        try:
            async with anyio.create_task_group() as group:
                for _ in range(min(self.api.max_concurrency, len(todo))):
                    group.start_soon(worker)
        except BaseExceptionGroup as errors:
            ours = errors.subgroup(PrefpipeError)
            if ours is not None:
                raise ours.exceptions[0] from None
            raise

    async def _ask(self, key: bytes, body: bytes) -> Outcome:
        """One request, attempted until it is answered or there is no sense in another attempt."""
        most = self._most_cost(body)
        for attempt in range(self.api.max_attempts):
            await anyio.sleep(max(0.0, self._not_before - anyio.current_time()))
            reply = await self._attempt(key, body, most)
            if reply.fatal:
                raise self._fatal(reply)
            outcome = reply.outcome
            if isinstance(outcome, Answer) or outcome.reason not in TRANSIENT or attempt + 1 == self.api.max_attempts:
                break
            log.debug("%s: attempt %d: %s: %s", self.component, attempt + 1, outcome.reason, outcome.detail)
            if reply.wait_seconds is not None:
                if reply.wait_seconds > self.api.max_retry_after_seconds:
                    break
                self._not_before = max(self._not_before, anyio.current_time() + reply.wait_seconds)
            longest = min(self.api.max_backoff_seconds, self.api.backoff_seconds * 2.0**attempt)
            await anyio.sleep((reply.wait_seconds or 0.0) + random.uniform(0, longest))
        return outcome

    async def _attempt(self, key: bytes, body: bytes, most: float) -> Reply:
        """Reserve, send, keep the answer, settle: in this order, so that a kill can only count too much."""
        await self._reserve(most)
        reply, raw = Reply(Failure("connection", "cancelled"), "unknown"), b""
        try:
            reply, raw = await self._send(body)
        finally:
            with anyio.CancelScope(shield=True):
                if isinstance(reply.outcome, Answer):
                    await self._answers.put(key, raw)
                elif reply.outcome.reason == "too_large":
                    await self._answers.put(key, _TOO_LARGE + str(self.api.max_answer_bytes).encode())
                await self._settle(most, reply)
        return reply

    async def _send(self, body: bytes) -> tuple[Reply, bytes]:
        """One attempt, timed as a whole: a read time-out alone would let a server drip one byte a second for ever."""
        import httpx2

        try:
            with anyio.fail_after(self.api.timeout_seconds):
                async with self._http.stream(
                    "POST",
                    self.api.base_url.rstrip("/") + "/chat/completions",
                    content=body,
                    headers={"Content-Type": "application/json"},
                ) as response:
                    raw = await self._read(response)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            return Reply(Failure("connection", self._clean(error)), "nothing"), b""
        except (TimeoutError, httpx2.TimeoutException):
            return Reply(Failure("timeout", f"no answer within {self.api.timeout_seconds} s"), "unknown"), b""
        except (httpx2.TransportError, httpx2.StreamError) as error:
            return Reply(Failure("connection", self._clean(error)), "unknown"), b""
        if raw is None:
            size = f"more than {self.api.max_answer_bytes} bytes"
            return Reply(Failure("too_large", size), "unknown"), b""
        return read_reply(response.status_code, response.headers, raw), raw

    async def _read(self, response: httpx2.Response) -> bytes | None:
        """The body, without the key, should a server echo it; None when it is too large. Nothing is decompressed."""
        pieces: list[bytes] = []
        size = 0
        async for piece in response.aiter_raw():
            size += len(piece)
            if size > self.api.max_answer_bytes:
                return None
            pieces.append(piece)
        return self._redacted(b"".join(pieces))

    def _most_cost(self, body: bytes) -> float:
        """An upper bound: a token is at least one byte, and the answer has at most max_tokens of them, n times."""
        request = orjson.loads(body)
        completion = request[self.api.max_tokens_key] * request.get("n", 1)
        return self._cost(len(body) + TEMPLATE_TOKENS, completion)

    def _cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.api.prompt_price + completion_tokens * self.api.completion_price) / 1e6

    async def _reserve(self, most: float) -> None:
        """Set aside the most that an attempt can cost. Waits while what is under way may turn out cheaper."""
        while True:
            self._in_flight += 1  # before it is known, as a neighbour whose turn is in the same commit may ask
            settled = self._num_settled
            if not most or await self._ledger.reserve(most, self.api.max_cost):
                return
            self._in_flight -= 1
            async with self._settled:
                if self._num_settled == settled:
                    if not self._in_flight:
                        raise self._over_budget(most)
                    await self._settled.wait()

    async def _settle(self, most: float, reply: Reply) -> None:
        outcome = reply.outcome
        tokens: tuple[int, int] | None = None
        cost, unknown = 0.0, most if reply.paid == "unknown" else 0.0
        if isinstance(outcome, Answer):
            tokens = (outcome.prompt_tokens or 0, outcome.completion_tokens or 0)
            if outcome.prompt_tokens is None or outcome.completion_tokens is None:
                unknown = most
            else:
                cost = self._cost(*tokens)
            self._counts["answered"] += 1
            self._counts["prompt tokens"] += tokens[0]
            self._counts["completion tokens"] += tokens[1]
        try:
            if most or tokens:
                await self._ledger.settle(most, cost=cost, unknown=unknown, tokens=tokens)
        finally:
            self._in_flight -= 1
            self._num_settled += 1
            async with self._settled:
                self._settled.notify_all()

    def _over_budget(self, most: float) -> ApiError:
        spend = self._ledger.spend()
        kind = self.component.partition("=")[0]
        lost = f", at most {spend.unknown:.4f} for answers that were lost" if spend.unknown else ""
        lost += f", at most {spend.reserved:.4f} for what others have under way or a kill cut off" * (
            spend.reserved > 0
        )
        return ApiError(
            f"{kind}.api.max_cost={self.api.max_cost}: {spend.cost:.4f} is spent{lost}, and the next request may cost "
            f"{most:.4f}. What was answered is kept: raise {kind}.api.max_cost and run the same command again "
            f"(spend is added up in {self._ledger.path})"
        )

    def _fatal(self, reply: Reply) -> ApiError:
        kind = self.component.partition("=")[0]
        assert isinstance(reply.outcome, Failure)
        said = f"{self.api.base_url} says {self._clean(reply.outcome.detail)}"
        if reply.fatal == "key":
            name = self.api.api_key_env
            remedy = (
                f"check the key in ${name}" if name else f"name the variable with the key in {kind}.api.api_key_env"
            )
        elif reply.fatal == "quota":
            remedy = "the account has no money left; what was answered is kept"
        else:
            remedy = f"check {kind}.api.base_url, which ends in /v1, and {kind}.api.model={self.api.model}"
        return ApiError(f"{said}: {remedy}, and run the same command again")

    def _too_many(self, failed: Counter[str], seen: int, last: Failure) -> ApiError:
        kind = self.component.partition("=")[0]
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(failed.items()) if count)
        return ApiError(
            f"{self.api.base_url}: {failed.total()} of {seen} requests failed after up to {self.api.max_attempts} "
            f"attempts ({reasons}; the last: {self._clean(last.detail)}), more than "
            f"{kind}.api.max_failed_fraction={self.api.max_failed_fraction}. What was answered is kept: run the same "
            f"command again once the server is well"
        )

    def _log_summary(self) -> None:
        if self._counts:
            spend = self._ledger.spend()
            limit = "" if self.api.max_cost is None else f" of at most {self.api.max_cost}"
            counts = ", ".join(f"{name} {count}" for name, count in sorted(self._counts.items()) if count)
            log.info("%s: %s; spent %.4f%s", self.component, counts, spend.total, limit)

    def _redacted(self, text: bytes) -> bytes:
        for secret in self._secrets:
            text = text.replace(secret, b"[key]")
        return text

    def _clean(self, what: object) -> str:
        """A message for people: one line, without the key."""
        text = self._redacted(str(what).encode("utf-8", errors="replace")).decode()
        return f"{type(what).__name__}: {text}" if isinstance(what, Exception) else text


_TOO_LARGE = b"too large: "


def _key(variable: str | None, name: str) -> str:
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"{name}={variable}: that environment variable is not set; export it, or set {name}=null")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError(f"{name}={variable}: what that environment variable holds cannot be a key (odd characters)")
    return key


def _spellings(key: str) -> list[bytes]:
    """How a key might be echoed: as it is, in a URL, or in base64."""
    if len(key) < SHORTEST_KEY:
        return []
    encoded = base64.b64encode(key.encode())
    return sorted({key.encode(), quote(key, safe="").encode(), encoded, encoded.rstrip(b"=")}, key=len, reverse=True)
