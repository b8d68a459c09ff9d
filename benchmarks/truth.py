"""What the client gets, and what the database holds: `python -m benchmarks.truth`.

Each cell is what was seen of one request, on a database of its own. The status is that
of the response that reached the server; an exception without a response is a 500, as
servers make it. All contestants stand on FastAPI or Starlette.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import sys
import tempfile
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import anyio
import uvicorn
from sqlalchemy import Engine, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import QueuePool
from starlette.exceptions import HTTPException

from tests import servers
from tests.servers.process import HOST, free_port

from .contestants import variants
from .databases import KEYS
from .peers import Work
from .questions import http_scope
from .tables import print_table

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.pool import ConnectionPoolEntry

    from asgi_uow._asgi import Message

    from .contestants import Make

    Do: TypeAlias = Callable[[AsyncSession], Awaitable[int]]

TABLES = (
    "CREATE TABLE note (id {key} PRIMARY KEY, content VARCHAR(40) UNIQUE)",
    "CREATE TABLE parent (id INTEGER PRIMARY KEY)",
    """CREATE TABLE child (
        parent INTEGER REFERENCES parent (id) DEFERRABLE INITIALLY DEFERRED
    )""",
)
INSERT = text("INSERT INTO note (content) VALUES ('something to keep')")
ORPHAN = text("INSERT INTO child (parent) VALUES (404)")
SLOW = {
    "postgresql": "SELECT pg_sleep(60)",
    "sqlite": "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT"
    " 20000000) SELECT count(*) FROM n",  # seconds
}
PATIENCE = 20.0
SOON = 0.5
BODY = "http.response.body"


async def insert(session: AsyncSession) -> int:
    await session.execute(INSERT)
    return 200


async def insert_orphan(session: AsyncSession) -> int:
    """Insert what COMMIT refuses: a deferred foreign key that leads nowhere."""
    await session.execute(INSERT)
    await session.execute(ORPHAN)
    return 200


async def insert_and_swallow(session: AsyncSession) -> int:
    """Have the database refuse a second row, and go on."""
    await session.execute(INSERT)
    with suppress(DBAPIError):
        await session.execute(INSERT)
    return 200


async def insert_and_return_409(session: AsyncSession) -> int:
    await session.execute(INSERT)
    return 409


async def insert_and_raise_409(session: AsyncSession) -> int:
    await session.execute(INSERT)
    raise HTTPException(409)


async def insert_and_raise(session: AsyncSession) -> int:
    await session.execute(INSERT)
    raise ZeroDivisionError


@dataclasses.dataclass
class Attempt:
    """One request of one contestant, on a database of its own."""

    make: Make
    backend: servers.Backend
    messages: list[Message] = dataclasses.field(default_factory=list[Any])
    pools: set[QueuePool] = dataclasses.field(default_factory=set[QueuePool])

    async def run(self, do: Do) -> str:
        """Make the request, return what is seen afterwards."""
        await self._make_tables()
        async with AsyncExitStack() as stack:
            app = self.make(Work(do), self.backend.url, stack)
            with suppress(Exception):
                await self._ask(app)
            return self._answer(await self._is_kept())

    async def lose_answer(self, do: Do) -> str:
        """Cut the connection when the server has committed."""
        if not isinstance(self.backend, servers.ServerBackend):
            return "-"
        await self._make_tables()
        async with self.backend.proxy() as proxy, AsyncExitStack() as stack:
            app = self.make(Work(do), self.backend.through(proxy.port), stack)
            rule = proxy.cut_after(lambda trip: trip == "COMMIT")
            with suppress(Exception):
                await self._ask(app)
            await asyncio.wait_for(rule.fired.wait(), PATIENCE)
            return self._answer(await self._is_kept())

    async def leave(self, do: Do, *, is_scope: bool) -> str:
        """Cancel the request while a statement runs, in one of two ways.

        A task is cancelled once; a scope of anyio cancels whatever is awaited next, as
        BaseHTTPMiddleware and `fail_after` do.
        """
        await self._make_tables()
        is_running, slow = asyncio.Event(), SLOW[self.backend.name]
        leaves = anyio.CancelScope()

        async def insert_and_wait(session: AsyncSession) -> int:
            await do(session)
            is_running.set()
            await session.execute(text(slow))
            return 200

        async def serve() -> None:
            with leaves:
                await self._ask(app)

        async with AsyncExitStack() as stack:
            app = self._make_watched(insert_and_wait, stack)
            task = asyncio.create_task(serve())
            await is_running.wait()
            await self._until_it_runs(slow)
            (leaves if is_scope else task).cancel()
            done, _ = await asyncio.wait({task}, timeout=PATIENCE)
            return await self._left(slow, is_done=bool(done))

    async def hang_up(self, do: Do) -> str:
        """Close the client's socket under uvicorn while the handler is at work."""
        await self._make_tables()
        is_running, is_alone = asyncio.Event(), asyncio.Event()

        async def insert_and_go_on(session: AsyncSession) -> int:
            await do(session)
            is_running.set()
            await is_alone.wait()
            return 200

        async with AsyncExitStack() as stack:
            app = self._make_watched(insert_and_go_on, stack)
            port = free_port()
            config = uvicorn.Config(app, port=port, lifespan="off", log_config=None)
            server = uvicorn.Server(config)
            serving = asyncio.create_task(server.serve())
            await servers.eventually(1, lambda: _count(server.started))
            _, writer = await asyncio.open_connection(HOST, port)
            writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await is_running.wait()
            writer.transport.abort()
            state = server.server_state
            await servers.eventually(0, lambda: _count(*state.connections))
            is_alone.set()
            await servers.eventually(0, lambda: _count(*state.tasks))
            seen = await self._left(SLOW[self.backend.name], is_done=True)
            server.should_exit = True
            await serving
            return seen

    def _make_watched(self, do: Do, stack: AsyncExitStack) -> Any:
        """Make the application; its pools are known as soon as they connect."""
        stack.callback(event.remove, Engine, "engine_connect", self._add_pool)
        event.listen(Engine, "engine_connect", self._add_pool)
        return self.make(Work(do), self.backend.url, stack)

    async def _left(self, slow: str, *, is_done: bool) -> str:
        kept = "row kept" if await self._is_kept() else "not kept"
        return f"{kept}, {await self._connections(slow) if is_done else 'hangs'}"

    async def _until_it_runs(self, slow: str) -> None:
        backend = self.backend
        if isinstance(backend, servers.ServerBackend):
            await servers.eventually(1, lambda: backend.running(slow))
        else:
            await asyncio.sleep(0.2)  # a file tells nobody

    async def _connections(self, slow: str) -> str:
        """Tell whether the pools have their connections back, and what goes on."""

        async def checked_out() -> int:
            return sum(each.checkedout() for each in self.pools)

        backend = self.backend
        for probe in (checked_out, backend.open_transactions):
            with suppress(AssertionError):
                await servers.eventually(0, probe, within=SOON)
        found = f"connection {'leaked' if await checked_out() else 'returned'}"
        if not await backend.open_transactions():
            return found
        if isinstance(backend, servers.ServerBackend) and await backend.running(slow):
            return f"{found}, statement runs on"
        return f"{found}, transaction open"

    def _add_pool(self, connection: Any) -> None:
        if isinstance(connection.engine.pool, QueuePool):
            self.pools.add(connection.engine.pool)

    async def _make_tables(self) -> None:
        key = KEYS[self.backend.name]
        await self.backend.execute(*(each.format(key=key) for each in TABLES))

    async def _is_kept(self) -> bool:
        return bool(await self.backend.scalar("SELECT count(*) FROM note"))

    async def _ask(self, app: Any) -> None:
        """Send the request of a client that stays."""
        body = [{"type": "http.request", "body": b""}]

        async def receive() -> Message:
            if not body:
                await asyncio.Event().wait()
            return body.pop()

        async def send(message: Message) -> None:
            self.messages.append(message)

        await app(http_scope(), receive, send)

    def _answer(self, is_kept: bool) -> str:  # noqa: FBT001
        starts = [each["status"] for each in self.messages if "status" in each]
        status = starts[0] if starts else 500
        last = self.messages[-1] if starts else {"type": BODY}
        is_whole = last["type"] == BODY and not last.get("more_body", False)
        row = "row kept" if is_kept else "not kept"
        lost = status < 400 and not is_kept
        return f"{status}{'' if is_whole else ' cut'}, {'row lost' if lost else row}"


async def _count(*found: object) -> int:
    return sum(map(bool, found))


CASES: dict[str, Callable[[Attempt], Awaitable[str]]] = {
    "COMMIT fails": lambda attempt: attempt.run(insert_orphan),
    "answer to COMMIT is lost": lambda attempt: attempt.lose_answer(insert),
    "error swallowed, 200": lambda attempt: attempt.run(insert_and_swallow),
    "409 returned": lambda attempt: attempt.run(insert_and_return_409),
    "HTTPException(409)": lambda attempt: attempt.run(insert_and_raise_409),
    "handler raises": lambda attempt: attempt.run(insert_and_raise),
    "client hangs up": lambda attempt: attempt.hang_up(insert),
    "task cancelled": lambda attempt: attempt.leave(insert, is_scope=False),
    "scope cancelled": lambda attempt: attempt.leave(insert, is_scope=True),
}


def check_foreign_keys(connection: Any, record: ConnectionPoolEntry) -> None:  # noqa: ARG001
    """Have SQLite check foreign keys, in the engines of all contestants."""
    if "sqlite" in type(connection).__module__:
        cursor = connection.cursor()
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()


async def truth_table() -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return titles and rows."""
    rows: list[tuple[str, ...]] = []
    logging.disable()  # what the contestants log about the failures
    event.listen(Engine, "connect", check_foreign_keys)
    with tempfile.TemporaryDirectory() as folder, servers.PostgreSQL() as server:
        databases: dict[str, Callable[[], servers.Backend]] = {
            "PostgreSQL": lambda: servers.PostgreSQLBackend(server.port),
            "SQLite": lambda: servers.SQLiteBackend(Path(folder)),
        }
        for database, make_backend in databases.items():
            for name, make in variants(is_postgresql=database == "PostgreSQL").items():
                print(f"trying {name} on {database} ...", file=sys.stderr)
                cells = [await _try(each, make, make_backend) for each in CASES]
                rows.append((database, name, *cells))
    event.remove(Engine, "connect", check_foreign_keys)
    logging.disable(logging.NOTSET)
    return ("database", "contestant", *CASES), rows


async def _try(
    case: str, make: Make, make_backend: Callable[[], servers.Backend]
) -> str:
    before = asyncio.all_tasks()
    async with make_backend() as backend, asyncio.timeout(3 * PATIENCE):
        seen = await CASES[case](Attempt(make, backend))
    # A connection to SQLite whose closing was cancelled leaves a task that never ends.
    while left := asyncio.all_tasks() - before:
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=SOON)
    return seen


if __name__ == "__main__":
    print_table(*asyncio.run(truth_table()))
