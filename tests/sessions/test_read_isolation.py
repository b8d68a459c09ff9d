"""One snapshot for all reads: `read_isolation="REPEATABLE READ"`."""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.exc import DBAPIError

from asgi_uow import Database, parallel_read
from asgi_uow.errors import ConfigurationError, ReadOnlySessionError
from tests.support import shop
from tests.support.databases import DRIVERS, SERVERS, checked_out, on

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from tests.servers import Backend, ServerBackend

pytestmark = on(*DRIVERS)

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


async def test_one_snapshot(backend: Backend) -> None:
    """What others commit between two reads of a unit is seen by the next unit."""
    async with database(backend) as db:
        async with db:
            assert 0 == await db.read.scalar(COUNT)
            await backend.execute(INSERT)
            assert 0 == await db.read.scalar(COUNT)
        async with db:
            assert 1 == await db.read.scalar(COUNT)


async def test_without_the_option(backend: Backend) -> None:
    """Else each read sees what is there by then."""
    await shop.create(backend)
    db = Database.from_url(backend.url)
    async with db:
        assert 0 == await db.read.scalar(COUNT)
        await backend.execute(INSERT)
        assert 1 == await db.read.scalar(COUNT)
    await db.dispose()


async def test_stream_in_the_snapshot(backend: Backend) -> None:
    """A stream reads in it too."""
    async with database(backend) as db, db:
        assert 0 == await db.read.scalar(COUNT)
        await backend.execute(INSERT)
        rows = await db.read.stream_scalars("SELECT id FROM items")
        assert [] == await rows.all()
        assert 0 == await db.read.scalar(COUNT)


@pytest.mark.parametrize(
    "statement",
    [INSERT, "CREATE TABLE other (id INTEGER)", "SELECT id FROM items FOR UPDATE"],
)
async def test_still_read_only(backend: Backend, statement: str) -> None:
    """The database refuses as without it; the unit goes on, the next one writes."""
    unknown = backend.name == "sqlite" and statement.endswith("UPDATE")
    refusal = DBAPIError if unknown else ReadOnlySessionError
    async with database(backend) as db:
        async with db:
            assert 0 == await db.read.scalar(COUNT)
            with pytest.raises(refusal):
                await db.read.execute(statement)
            assert 0 == await db.read.scalar(COUNT)
        async with db:
            await db.write.execute(INSERT)
        assert [1] == await shop.items(backend)


async def test_nothing_reaches_the_next_unit(backend: Backend) -> None:
    """After a read, and after an error, no transaction is open."""
    async with database(backend) as db:
        async with db:
            await db.read.execute(COUNT)
        assert 0 == await backend.open_transactions()
        async with db:
            with pytest.raises(DBAPIError):
                await db.read.execute("SELECT nothing FROM nowhere")
        assert 0 == await backend.open_transactions()
        await backend.execute(INSERT)
        async with db:
            assert 1 == await db.read.scalar(COUNT)


async def test_own_writes(backend: Backend) -> None:
    """After a write the unit reads in the writer's transaction, as without it."""
    async with database(backend) as db, db:
        assert 0 == await db.read.scalar(COUNT)
        await db.write.execute(INSERT)
        assert 1 == await db.read.scalar(COUNT)


@on(*SERVERS)
async def test_parallel_reads(backend: ServerBackend) -> None:
    """A parallel read has a snapshot of its own; the connection is lent to it."""
    async with database(backend) as db, db:
        assert 0 == await db.read.scalar(COUNT)
        await backend.execute(INSERT)
        async with parallel_read() as session:
            assert 1 == await session.scalar(COUNT)
        assert 1 == await db.read.scalar(COUNT)


ROUND_TRIPS = {
    "asyncmy": [COUNT, COUNT, "ROLLBACK"],
    "asyncpg": ["BEGIN ISOLATION LEVEL REPEATABLE READ", COUNT, COUNT, "ROLLBACK"],
}
ROUND_TRIPS["psycopg"] = ROUND_TRIPS["asyncpg"]


@on(*ROUND_TRIPS)
async def test_round_trips(backend: ServerBackend) -> None:
    """It costs the beginning and the end of a transaction."""
    async with (
        backend.proxy() as proxy,
        database(backend, backend.through(proxy.port)) as db,
    ):
        for _ in range(2):  # the first connects and prepares
            proxy.clear()
            async with db:
                await db.read.execute(COUNT)
                await db.read.execute(COUNT)
        assert ROUND_TRIPS[backend.driver] == proxy.trips


def test_other_levels() -> None:
    """No other isolation level is offered."""
    level: Any = "SERIALIZABLE"
    with pytest.raises(ConfigurationError, match="read_isolation must be"):
        Database.from_url("sqlite:///app.db", read_isolation=level)


@on(*SERVERS)
async def test_begin_on_a_lost_connection(backend: ServerBackend) -> None:
    """A snapshot that cannot be begun is an error, and the next unit has its own."""
    async with database(backend) as db:
        async with db:
            await db.read.execute(COUNT)
        await backend.kill_connections()
        with suppress(DBAPIError):  # asyncpg has noticed before, and connects anew
            async with db:
                await db.read.execute(COUNT)
        async with db:
            assert 0 == await db.read.scalar(COUNT)
