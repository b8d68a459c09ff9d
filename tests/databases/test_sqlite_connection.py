"""SQLite: how often a connection's thread is called, and that it leaves no lock."""

from __future__ import annotations

import asyncio
import gc
import logging
import operator
import sqlite3
import threading
import weakref
from contextlib import asynccontextmanager, closing
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import aiosqlite
import pytest
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool

from asgi_uow import (
    Database,
    UnitOfWorkMiddleware,
    current_read_session,
    current_session,
)
from asgi_uow._databases.sqlite_connection import Connection, Cursor
from tests.servers import eventually
from tests.servers.backend import SQLiteBackend
from tests.support import shop
from tests.support.asgi import endpoint, request
from tests.support.databases import shop_database

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

    Scenario: TypeAlias = Callable[[aiosqlite.Connection], Awaitable[object]]

BEGIN = "BEGIN IMMEDIATE"
INSERT = "INSERT INTO numbers VALUES (1000)"
SELECT = "SELECT id FROM numbers"
ENDLESS = (
    "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
    " SELECT count(*) FROM n"
)


@asynccontextmanager
async def opened(
    backend: SQLiteBackend, make: Callable[..., Any] = Connection
) -> AsyncGenerator[Any]:
    """Open a connection to a file with 200 numbers and no write-ahead log."""
    backend.path.unlink(missing_ok=True)
    connection = await make(str(backend.path), isolation_level=None)
    await connection.executescript(
        "CREATE TABLE numbers (id INTEGER PRIMARY KEY); BEGIN;"
        + "".join(f"INSERT INTO numbers VALUES ({n});" for n in range(200))
        + "COMMIT; PRAGMA busy_timeout = 0"
    )
    try:
        yield connection
    finally:
        await connection.close()


@pytest.fixture
async def connection(sqlite: SQLiteBackend) -> AsyncIterator[Connection]:
    async with opened(sqlite) as connection:
        yield connection


@pytest.fixture
def calls(caplog: pytest.LogCaptureFixture) -> Callable[[], int]:
    """Give how often a thread was called since it was asked last."""
    caplog.set_level(logging.DEBUG, "aiosqlite")

    def count() -> int:
        found = [each for each in caplog.records if each.msg == "executing %s"]
        caplog.clear()
        return len(found)

    return count


def is_locked(backend: SQLiteBackend) -> bool:
    """Tell whether anybody reads or writes the file."""
    with closing(sqlite3.connect(backend.path, timeout=0)) as other:
        try:
            other.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError:
            return True
        return False


# How often the thread is called


async def select(sql: str) -> None:
    await current_read_session().execute(sql)


async def insert_returning() -> None:
    result = await current_session().execute(
        "INSERT INTO items (id) VALUES (1000), (1001) RETURNING id"
    )
    assert [(1000,), (1001,)] == result.all()


@pytest.mark.parametrize(
    ("expected", "handler"),
    [
        (2, partial(shop.insert, 1000)),
        (2, insert_returning),
        (1, partial(select, "SELECT id FROM items WHERE id < 64")),
        (2, partial(select, "SELECT id FROM items WHERE id < 65")),
        (2, partial(select, "SELECT id FROM items")),
    ],
)
async def test_calls_of_a_request(
    sqlite: SQLiteBackend,
    calls: Callable[[], int],
    expected: int,
    handler: Callable[[], Awaitable[None]],
) -> None:
    """An INSERT and its COMMIT take two, a SELECT takes one, or two if it is long."""
    async with shop_database(sqlite) as db:
        async with db:
            for number in range(1, 200):
                await db.write.execute("INSERT INTO items (id) VALUES (:n)", n=number)
        async with db:
            await db.read.execute("SELECT 1")
        calls()
        response = await request(UnitOfWorkMiddleware(endpoint(handler), db))
        assert response.error is None
        assert expected == calls()


async def test_calls_of_a_snapshot(
    sqlite: SQLiteBackend, calls: Callable[[], int]
) -> None:
    """BEGIN of a snapshot comes with the first SELECT too."""
    async with shop_database(sqlite, read_isolation="REPEATABLE READ") as db:
        async with db:
            await db.read.execute("SELECT 1")
        calls()
        async with db:
            assert 0 == await db.read.scalar("SELECT count(*) FROM items")
            assert 1 == calls()
        assert 1 == calls()  # ROLLBACK


# BEGIN that waits for a statement


async def test_pending_transaction(
    connection: Connection, sqlite: SQLiteBackend
) -> None:
    """The transaction counts as open at once; the lock comes with a statement."""

    def state() -> tuple[bool, bool]:
        return connection.in_transaction, is_locked(sqlite)

    connection.begin_with(BEGIN)
    assert (True, False) == state()
    await connection.cursor().execute(SELECT + " LIMIT 1")
    assert (True, True) == state()
    await connection.rollback()
    assert (False, False) == state()


@pytest.mark.parametrize("end", ["commit", "rollback"])
async def test_end_of_a_pending_transaction(
    connection: Connection, calls: Callable[[], int], end: str
) -> None:
    """A transaction that executed nothing ends without a call into the thread."""
    connection.begin_with(BEGIN)
    await getattr(connection, end)()
    assert not connection.in_transaction
    assert 0 == calls()


async def test_close_of_a_pending_transaction(
    connection: Connection, sqlite: SQLiteBackend
) -> None:
    """Closing does not begin: it works while another holds the lock."""
    with closing(sqlite3.connect(sqlite.path, isolation_level=None)) as other:
        other.execute(BEGIN)
        connection.begin_with(BEGIN)
        await connection.close()


async def test_user_statement_begins(
    connection: Connection, sqlite: SQLiteBackend
) -> None:
    """What is executed on the driver's connection belongs to the transaction."""
    connection.begin_with(BEGIN)
    await connection.execute(INSERT)
    await connection.rollback()
    assert 200 == await sqlite.scalar("SELECT count(*) FROM numbers")


async def test_close_of_a_cursor_does_not_begin(
    connection: Connection, sqlite: SQLiteBackend
) -> None:
    """Neither do the rows of an earlier transaction."""
    cursor = await connection.cursor().execute(SELECT)
    connection.begin_with(BEGIN)
    assert 200 == len(await cursor.fetchall())
    assert not is_locked(sqlite)
    await connection.rollback()
    cursor = await connection.cursor().execute(SELECT)
    connection.begin_with(BEGIN)
    await cursor.close()
    assert connection.in_transaction
    assert not is_locked(sqlite)


async def test_busy_begin(connection: Connection, sqlite: SQLiteBackend) -> None:
    """The first statement says that the database is locked; BEGIN is still to come."""
    with closing(sqlite3.connect(sqlite.path, isolation_level=None)) as other:
        other.execute(BEGIN)
        connection.begin_with(BEGIN)
        with pytest.raises(sqlite3.OperationalError, match="locked") as raised:
            await connection.cursor().execute(INSERT)
    assert "SQLITE_BUSY" == raised.value.sqlite_errorname
    assert connection.in_transaction
    await connection.cursor().execute(INSERT)
    await connection.rollback()
    assert 200 == await sqlite.scalar("SELECT count(*) FROM numbers")
    connection.begin_with(BEGIN)
    await connection.cursor().execute(INSERT)
    await connection.commit()
    assert 201 == await sqlite.scalar("SELECT count(*) FROM numbers")


async def test_busy_begin_of_a_unit(
    sqlite: SQLiteBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit whose BEGIN failed may try again; what it writes is one transaction."""
    monkeypatch.setattr("asgi_uow._databases.sqlite.BUSY_TIMEOUT", 50)
    async with shop_database(sqlite) as db:
        async with db:
            await db.write.execute("SELECT 1")
        with closing(sqlite3.connect(sqlite.path, isolation_level=None)) as other:
            other.execute(BEGIN)
            with pytest.raises(LookupError):
                async with db:
                    with pytest.raises(OperationalError, match="INSERT"):
                        await shop.insert(1)
                    other.execute("ROLLBACK")
                    await shop.insert(2)
                    raise LookupError
        async with db:
            await shop.insert(3)
        assert [3] == await shop.items(sqlite)


# An engine of one's own


async def driver_of(db: Database) -> aiosqlite.Connection:
    """Give the driver's connection of the unit."""
    pooled = await (await db.write.connection()).get_raw_connection()
    assert isinstance(pooled.driver_connection, aiosqlite.Connection)
    return pooled.driver_connection


@pytest.mark.parametrize("was_used", [False, True])
async def test_foreign_engine(sqlite: SQLiteBackend, was_used: bool) -> None:
    """A cancelled statement leaves no lock on an engine of the application either.

    Not even if the engine has a connection of plain aiosqlite in its pool.
    """
    await shop.create(sqlite)
    engine = create_async_engine(sqlite.url, connect_args={"iter_chunk_size": 10})
    if was_used:
        async with engine.connect() as plain:
            pooled = await plain.get_raw_connection()
            assert type(pooled.driver_connection) is aiosqlite.Connection
    db, running = Database(engine), asyncio.Event()
    wake = partial(asyncio.get_running_loop().call_soon_threadsafe, running.set)

    async def work() -> None:
        async with db:
            await shop.insert(1)
            await (await driver_of(db)).create_function("wake", 0, wake)
            await db.write.execute(f"SELECT wake() OR ({ENDLESS})")

    async with db:
        assert isinstance(await driver_of(db), Connection)
    task = asyncio.ensure_future(work())
    await running.wait()
    task.cancel()
    kept = await ended(task)
    assert not is_locked(sqlite)
    async with db:
        await shop.insert(2)
        assert [2] == (await db.read.scalars(shop.SELECT)).all()
    await db.dispose()
    assert kept.__traceback__ is not None


async def test_foreign_memory() -> None:
    """An in-memory engine keeps the connection that has its tables."""
    engine = create_async_engine(
        "sqlite+aiosqlite://",
        poolclass=AsyncAdaptedQueuePool,
        pool_size=1,
        max_overflow=0,
    )
    async with engine.begin() as connection:
        await connection.exec_driver_sql("CREATE TABLE mine (id INTEGER)")
    db = Database(engine)
    async with db:
        assert 0 == await db.read.scalar("SELECT count(*) FROM mine")
    await db.dispose()


async def test_foreign_creator(sqlite: SQLiteBackend) -> None:
    """An engine that says how to connect goes on to connect that way."""
    made: list[str] = []

    def creator(name: str, **options: Any) -> aiosqlite.Connection:
        made.append(name)
        return aiosqlite.connect(name, **options)

    arguments = {"async_creator_fn": creator}
    db = Database(create_async_engine(sqlite.url, connect_args=arguments))
    async with db:
        assert type(await driver_of(db)) is aiosqlite.Connection
    await db.dispose()
    assert 1 == len(made)


# As with plain aiosqlite


def shown(cursor: aiosqlite.Cursor) -> tuple[object, ...]:
    return (
        cursor.description,
        cursor.rowcount,
        cursor.lastrowid,
        cursor.arraysize,
        cursor.row_factory,
        type(cursor.connection),
    )


async def tried(call: Awaitable[object]) -> object:
    try:
        return await call
    except sqlite3.Error as error:
        return repr(error)


async def nothing_executed(connection: aiosqlite.Connection) -> object:
    cursor = await connection.cursor()
    rows = [await cursor.fetchone(), await cursor.fetchmany(), await cursor.fetchall()]
    await cursor.close()
    return rows, shown(cursor)


async def fetching(connection: aiosqlite.Connection) -> object:
    found: list[object] = []
    async with connection.cursor() as cursor:
        cursor.arraysize = 3
        for count in (0, 1, 63, 64, 65, 128, 129, 200):
            assert await cursor.execute(f"{SELECT} LIMIT ?", (count,)) is cursor
            found += [await cursor.fetchone(), await cursor.fetchmany()]
            found += [await cursor.fetchmany(70), await cursor.fetchall()]
            found += [await cursor.fetchone(), shown(cursor)]
        await cursor.execute(SELECT, None)
        found += [row async for row in cursor]
        await cursor.execute(SELECT)
        await cursor.execute("SELECT :name", {"name": 5})
        return [*found, await cursor.fetchall()]


async def writing(connection: aiosqlite.Connection) -> object:
    cursor = await connection.cursor()
    found: list[object] = []
    for sql in (
        "INSERT INTO numbers VALUES (500), (501)",
        "UPDATE numbers SET id = id + 1000 WHERE id >= 100",
        "DELETE FROM numbers WHERE id >= 1100 RETURNING id",
        "CREATE TABLE other (id)",
    ):
        await cursor.execute(sql)
        found += [await cursor.fetchall(), shown(cursor), connection.total_changes]
    cursor = await connection.cursor()
    await cursor.executemany("INSERT INTO other VALUES (?)", [(1,), (2,)])
    found.append(shown(cursor))
    cursor = await connection.cursor()
    await cursor.executescript("DELETE FROM other; DELETE FROM numbers")
    return [*found, shown(cursor), await cursor.fetchall()]


def named(cursor: sqlite3.Cursor, row: tuple[object, ...]) -> list[object]:
    return [cursor.description[0][0], *row]


async def row_factories(connection: aiosqlite.Connection) -> object:
    first = await connection.cursor()
    # aiosqlite takes any callable, but says that it takes a type.
    first.row_factory = named  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
    connection.row_factory = sqlite3.Row
    second = await connection.cursor()
    found: list[object] = []
    for cursor in (first, second):
        await cursor.execute(SELECT + " LIMIT 70")
        found += [(type(row), *row) for row in await cursor.fetchall()]
    return found


async def closed_cursor(connection: aiosqlite.Connection) -> object:
    cursor = await connection.cursor()
    await cursor.execute(SELECT)
    await cursor.close()
    await cursor.close()
    return [
        shown(cursor)[:4],
        await tried(cursor.execute(SELECT)),
        await tried(cursor.executemany(INSERT, [])),
        await tried(cursor.executescript(INSERT)),
        await tried(cursor.fetchone()),
        await tried(cursor.fetchmany(1)),
        await tried(cursor.fetchall()),
    ]


async def errors(connection: aiosqlite.Connection) -> object:
    cursor = await connection.cursor()
    return [
        await tried(cursor.execute("SELEC")),
        await tried(cursor.execute("SELECT :name", {})),
        await tried(cursor.execute("INSERT INTO numbers VALUES (1)")),
        await tried(cursor.executemany(INSERT, [(), ()])),
        await tried(cursor.fetchall()),
    ]


async def shortcuts(connection: aiosqlite.Connection) -> object:
    await connection.create_function("negative", 1, operator.neg)
    async with connection.execute("SELECT negative(id) FROM numbers") as cursor:
        found: list[object] = [row async for row in cursor]
    async with connection.executemany(INSERT[:-6] + "(?)", [(1,)] * 0) as cursor:
        found.append(shown(cursor))
    return [
        *found,
        await connection.execute_insert(INSERT),
        await connection.execute_fetchall(SELECT),
    ]


async def copies(connection: aiosqlite.Connection) -> object:
    dumped = [line async for line in connection.iterdump()]
    async with aiosqlite.connect(":memory:") as target:
        await connection.backup(target)
        return dumped, await target.execute_fetchall(SELECT)


async def transactions(connection: aiosqlite.Connection) -> object:
    found = [connection.in_transaction]
    for statement in ("BEGIN", INSERT, "ROLLBACK", "BEGIN", INSERT):
        await connection.execute(statement)
        found.append(connection.in_transaction)
    await connection.commit()
    return found, connection.in_transaction, connection.isolation_level


@pytest.mark.parametrize(
    "scenario",
    [
        nothing_executed,
        fetching,
        writing,
        row_factories,
        closed_cursor,
        errors,
        shortcuts,
        copies,
        transactions,
    ],
)
async def test_as_plain(sqlite: SQLiteBackend, scenario: Scenario) -> None:
    """The application that asks for the driver's connection sees no difference."""
    async with opened(sqlite, aiosqlite.connect) as plain:
        expected = await scenario(plain)
    async with opened(sqlite) as connection:
        assert isinstance(connection.cursor(), Cursor)
        assert repr(expected) == repr(await scenario(connection))


# Rows fetched ahead


async def test_stream(connection: Connection, calls: Callable[[], int]) -> None:
    """Rows are made while they are read, 64 or as many as are asked for at once."""
    made: list[int] = []
    await connection.create_function("noted", 1, made.append)
    cursor = connection.cursor()
    await cursor.execute("SELECT noted(id) FROM numbers")
    await cursor.fetchone()
    assert 64 <= len(made) <= 65  # sqlite3 is one row ahead
    assert 2 == calls()
    assert 63 == len(await cursor.fetchmany(63))
    assert 0 == calls()
    assert 100 == len(await cursor.fetchmany(100))
    assert 164 <= len(made) <= 165
    await cursor.fetchone()
    assert list(range(200)) == made
    assert 35 == len(await cursor.fetchall())
    assert 2 == calls()
    await cursor.close()
    assert 0 == calls()


async def test_stream_of_a_session(sqlite: SQLiteBackend) -> None:
    """A stream gives all rows in order, and can be left in the middle."""
    async with shop_database(sqlite) as db:
        rows = [{"id": number} for number in range(1000)]
        async with db:
            await db.write.execute("INSERT INTO items (id) VALUES (:id)", rows)
        async with db:
            stream = await db.read.stream_scalars("SELECT id FROM items")
            assert [*range(1000)] == [number async for number in stream]
            left = await db.read.stream_scalars("SELECT id FROM items")
            assert 0 == await anext(left)
        [[busy, *_]] = await sqlite.fetch("PRAGMA wal_checkpoint(TRUNCATE)")
        assert 0 == busy  # nobody reads any more


async def test_no_lock_of_rows_fetched_ahead(
    connection: Connection, sqlite: SQLiteBackend
) -> None:
    """Nobody waits for a reader that has not read or closed what is here already."""
    cursor = await connection.cursor().execute(SELECT + " LIMIT 50")
    assert (0,) == await cursor.fetchone()
    assert not is_locked(sqlite)
    assert 49 == len(await cursor.fetchall())


async def test_no_lock_of_a_closed_cursor(
    connection: Connection, sqlite: SQLiteBackend
) -> None:
    """A long result keeps its lock until the cursor is closed or used again."""
    cursor = await connection.cursor().execute(SELECT)
    assert is_locked(sqlite)
    await cursor.execute("SELECT 1")
    assert not is_locked(sqlite)
    await cursor.execute(SELECT)
    assert is_locked(sqlite)
    await cursor.close()
    assert not is_locked(sqlite)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT CAST(x'ff' AS text) FROM numbers",
        "SELECT failing(id) FROM numbers",
        "SELECT CASE WHEN id < 100 THEN id ELSE failing(id) END FROM numbers",
    ],
)
async def test_no_lock_after_an_error(
    connection: Connection, sqlite: SQLiteBackend, sql: str
) -> None:
    """A row that cannot be made or read frees the file, also of a kept exception."""

    def failing(_: int) -> int:
        raise LookupError

    await connection.create_function("failing", 1, failing)
    cursor = connection.cursor()
    with pytest.raises(sqlite3.OperationalError) as kept:
        await cursor.execute(sql)
        await cursor.fetchall()
    assert not is_locked(sqlite)
    assert kept.traceback


async def test_idle_thread_refers_to_nothing(connection: Connection) -> None:
    """What a statement has given can be freed before the next statement."""

    class Row:
        pass

    connection.row_factory = lambda *_: Row()  # type: ignore[assignment]
    cursor = await connection.cursor().execute(SELECT)
    rows = [*await cursor.fetchmany(64), *await cursor.fetchall()]
    references = [weakref.ref(each) for each in (rows[0], rows[-1], cursor)]
    del rows, cursor
    gc.collect()
    assert [None] * 3 == [each() for each in references]


# Cancelled


async def is_clean(connection: Connection, backend: SQLiteBackend) -> bool:
    """Tell whether nothing was kept and the connection can be used on."""
    [[count]] = await connection.execute_fetchall("SELECT count(*) FROM numbers")
    return count == 200 and not connection.in_transaction and not is_locked(backend)


async def ended(task: asyncio.Future[Any]) -> asyncio.CancelledError:
    """Wait, give the cancellation with its traceback, which refers to cursors."""
    try:
        await task
    except asyncio.CancelledError as error:
        return error
    raise NotImplementedError


@asynccontextmanager
async def busy_thread(connection: Connection) -> AsyncGenerator[asyncio.Future[None]]:
    """Keep the thread busy with what cannot be interrupted."""
    taken, free = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def block() -> None:
        loop.call_soon_threadsafe(taken.set)
        free.wait()

    future = asyncio.ensure_future(connection.call(block))
    await taken.wait()
    yield future
    free.set()


def queued(connection: Connection) -> Callable[[], Awaitable[int]]:
    async def count() -> int:
        return connection._tx.qsize()

    return count


async def test_cancelled_while_running(
    connection: Connection, sqlite: SQLiteBackend
) -> None:
    """A statement that was begun with is stopped, and undone with the transaction."""
    running = asyncio.Event()
    wake = partial(asyncio.get_running_loop().call_soon_threadsafe, running.set)
    await connection.create_function("wake", 0, wake)
    reading = await connection.cursor().execute(SELECT)
    plain = await connection.execute(SELECT)
    connection.begin_with(BEGIN)
    cursor = connection.cursor()
    sql = f"INSERT INTO numbers SELECT 1000 + ifnull(wake(), 0) + ({ENDLESS})"
    task = asyncio.ensure_future(cursor.execute(sql))
    await running.wait()
    task.cancel()
    kept = await ended(task)
    assert await is_clean(connection, sqlite)
    assert "closed" in str(await tried(reading.fetchmany(100)))
    assert "closed" in str(await tried(plain.fetchmany(100)))
    assert kept.__traceback__ is not None


async def test_cancelled_between_statements(
    connection: Connection, sqlite: SQLiteBackend
) -> None:
    """A cancelled fetch undoes the transaction too, as a cancelled statement does."""
    connection.begin_with(BEGIN)
    await connection.cursor().execute(INSERT)
    cursor = await connection.cursor().execute(SELECT)
    task = asyncio.ensure_future(cursor.fetchall())
    await asyncio.sleep(0)
    task.cancel()
    await ended(task)
    assert await is_clean(connection, sqlite)


async def test_cancelled_before_it_starts(
    connection: Connection, sqlite: SQLiteBackend
) -> None:
    """A statement that waits for the thread is not executed, nor is its BEGIN."""
    traced: list[str] = []
    await connection.set_trace_callback(traced.append)
    async with busy_thread(connection) as other:
        connection.begin_with(BEGIN)
        task = asyncio.ensure_future(connection.cursor().execute(INSERT))
        await asyncio.sleep(0)
        task.cancel()
        await eventually(2, queued(connection))
    await ended(task)
    await other
    assert [] == traced
    assert await is_clean(connection, sqlite)


async def test_cancelled_while_begin_waits(
    connection: Connection, sqlite: SQLiteBackend
) -> None:
    """BEGIN that got its lock after all is undone, the statement is not executed."""
    traced: list[str] = []
    waiting = asyncio.Event()
    loop = asyncio.get_running_loop()

    def note(statement: str) -> None:
        traced.append(statement)
        loop.call_soon_threadsafe(waiting.set)

    await connection.execute("PRAGMA busy_timeout = 5000")
    await connection.set_trace_callback(note)
    with closing(sqlite3.connect(sqlite.path, isolation_level=None)) as other:
        other.execute(BEGIN)
        connection.begin_with(BEGIN)
        task = asyncio.ensure_future(connection.cursor().execute(INSERT))
        await waiting.wait()
        task.cancel()
        await asyncio.sleep(0)
    await ended(task)
    assert INSERT not in traced
    assert await is_clean(connection, sqlite)


async def test_cancelled_while_being_prepared(
    connection: Connection, sqlite: SQLiteBackend
) -> None:
    """A statement is stopped although it started after it was interrupted."""
    preparing, free = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def authorize(*_: object) -> int:
        loop.call_soon_threadsafe(preparing.set)
        free.wait()
        return sqlite3.SQLITE_OK

    await connection.call(partial(connection._conn.set_authorizer, authorize))
    connection.begin_with(BEGIN)
    free.set()
    await connection.cursor().execute(INSERT)
    free.clear()
    preparing.clear()
    task = asyncio.ensure_future(connection.cursor().execute(ENDLESS))
    await preparing.wait()
    task.cancel()
    await eventually(1, queued(connection))  # interrupted at the same time
    free.set()
    await ended(task)
    assert await is_clean(connection, sqlite)


async def test_cancelled_while_others_close(connection: Connection) -> None:
    """The cancelled task hears of its cancellation, not of the closed connection."""
    async with busy_thread(connection) as task:
        closing = asyncio.ensure_future(connection.close())
        await asyncio.sleep(0)
        task.cancel()
        await eventually(2, queued(connection))
    await ended(task)
    await closing


async def test_cancelled_close(connection: Connection) -> None:
    """A cancelled close says so, and the connection is closed."""
    raw = connection._conn
    async with busy_thread(connection):
        task = asyncio.ensure_future(connection.close())
        await asyncio.sleep(0)
        task.cancel()
        await eventually(2, queued(connection))
    await ended(task)
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        raw.interrupt()
    for call in (connection.commit(), connection.cursor().execute(SELECT)):
        with pytest.raises(ValueError, match="no active connection"):
            await call


@pytest.mark.parametrize("end", ["close", "stop", "abandon"])
async def test_ended_in_a_transaction(
    connection: Connection, sqlite: SQLiteBackend, end: str
) -> None:
    """However it ends, an open cursor that somebody refers to keeps no lock."""
    reading = await connection.cursor().execute(SELECT)
    connection.begin_with(BEGIN)
    await connection.cursor().execute(INSERT)
    assert is_locked(sqlite)
    if (ended := getattr(connection, end)()) is not None:
        await ended
    await asyncio.to_thread(connection._thread.join)
    assert not is_locked(sqlite)
    await reading.close()


async def test_ended_in_several_ways(
    connection: Connection, sqlite: SQLiteBackend
) -> None:
    """Who closes what was abandoned, or is being stopped, does not wait in vain."""
    connection.begin_with(BEGIN)
    await connection.cursor().execute(INSERT)
    another = SQLiteBackend(sqlite.path.parent)
    async with asyncio.timeout(10), opened(another) as other:
        connection.abandon()
        await asyncio.gather(connection.close(), connection.close())
        assert connection.stop() is None
        other.stop()
        await asyncio.gather(other.close(), other.close())
    await asyncio.to_thread(connection._thread.join)
    assert not is_locked(sqlite)


async def test_cancelled_while_it_opens(sqlite: SQLiteBackend) -> None:
    """A connection that nobody waits for any more is closed before one hears of it."""
    opening = Connection(str(sqlite.path))
    task: asyncio.Future[Any] = asyncio.ensure_future(opening)
    await asyncio.sleep(0)
    task.cancel()
    assert not (await ended(task)).args
    with pytest.raises(ValueError, match="no active connection"):
        await opening.commit()
