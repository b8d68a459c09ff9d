"""Conflicts between transactions, each the database's own."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

import asgi_uow as uow
from tests.servers.backend import SQLiteBackend
from tests.support.databases import shop_database

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from sqlalchemy.ext.asyncio import AsyncConnection

    from asgi_uow import Database
    from tests.servers.backend import Backend, MariaDBBackend

READ = "SELECT value FROM counters"
WRITE = "UPDATE counters SET value = value + 1"
CODES: Mapping[str, object] = {
    "sqlite": "SQLITE_BUSY",
    "mariadb": 1020,
    "postgresql": "40001",
}


@asynccontextmanager
async def conflicting_shop(
    backend: Backend, **options: Any
) -> AsyncGenerator[Database]:
    """A shop with one counter, in which a conflict is told at once."""
    async with shop_database(backend, **options) as db:
        await prepare_conflicts(backend, db)
        yield db


async def prepare_conflicts(backend: Backend, db: Database) -> None:
    """Add one counter; a conflict over it is told at once."""
    if isinstance(backend, SQLiteBackend):
        event.listen(db.engine.sync_engine, "checkout", _wait_for_no_lock)
        await backend.execute("PRAGMA journal_mode = WAL")
    await backend.execute("CREATE TABLE counters (value INTEGER)")
    await backend.execute("INSERT INTO counters VALUES (0)")


def _wait_for_no_lock(dbapi: Any, *_: object) -> None:
    with closing(dbapi.cursor()) as cursor:
        cursor.execute("PRAGMA busy_timeout = 0")


async def conflict(backend: Backend) -> None:
    """Have the unit's write session read what another transaction then changes."""
    session = uow.current_session()
    if isinstance(backend, SQLiteBackend):
        with closing(sqlite3.connect(backend.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            await session.execute(WRITE)
        raise NotImplementedError
    if backend.name == "postgresql":
        uow.isolation_level("REPEATABLE READ")
    else:
        await session.execute("SET innodb_snapshot_isolation = ON")
    await session.scalar(READ)
    await backend.execute(WRITE, WRITE.replace("+", "-"))
    await session.execute(WRITE)
    raise NotImplementedError


@asynccontextmanager
async def rival_of(backend: MariaDBBackend) -> AsyncGenerator[AsyncConnection]:
    """A connection that the journal does not know of."""
    engine = create_async_engine(backend.url, poolclass=NullPool)
    async with engine.connect() as rival:
        yield rival


async def deadlock(backend: MariaDBBackend) -> None:
    """Make the statement of the current unit the victim of a real deadlock.

    MariaDB ends the transaction that has changed fewer rows.
    """
    await uow.current_session().execute("UPDATE items SET parent = 1 WHERE id = 1")
    async with rival_of(backend) as rival:
        for number in (2, 3, 4, 5):
            await rival.exec_driver_sql(
                f"UPDATE items SET parent = 2 WHERE id = {number}"
            )
        blocked = asyncio.create_task(
            rival.exec_driver_sql("UPDATE items SET parent = 3 WHERE id = 1")
        )
        try:
            await uow.current_session().execute(
                "UPDATE items SET parent = 4 WHERE id = 2"
            )
        finally:
            await blocked
