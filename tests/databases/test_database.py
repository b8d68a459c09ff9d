"""Databases: how their engines are made, checked, cared for and closed."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import sqlite3
import sys
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import (
    JSON,
    Column,
    Connection,
    MetaData,
    Table,
    create_engine,
    event,
    make_url,
    select,
    text,
)
from sqlalchemy import exc as sa_exc
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, StaticPool

from asgi_uow import (
    Database,
    force_commit,
    savepoint,
    set_rollback_only,
    unit_of_work,
)
from asgi_uow.errors import (
    ConfigurationError,
    EngineNotInitialisedError,
    MissingDriverError,
    NestedUnitOfWorkError,
    ReadOnlySessionError,
)
from tests.servers import ServerBackend, eventually
from tests.servers.process import free_port
from tests.support.databases import DRIVERS, SERVER_DRIVERS, SERVERS, on
from tests.support.private import IDLE_SINCE, SQLITE_CONNECTION, code_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.pool import ConnectionPoolEntry

    from tests.servers import Backend, MariaDBBackend, PostgreSQLBackend, SQLiteBackend

pytestmark = on(*DRIVERS)

CREATE = "CREATE TABLE t (id INTEGER PRIMARY KEY)"
INSERT = "INSERT INTO t VALUES (:id)"
SELECT = "SELECT id FROM t ORDER BY id"
WITH_PASSWORD = "postgresql://app:s3cret@db.example/shop"

IDENTITY = {
    "asyncmy": "SELECT connection_id()",
    "asyncpg": "SELECT pg_backend_pid()",
    "psycopg": "SELECT pg_backend_pid()",
}
READ_ONLY = {
    "aiosqlite": "SQLITE_READONLY",
    "asyncmy": 1792,
    "asyncpg": "25006",
    "psycopg": "25006",
}
PING = {"asyncmy": "PING", "asyncpg": "PREPARE ", "psycopg": ""}
on_servers = on(*SERVER_DRIVERS)


@pytest.fixture
async def db(backend: Backend) -> AsyncIterator[Database]:
    """A database with a table `t`, one connection for writing, one for reading."""
    await backend.execute(CREATE)
    db = Database.from_url(backend.url, pool_size=1, max_overflow=0)
    yield db
    await db.dispose()


async def insert(db: Database, *numbers: int) -> None:
    async with db:
        for number in numbers:
            await db.write.execute(INSERT, id=number)


# Making one


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("sqlite:///app.db", "sqlite+aiosqlite:///app.db"),
        ("mysql://h/d", "mysql+asyncmy://h/d?charset=utf8mb4"),
        ("mariadb://h/d", "mariadb+asyncmy://h/d?charset=utf8mb4"),
        ("mysql+asyncmy://h/d?charset=latin1", "mysql+asyncmy://h/d?charset=latin1"),
        ("postgresql://h/d", "postgresql+asyncpg://h/d"),
        ("postgres://h/d", "postgresql+asyncpg://h/d"),
        ("postgresql+psycopg://h/d", "postgresql+psycopg://h/d"),
    ],
)
def test_default_drivers(url: str, expected: str) -> None:
    """A URL that names no driver gets an async one, MySQL's all of Unicode."""
    db = Database.from_url(url, read_urls=[make_url(url)])
    assert [expected] * 2 == [str(engine.url) for engine in (db.engine, *db.readers)]
    assert expected == db.name


async def test_defaults_that_suit_mariadb(mariadb: MariaDBBackend) -> None:
    """Connections are replaced before the server ends them; every letter is kept."""
    db = Database.from_url(mariadb.url)
    async with db:
        server_ends_after = await db.write.scalar("SELECT @@wait_timeout")
        assert "\N{PILE OF POO}" == await db.write.scalar(
            "SELECT :letter", letter="\N{PILE OF POO}"
        )
    await db.dispose()
    for engine in (db.engine, *db.readers):
        assert 0 < engine.sync_engine.pool._recycle < server_ends_after


async def test_options_win(mariadb: MariaDBBackend) -> None:
    """What the caller passes goes to every engine and wins over the defaults."""
    db = Database.from_url(mariadb.url, read_urls=[mariadb.url], pool_recycle=7)
    engines = [db.engine, db.read_engine, *db.readers]
    assert [7] * 3 == [engine.sync_engine.pool._recycle for engine in engines]


@pytest.mark.parametrize(
    ("url", "options", "kind", "message"),
    [
        ("s3cret", {}, ConfigurationError, "The database URL cannot be read"),
        (
            "postgresql://app:s3cret@db.example:port/shop",
            {},
            ConfigurationError,
            "has to be percent-encoded",
        ),
        (
            "nosql://app:s3cret@db.example",
            {},
            ConfigurationError,
            "SQLAlchemy knows no database 'nosql'.",
        ),
        (
            "sqlite+pysqlite:///s3cret",
            {},
            ConfigurationError,
            r"'sqlite\+pysqlite' is not an async driver: leave the driver out",
        ),
        (
            "postgresql+psycopg2://app:s3cret@db.example/shop",
            {},
            ConfigurationError,
            r"'postgresql\+psycopg2' is not an async driver: leave the driver out",
        ),
        (
            "mysql+aiomysql://app:s3cret@db.example/shop",
            {},
            MissingDriverError,
            "'aiomysql' is not installed: install aiomysql.",
        ),
        (
            WITH_PASSWORD,
            {"pool_sise": 5},
            ConfigurationError,
            r"Invalid argument\(s\) 'pool_sise'",
        ),
    ],
)
def test_a_database_that_cannot_work(
    url: str,
    options: dict[str, Any],
    kind: type[ConfigurationError],
    message: str,
) -> None:
    """The error says what to change, and shows no password."""
    with pytest.raises(kind, match=message) as caught:
        Database.from_url(url, **options)
    assert "s3cret" not in f"{caught.value}{caught.value!r}"


@pytest.mark.parametrize(
    ("scheme", "extra"),
    [("sqlite", "sqlite"), ("mysql", "mysql"), ("postgresql", "postgresql")],
)
def test_a_usual_driver_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, scheme: str, extra: str
) -> None:
    """The error names the extra that brings the driver."""
    for name in ("aiosqlite", "asyncmy", "asyncpg"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, SQLITE_CONNECTION, raising=False)
    with pytest.raises(MissingDriverError, match=rf"'asgi-uow\[{extra}\]'"):
        Database.from_url(f"{scheme}:///app")


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("sqlite:///app.db", "takes an AsyncEngine, not str: .*Database.from_url"),
        (create_engine("sqlite://"), "takes an AsyncEngine, not Engine: "),
        (create_async_engine("sqlite+aiosqlite://"), "A StaticPool hands its one"),
        (
            create_async_engine("sqlite+aiosqlite:///x", poolclass=StaticPool),
            "the rollback of one undoes",
        ),
    ],
    ids=["str", "Engine", "in memory", "StaticPool"],
)
def test_an_engine_that_cannot_work(engine: object, message: str) -> None:
    """Not an AsyncEngine, or one connection for everybody: refused, with a remedy."""
    with pytest.raises(ConfigurationError, match=message):
        Database(engine)  # type: ignore[arg-type]


def test_a_reader_that_cannot_work() -> None:
    """A reader is checked as the writer is, and is another engine than it."""
    writer = create_async_engine("sqlite+aiosqlite:///app.db")
    not_async: Any = create_engine("sqlite://")
    for reader in (not_async, writer):
        with pytest.raises(ConfigurationError):
            Database(writer, readers=[reader])
    late = Database(None, readers=[writer])
    with pytest.raises(ConfigurationError, match="cannot be the writer"):
        late.engine = writer


@pytest.mark.parametrize(
    "option", ["sync_session_class", "close_resets_only", "bind", "autocommit"]
)
def test_reserved_session_options(option: str) -> None:
    """A session option that would undo a promise is refused."""
    options: dict[str, Any] = {option: None}
    with pytest.raises(ConfigurationError, match=f"'{option}' belongs to asgi-uow"):
        Database(None, **options)


async def test_session_options(sqlite: SQLiteBackend) -> None:
    """Objects outlive the commit; every other option is SQLAlchemy's."""
    db = Database(create_async_engine(sqlite.url), autoflush=False, info={"app": "x"})
    async with db:
        sync_session = db.write.sync_session
        assert not sync_session.autoflush
        assert not sync_session.expire_on_commit
        assert {"app": "x"} == sync_session.info == db.read.info


async def test_commit_on_exit(sqlite: SQLiteBackend) -> None:
    """Where leaving the block does not commit, `force_commit()` does."""
    await sqlite.execute(CREATE)
    db = Database.from_url(sqlite.url, commit_on_exit=False)
    await insert(db, 1)
    assert [] == await sqlite.fetch(SELECT)
    async with db:
        await db.write.execute(INSERT, id=2)
        force_commit()
    assert [(2,)] == await sqlite.fetch(SELECT)
    await db.dispose()


# Passwords


def test_no_password_is_shown() -> None:
    """A database shows its URL without the password."""
    db = Database.from_url(WITH_PASSWORD)
    assert "postgresql+asyncpg://app:***@db.example/shop" == db.name
    assert f"Database({db.name})" == repr(db)
    assert db.name in repr(unit_of_work(db).databases)


@pytest.mark.parametrize("drivername", ["mysql", "postgresql", "postgresql+psycopg"])
async def test_no_password_is_logged(
    drivername: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the logs nor the error of a failing connection show the password."""
    caplog.set_level(logging.DEBUG)
    db = Database.from_url(
        f"{drivername}://app:s3cret@127.0.0.1:{free_port()}/shop", echo="debug"
    )
    async with db:
        for session in (db.read, db.write):
            with pytest.raises((sa_exc.OperationalError, OSError)) as caught:
                await session.execute("SELECT 1")
            assert "s3cret" not in f"{caught.value}{caught.value!r}"
        set_rollback_only("nothing was written")
    assert "s3cret" not in caplog.text


# Without an engine


async def test_without_an_engine(sqlite: SQLiteBackend) -> None:
    """A database can be made before its engine is known; using it says so."""
    db = Database(None)
    assert "Database(no engine)" == repr(db)
    for name in ("engine", "read_engine", "readers", "name"):
        with pytest.raises(EngineNotInitialisedError, match="create it with Database"):
            getattr(db, name)
    with pytest.raises(EngineNotInitialisedError):
        await db.dispose()
    await db.dispose_owned()
    with pytest.raises(EngineNotInitialisedError):
        await insert(db, 1)
    db.engine = create_async_engine(sqlite.url)
    async with db:
        assert 1 == await db.write.scalar("SELECT 1")
        assert 1 == await db.read.scalar("SELECT 1")
    await db.dispose()


def test_an_engine_is_assigned_once() -> None:
    """The engine of a database that is in use is never exchanged."""
    db = Database.from_url("sqlite:///app.db")
    engine = db.engine
    with pytest.raises(ConfigurationError, match="make another Database"):
        db.engine = create_async_engine("sqlite+aiosqlite:///other.db")
    assert engine is db.engine


# Closing


@on(*SERVERS)
async def test_dispose(backend: ServerBackend) -> None:
    """Every pooled connection is closed: the writer's, the reader's, the replicas'."""
    url = backend.url
    db = Database.from_url(url, read_urls=[url])
    async with db, db.read_engine.connect():
        await db.write.execute("SELECT 1")
        await db.read.execute("SELECT 1")
        async with db.readers[0].connect():
            assert 3 <= await backend.connections()
    await db.dispose()
    await eventually(0, backend.connections)


@on(*SERVERS)
async def test_dispose_owned(backend: ServerBackend) -> None:
    """What asgi-uow made is closed, an engine that was passed in is left alone."""
    engine = create_async_engine(backend.url)
    for db, left in (
        (Database.from_url(backend.url), 0),
        (Database(engine), 1),
    ):
        async with db:
            assert 1 == await db.read.scalar("SELECT 1")
            await db.write.execute("SELECT 1")
        assert 2 == await backend.connections()
        await db.dispose_owned()
        await eventually(left, backend.connections)
    await engine.dispose()


async def test_dispose_owned_in_memory() -> None:
    """An in-memory database that was passed in is not closed: it would be gone."""
    engine = create_async_engine(
        "sqlite+aiosqlite://",
        poolclass=AsyncAdaptedQueuePool,
        pool_size=1,
        max_overflow=0,
    )
    db = Database(engine)
    async with db:
        await db.write.execute(CREATE)
    await db.dispose_owned()
    async with db:
        assert [] == (await db.read.execute(SELECT)).all()
    await db.dispose()


# Reading only


async def test_reading_only(backend: Backend, db: Database) -> None:
    """The database refuses a write; the connection still reads, the writer writes."""
    identity = IDENTITY.get(backend.driver, "SELECT 1")
    async with db:
        before = await db.read.scalar(identity)
    for statement in ("INSERT INTO t VALUES (1)", "CREATE TABLE u (id INTEGER)"):
        async with db:
            with pytest.raises(ReadOnlySessionError, match="current_session") as caught:
                await db.read.execute(statement)
            assert READ_ONLY[backend.driver] == code_of(caught.value.__cause__)
            assert [] == (await db.read.execute(SELECT)).all()
    async with db:
        assert before == await db.read.scalar(identity)
    await insert(db, 2)
    async with db:
        assert [2] == (await db.read.scalars(SELECT)).all()
    assert [(2,)] == await backend.fetch(SELECT)


async def test_the_read_engine_of_an_engine(postgresql: PostgreSQLBackend) -> None:
    """An engine that is passed in gets a read engine that connects as it does."""
    engine = create_async_engine(
        postgresql.url,
        connect_args={"server_settings": {"application_name": "the shop"}},
        pool_size=3,
    )
    db = Database(engine)
    assert engine is db.engine
    async with db:
        assert "the shop" == await db.read.scalar("SHOW application_name")
        assert "on" == await db.read.scalar("SHOW transaction_read_only")
        assert "the shop" == await db.write.scalar("SHOW application_name")
        assert "off" == await db.write.scalar("SHOW transaction_read_only")
    [reader] = db.readers
    assert db.read_engine is reader
    assert isinstance(reader.sync_engine.pool, AsyncAdaptedQueuePool)
    assert 3 == reader.sync_engine.pool.size()
    await db.dispose()


async def test_the_read_engine_understands_as_the_writer(sqlite: SQLiteBackend) -> None:
    """Engine options that give values their meaning hold for reads, too."""

    def decode(value: str) -> tuple[str, str]:
        return "mine", value

    engine = create_async_engine(
        sqlite.url,
        json_deserializer=decode,
        execution_options={"schema_translate_map": {"shop": None}},
    )
    db = Database(engine)
    number = Table("t", MetaData(), Column("id", JSON), schema="shop").c.id
    async with db:
        await db.write.execute("CREATE TABLE t (id JSON)")
        await db.write.execute("INSERT INTO t VALUES ('[1]')")
        assert ("mine", "[1]") == await db.write.scalar(select(number))
    async with db:
        assert ("mine", "[1]") == await db.read.scalar(select(number))
    await db.dispose()


async def test_replicas(
    backend: Backend, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Reads go to the replica, which refuses writes; writes to the writer."""
    await backend.execute(CREATE, "INSERT INTO t VALUES (1)")
    replica = create_async_engine(backend.url)
    writer = tmp_path_factory.mktemp("writer") / "app.db"
    db = Database.from_url(f"sqlite:///{writer}")
    with_replica = Database(db.engine, readers=[replica])
    async with db:
        await db.write.execute(CREATE)
    async with with_replica as uow:
        assert [1] == (await with_replica.read.scalars(SELECT)).all()
        with pytest.raises(ReadOnlySessionError):
            await with_replica.read.execute("DELETE FROM t")
        await uow.session().execute(INSERT, id=2)
    assert (replica,) == with_replica.readers
    await with_replica.dispose()
    await db.dispose()
    assert [(1,)] == await backend.fetch(SELECT)
    with contextlib.closing(sqlite3.connect(writer)) as connection:
        assert [(2,)] == connection.execute(SELECT).fetchall()


# SQLite files


async def test_sqlite_settings(sqlite: SQLiteBackend) -> None:
    """Readers do not block writers, locks are waited for, foreign keys are kept."""
    db = Database.from_url(sqlite.url)
    expected = {"journal_mode": "wal", "busy_timeout": 5000, "foreign_keys": 1}
    async with db:
        for session in (db.read, db.write):
            assert expected == {
                name: await session.scalar(f"PRAGMA {name}") for name in expected
            }
        assert 1 == await sqlite.open_transactions()  # BEGIN IMMEDIATE, for a read
    assert 0 == await sqlite.open_transactions()
    await db.dispose()


async def test_a_file_that_somebody_reads(sqlite: SQLiteBackend) -> None:
    """The first connection waits for a reader in its way, then keeps a WAL.

    Others that connect to a new file at the same moment are such readers.
    """
    await sqlite.execute("CREATE TABLE items (id INTEGER)")
    await sqlite.execute("INSERT INTO items VALUES (1), (2)")
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
        assert 2 == await db.write.scalar("SELECT count(*) FROM items")
        assert "wal" == await db.write.scalar("PRAGMA journal_mode")
    assert "BEGIN EXCLUSIVE" in sent
    await db.dispose()
    reader.close()


async def test_a_file_that_stays_locked(
    sqlite: SQLiteBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that does not end is an error when the time to wait is over."""
    monkeypatch.setattr("asgi_uow._databases.sqlite.BUSY_TIMEOUT", 100)
    await sqlite.execute("CREATE TABLE items (id INTEGER)")
    await sqlite.execute("INSERT INTO items VALUES (1), (2)")
    db = Database.from_url(sqlite.url)
    with contextlib.closing(sqlite3.connect(sqlite.path)) as reader:
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
    await sqlite.execute("CREATE TABLE items (id INTEGER)")
    db = Database.from_url(f"sqlite+aiosqlite:///file:{sqlite.path}?mode=ro&uri=true")
    async with db:
        assert 0 == await db.read.scalar("SELECT count(*) FROM items")
    await db.dispose()


async def test_a_file_that_is_none(sqlite: SQLiteBackend) -> None:
    """What is no database is an error at once."""
    sqlite.path.write_text("no database, but long enough to be looked at " * 9)
    db = Database.from_url(sqlite.url)
    with pytest.raises(sa_exc.DatabaseError, match="file is not a database"):
        async with db:
            await db.read.scalar("SELECT 1")
    await db.dispose()


async def test_sqlite_foreign_keys(sqlite: SQLiteBackend) -> None:
    """A row that refers to nothing is refused."""
    await sqlite.execute(CREATE, "CREATE TABLE u (t INTEGER REFERENCES t (id))")
    db = Database.from_url(sqlite.url)
    with pytest.raises(sa_exc.IntegrityError, match="FOREIGN KEY constraint failed"):
        async with db:
            await db.write.execute("INSERT INTO u VALUES (1)")
    await db.dispose()


async def test_savepoints(backend: Backend, db: Database) -> None:
    """A savepoint undoes its own rows, also when it is the first of a unit."""
    async with db:
        with contextlib.suppress(ZeroDivisionError):
            async with savepoint():
                await db.write.execute(INSERT, id=1)
                raise ZeroDivisionError
        async with savepoint():
            await db.write.execute(INSERT, id=2)
        assert [] == await backend.fetch(SELECT)
        await db.write.execute(INSERT, id=3)
    assert [(2,), (3,)] == await backend.fetch(SELECT)


async def test_rollback_of_a_released_savepoint(backend: Backend, db: Database) -> None:
    """RELEASE keeps nothing of a unit that is rolled back."""
    with contextlib.suppress(ZeroDivisionError):
        async with db:
            async with savepoint():
                await db.write.execute(INSERT, id=1)
            raise ZeroDivisionError
    assert [] == await backend.fetch(SELECT)


async def test_concurrent_writers(sqlite: SQLiteBackend) -> None:
    """Units that read before they write wait for each other, and none fails."""
    await sqlite.execute(CREATE)
    db = Database.from_url(sqlite.url)

    async def read_then_write() -> None:
        async with db:
            last = await db.write.scalar("SELECT count(*) FROM t")
            await db.write.execute(INSERT, id=last)

    await asyncio.gather(*(read_then_write() for _ in range(5)))
    assert [(number,) for number in range(5)] == await sqlite.fetch(SELECT)
    await db.dispose()


# SQLite in memory


async def test_in_memory() -> None:
    """One connection, one unit at a time: a rollback undoes nobody else's rows."""
    db = Database.from_url("sqlite://")
    assert db.read_engine is db.engine
    async with db:
        await db.write.execute(CREATE)
    both_are_there = asyncio.Barrier(2)

    async def work(number: int) -> None:
        async with db:
            await both_are_there.wait()
            await db.write.execute(INSERT, id=number)
            assert [number] == (await db.read.scalars(SELECT)).all()
            raise ZeroDivisionError

    errors = await asyncio.gather(work(1), work(2), return_exceptions=True)
    assert [ZeroDivisionError] * 2 == [type(error) for error in errors]
    await asyncio.gather(insert(db, 3), insert(db, 4))
    async with db:
        assert [3, 4] == (await db.read.scalars(SELECT)).all()
        with pytest.raises(NestedUnitOfWorkError):  # it would wait for ever
            await unit_of_work(db, independent=True).__aenter__()
    await db.dispose()


@pytest.mark.parametrize("options", [{"pool_size": 5}, {"poolclass": NullPool}])
async def test_in_memory_is_one_connection(options: dict[str, Any]) -> None:
    """A pool made for servers does not make several databases of one in memory."""
    db = Database.from_url("sqlite://", **options)
    async with db:
        await db.write.execute(CREATE)
    both_are_there = asyncio.Barrier(2)

    async def work(number: int) -> None:
        async with db:
            await both_are_there.wait()
            await db.write.execute(INSERT, id=number)

    await asyncio.gather(work(1), work(2))
    async with db:
        assert [1, 2] == (await db.read.scalars(SELECT)).all()
    await db.dispose()


# Looking after connections


def leave_open(connection: Connection) -> None:
    """Insert behind SQLAlchemy's back, and end nothing."""
    cursor = connection.connection.cursor()
    if connection.dialect.name == "sqlite":
        cursor.execute("BEGIN IMMEDIATE")
    cursor.execute("INSERT INTO t VALUES (1)")
    cursor.close()


async def test_a_transaction_left_open(backend: Backend, db: Database) -> None:
    """A connection with an open transaction is rolled back before it is pooled."""
    async with db.engine.connect() as connection:
        await connection.run_sync(leave_open)
        assert 1 == await backend.open_transactions()
    await eventually(0, backend.open_transactions)
    await insert(db, 2)
    assert [(2,)] == await backend.fetch(SELECT)


async def test_a_transaction_that_failed(backend: Backend, db: Database) -> None:
    """After an error the same connection serves the next unit, which starts clean."""
    await insert(db, 1)
    for _ in range(2):
        with pytest.raises(sa_exc.IntegrityError):
            await insert(db, 2, 1)
        assert 0 == await backend.open_transactions()
    await insert(db, 3)
    assert [(1,), (3,)] == await backend.fetch(SELECT)


async def test_a_commit_that_failed(sqlite: SQLiteBackend) -> None:
    """After a failed COMMIT the transaction is open; it is not committed by another."""
    await sqlite.execute(
        CREATE, "CREATE TABLE u (t REFERENCES t (id) DEFERRABLE INITIALLY DEFERRED)"
    )
    db = Database.from_url(sqlite.url, pool_size=1, max_overflow=0)
    async with db.engine.connect() as connection:
        await connection.execute(text("INSERT INTO t VALUES (1)"))
        await connection.execute(text("INSERT INTO u VALUES (2)"))
        with pytest.raises(sa_exc.IntegrityError):
            await connection.commit()
    await insert(db, 2)
    assert [(2,)] == await sqlite.fetch(SELECT)
    await db.dispose()


class Stubborn(sqlite3.Connection):
    """A connection that always says that a transaction is open."""

    @property
    def in_transaction(self) -> bool:
        return True


async def test_a_rollback_that_does_nothing(
    sqlite: SQLiteBackend, caplog: pytest.LogCaptureFixture
) -> None:
    """A connection that cannot be rolled back is thrown away."""
    await sqlite.execute(CREATE)
    db = Database.from_url(sqlite.url, connect_args={"factory": Stubborn})
    async with db.engine.connect() as connection:
        await connection.run_sync(leave_open)
    assert "Exception during reset" in caplog.text
    assert 0 == await sqlite.open_transactions()
    await db.dispose()


async def test_a_forgotten_connection(postgresql: PostgreSQLBackend) -> None:
    """What the garbage collector finds is closed, not talked to."""
    await postgresql.execute(CREATE)
    db = Database.from_url(postgresql.url)
    forgotten = [await db.engine.connect()]
    await forgotten[0].run_sync(leave_open)

    def forget() -> None:
        forgotten.clear()
        gc.collect()

    with pytest.warns(sa_exc.SAWarning, match="garbage collector"):
        forget()
    await eventually(0, postgresql.open_transactions)
    await db.dispose()


@on_servers
async def test_a_connection_that_died(backend: ServerBackend, db: Database) -> None:
    """A pooled connection that the server has closed is replaced without an error."""
    await insert(db, 1)
    for _ in range(2):
        async with db:
            assert 1 == await db.read.scalar("SELECT count(*) FROM t")
        await backend.kill_connections()
        async with db:
            assert 1 == await db.write.scalar("SELECT count(*) FROM t")


@on_servers
async def test_replicas_cost_no_more(backend: ServerBackend) -> None:
    """A read on a replica is one round trip, as on the read engine."""
    async with backend.proxy() as proxy:
        replica = backend.through(proxy.port)
        db = Database.from_url(backend.url, read_urls=[replica])
        async with db:
            await db.read.execute("SELECT 1")
        proxy.clear()
        async with db:
            await db.read.execute("SELECT 1")
        assert ["SELECT 1"] == proxy.trips
        await db.dispose()


@on_servers
async def test_care_costs_nothing(backend: ServerBackend) -> None:
    """A connection that is alive is handed out and taken back without a round trip."""
    async with backend.proxy() as proxy:
        db = Database.from_url(backend.through(proxy.port))
        async with db:
            await db.read.execute("SELECT 1")
        proxy.clear()
        async with db:
            await db.read.execute("SELECT 1")
        assert ["SELECT 1"] == proxy.trips
        await db.dispose()


def has_been_idle_for_long(_: object, entry: ConnectionPoolEntry) -> None:
    entry.info[IDLE_SINCE] = float("-inf")


@on_servers
@pytest.mark.parametrize("answers", [True, False])
async def test_ping(*, backend: ServerBackend, answers: bool) -> None:
    """After long idleness a connection is asked first, and replaced if need be."""
    async with backend.proxy() as proxy:
        db = Database.from_url(backend.through(proxy.port))
        event.listen(db.read_engine.sync_engine, "checkin", has_been_idle_for_long)
        async with db:
            await db.read.execute("SELECT 1")
        proxy.clear()
        if not answers:
            proxy.cut_before(lambda _: True)
        async with db:
            assert 42 == await db.read.scalar("SELECT 42")
        assert PING[backend.driver] == proxy.trips[0]
        assert "SELECT 42" == proxy.trips[-1]
        assert (1 if answers else 2) == proxy.connections
        await db.dispose()
