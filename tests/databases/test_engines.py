"""Engines: how a `Database` is made from a URL or an engine, and how it is closed."""

from __future__ import annotations

import asyncio
import logging
import sys
import traceback
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from sqlalchemy import (
    JSON,
    Column,
    MetaData,
    Table,
    create_engine,
    event,
    make_url,
    select,
)
from sqlalchemy import exc as sa_exc
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.aiosqlite import SQLiteDialect_aiosqlite
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, StaticPool

from asgi_uow import (
    Database,
    current_session,
    errors,
    set_rollback_only,
    unit_of_work,
)
from tests.servers import eventually
from tests.servers.process import free_port
from tests.support import shop
from tests.support.asgi import handle
from tests.support.databases import SERVERS, checked_out, on
from tests.support.private import SQLITE_CONNECTION

if TYPE_CHECKING:
    from tests.servers import (
        MariaDBBackend,
        PostgreSQLBackend,
        ServerBackend,
        SQLiteBackend,
    )

WITH_PASSWORD = "postgresql://app:s3cret@db.example/shop"


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
        ("s3cret", {}, errors.ConfigurationError, "The database URL cannot be read"),
        (
            "postgresql://app:s3cret@db.example:port/shop",
            {},
            errors.ConfigurationError,
            "has to be percent-encoded",
        ),
        (
            "nosql://app:s3cret@db.example",
            {},
            errors.ConfigurationError,
            "SQLAlchemy knows no database 'nosql'.",
        ),
        (
            "sqlite+pysqlite:///s3cret",
            {},
            errors.ConfigurationError,
            r"'sqlite\+pysqlite' is not an async driver: leave the driver out",
        ),
        (
            "postgresql+psycopg2://app:s3cret@db.example/shop",
            {},
            errors.ConfigurationError,
            r"'postgresql\+psycopg2' is not an async driver: leave the driver out",
        ),
        (
            "mysql+aiomysql://app:s3cret@db.example/shop",
            {},
            errors.MissingDriverError,
            "'aiomysql' is not installed: install aiomysql.",
        ),
        (
            WITH_PASSWORD,
            {"pool_sise": 5},
            errors.ConfigurationError,
            r"Invalid argument\(s\) 'pool_sise'",
        ),
    ],
)
def test_a_database_that_cannot_work(
    url: str,
    options: dict[str, Any],
    kind: type[errors.ConfigurationError],
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
    with pytest.raises(errors.MissingDriverError, match=rf"'asgi-uow\[{extra}\]'"):
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
    with pytest.raises(errors.ConfigurationError, match=message):
        Database(engine)  # type: ignore[arg-type]


def test_a_reader_that_cannot_work() -> None:
    """A reader is checked as the writer is, and is another engine than it."""
    writer = create_async_engine("sqlite+aiosqlite:///app.db")
    not_async: Any = create_engine("sqlite://")
    for reader in (not_async, writer):
        with pytest.raises(errors.ConfigurationError):
            Database(writer, readers=[reader])
    late = Database(None, readers=[writer])
    with pytest.raises(errors.ConfigurationError, match="cannot be the writer"):
        late.engine = writer


async def test_an_engine_that_was_refused(sqlite: SQLiteBackend) -> None:
    """An engine that was refused as both can still be the writer of a database."""
    engine = create_async_engine(sqlite.url)
    with pytest.raises(errors.ConfigurationError, match="cannot be the writer"):
        Database(engine, readers=[engine])
    db = Database(engine)
    async with db:
        await db.write.execute("CREATE TABLE t (id INTEGER)")
    await db.dispose()
    assert "t" == await sqlite.scalar("SELECT name FROM sqlite_master")


@pytest.mark.parametrize(
    "option", ["sync_session_class", "close_resets_only", "bind", "autocommit"]
)
def test_reserved_session_options(option: str) -> None:
    """A session option that would undo a promise is refused."""
    options: dict[str, Any] = {option: None}
    with pytest.raises(
        errors.ConfigurationError,
        match=f"'{option}' is no option of a session, or belongs",
    ):
        Database(None, **options)


class Weird(SQLiteDialect_aiosqlite):
    """A database that asgi-uow knows nothing of."""

    name = "weird"


def test_unknown_database_is_refused() -> None:
    """Without knowing how reads are made read-only, nothing is promised."""
    registry.register("weird.aiosqlite", __name__, "Weird")

    with pytest.raises(
        errors.ConfigurationError, match="does not know the database 'weird'"
    ):
        Database(create_async_engine("weird+aiosqlite:///weird.db"))


def test_password_in_the_query_is_hidden() -> None:
    """A password given as a query parameter is not shown either."""
    db = Database.from_url("postgresql://h/app?user=u&password=sEcret")

    assert "sEcret" not in repr(db)
    assert "user=u" in repr(db)


@on(*SERVERS)
async def test_autocommit_engine_is_refused(backend: ServerBackend) -> None:
    """With AUTOCOMMIT nothing could be rolled back, so nothing is executed."""
    await shop.create(backend)
    engine = create_async_engine(backend.url, isolation_level="AUTOCOMMIT")
    db = Database(engine)

    response = await handle(lambda: shop.insert(1), db, status=409)

    assert isinstance(response.error, errors.ConfigurationError)
    assert "AUTOCOMMIT" in str(response.error)
    assert [] == await shop.items(backend)
    assert [0, 0] == checked_out(db)
    await db.dispose()
    await engine.dispose()


@on(*SERVERS)
@pytest.mark.parametrize(
    "options", [{"isolation_level": "AUTOCOMMIT"}, {"logging_token": "other"}]
)
async def test_another_engine_is_refused(
    backend: ServerBackend, options: dict[str, str]
) -> None:
    """Nor is a statement on another engine, even if it shares the pool."""
    await shop.create(backend)
    db = Database.from_url(backend.url)
    engine = db.engine.execution_options(**options)
    arguments = {"bind": engine.sync_engine}

    async def handler() -> None:
        insert = "INSERT INTO items (id) VALUES (1)"
        await current_session().execute(insert, bind_arguments=arguments)

    response = await handle(handler, db)

    assert isinstance(response.error, errors.ConfigurationError)
    assert [] == await shop.items(backend)
    await db.dispose()


async def test_a_reader_that_is_used_before_there_is_a_writer(
    sqlite: SQLiteBackend,
) -> None:
    """A reader is read-only from its first connection on, whenever that is made."""
    await shop.create(sqlite)
    reader = create_async_engine(sqlite.url)
    db = Database(None, readers=[reader])
    async with reader.connect():
        pass  # it is in the pool now
    db.engine = create_async_engine(sqlite.url)
    async with db:
        with pytest.raises(errors.ReadOnlySessionError):
            await db.read.execute("INSERT INTO items (id) VALUES (1)")
    await db.dispose()


async def test_session_options(sqlite: SQLiteBackend) -> None:
    """Objects outlive the commit; every other option is SQLAlchemy's."""
    db = Database(create_async_engine(sqlite.url), autoflush=False, info={"app": "x"})
    async with db:
        sync_session = db.write.sync_session
        assert not sync_session.autoflush
        assert not sync_session.expire_on_commit
        assert {"app": "x"} == sync_session.info == db.read.info


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


def test_one_that_was_refused_is_shown() -> None:
    """Whoever shows the values of frames, as error trackers do, shows the error too."""
    with pytest.raises(errors.ConfigurationError) as refused:
        Database(None, commit_on_exit="x")  # type: ignore[arg-type]
    shown = traceback.TracebackException.from_exception(
        refused.value, capture_locals=True
    )
    assert "self = Database(no engine)" in "".join(shown.format())


async def test_without_an_engine(sqlite: SQLiteBackend) -> None:
    """A database can be made before its engine is known; using it says so."""
    db = Database(None)
    assert "Database(no engine)" == repr(db)
    for name in ("engine", "read_engine", "readers", "name"):
        with pytest.raises(
            errors.EngineNotInitialisedError, match="create it with Database"
        ):
            getattr(db, name)
    with pytest.raises(errors.EngineNotInitialisedError):
        await db.dispose()
    await db.dispose_owned()
    with pytest.raises(errors.EngineNotInitialisedError):
        async with db:
            await shop.insert(1)
    db.engine = create_async_engine(sqlite.url)
    async with db:
        assert 1 == await db.write.scalar("SELECT 1")
        assert 1 == await db.read.scalar("SELECT 1")
    await db.dispose()


def test_an_engine_is_assigned_once() -> None:
    """The engine of a database that is in use is never exchanged."""
    db = Database.from_url("sqlite:///app.db")
    engine = db.engine
    with pytest.raises(errors.ConfigurationError, match="make another Database"):
        db.engine = create_async_engine("sqlite+aiosqlite:///other.db")
    assert engine is db.engine


# The read engine


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


# Closing


@on(*SERVERS)
async def test_dispose(backend: ServerBackend) -> None:
    """Every pooled connection is closed: the writer's, the reader's, the replicas'."""
    db = Database.from_url(backend.url, read_urls=[backend.url])
    async with db, db.read_engine.connect():
        await db.write.execute("SELECT 1")
        await db.read.execute("SELECT 1")
        async with db.readers[0].connect():
            assert 3 <= await backend.connections()
    await db.dispose()
    await eventually(0, backend.connections)


@on(*SERVERS)
@pytest.mark.parametrize("owned", [True, False])
async def test_dispose_owned(backend: ServerBackend, owned: bool) -> None:
    """What asgi-uow made is closed, an engine that was passed in is left alone."""
    engine = create_async_engine(backend.url)
    db = Database.from_url(backend.url) if owned else Database(engine)
    async with db:
        assert 1 == await db.read.scalar("SELECT 1")
        await db.write.execute("SELECT 1")
    assert 2 == await backend.connections()
    await db.dispose_owned()
    await eventually(0 if owned else 1, backend.connections)
    await engine.dispose()


async def test_dispose_of_a_file(sqlite: SQLiteBackend) -> None:
    """SQLite's connections are closed one by one: the last empties the log."""
    db = Database.from_url(sqlite.url)
    closing: list[object] = []

    def close(*_: object) -> None:
        closing.append(asyncio.current_task())

    event.listen(db.engine.sync_engine, "close", close)
    async with db:
        await db.write.execute("CREATE TABLE items (id INTEGER)")
    async with AsyncExitStack() as used:
        for engine in [db.engine, db.read_engine] * 2:
            await used.enter_async_context(engine.connect())
    await db.dispose()
    assert [asyncio.current_task()] * 4 == closing
    assert not await anyio.Path(f"{db.engine.url.database}-wal").exists()


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
        await db.write.execute("CREATE TABLE items (id INTEGER)")
    await db.dispose_owned()
    async with db:
        assert 0 == await db.read.scalar(shop.COUNT)
    await db.dispose()
