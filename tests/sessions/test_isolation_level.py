"""`isolation_level()`: that of one transaction."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine

import asgi_uow as uow
from asgi_uow import Database, errors
from tests.support import shop
from tests.support.asgi import handle
from tests.support.databases import (
    DRIVERS,
    SERVER_DRIVERS,
    behind_proxy,
    memory_database,
    on,
)

if TYPE_CHECKING:
    from tests.servers import Backend, ServerBackend

POOL_OF_ONE: Any = {"pool_size": 1, "max_overflow": 0}
LEVEL = "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"
TRIPS = {
    "asyncmy": [LEVEL, shop.COUNT, "COMMIT"],
    "asyncpg": ["BEGIN ISOLATION LEVEL SERIALIZABLE", shop.COUNT, "COMMIT"],
}
TRIPS["psycopg"] = TRIPS["asyncpg"]


async def is_serializable(db: Database, backend: Backend) -> bool:
    """Tell whether the transaction of the write session is."""
    if backend.name == "postgresql":
        return bool(
            "serializable" == await db.write.scalar("SHOW transaction_isolation")
        )
    await db.write.execute(shop.SELECT)  # which InnoDB locks there
    try:
        await backend.execute("SELECT id FROM items FOR UPDATE NOWAIT")
    except DBAPIError:
        return True
    return False


@on(*SERVER_DRIVERS, **POOL_OF_ONE)
async def test_one_unit(db: Database, backend: ServerBackend) -> None:
    """The next unit on the connection has the default again, whatever the end."""
    await backend.execute("INSERT INTO items (id) VALUES (1)")
    for end in ("commit", "roll back", "only connect", "fail"):
        async with db as unit:
            uow.isolation_level("SERIALIZABLE")
            if end == "only connect":
                await db.write.connection()
            elif end == "fail":
                unit.set_rollback_only("it has failed")
                with pytest.raises(DBAPIError):
                    await db.write.execute("SELECT nothing FROM nowhere")
            else:
                assert await is_serializable(db, backend)
                if end == "roll back":
                    unit.set_rollback_only("it is not needed")
        async with db:
            assert not await is_serializable(db, backend)


@on(*SERVER_DRIVERS)
async def test_read_your_writes(db: Database, backend: Backend) -> None:
    """Reads join the transaction as they do without it."""
    async with db:
        uow.isolation_level("REPEATABLE READ")
        uow.isolation_level("SERIALIZABLE")  # the last one counts
        await shop.insert(1)
        assert 1 == await db.read.scalar(shop.COUNT)
        async with uow.savepoint():
            await shop.insert(2)
    assert [1, 2] == await shop.items(backend)


@on(*SERVER_DRIVERS)
async def test_two_that_conflict(db: Database, backend: Backend) -> None:
    """Of two requests that have read what the other one changes, one gets a 503."""
    await backend.execute("INSERT INTO items (id) VALUES (1)")
    both, numbers = asyncio.Barrier(2), iter((2, 3))

    async def handler() -> None:
        uow.isolation_level("SERIALIZABLE")
        await uow.current_session().execute(shop.SELECT)
        await both.wait()
        await shop.insert(next(numbers))

    responses = await asyncio.gather(handle(handler, db), handle(handler, db))

    assert [200, 503] == sorted(each.status for each in responses)
    assert 2 == await backend.scalar(shop.COUNT)


@on(*SERVER_DRIVERS)
async def test_round_trips(backend: ServerBackend) -> None:
    """It costs one on MariaDB, and none on PostgreSQL."""
    async with behind_proxy(backend, **POOL_OF_ONE) as (db, proxy):
        for _ in range(2):  # the first connects and prepares
            proxy.clear()
            async with db:
                uow.isolation_level("SERIALIZABLE")
                await db.write.execute(shop.COUNT)
        assert TRIPS[backend.driver] == proxy.trips


@on(*DRIVERS)
async def test_too_late(db: Database, backend: Backend) -> None:
    """After the first statement it is refused, and the unit goes on."""
    async with db:
        await shop.insert(1)
        with pytest.raises(errors.ConfigurationError, match="first statement"):
            uow.isolation_level("SERIALIZABLE")
    assert [1] == await shop.items(backend)


@on(*DRIVERS)
@pytest.mark.parametrize("level", ["AUTOCOMMIT", "serialisable", None])
async def test_no_such_level(db: Database, level: Any) -> None:
    """AUTOCOMMIT, and what the database does not know, is refused."""
    async with db:
        with pytest.raises(errors.ConfigurationError, match="SERIALIZABLE"):
            uow.isolation_level(level)
        await shop.insert(1, db)


@on("asyncpg", "psycopg")
async def test_an_engine_with_a_level_of_its_own(backend: ServerBackend) -> None:
    """SQLAlchemy would set the engine's after ours: refused, not ignored."""
    engine = create_async_engine(backend.url)
    level = engine.execution_options(isolation_level="REPEATABLE READ")
    db = Database(level)
    async with db:
        with pytest.raises(errors.ConfigurationError, match="to create_async_engine"):
            uow.isolation_level("SERIALIZABLE")
    await db.dispose()
    db = Database(create_async_engine(backend.url, isolation_level="REPEATABLE READ"))
    async with db:
        uow.isolation_level("SERIALIZABLE")
        assert await is_serializable(db, backend)
    await db.dispose()


@on("aiosqlite")
async def test_sqlite(db: Database) -> None:
    """SQLite is serializable: a write still begins at once, and holds the lock."""
    begun: list[object] = []
    event.listen(db.engine.sync_engine, "begin", begun.append)
    async with db:
        uow.isolation_level("SERIALIZABLE", db)
        await db.write.execute(shop.COUNT)
        with pytest.raises(errors.NestedUnitOfWorkError):
            async with uow.unit_of_work(db, independent=True):
                raise NotImplementedError
    assert 1 == len(begun)


@on("aiosqlite")
async def test_in_memory() -> None:
    """In memory it changes nothing."""
    async with memory_database() as db, db:
        uow.isolation_level("SERIALIZABLE")
        assert 0 == await db.read.scalar(shop.COUNT)
        await shop.insert(1)
        assert 1 == await db.read.scalar(shop.COUNT)


async def test_outside_of_a_unit() -> None:
    """It needs a unit of work."""
    with pytest.raises(errors.NoUnitOfWorkError, match="isolation_level"):
        uow.isolation_level("SERIALIZABLE")
