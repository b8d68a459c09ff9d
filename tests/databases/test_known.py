"""What is known of each database, asked of real ones."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, get_args

import pytest
from asyncmy import errors as asyncmy_errors
from sqlalchemy import exc as sa_exc
from sqlalchemy import make_url, text
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.aiosqlite import SQLiteDialect_aiosqlite
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_uow import Database
from asgi_uow._databases import known
from asgi_uow._databases.configuration import create_engine
from asgi_uow._databases.driver_errors import (
    code_of,
    is_in_doubt,
    is_lost,
    is_unavailable,
    means,
)
from asgi_uow._databases.known import database_of, driver_of, is_memory
from asgi_uow._databases.postgresql import Asyncpg
from tests.servers import eventually
from tests.servers.process import free_port
from tests.support.databases import DRIVERS, SERVER_DRIVERS, on

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.ext.asyncio import AsyncEngine

    from tests.servers import Backend, MariaDBBackend, ServerBackend, SQLiteBackend

pytestmark = on(*DRIVERS)

CREATE = "CREATE TABLE t (id INTEGER PRIMARY KEY)"
INSERT = text("INSERT INTO t VALUES (1)")

DUPLICATE = {
    "aiosqlite": "SQLITE_CONSTRAINT_PRIMARYKEY",
    "asyncmy": 1062,
    "asyncpg": "23505",
    "psycopg": "23505",
}
LOCKED = {
    "aiosqlite": "SQLITE_BUSY",
    "asyncmy": 1205,
    "asyncpg": "55P03",
    "psycopg": "55P03",
}
on_servers = on(*SERVER_DRIVERS)


class UnheardOf(SQLiteDialect_aiosqlite):
    """A dialect whose driver asgi-uow knows nothing about."""

    driver = "unheard_of"
    supports_statement_cache = True


registry.register("sqlite.unheard_of", __name__, "UnheardOf")


@pytest.fixture
async def engine(backend: Backend) -> AsyncIterator[AsyncEngine]:
    """An engine as SQLAlchemy makes it, with a table `t`."""
    await backend.execute(CREATE)
    engine = create_async_engine(backend.url)
    yield engine
    await engine.dispose()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("sqlite://", True),
        ("sqlite+aiosqlite://", True),
        ("sqlite:///:memory:", True),
        ("sqlite:///file:shared?mode=memory&cache=shared&uri=true", True),
        ("sqlite:///app.db", False),
        ("sqlite:///file:app.db?mode=ro&uri=true", False),
        ("postgresql://localhost", False),
    ],
)
def test_is_memory(*, url: str, expected: bool) -> None:
    """A SQLite database without a file lives in its connection."""
    assert expected == is_memory(make_url(url))


@pytest.mark.parametrize("scheme", ["mysql", "mariadb+asyncmy"])
def test_mysql_connections_are_recycled(scheme: str) -> None:
    """Only the MySQL family ends connections that are idle for long."""
    assert 1800 == recycled_after(f"{scheme}://localhost/shop")
    assert -1 == recycled_after("postgresql://localhost/shop")


def recycled_after(url: str) -> int:
    """The seconds after which the pool replaces a connection; -1 is never."""
    return create_engine(url, {}).sync_engine.pool._recycle


def test_tables_of_codes() -> None:
    """A table of codes gives no meaning that nobody asks for."""
    meanings = set(get_args(known.Meaning))
    for database in known.DATABASES.values():
        assert meanings >= database.CODES.keys()
    assert all(map(known.codes, meanings))


def test_a_driver_that_another_file_describes() -> None:
    """A database whose file leaves a driver out has it as it is elsewhere."""
    dialect = make_url("postgresql+psycopg://").get_dialect()()
    expected = driver_of(dialect)
    assert expected.is_known
    for name in ("mariadb", "unheard_of"):
        dialect.name = name
        assert expected is driver_of(dialect)


async def test_what_a_connection_tells(engine: AsyncEngine) -> None:
    """A driver's connection knows whether a transaction is open."""
    driver = driver_of(engine.dialect)
    async with engine.connect() as connection:
        raw = (await connection.get_raw_connection()).driver_connection
        assert not driver.in_transaction(raw)
        await connection.execute(INSERT)
        assert driver.in_transaction(raw)
        assert not driver.is_dead(raw)
        await connection.rollback()
        assert not driver.in_transaction(raw)


@on_servers
async def test_what_a_dead_connection_tells(
    backend: ServerBackend, engine: AsyncEngine
) -> None:
    """A driver's connection knows that the server has closed it; no query asks."""
    driver = driver_of(engine.dialect)
    async with engine.connect() as connection:
        raw = (await connection.get_raw_connection()).driver_connection
        await backend.kill_connections()

        async def is_dead() -> bool:
            return driver.is_dead(raw)

        await eventually(True, is_dead)
        await connection.invalidate()


@on("asyncpg")
@pytest.mark.parametrize("first", ["idle", "in flight"])
async def test_a_statement_that_only_the_driver_knows(
    engine: AsyncEngine, first: str
) -> None:
    """asyncpg's connection is busy until the answer is there, whatever was seen first.

    Where the future for the answer is has been learnt of another state, or of this.
    """
    lock, driver = "SELECT pg_advisory_lock(1)", Asyncpg()
    async with engine.connect() as one, engine.connect() as another:
        holder = (await one.get_raw_connection()).driver_connection
        raw: Any = (await another.get_raw_connection()).driver_connection
        for looked in range(3):
            await one.exec_driver_sql(lock)
            if looked or first == "idle":
                assert not driver.is_busy(raw)
            waiting = asyncio.create_task(raw.fetchval(lock))
            await asyncio.sleep(0)
            assert driver.is_busy(raw), looked
            assert not driver.is_busy(holder)
            await one.exec_driver_sql("SELECT pg_advisory_unlock(1)")
            await waiting
            assert not driver.is_busy(raw)
            await raw.fetchval("SELECT pg_advisory_unlock(1)")


@on("psycopg")
async def test_what_a_closed_connection_tells(engine: AsyncEngine) -> None:
    """A psycopg connection that was closed has no socket left to look at."""
    async with engine.connect() as connection:
        raw = (await connection.get_raw_connection()).driver_connection
        assert raw is not None
        await raw.close()
        assert driver_of(engine.dialect).is_dead(raw)
        await connection.invalidate()


async def test_an_unknown_driver(sqlite: SQLiteBackend) -> None:
    """A driver nobody heard of is always rolled back, and works."""
    db = Database.from_url(f"sqlite+unheard_of:///{sqlite.path}")
    assert not driver_of(db.engine.dialect).is_known
    for database in known.DATABASES.values():
        assert all(driver.is_known for driver in database.DRIVERS.values())
    async with db:
        await db.write.execute(CREATE)
    with contextlib.suppress(ZeroDivisionError):
        async with db:
            await db.write.execute("INSERT INTO t VALUES (1)")
            raise ZeroDivisionError
    async with db:
        await db.write.execute("INSERT INTO t VALUES (2)")
        with pytest.raises(sa_exc.IntegrityError):
            await db.write.execute("INSERT INTO t VALUES (2)")
        assert 2 == await db.read.scalar("SELECT id FROM t")
    async with db:
        assert 2 == await db.read.scalar("SELECT id FROM t")
    await db.dispose()
    assert [(2,)] == await sqlite.fetch("SELECT id FROM t")


@on("aiosqlite", "asyncmy")
async def test_a_transaction_that_nobody_remembers(engine: AsyncEngine) -> None:
    """SQLite and MariaDB cannot be asked what became of a transaction."""
    database = database_of(engine.dialect)
    assert database.TRANSACTION_ID is None
    assert await database.was_committed(engine, "1", 1) is None


async def test_a_database_without_replicas(sqlite: SQLiteBackend) -> None:
    """SQLite has no position, and nothing to wait for."""
    engine = create_async_engine(sqlite.url)
    database = database_of(engine.dialect)
    async with engine.connect() as connection:
        assert await database.position(connection) is None
        assert not await database.wait_for(connection, "0/1", 1)
    await engine.dispose()


async def test_the_code_of_a_duplicate(engine: AsyncEngine) -> None:
    """The code is the driver's own; a duplicate key stays a duplicate key."""
    async with engine.connect() as connection:
        await connection.execute(INSERT)
        with pytest.raises(sa_exc.IntegrityError) as caught:
            await connection.execute(INSERT)
        await connection.rollback()
    wrapped = RuntimeError("from the application")
    wrapped.__cause__ = caught.value
    for error in (caught.value, caught.value.orig, wrapped):
        assert DUPLICATE[engine.dialect.driver] == code_of(error)
    assert not means(caught.value, "conflict")
    assert not is_unavailable(caught.value)


async def test_a_lock_somebody_else_holds(
    backend: Backend, engine: AsyncEngine
) -> None:
    """A conflict with another transaction may be gone a moment later."""
    await backend.execute("INSERT INTO t VALUES (1)")
    first, second = "SELECT * FROM t FOR UPDATE", "SELECT * FROM t FOR UPDATE NOWAIT"
    if backend.name == "sqlite":
        first, second = "BEGIN IMMEDIATE", "BEGIN IMMEDIATE"
    async with engine.connect() as one, engine.connect() as other:
        if backend.name == "sqlite":
            await other.exec_driver_sql("PRAGMA busy_timeout = 0")
        await one.exec_driver_sql(first)
        with pytest.raises(sa_exc.DBAPIError) as caught:
            await other.exec_driver_sql(second)
        await one.rollback()
        await other.rollback()
    assert LOCKED[engine.dialect.driver] == code_of(caught.value)
    assert means(caught.value, "conflict")
    assert not is_unavailable(caught.value)


@on("aiosqlite")
async def test_a_snapshot_that_is_too_old(
    backend: SQLiteBackend, engine: AsyncEngine
) -> None:
    """A transaction that reads first, and then writes, may find that it is too late."""
    await backend.execute("PRAGMA journal_mode = WAL")
    async with engine.connect() as connection:
        await connection.exec_driver_sql("BEGIN")
        await connection.exec_driver_sql("SELECT * FROM t")
        await backend.execute("INSERT INTO t VALUES (2)")
        with pytest.raises(sa_exc.OperationalError) as caught:
            await connection.execute(INSERT)
        await connection.rollback()
    assert "SQLITE_BUSY_SNAPSHOT" == code_of(caught.value)
    assert means(caught.value, "conflict")


@on("aiosqlite")
@pytest.mark.usefixtures("engine")
async def test_a_cache_that_is_shared(backend: SQLiteBackend) -> None:
    """With a shared cache a table is locked, and SQLite does not wait for it."""
    url = f"sqlite+aiosqlite:///file:{backend.path}?cache=shared&uri=true"
    shared = create_async_engine(url)
    async with shared.connect() as one, shared.connect() as other:
        await one.execute(INSERT)
        with pytest.raises(sa_exc.OperationalError) as caught:
            await other.exec_driver_sql("SELECT * FROM t")
        await one.rollback()
    await shared.dispose()
    assert "SQLITE_LOCKED_SHAREDCACHE" == code_of(caught.value)
    assert means(caught.value, "conflict")


@on_servers
async def test_a_connection_that_is_lost(
    backend: ServerBackend, engine: AsyncEngine
) -> None:
    """A statement on a connection that was killed says that it is lost."""
    async with engine.connect() as connection:
        await connection.execute(INSERT)
        await backend.kill_connections()
        with pytest.raises((sa_exc.DBAPIError, OSError)) as caught:
            await connection.execute(INSERT)
    assert is_lost(caught.value)
    assert is_unavailable(caught.value)
    assert not means(caught.value, "conflict")


@pytest.mark.parametrize(
    "drivername", ["mysql+asyncmy", "postgresql+asyncpg", "postgresql+psycopg"]
)
async def test_a_server_that_is_down(drivername: str) -> None:
    """A server that cannot be reached may be back a moment later."""
    engine = create_async_engine(f"{drivername}://app@127.0.0.1:{free_port()}")
    with pytest.raises((sa_exc.OperationalError, OSError)) as caught:
        await engine.connect()
    assert is_unavailable(caught.value)


async def test_a_pool_that_is_exhausted(sqlite: SQLiteBackend) -> None:
    """A pool without a free connection may have one a moment later."""
    engine = create_async_engine(
        sqlite.url, pool_size=1, max_overflow=0, pool_timeout=0.01
    )
    async with engine.connect():
        with pytest.raises(sa_exc.TimeoutError) as caught:
            await engine.connect()
    await engine.dispose()
    assert is_unavailable(caught.value)
    assert code_of(caught.value) is None


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(111, "refused"),  # not raised below SQLAlchemy
        ValueError("1213"),
        ValueError(),
        None,
    ],
    ids=repr,
)
def test_errors_without_a_code(error: BaseException | None) -> None:
    """What no database said has no code, an errno of the system least of all."""
    assert code_of(error) is None
    assert not (error is not None and is_unavailable(error))


@pytest.mark.parametrize(
    ("code", "is_lost", "expected"),
    [
        (1213, False, False),
        (1047, True, False),  # refused before it was tried; the connection is left
        (1180, False, True),
        (2013, True, True),
    ],
)
def test_errors_of_commit(*, code: int, is_lost: bool, expected: bool) -> None:
    """What a Galera node says of a COMMIT that it could not certify is no proof."""
    error = sa_exc.OperationalError(
        "COMMIT", {}, asyncmy_errors.OperationalError(code, "no"), is_lost
    )
    assert expected == is_in_doubt(error)


def test_errors_that_are_each_others_cause() -> None:
    """Who looks for the code comes back from a circle of causes."""
    error, other = ValueError(), KeyError()
    error.__cause__, other.__cause__ = other, error
    assert code_of(error) is None


async def test_a_cancelled_asyncmy_connection(mariadb: MariaDBBackend) -> None:
    """asyncmy's refusal to go on after a cancellation counts as a lost connection."""
    async with mariadb.proxy() as proxy:
        db = Database.from_url(mariadb.through(proxy.port))
        async with db.engine.connect() as connection:
            raw = (await connection.get_raw_connection()).driver_connection
            assert raw is not None
            hold = proxy.hold_answer(lambda trip: trip == "SELECT 42")
            query = asyncio.create_task(raw.query("SELECT 42"))
            await hold.answered.wait()
            query.cancel()
            await asyncio.wait((query,))
            with pytest.raises(sa_exc.InterfaceError) as caught:
                await connection.execute(text("SELECT 43"))
        await db.dispose()
    assert caught.value.orig is not None
    assert means(caught.value.orig, "disconnect")
    assert caught.value.connection_invalidated
    assert not means(ValueError(0), "disconnect")


# What may be shown of a statement


@pytest.mark.parametrize(
    ("statement", "shown"),
    [
        ("CREATE USER ann IDENTIFIED BY 'hunter2'", "CREATE USER"),
        (
            "create  or replace\nuser ann IDENTIFIED BY 'hunter2'",
            "CREATE OR REPLACE USER",
        ),
        ("ALTER USER ann IDENTIFIED BY 'hunter2'", "ALTER USER"),
        ("DROP USER hunter2", "DROP USER"),
        ("SET PASSWORD FOR ann = PASSWORD('hunter2')", "SET PASSWORD"),
        ("GRANT ALL ON *.* TO ann IDENTIFIED BY 'hunter2'", "GRANT"),
        ("TRUNCATE hunter2", "TRUNCATE"),
        ("-- hunter2\n/* 'hunter2' */ ALTER /* hunter2 */ USER ann", "ALTER"),
        ("/*!50000 CREATE USER hunter2 */", "a statement"),
        ("/* hunter2", "a statement"),
        ("", "a statement"),
        ("COMMIT /* hunter2 */", "COMMIT"),
        ("PRAGMA key = hunter2", "PRAGMA"),
        ("SELECT 'hunter2'", "SELECT"),
        ("SELECT E'\\'hunter2'", "SELECT"),
        ('SELECT "hunter2"', "SELECT"),
        ("SELECT $$hunter2$$", "SELECT"),
        ("SELECT $tag$hunter2$tag$", "SELECT"),
        ("SELECT a #hunter2", "SELECT"),
        ("SELECT a --hunter2", "SELECT"),
        ("SELECT a /*hunter2*/", "SELECT"),
        ("SELECT a FROM t LIMIT 42", "SELECT a FROM t LIMIT ?"),
        ("SELECT a-1, 0x2A, 1.5e3, a%7, b:7", "SELECT a-?, ?, ?, a%?, b:?"),
        (
            "SELECT a_1, $1, %s, %(n_1)s, :n_1, ?",
            "SELECT a_1, $1, %s, %(n_1)s, :n_1, ?",
        ),
        ("WITH a AS (SELECT 1) SELECT b", "WITH a AS (SELECT ?) SELECT b"),
        (
            "INSERT INTO t (a) VALUES ($1::VARCHAR(9))",
            "INSERT INTO t (a) VALUES ($1::VARCHAR(?))",
        ),
    ],
)
def test_without_literals(statement: str, shown: str) -> None:
    """No literal and no comment is shown; what is in doubt is not shown at all."""
    assert shown == known.without_literals(statement)


async def test_no_lock() -> None:
    """Where cursors take no lock of SQLAlchemy, the driver alone is asked."""
    await known.NO_LOCK.acquire()
    known.NO_LOCK._locked = True
    assert not known.NO_LOCK._locked
    known.NO_LOCK.release()
