"""What outlives a kill: the answers that were paid for, and how much was spent. SQLite, safe for several processes."""

import sqlite3
import zlib
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import anyio.to_thread

from prefpipe.errors import ArtifactError
from prefpipe.files import chunks

Operation = Callable[[sqlite3.Connection], Any]

LOCK_SECONDS = 120.0
"""How long to wait for another process that writes."""


class Spend(NamedTuple):
    """Totals of one ledger. cost: of answers. unknown: at most that much of attempts whose answer was lost.

    reserved: at most that much of attempts that are under way, in any process, or were cut off by a kill.
    """

    requests: int
    prompt_tokens: int
    completion_tokens: int
    cost: float
    unknown: float
    reserved: float

    @property
    def total(self) -> float:
        return self.cost + self.unknown + self.reserved


class _Ticket:
    def __init__(self, operation: Operation) -> None:
        self.operation, self.done, self.result = operation, False, None
        self.error: ArtifactError | None = None


class _Database:
    """One SQLite file. Writes that wait while another one is committed share the next commit.

    The rollback journal instead of WAL, as that needs memory shared between the machines of a network file system.
    """

    def __init__(self, path: Path, table: str) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._connection = sqlite3.connect(
                path, timeout=LOCK_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._connection.execute(table)
        except sqlite3.Error as error:
            raise self._explained(error) from None
        self._waiting: list[_Ticket] = []
        self._lock = anyio.Lock()

    async def write(self, operation: Operation) -> Any:
        """Run an operation in a transaction. It is durable on return."""
        ticket = _Ticket(operation)
        self._waiting.append(ticket)
        async with self._lock:
            if not ticket.done:
                batch, self._waiting = self._waiting, []
                await anyio.to_thread.run_sync(self._commit, batch)
        if ticket.error:
            raise ticket.error
        return ticket.result

    def read(self, query: str, values: Iterable[Any] = ()) -> list[Any]:
        try:
            return self._connection.execute(query, tuple(values)).fetchall()
        except sqlite3.Error as error:
            raise self._explained(error) from None

    def close(self) -> None:
        self._connection.close()

    def _commit(self, batch: list[_Ticket]) -> None:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            for ticket in batch:
                ticket.result = ticket.operation(self._connection)
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            for ticket in batch:
                ticket.error = self._explained(error)
        for ticket in batch:
            ticket.done = True

    def _explained(self, error: sqlite3.Error) -> ArtifactError:
        return ArtifactError(
            f"{self.path}: {error}. If the disk is full, make room; if the file is damaged, move it away: what it held "
            f"is then asked, and paid for, again"
        )


class Answers(_Database):
    """Key of a request → the body of its answer, as the server sent it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, body BLOB NOT NULL)")

    def get(self, keys: Collection[bytes]) -> dict[bytes, bytes]:
        """Those that are there."""
        found: dict[bytes, bytes] = {}
        for some in chunks(keys, 500):
            marks = ",".join("?" * len(some))
            for key, body in self.read(f"SELECT key, body FROM answers WHERE key IN ({marks})", some):
                found[key] = zlib.decompress(body)
        return found

    async def put(self, key: bytes, body: bytes) -> None:
        row = (key, zlib.compress(body))
        await self.write(lambda db: db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", row))


class Ledger(_Database):
    """What was spent, one row for each component and model; sums over all of them are what a limit is held against."""

    def __init__(self, path: Path, component: str, model: str) -> None:
        super().__init__(
            path,
            "CREATE TABLE IF NOT EXISTS spend (component TEXT, model TEXT, requests INTEGER DEFAULT 0, "
            "prompt_tokens INTEGER DEFAULT 0, completion_tokens INTEGER DEFAULT 0, cost REAL DEFAULT 0, "
            "unknown REAL DEFAULT 0, reserved REAL DEFAULT 0, PRIMARY KEY (component, model))",
        )
        self._row = (component, model)

    def spend(self) -> Spend:
        return Spend(*self.read(self._SUMS)[0])

    async def reserve(self, most: float, limit: float | None) -> bool:
        """Set aside the most that an attempt can cost, before it is sent; False if that might exceed the limit."""

        def operation(db: sqlite3.Connection) -> bool:
            if limit is not None and Spend(*db.execute(self._SUMS).fetchone()).total + most > limit:
                return False
            db.execute("INSERT OR IGNORE INTO spend (component, model) VALUES (?, ?)", self._row)
            db.execute("UPDATE spend SET reserved = reserved + ? WHERE component = ? AND model = ?", (most, *self._row))
            return True

        return bool(await self.write(operation))

    async def settle(self, most: float, *, cost: float, unknown: float, tokens: tuple[int, int] | None) -> None:
        """Put what an attempt cost in the place of what was set aside. tokens: of the prompt and of the completions."""
        prompt, completion = tokens or (0, 0)
        values = (int(tokens is not None), prompt, completion, cost, unknown, most, *self._row)
        await self.write(
            lambda db: db.execute(
                "UPDATE spend SET requests = requests + ?, prompt_tokens = prompt_tokens + ?, "
                "completion_tokens = completion_tokens + ?, cost = cost + ?, unknown = unknown + ?, "
                "reserved = max(0, reserved - ?) WHERE component = ? AND model = ?",
                values,
            )
        )

    _SUMS = (
        "SELECT coalesce(sum(requests), 0), coalesce(sum(prompt_tokens), 0), coalesce(sum(completion_tokens), 0), "
        "coalesce(sum(cost), 0.0), coalesce(sum(unknown), 0.0), coalesce(sum(reserved), 0.0) FROM spend"
    )
