"""A statement that the server executes and does not answer before it is told to."""

from __future__ import annotations

import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from tests.servers import Backend, ServerBackend, eventually
from tests.support.databases import shop_database

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from sqlalchemy.ext.asyncio import AsyncConnection

    from asgi_uow import Database

WAITS = {
    "sqlite": "wait_at_gate()",
    "mariadb": "get_lock(database(), 3600)",
    "postgresql": "CAST(pg_advisory_lock(1) AS text)",
}
UNLOCK = {
    "mariadb": "SELECT release_lock(database())",
    "postgresql": "SELECT pg_advisory_unlock(1)",
}
WAITING = {
    "mariadb": (
        "SELECT count(*) FROM information_schema.processlist"
        " WHERE state = 'User lock' AND db = database()"
    ),
    "postgresql": (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE wait_event = 'advisory' AND datname = current_database()"
    ),
}


class Gate:
    """Whatever evaluates `expression` waits: for a lock, in SQLite for the thread."""

    def __init__(self, backend: Backend) -> None:
        self.expression = WAITS[backend.name]
        self.insert = (
            "INSERT INTO items (id) SELECT 2 FROM"
            f" (SELECT {self.expression} AS passed) AS gate WHERE passed IS NOT NULL"
        )
        self.select = f"SELECT {self.expression}"


class ThreadGate(Gate):
    """Holds the thread of a SQLite connection up."""

    def __init__(self, backend: Backend, db: Database) -> None:
        super().__init__(backend)
        self._reached, self._opened = threading.Event(), threading.Event()
        for engine in (db.engine, *db.readers):
            event.listen(engine.sync_engine, "connect", self._prepare)

    def _prepare(self, dbapi: Any, _: object) -> None:
        dbapi.create_function("wait_at_gate", 0, self._wait)

    def _wait(self) -> str:
        self._reached.set()
        self._opened.wait()
        return ""

    async def reached(self) -> None:
        async def is_reached() -> bool:
            return self._reached.is_set()

        await eventually(True, is_reached)

    async def open(self) -> None:
        self._opened.set()


class LockGate(Gate):
    """Holds a lock that the statement waits for, on another connection."""

    def __init__(self, backend: ServerBackend, holder: AsyncConnection) -> None:
        super().__init__(backend)
        self._backend, self._holder = backend, holder

    async def reached(self) -> None:
        async def waiting() -> bool:
            return await self._backend.scalar(WAITING[self._backend.name]) == 1

        await eventually(True, waiting)

    async def open(self) -> None:
        await self._holder.execute(text(UNLOCK[self._backend.name]))


@asynccontextmanager
async def gate_at(
    backend: Backend, **settings: Any
) -> AsyncGenerator[tuple[Database, ThreadGate | LockGate]]:
    """A database with an empty shop, and a gate that is closed; it opens at the end."""
    async with shop_database(backend, **settings) as db:
        if not isinstance(backend, ServerBackend):
            gate: ThreadGate | LockGate = ThreadGate(backend, db)
            try:
                yield db, gate
            finally:
                await gate.open()
            return
        options = {"poolclass": NullPool, "isolation_level": "AUTOCOMMIT"}
        holding = create_async_engine(backend.url, **options)
        async with holding.connect() as holder:
            gate = LockGate(backend, holder)
            await holder.execute(text(gate.select))
            yield db, gate
