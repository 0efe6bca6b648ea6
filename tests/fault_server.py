"""A real HTTP server that speaks /v1/chat/completions, as well or as badly as it is told to, and counts."""

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import orjson


@dataclass
class Script:
    """What the server does with one attempt. body: None writes an answer with `text`.

    cut: the connection is reset after so many bytes of the body. silent_seconds: before anything is sent.
    drip: one byte a header line, for ever.
    """

    text: str = "[[7]]"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    message: dict[str, Any] = field(default_factory=dict)
    finish_reason: str | None = "stop"
    extra: dict[str, Any] = field(default_factory=dict)
    usage: tuple[int, int] | None = (100, 10)
    cut: int | None = None
    silent_seconds: float = 0.0
    drip: bool = False


Handler = Callable[[dict[str, Any], int], Script]
"""(request, number of this attempt at it, from 0) → what happens."""


class FaultServer:
    """Runs in a thread; use as a context manager.

    answered: request → how often it got a whole, usable answer, which is when a provider charges.
    attempts: request → how often it came. most_at_once: requests that were open together. received: all headers.
    """

    def __init__(self, handler: Handler, *, seconds: float = 0.0) -> None:
        self.handler, self.seconds = handler, seconds
        self.answered, self.attempts = Counter[bytes](), Counter[bytes]()
        self.received: list[bytes] = []
        self.tokens = Counter[str]()
        self.at_once = self.most_at_once = 0
        self._ready = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> "FaultServer":
        self._thread = threading.Thread(target=asyncio.run, args=(self._run(),), daemon=True)
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=512)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(int(x[15:]) for x in head.lower().split(b"\r\n") if x.startswith(b"content-length:"))
                raw = await reader.readexactly(length)
                self.received.append(head)
                self.at_once += 1
                self.most_at_once = max(self.most_at_once, self.at_once)
                try:
                    go_on = await self._answer(raw, writer)
                finally:
                    self.at_once -= 1
                if not go_on:
                    break
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, raw: bytes, writer: asyncio.StreamWriter) -> bool:
        request = orjson.loads(raw)
        number = self.attempts[raw]
        self.attempts[raw] += 1
        script = self.handler(request, number)
        await asyncio.sleep(self.seconds + script.silent_seconds)
        if script.drip:
            while True:
                writer.write(b"X")
                await writer.drain()
                await asyncio.sleep(0.05)
        body = self.completion(request, script) if script.body is None else script.body
        lines = [f"HTTP/1.1 {script.status} X", f"content-length: {len(body)}", "content-type: application/json"]
        lines += [f"{name}: {value}" for name, value in script.headers.items()]
        if script.cut is not None:
            writer.write("\r\n".join([*lines, "", ""]).encode() + body[: script.cut])
            await writer.drain()
            writer.transport.abort()  # a reset, not an end
            return False
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        await writer.drain()
        if script.status == 200 and script.body is None:
            self.answered[raw] += 1
            for name, count in zip(("prompt", "completion"), script.usage or (), strict=False):
                self.tokens[name] += count
        return True

    @staticmethod
    def completion(request: dict[str, Any], script: Script) -> bytes:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": script.text, **script.message},
                "finish_reason": script.finish_reason,
                **script.extra,
            }
            for index in range(request.get("n", 1))
        ]
        answer: dict[str, Any] = {"id": "x", "model": f"{request['model']}-2026", "choices": choices}
        if script.usage:
            prompt, completion = script.usage
            answer["usage"] = {"prompt_tokens": prompt, "completion_tokens": completion}
        return orjson.dumps(answer)
