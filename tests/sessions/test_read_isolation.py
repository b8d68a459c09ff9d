"""One snapshot for all reads: `read_isolation="REPEATABLE READ"`."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.exc import DBAPIError

from asgi_uow import Database, parallel_read
from asgi_uow.errors import ConfigurationError, ReadOnlySessionError
from tests.promises.test_promises import checked_out
from tests.support import shop

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from tests.servers import Backend, ServerBackend

COUNT = "SELECT count(*) FROM items"
INSERT = "INSERT INTO items (id) VALUES (1)"


@asynccontextmanager
async def database(
    backend: Backend, url: str | None = None, **options: Any
) -> AsyncGenerator[Database]:
    """A database with one connection to read, and an empty table."""
    await shop.create(backend)
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5} | options
    db = Database.from_url(
        url or backend.url, read_isolation="REPEATABLE READ", **options
    )
    yield db
    assert [0, 0] == checked_out(db)
    await db.dispose()


async def test_one_snapshot(any_driver: Backend) -> None:
    """What others commit between two reads of a unit is seen by the next unit."""
    async with database(any_driver) as db:
        async with db:
            assert 0 == await db.read.scalar(COUNT)
            await any_driver.execute(INSERT)
            assert 0 == await db.read.scalar(COUNT)
        async with db:
            assert 1 == await db.read.scalar(COUNT)


async def test_without_the_option(any_driver: Backend) -> None:
    """Else each read sees what is there by then."""
    await shop.create(any_driver)
    db = Database.from_url(any_driver.url)
    async with db:
        assert 0 == await db.read.scalar(COUNT)
        await any_driver.execute(INSERT)
        assert 1 == await db.read.scalar(COUNT)
    await db.dispose()


async def test_stream_in_the_snapshot(any_driver: Backend) -> None:
    """A stream reads in it too."""
    async with database(any_driver) as db, db:
        assert 0 == await db.read.scalar(COUNT)
        await any_driver.execute(INSERT)
        rows = await db.read.stream_scalars("SELECT id FROM items")
        assert [] == await rows.all()
        assert 0 == await db.read.scalar(COUNT)


@pytest.mark.parametrize(
    "statement",
    [INSERT, "CREATE TABLE other (id INTEGER)", "SELECT id FROM items FOR UPDATE"],
)
async def test_still_read_only(any_driver: Backend, statement: str) -> None:
    """The database refuses as without it; the unit goes on, the next one writes."""
    unknown = any_driver.name == "sqlite" and statement.endswith("UPDATE")
    refusal = DBAPIError if unknown else ReadOnlySessionError
    async with database(any_driver) as db:
        async with db:
            assert 0 == await db.read.scalar(COUNT)
            with pytest.raises(refusal):
                await db.read.execute(statement)
            assert 0 == await db.read.scalar(COUNT)
        async with db:
            await db.write.execute(INSERT)
        assert [1] == await shop.items(any_driver)


async def test_nothing_reaches_the_next_unit(any_driver: Backend) -> None:
    """After a read, and after an error, no transaction is open."""
    async with database(any_driver) as db:
        async with db:
            await db.read.execute(COUNT)
        assert 0 == await any_driver.open_transactions()
        async with db:
            with pytest.raises(DBAPIError):
                await db.read.execute("SELECT nothing FROM nowhere")
        assert 0 == await any_driver.open_transactions()
        await any_driver.execute(INSERT)
        async with db:
            assert 1 == await db.read.scalar(COUNT)


async def test_own_writes(any_driver: Backend) -> None:
    """After a write the unit reads in the writer's transaction, as without it."""
    async with database(any_driver) as db, db:
        assert 0 == await db.read.scalar(COUNT)
        await db.write.execute(INSERT)
        assert 1 == await db.read.scalar(COUNT)


async def test_parallel_reads(server_backend: ServerBackend) -> None:
    """A parallel read has a snapshot of its own; the connection is lent to it."""
    async with database(server_backend) as db, db:
        assert 0 == await db.read.scalar(COUNT)
        await server_backend.execute(INSERT)
        async with parallel_read() as session:
            assert 1 == await session.scalar(COUNT)
        assert 1 == await db.read.scalar(COUNT)


ROUND_TRIPS = {
    "asyncmy": [COUNT, COUNT, "ROLLBACK"],
    "asyncpg": ["BEGIN ISOLATION LEVEL REPEATABLE READ", COUNT, COUNT, "ROLLBACK"],
}
ROUND_TRIPS["psycopg"] = ROUND_TRIPS["asyncpg"]


@pytest.mark.parametrize("any_driver", ROUND_TRIPS, indirect=True)
async def test_round_trips(any_driver: ServerBackend) -> None:
    """It costs the beginning and the end of a transaction."""
    async with (
        any_driver.proxy() as proxy,
        database(any_driver, any_driver.through(proxy.port)) as db,
    ):
        for _ in range(2):  # the first connects and prepares
            proxy.clear()
            async with db:
                await db.read.execute(COUNT)
                await db.read.execute(COUNT)
        assert ROUND_TRIPS[any_driver.driver] == proxy.trips


def test_other_levels() -> None:
    """No other isolation level is offered."""
    level: Any = "SERIALIZABLE"
    with pytest.raises(ConfigurationError, match="SERIALIZABLE"):
        Database.from_url("sqlite:///app.db", read_isolation=level)
