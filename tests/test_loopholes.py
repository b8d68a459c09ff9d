"""Ways around the promises that a careful adversary found, and that are closed."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import event
from sqlalchemy import exc as sa_exc
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.aiosqlite import SQLiteDialect_aiosqlite
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_uow import (
    Database,
    Session,
    after_commit,
    after_rollback,
    before_commit,
    current_read_session,
    current_session,
    savepoint,
)
from asgi_uow.errors import (
    ConcurrentUseError,
    ConfigurationError,
    DoomedError,
    ManagedTransactionError,
    TransactionGoneError,
)
from asgi_uow.observers import CommitFailed, HookFailed
from tests.servers.process import MariaDB
from tests.support import shop
from tests.support.asgi import BODY, START, handle, serve
from tests.support.databases import DRIVERS, SERVERS, checked_out, on, shop_database
from tests.support.private import concurrency

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from asgi_uow._asgi import Receive, Scope, Send
    from asgi_uow.observers import Event
    from tests.servers.backend import (
        Backend,
        MariaDBBackend,
        PostgreSQLBackend,
        SQLiteBackend,
    )
    from tests.support.asgi import Response
    from tests.support.private import ManagedSession

pytestmark = on(*DRIVERS)


class Sent:
    """One request with both kinds of hooks, and what came of it."""

    def __init__(self) -> None:
        self.fired: list[str] = []
        self.events: list[Event] = []

    async def request(
        self,
        db: Database,
        handler: Callable[[], Awaitable[object]],
        status: int = 200,
    ) -> Response:
        async def work() -> None:
            after_commit(self.fired.append, "commit")
            after_rollback(self.fired.append, "rollback")
            await handler()

        return await handle(work, db, status=status, observers=[self.events.append])


# A statement of another task that fails while the decision waits for it


async def test_statement_in_flight_that_fails(postgresql: PostgreSQLBackend) -> None:
    """COMMIT waits for it, then sees that PostgreSQL has given the work up."""
    tasks: list[asyncio.Task[object]] = []
    async with shop_database(postgresql) as db:

        async def handler() -> None:
            await shop.insert(1)
            slow = current_session().execute("SELECT pg_sleep(0.1), 1 / :zero", zero=0)
            tasks.append(asyncio.ensure_future(slow))
            await asyncio.wait(tasks, timeout=0.01)

        sent = Sent()
        response = await sent.request(db, handler)

        with pytest.raises(sa_exc.DBAPIError):
            await tasks[0]
        assert 500 == response.status
        assert isinstance(response.error, DoomedError)
        assert ["rollback"] == sent.fired
        assert [] == await shop.items(postgresql)


async def test_listener_that_dooms_before_commit(sqlite: SQLiteBackend) -> None:
    """A SQLAlchemy before_commit listener that swallows what dooms is seen too."""
    async with shop_database(sqlite) as db:

        def doom(session: ManagedSession) -> None:
            [connection] = session.connections
            with suppress(sa_exc.IntegrityError):
                connection.exec_driver_sql(
                    "INSERT OR ROLLBACK INTO items (id) VALUES (1)"
                )

        async def handler() -> None:
            await shop.insert(1)
            event.listen(current_session().sync_session, "before_commit", doom)

        sent = Sent()
        response = await sent.request(db, handler)

        assert isinstance(response.error, DoomedError)
        assert ["rollback"] == sent.fired
        assert [] == await shop.items(sqlite)


# Savepoints of two tasks that overlap


@pytest.mark.parametrize("outer_fails", [True, False])
async def test_overlapping_savepoints(
    db: Database, backend: Backend, outer_fails: bool
) -> None:
    """The one that was ended by the other's end dooms the unit."""
    inside, ended = asyncio.Event(), asyncio.Event()

    async def outer() -> None:
        with suppress(ZeroDivisionError):
            async with savepoint():
                await inside.wait()
                if outer_fails:
                    raise ZeroDivisionError
        ended.set()

    async def inner() -> None:
        async with savepoint():
            await shop.insert(2)
            inside.set()
            await ended.wait()
            if not outer_fails:
                raise ZeroDivisionError

    async def handler() -> None:
        await shop.insert(1)
        first = asyncio.ensure_future(outer())
        await asyncio.wait((first,), timeout=0.01)
        expected = ConcurrentUseError if outer_fails else ZeroDivisionError
        with pytest.raises(expected):
            await inner()
        await first

    sent = Sent()
    response = await sent.request(db, handler)

    assert 500 == response.status
    assert isinstance(response.error, DoomedError)
    assert isinstance(response.error.__cause__, ConcurrentUseError)
    assert ["rollback"] == sent.fired
    assert [] == await shop.items(backend)


async def test_savepoint_ended_by_hand(db: Database, backend: Backend) -> None:
    """Ending a savepoint inside its own block is SQLAlchemy's way, and allowed."""

    async def handler() -> None:
        async with savepoint() as undone:
            await shop.insert(1)
            await undone.rollback()
        async with savepoint() as kept:
            await shop.insert(2)
            await kept.commit()

    response = await Sent().request(db, handler)

    assert 200 == response.status
    assert [2] == await shop.items(backend)


# SQLite that has ended the transaction by itself


@pytest.mark.parametrize("status", [200, 409])
async def test_nothing_is_kept_alone(sqlite: SQLiteBackend, status: int) -> None:
    """After SQLite's own rollback a statement would commit itself: refused."""
    async with shop_database(sqlite) as db:

        async def handler() -> None:
            await shop.insert(1)
            with suppress(sa_exc.IntegrityError):
                await current_session().execute(
                    "INSERT OR ROLLBACK INTO items (id) VALUES (1)"
                )
            with pytest.raises(TransactionGoneError, match="leave the handler"):
                await shop.insert(2)

        sent = Sent()
        response = await sent.request(db, handler, status)

        assert (500 if status == 200 else 409) == response.status
        assert ["rollback"] == sent.fired
        assert [] == await shop.items(sqlite)


# Starts that come too late, or too early


# Blocks that do not end where, or in the order, they began


# Streams of reads that share the writer's connection


async def test_joined_stream_ends_with_the_writer(
    db: Database, backend: Backend
) -> None:
    """A stream on the writer's connection raises after the decision, never lies."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for number in range(3):
            await shop.insert(number)
        stream = await current_read_session().stream("SELECT id FROM items")
        await send({"type": START, "status": 200, "headers": []})
        with pytest.raises(sa_exc.ResourceClosedError):
            await stream.all()
        await send({"type": BODY, "body": b""})

    response = await serve(app, db)

    assert response.error is None
    assert [0, 1, 2] == await shop.items(backend)


async def test_joined_stream_holds_off_the_writer(mariadb: MariaDBBackend) -> None:
    """On MariaDB a write would cut the stream off: refused."""
    async with shop_database(mariadb) as db:

        async def handler() -> None:
            for number in range(3):
                await shop.insert(number)
            stream = await current_read_session().stream("SELECT id FROM items")
            with pytest.raises(ConcurrentUseError, match="stream"):
                await shop.insert(4)
            assert 3 == len(await stream.all())

        response = await Sent().request(db, handler)

        assert 200 == response.status


# Transactions ended by text


@pytest.mark.parametrize(
    "statement",
    [
        "COMMIT",
        "rollback",
        " /* why */ COMMIT",
        "-- why\nCOMMIT",
        "BEGIN",
        "START TRANSACTION",
    ],
)
@pytest.mark.parametrize("status", [200, 409])
async def test_transaction_control_as_text(
    db: Database, backend: Backend, statement: str, status: int
) -> None:
    """COMMIT, ROLLBACK or BEGIN as text is refused before it is sent."""

    async def handler() -> None:
        await shop.insert(1)
        with pytest.raises(ManagedTransactionError, match="set_rollback_only"):
            await current_session().execute(statement)

    sent = Sent()
    await sent.request(db, handler, status)

    kept = status == 200
    assert ["commit" if kept else "rollback"] == sent.fired
    assert ([1] if kept else []) == await shop.items(backend)


async def test_rollback_to_a_savepoint_as_text(db: Database, backend: Backend) -> None:
    """ROLLBACK TO names a savepoint and ends nothing."""

    async def handler() -> None:
        await shop.insert(1)
        await current_session().execute("SAVEPOINT mine")
        await shop.insert(2)
        await current_session().execute("ROLLBACK TO SAVEPOINT mine")

    response = await Sent().request(db, handler)

    assert 200 == response.status
    assert [1] == await shop.items(backend)


@pytest.mark.parametrize("statement", ["SET autocommit = 1", "LOCK TABLES items WRITE"])
async def test_what_would_outlive_the_unit_on_mariadb(
    mariadb: MariaDBBackend, statement: str
) -> None:
    """AUTOCOMMIT and table locks would poison the pooled connection: refused."""
    async with shop_database(mariadb) as db:

        async def handler() -> None:
            await shop.insert(1)
            with pytest.raises(ManagedTransactionError):
                await current_session().execute(statement)

        sent = Sent()
        await sent.request(db, handler, 409)

        assert ["rollback"] == sent.fired
        assert [] == await shop.items(mariadb)


async def test_lock_wait_timeout_that_rolls_back(mariadb_port: int) -> None:
    """With innodb_rollback_on_timeout 1205 has undone everything: doomed."""
    with MariaDB("--innodb-rollback-on-timeout=ON") as server:
        url = f"mysql+asyncmy://root@127.0.0.1:{server.port}"
        admin = create_async_engine(f"{url}/")
        async with admin.begin() as connection:
            await connection.exec_driver_sql("CREATE DATABASE shop")
            await connection.exec_driver_sql(
                "CREATE TABLE shop.items (id INTEGER PRIMARY KEY)"
            )
        db = Database.from_url(f"{url}/shop")
        async with admin.connect() as rival:
            await rival.exec_driver_sql("INSERT INTO shop.items VALUES (2)")

            async def handler() -> None:
                session = current_session()
                await session.execute("SET innodb_lock_wait_timeout = 1")
                await shop.insert(1)
                with suppress(sa_exc.OperationalError):
                    await shop.insert(2)
                await shop.insert(3)

            sent = Sent()
            response = await sent.request(db, handler)
            await rival.rollback()

        assert 503 == response.status
        assert isinstance(response.error, DoomedError)
        assert ["rollback"] == sent.fired
        async with db:
            assert 0 == await db.read.scalar("SELECT count(*) FROM items")
        await db.dispose()
        await admin.dispose()


@on(*SERVERS)
async def test_autocommit_engine_is_refused(
    backend: MariaDBBackend | PostgreSQLBackend,
) -> None:
    """With AUTOCOMMIT nothing could be rolled back, so nothing is executed."""
    await shop.create(backend)
    engine = create_async_engine(backend.url, isolation_level="AUTOCOMMIT")
    db = Database(engine)

    response = await Sent().request(db, lambda: shop.insert(1), 409)

    assert isinstance(response.error, ConfigurationError)
    assert "AUTOCOMMIT" in str(response.error)
    assert [] == await shop.items(backend)
    assert [0, 0] == checked_out(db)
    await db.dispose()
    await engine.dispose()


# Doomed, and left by a redirect


# Sessions that open while the unit closes


# In memory


async def test_memory_survives_a_cancelled_statement() -> None:
    """The connection is the database: a cancelled statement does not cost it."""
    endless = (
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
        " SELECT max(i) FROM n"
    )
    db = Database.from_url("sqlite:///file::memory:?uri=true")
    async with db:
        await db.write.execute("CREATE TABLE items (id INTEGER)")
    with pytest.raises(DoomedError):
        async with db:
            await shop.insert(1)
            with suppress(TimeoutError):
                await asyncio.wait_for(db.write.execute(endless), 0.05)
    async with db:
        await shop.insert(2)
        assert [2] == (await db.read.scalars("SELECT id FROM items")).all()
    await db.dispose()


# Turns, hooks, groups


async def test_read_that_moves_while_another_read_connects(
    backend: Backend, db: Database
) -> None:
    """Two reads, before and after the first write, do not meet on the session."""

    async def handler() -> None:
        read = current_read_session()
        early = asyncio.ensure_future(read.scalar("SELECT 1"))
        await asyncio.wait((early,), timeout=0)
        await shop.insert(1)
        late = read.scalar("SELECT count(*) FROM items")
        assert [1, 1] == list(await asyncio.gather(early, late))

    response = await Sent().request(db, handler)

    assert 200 == response.status


@pytest.mark.parametrize("register", [before_commit, after_commit])
async def test_hook_that_does_not_let_itself_be_cancelled(
    sqlite: SQLiteBackend,
    monkeypatch: pytest.MonkeyPatch,
    register: Callable[[Callable[[], object]], None],
) -> None:
    """Past hook_timeout and a grace period it is left behind; the response leaves.

    It is a success only if the hook was one for which it was too late to object.
    """
    monkeypatch.setattr(concurrency, "GRACE", 0.01)
    over = asyncio.Event()
    events: list[Event] = []
    tasks: list[asyncio.Task[object] | None] = []

    async def stubborn() -> None:
        tasks.append(asyncio.current_task())
        while not over.is_set():
            with suppress(asyncio.CancelledError):
                await over.wait()

    async def handler() -> None:
        await shop.insert(1)
        register(stubborn)

    async with shop_database(sqlite) as db:
        response = await handle(
            handler, db, observers=[events.append], hook_timeout=0.01
        )

        is_after = register is after_commit
        assert (200 if is_after else 500) == response.status
        assert ([1] if is_after else []) == await shop.items(sqlite)
        [failed] = [e for e in events if isinstance(e, HookFailed | CommitFailed)]
        assert isinstance(failed, HookFailed if is_after else CommitFailed)
        error = failed.error if is_after else failed.error.__cause__
        assert isinstance(error, TimeoutError)
        over.set()
        await asyncio.wait([task for task in tasks if task])


async def test_add_while_another_task_flushes(sqlite: SQLiteBackend) -> None:
    """SQLAlchemy would only warn, and might lose the object: refused."""
    flushing = asyncio.Event()
    async with shop_database(sqlite) as db:

        async def handler() -> None:
            session = current_session()
            session.add(shop.Item(id=1))
            event.listen(session.sync_session, "after_flush", lambda *_: flushing.set())
            flush = asyncio.ensure_future(session.flush())
            await flushing.wait()
            session.sync_session._flushing = True
            with pytest.raises(ConcurrentUseError, match="another task is flushing"):
                await asyncio.create_task(add(session))
            session.sync_session._flushing = False
            await flush

        async def add(session: Session) -> None:
            async with current_session().lock:
                await asyncio.create_task(late(session))

        async def late(session: Session) -> None:
            session.add_all([shop.Item(id=2)])

        response = await Sent().request(db, handler)

        assert 200 == response.status
        assert [1] == await shop.items(sqlite)


async def test_memory_and_an_ordinary_error() -> None:
    """What is no cancellation is an error as anywhere else."""
    db = Database.from_url("sqlite://")
    async with db:
        await db.write.execute("CREATE TABLE items (id INTEGER PRIMARY KEY)")
        await shop.insert(1)
        with suppress(sa_exc.IntegrityError):
            await shop.insert(1)
    async with db:
        assert 1 == await db.read.scalar("SELECT count(*) FROM items")
    await db.dispose()


async def test_parameters_by_mapping_and_by_name(sqlite: SQLiteBackend) -> None:
    """One or the other."""
    async with shop_database(sqlite) as db, db:
        with pytest.raises(TypeError, match="not both"):
            await db.write.execute("SELECT :a", {"a": 1}, a=2)
        assert 1 == await db.write.scalar("SELECT :a", {"a": 1})


async def test_streams_of_every_shape(db: Database, backend: Backend) -> None:
    """Partitions and mappings take turns as plain streams do."""

    async def handler() -> None:
        for number in range(5):
            await shop.insert(number)
        stream = await current_session().stream("SELECT id FROM items ORDER BY id")
        parts = [len(part) async for part in stream.partitions(2)]
        assert [2, 2, 1] == parts
        stream = await current_session().stream("SELECT id FROM items ORDER BY id")
        rows = await stream.mappings().fetchmany(2)
        assert [{"id": 0}, {"id": 1}] == [dict(row) for row in rows]
        await stream.close()
        with pytest.raises(TypeError, match="not both"):
            await current_session().execute("SELECT :a", {"a": 1}, a=2)

    response = await Sent().request(db, handler)

    assert 200 == response.status


class Weird(SQLiteDialect_aiosqlite):
    """A database that asgi-uow knows nothing of."""

    name = "weird"


def test_unknown_database_is_refused() -> None:
    """Without knowing how reads are made read-only, nothing is promised."""
    registry.register("weird.aiosqlite", __name__, "Weird")

    with pytest.raises(ConfigurationError, match="does not know the database 'weird'"):
        Database(create_async_engine("weird+aiosqlite:///weird.db"))


def test_password_in_the_query_is_hidden() -> None:
    """A password given as a query parameter is not shown either."""
    db = Database.from_url("postgresql://h/app?user=u&password=sEcret")

    assert "sEcret" not in repr(db)
    assert "user=u" in repr(db)
