"""The pools: connections are clean and alive when they are handed out, at no cost."""

from __future__ import annotations

import asyncio
import gc
import sqlite3
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Connection, event, text
from sqlalchemy import exc as sa_exc
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_uow import Database
from asgi_uow.errors import ManagedTransactionError, ReadOnlySessionError
from tests.servers import eventually
from tests.support import shop
from tests.support.databases import (
    DRIVERS,
    SERVER_DRIVERS,
    behind_proxy,
    memory_database,
    on,
)
from tests.support.private import IDLE_SINCE, driver_of
from tests.support.writes import driver_connection

if TYPE_CHECKING:
    from sqlalchemy.pool import ConnectionPoolEntry

    from tests.servers import Backend, PostgreSQLBackend, ServerBackend, SQLiteBackend

pytestmark = on(*DRIVERS, pool_size=1, max_overflow=0)
on_servers = on(*SERVER_DRIVERS)

PING = {"asyncmy": "PING", "asyncpg": "PREPARE ", "psycopg": ""}


async def insert(db: Database, *numbers: int) -> None:
    async with db:
        for number in numbers:
            await shop.insert(number)


# Handed out


async def test_a_reader_that_was_connected_before(backend: Backend) -> None:
    """A connection from before the engine was a reader's does not serve: it writes."""
    await shop.create(backend)
    reader = create_async_engine(backend.url)
    async with reader.connect():
        pass
    db = Database(create_async_engine(backend.url), readers=[reader])
    async with db:
        with pytest.raises(ReadOnlySessionError):
            await db.read.execute("INSERT INTO items (id) VALUES (1)")
    await db.dispose()
    assert [] == await shop.items(backend)


@on_servers
async def test_cut_off_after_its_goodbye(db: Database) -> None:
    """A connection that said goodbye in time is not there any more to be cut off."""
    async with db.engine.connect() as connection:
        raw = (await connection.get_raw_connection()).driver_connection
        await connection.invalidate()
    await db.dispose()
    driver_of(db.engine.dialect).cut_off(raw)


# Handed back


def leave_open(connection: Connection) -> None:
    """Insert behind SQLAlchemy's back, and end nothing."""
    cursor = connection.connection.cursor()
    if connection.dialect.name == "sqlite":
        cursor.execute("BEGIN IMMEDIATE")
    cursor.execute("INSERT INTO items (id) VALUES (1)")
    cursor.close()


async def test_a_transaction_left_open(backend: Backend, db: Database) -> None:
    """A connection with an open transaction is rolled back before it is pooled."""
    async with db.engine.connect() as connection:
        await connection.run_sync(leave_open)
        assert 1 == await backend.open_transactions()
    await eventually(0, backend.open_transactions)
    await insert(db, 2)
    assert [2] == await shop.items(backend)


async def test_a_transaction_that_failed(backend: Backend, db: Database) -> None:
    """After an error the same connection serves the next unit, which starts clean."""
    await insert(db, 1)
    for _ in range(2):
        with pytest.raises(sa_exc.IntegrityError):
            await insert(db, 2, 1)
        assert 0 == await backend.open_transactions()
    await insert(db, 3)
    assert [1, 3] == await shop.items(backend)


@on("aiosqlite")
async def test_a_commit_that_failed(backend: SQLiteBackend, db: Database) -> None:
    """After a failed COMMIT the transaction is open; it is not committed by another."""
    async with db.engine.connect() as connection:
        await connection.execute(text("INSERT INTO items VALUES (1, 404)"))
        with pytest.raises(sa_exc.IntegrityError):
            await connection.commit()
    await insert(db, 2)
    assert [2] == await shop.items(backend)


class Stubborn(sqlite3.Connection):
    """A connection that always says that a transaction is open."""

    @property
    def in_transaction(self) -> bool:
        return True


@on("aiosqlite", connect_args={"factory": Stubborn})
async def test_a_rollback_that_does_nothing(
    backend: SQLiteBackend, db: Database
) -> None:
    """A connection that cannot be rolled back is thrown away."""
    async with db.engine.connect() as connection:
        await connection.run_sync(leave_open)
        thrown_away = await connection.get_raw_connection()
        driver_connection = thrown_away.driver_connection
    assert 0 == await backend.open_transactions()
    async with db.engine.connect() as connection:
        another = await connection.get_raw_connection()
        assert another.driver_connection is not driver_connection


@on("asyncpg")
async def test_a_forgotten_connection(backend: PostgreSQLBackend, db: Database) -> None:
    """What the garbage collector finds is closed, not talked to."""
    forgotten = [await db.engine.connect()]
    await forgotten[0].run_sync(leave_open)

    def forget() -> None:
        forgotten.clear()
        gc.collect()

    with pytest.warns(sa_exc.SAWarning, match="garbage collector"):
        forget()
    await eventually(0, backend.open_transactions)


async def test_an_engine_used_by_hand(backend: Backend, db: Database) -> None:
    """Outside a unit the engine is an engine: savepoints, COMMIT, ROLLBACK."""
    insert_number = text("INSERT INTO items (id) VALUES (:id)")
    async with db.engine.begin() as connection:
        async with connection.begin_nested():
            await connection.execute(insert_number, {"id": 1})
        savepoint = await connection.begin_nested()
        await connection.execute(insert_number, {"id": 2})
        await savepoint.rollback()
    assert [1] == await shop.items(backend)


@on("asyncmy")
async def test_two_phases_by_hand(backend: Backend, db: Database) -> None:
    """So is a transaction that is prepared first."""

    def prepare_and_commit(connection: Connection) -> None:
        with connection.begin_twophase() as transaction:
            connection.execute(text("INSERT INTO items (id) VALUES (1)"))
            transaction.prepare()
            transaction.commit()

    async with db.engine.connect() as connection:
        await connection.run_sync(prepare_and_commit)
    assert [1] == await shop.items(backend)


async def test_no_parameters(db: Database) -> None:
    """What is sent without parameters is looked at like everything else."""
    async with db:
        connection = await db.write.connection()
        with pytest.raises(ManagedTransactionError):
            await connection.exec_driver_sql(
                "COMMIT", execution_options={"no_parameters": True}
            )


async def identity(db: Database) -> object:
    """Tell the connections of the driver apart."""
    async with db:
        return await driver_connection(db.write)


async def test_a_transaction_that_the_driver_began(
    backend: Backend, db: Database
) -> None:
    """What SQLAlchemy knows nothing of is over before the next unit begins."""
    async with db.engine.connect() as connection:
        raw: Any = (await connection.get_raw_connection()).driver_connection
        if backend.driver == "asyncpg":
            await raw.transaction().start()
        else:
            await (raw.query if hasattr(raw, "query") else raw.execute)("BEGIN")
    assert 0 == await backend.open_transactions()
    await insert(db, 1)
    assert [1] == await shop.items(backend)


@pytest.mark.parametrize("name", ["before_cursor_execute", "after_cursor_execute"])
@pytest.mark.parametrize("kind", [RuntimeError, asyncio.CancelledError])
async def test_a_listener_that_fails(
    backend: Backend, db: Database, name: str, kind: type[BaseException]
) -> None:
    """After what is no error of a database the connection serves nobody any more."""

    def listen(*_: object) -> None:
        raise kind

    before = await identity(db)
    event.listen(db.engine.sync_engine, name, listen)
    with pytest.raises(kind):
        await insert(db, 1)
    event.remove(db.engine.sync_engine, name, listen)
    # SQLAlchemy 2.0 tells nobody of one before, where nothing was sent.
    assert name.startswith("before") or before is not await identity(db)
    await insert(db, 2)
    assert [2] == await shop.items(backend)


async def test_an_error_of_the_server(db: Database) -> None:
    """After an error of the database it does."""
    before = await identity(db)
    with pytest.raises(sa_exc.DBAPIError):
        await insert(db, 1, 1)
    assert before is await identity(db)


async def test_the_memory_of_a_listener_that_fails() -> None:
    """In memory the connection is the database, and is kept."""

    def listen(*_: object) -> None:
        raise RuntimeError

    async with memory_database() as db:
        await insert(db, 1)
        event.listen(db.engine.sync_engine, "after_cursor_execute", listen)
        with pytest.raises(RuntimeError):
            await insert(db, 2)
        event.remove(db.engine.sync_engine, "after_cursor_execute", listen)
        async with db:
            assert [1] == (await db.read.scalars(shop.SELECT)).all()


# Handed out


@on_servers
async def test_a_connection_that_died(backend: ServerBackend, db: Database) -> None:
    """A pooled connection that the server has closed is replaced without an error."""
    await insert(db, 1)
    for _ in range(2):
        async with db:
            assert 1 == await db.read.scalar(shop.COUNT)
        await backend.kill_connections()
        async with db:
            assert 1 == await db.write.scalar(shop.COUNT)


@on_servers
@pytest.mark.parametrize("of", ["the writer", "a replica"])
async def test_care_costs_nothing(backend: ServerBackend, of: str) -> None:
    """A connection that is alive is handed out and taken back without a round trip."""
    async with backend.proxy() as proxy:
        proxied = backend.through(proxy.port)
        if of == "the writer":
            db = Database.from_url(proxied)
        else:
            db = Database.from_url(backend.url, read_urls=[proxied])
        for _ in range(2):
            proxy.clear()
            async with db:
                await db.read.execute("SELECT 1")
        assert ["SELECT 1"] == proxy.trips
        await db.dispose()


def has_been_idle_for_long(_: object, entry: ConnectionPoolEntry) -> None:
    entry.info[IDLE_SINCE] = float("-inf")


@on_servers
@pytest.mark.parametrize("answer", ["prompt", "cut", "none"])
async def test_ping(backend: ServerBackend, answer: str) -> None:
    """After long idleness a connection is asked first, and replaced if need be."""
    async with behind_proxy(backend) as (db, proxy):
        event.listen(db.read_engine.sync_engine, "checkin", has_been_idle_for_long)
        async with db:
            await db.read.execute("SELECT 1")
        proxy.clear()
        if answer == "cut":
            proxy.cut_before(lambda _: True)
        if answer == "none":
            proxy.hold_answer(lambda _: True)
        async with asyncio.timeout(10), db:
            assert 42 == await db.read.scalar("SELECT 42")
        assert PING[backend.driver] == proxy.trips[0]
        assert "SELECT 42" == proxy.trips[-1]
        assert (1 if answer == "prompt" else 2) == proxy.connections
