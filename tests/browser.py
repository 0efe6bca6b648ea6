"""A real browser for tests: Chromium, driven over its own protocol through a pair of pipes (no port, no package)."""

import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Browser:
    """One tab. `logged` holds what the page wrote to its console and what went wrong in it."""

    def __init__(self, to: Any, back: Any) -> None:
        self.to, self.back, self.number = to, back, 0
        self.session: dict[str, str] = {}
        self.logged: list[Any] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its answer; what happens in between is noted."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params, **self.session}
        self.to.write(json.dumps(message).encode() + b"\0")
        self.to.flush()
        while True:
            read = json.loads(self._message())
            if read.get("id") == self.number:
                assert "error" not in read, read
                return read["result"]
            name = read.get("method", "")
            if name in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
                self.logged.append(read["params"])
            if name in ("Page.javascriptDialogOpening",):
                self.logged.append(read["params"])
            if name == "Network.requestWillBeSent":
                self.requests.append(read["params"]["request"]["url"])

    def _message(self) -> bytes:
        parts = bytearray()
        while (byte := self.back.read(1)) != b"\0":
            assert byte, "Chromium is gone"
            parts += byte
        return bytes(parts)

    def run(self, expression: str) -> Any:
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, file: Path, fragment: str = "") -> None:
        """Load a page of ours, and wait until it shows its rows."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=f"{file.as_uri()}{fragment}")
        self.wait()

    def wait(self, seconds: float = 60) -> None:
        """Until the page has nothing left to do."""
        deadline = time.monotonic() + seconds
        while self.run("document.body && document.body.dataset.state") != "ready":
            assert time.monotonic() < deadline, self.logged
            time.sleep(0.05)

    def set(self, **values: str) -> None:
        """Type into fields by their id, as a user does, and wait for the rows."""
        for name, value in values.items():
            self.run(
                f"(() => {{ const field = document.getElementById({json.dumps(name)});"
                f"field.value = {json.dumps(value)}; document.body.dataset.state = 'asked';"
                f"field.dispatchEvent(new Event('input')); }})()"
            )
            self.wait()

    def texts(self, selector: str) -> list[str]:
        """The text of every element that a CSS selector finds."""
        return self.run(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)")


def _pipe() -> list[int]:
    """Both ends of a pipe, out of the way of descriptors 3 and 4."""
    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return high


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser with a profile of its own; skips the test where none is installed."""
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium here; install one (Debian: apt-get install chromium) to test pages in it")
    (to_read, to_write), (back_read, back_write) = _pipe(), _pipe()
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--disable-dev-shm-usage", f"--user-data-dir={profile}", "--remote-debugging-pipe"]
    # It reads commands from descriptor 3 and answers on 4, which the shell gives it.
    line = f'exec "$@" 3<&{to_read} 4>&{back_write} {to_read}<&- {back_write}>&-'
    process = subprocess.Popen(
        ["bash", "-c", line, "bash", *command],
        pass_fds=(to_read, back_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_read)
    os.close(back_write)
    to, back = os.fdopen(to_write, "wb"), os.fdopen(back_read, "rb")
    try:
        yield Browser(to, back)
    finally:
        process.terminate()
        process.wait(20)
        to.close()
        back.close()
