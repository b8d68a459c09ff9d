"""SQLite: files that others use as well, and databases in memory."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

import aiosqlite
import pytest
from sqlalchemy import exc as sa_exc
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from asgi_uow import Database, unit_of_work
from asgi_uow.errors import DoomedError, NestedUnitOfWorkError
from tests.support import shop
from tests.support.databases import memory_database, on

if TYPE_CHECKING:
    from tests.servers import SQLiteBackend

pytestmark = on("aiosqlite")

CREATE = "CREATE TABLE items (id INTEGER)"
ENDLESS = (
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
    " SELECT max(i) FROM n"
)


# Files


async def test_sqlite_settings(backend: SQLiteBackend, db: Database) -> None:
    """Readers do not block writers, locks are waited for, foreign keys are kept."""
    expected = {"journal_mode": "wal", "busy_timeout": 5000, "foreign_keys": 1}
    async with db:
        for session in (db.read, db.write):
            assert expected == {
                name: await session.scalar(f"PRAGMA {name}") for name in expected
            }
        assert 1 == await backend.open_transactions()  # BEGIN IMMEDIATE, for a read
    assert 0 == await backend.open_transactions()


async def test_two_databases_on_one_file(backend: SQLiteBackend) -> None:
    """A second writer would wait for the first for ever: refused at once.

    Be it a Database on the same engine, or one on another engine for the same file.
    """
    await backend.execute(CREATE)
    engine = create_async_engine(backend.url)
    one, two, far = Database(engine), Database(engine), Database.from_url(backend.url)
    async with one:
        async with two:  # nobody has written yet
            await shop.insert(1, two)
        await shop.insert(2, one)
        for db in (two, far):
            with pytest.raises(NestedUnitOfWorkError):
                await db.__aenter__()
    async with two, one, far:
        await shop.insert(3, two)
        for db in (one, far):
            with pytest.raises(NestedUnitOfWorkError):
                await shop.insert(4, db)
            assert 2 == await db.read.scalar(shop.COUNT)
    assert [(1,), (2,), (3,)] == await backend.fetch("SELECT id FROM items")
    for db in (one, two, far):
        await db.dispose()


async def test_two_databases_of_one_unit_on_one_file(backend: SQLiteBackend) -> None:
    """Nor can one unit of work write through two databases into one file."""
    await backend.execute(CREATE)
    engine = create_async_engine(backend.url)
    one, two = Database(engine), Database(engine)
    async with unit_of_work(one, two):
        await shop.insert(1, one)
        with pytest.raises(NestedUnitOfWorkError):
            await shop.insert(2, two)
    assert [(1,)] == await backend.fetch("SELECT id FROM items")
    for db in (one, two):
        await db.dispose()


async def test_two_databases_on_one_engine_in_memory() -> None:
    """One connection is one database, however many Database objects there are."""
    async with memory_database() as one, memory_database() as apart:
        two = Database(one.engine)
        async with one:
            await shop.insert(1, one)
            async with apart:
                await shop.insert(2, apart)
            with pytest.raises(NestedUnitOfWorkError):
                await two.__aenter__()
        async with two:
            assert [1] == (await two.read.scalars(shop.SELECT)).all()


async def test_a_file_that_somebody_reads(sqlite: SQLiteBackend) -> None:
    """The first connection waits for a reader in its way, then keeps a WAL.

    Others that connect to a new file at the same moment are such readers.
    """
    await sqlite.execute(CREATE, "INSERT INTO items VALUES (1), (2)")
    reader = sqlite3.connect(sqlite.path, check_same_thread=False)
    rows = reader.execute("SELECT id FROM items")
    assert (1,) == rows.fetchone()
    sent: list[str] = []

    class Traced(sqlite3.Connection):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.set_trace_callback(self.note)

        def note(self, statement: str) -> None:
            sent.append(statement)
            if statement.startswith("BEGIN EXCLUSIVE"):
                rows.close()

    db = Database.from_url(sqlite.url, connect_args={"factory": Traced})
    async with db:
        assert 2 == await db.write.scalar(shop.COUNT)
        assert "wal" == await db.write.scalar("PRAGMA journal_mode")
    assert "BEGIN EXCLUSIVE" in sent
    await db.dispose()
    reader.close()


async def test_a_file_that_stays_locked(
    sqlite: SQLiteBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that does not end is an error when the time to wait is over."""
    monkeypatch.setattr("asgi_uow._databases.sqlite.BUSY_TIMEOUT", 100)
    await sqlite.execute(CREATE, "INSERT INTO items VALUES (1), (2)")
    db = Database.from_url(sqlite.url)
    with closing(sqlite3.connect(sqlite.path)) as reader:
        rows = reader.execute("SELECT id FROM items")
        assert (1,) == rows.fetchone()
        with pytest.raises(sa_exc.OperationalError, match="database is locked"):
            async with db:
                await db.write.scalar("SELECT 1")
        rows.close()
    async with db:
        assert "wal" == await db.write.scalar("PRAGMA journal_mode")
    await db.dispose()


async def test_a_file_that_cannot_be_written(sqlite: SQLiteBackend) -> None:
    """A file that is opened for reading alone is read as it is."""
    await sqlite.execute(CREATE)
    db = Database.from_url(f"sqlite+aiosqlite:///file:{sqlite.path}?mode=ro&uri=true")
    async with db:
        assert 0 == await db.read.scalar(shop.COUNT)
    await db.dispose()


async def test_a_file_that_is_none(sqlite: SQLiteBackend) -> None:
    """What is no database is an error at once."""
    sqlite.path.write_text("no database, but long enough to be looked at " * 9)
    db = Database.from_url(sqlite.url)
    with pytest.raises(sa_exc.DatabaseError, match="file is not a database"):
        async with db:
            await db.read.scalar("SELECT 1")
    await db.dispose()


async def test_sqlite_foreign_keys(backend: SQLiteBackend, db: Database) -> None:
    """A row that refers to nothing is refused."""
    await backend.execute("CREATE TABLE u (item INTEGER REFERENCES items (id))")
    with pytest.raises(sa_exc.IntegrityError, match="FOREIGN KEY constraint failed"):
        async with db:
            await db.write.execute("INSERT INTO u VALUES (1)")


async def test_concurrent_writers(backend: SQLiteBackend, db: Database) -> None:
    """Units that read before they write wait for each other, and none fails."""

    async def read_then_write() -> None:
        async with db:
            await shop.insert(await db.write.scalar(shop.COUNT))

    await asyncio.gather(*(read_then_write() for _ in range(5)))
    assert [0, 1, 2, 3, 4] == await shop.items(backend)


# In memory


async def insert(db: Database, number: int) -> None:
    async with db:
        await shop.insert(number)


async def items(db: Database) -> list[int]:
    async with db:
        return list(await db.read.scalars(shop.SELECT))


async def test_in_memory() -> None:
    """One connection, one unit at a time: a rollback undoes nobody else's rows."""
    both_are_there = asyncio.Barrier(2)

    async def work(number: int) -> None:
        async with db:
            await both_are_there.wait()
            await shop.insert(number)
            assert [number] == (await db.read.scalars(shop.SELECT)).all()
            raise ZeroDivisionError

    async with memory_database() as db:
        assert db.read_engine is db.engine
        errors = await asyncio.gather(work(1), work(2), return_exceptions=True)
        assert [ZeroDivisionError] * 2 == [type(error) for error in errors]
        await asyncio.gather(insert(db, 3), insert(db, 4))
        assert [3, 4] == await items(db)
        async with db:
            await db.read.scalar(shop.COUNT)
            with pytest.raises(NestedUnitOfWorkError):  # it would wait for ever
                await unit_of_work(db, independent=True).__aenter__()


@pytest.mark.parametrize("options", [{"pool_size": 5}, {"poolclass": NullPool}])
async def test_in_memory_is_one_connection(options: dict[str, Any]) -> None:
    """A pool made for servers does not make several databases of one in memory."""
    both_are_there = asyncio.Barrier(2)

    async def work(number: int) -> None:
        async with db:
            await both_are_there.wait()
            await shop.insert(number)

    async with memory_database(**options) as db:
        await asyncio.gather(work(1), work(2))
        assert [1, 2] == await items(db)


async def test_memory_survives_a_cancelled_statement() -> None:
    """The connection is the database: a cancelled statement does not cost it."""
    db = Database.from_url("sqlite:///file::memory:?uri=true")
    async with db:
        await db.write.execute(CREATE)
    with pytest.raises(DoomedError):
        async with db:
            await shop.insert(1)
            with suppress(TimeoutError):
                await asyncio.wait_for(db.write.execute(ENDLESS), 0.05)
    await insert(db, 2)
    assert [2] == await items(db)
    await db.dispose()


async def test_memory_and_an_ordinary_error() -> None:
    """What is no cancellation is an error as anywhere else."""
    async with memory_database() as db:
        async with db:
            await shop.insert(1)
            with suppress(sa_exc.IntegrityError):
                await shop.insert(1)
        assert [1] == await items(db)


async def test_begin_of_an_engine_made_by_hand(backend: SQLiteBackend) -> None:
    """Where the engine connects in its own way BEGIN is sent at once, and can fail."""
    await shop.create(backend)
    arguments = {"timeout": 0, "async_creator_fn": aiosqlite.connect}
    db = Database(create_async_engine(backend.url, connect_args=arguments))
    async with db:
        await shop.insert(1)
    with closing(sqlite3.connect(str(db.engine.url.database))) as rival:
        rival.execute("BEGIN IMMEDIATE")
        with pytest.raises(sa_exc.OperationalError, match="SQL: BEGIN IMMEDIATE"):
            async with db:
                await shop.insert(2)
    async with db:
        await shop.insert(3)
    assert [1, 3] == await shop.items(backend)
    await db.dispose()
