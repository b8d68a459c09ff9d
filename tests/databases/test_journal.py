"""Swallowed errors: what the database gave up is never reported as a success."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import exc as sa_exc

from asgi_uow import (
    Database,
    Outcome,
    Session,
    UnitOfWork,
    after_commit,
    after_rollback,
    current_read_session,
    current_session,
    current_unit_of_work,
    savepoint,
)
from asgi_uow.errors import (
    DoomedError,
    ManagedTransactionError,
    PartialCommitError,
    TransactionGoneError,
)
from asgi_uow.observers import CommitFailed, ImplicitCommit, UnitFinished
from tests.servers.backend import MariaDBBackend
from tests.support import shop
from tests.support.asgi import handle
from tests.support.databases import DRIVERS, on, shop_database
from tests.support.private import Cause
from tests.support.shop import Item

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from asgi_uow.observers import Event
    from tests.servers.backend import (
        Backend,
        PostgreSQLBackend,
        SQLiteBackend,
    )
    from tests.support.asgi import Response

pytestmark = on(*DRIVERS)


class Request:
    """One request, its unit and everything that was reported."""

    def __init__(self, db: Database, handler: Callable[[], Awaitable[object]]) -> None:
        self.events: list[Event] = []
        self.fired: list[str] = []
        self.units: list[UnitOfWork] = []
        self._db = db
        self._handler = handler

    async def send(self, status: int = 200) -> Response:
        async def handler() -> None:
            self.units.append(current_unit_of_work())
            after_commit(self.fired.append, "commit")
            after_rollback(self.fired.append, "rollback")
            await self._handler()

        return await handle(
            handler, self._db, status=status, observers=[self.events.append]
        )


def is_postgresql(backend: Backend) -> bool:
    return backend.name == "postgresql"


async def test_swallowed_statement_error(db: Database, backend: Backend) -> None:
    """P2: PostgreSQL keeps nothing after a failed statement; the others go on."""

    async def handler() -> None:
        await shop.insert(1)
        with suppress(sa_exc.IntegrityError):
            await shop.insert(1)

    sent = Request(db, handler)
    response = await sent.send()

    if is_postgresql(backend):
        assert 500 == response.status
        assert isinstance(response.error, DoomedError)
        assert isinstance(response.error.__cause__, sa_exc.IntegrityError)
        assert response.error.__cause__ is sent.units[0].doomed_by
        assert ["rollback"] == sent.fired
        assert [] == await shop.items(backend)
        *_, failed, finished = sent.events
        assert isinstance(failed, CommitFailed)
        assert "23505" == failed.code
        assert isinstance(finished, UnitFinished)
        assert Cause.DOOMED is finished.cause
    else:
        assert 200 == response.status
        assert ["commit"] == sent.fired
        assert [1] == await shop.items(backend)


@on("asyncpg", "psycopg")
@pytest.mark.parametrize("session_of", [current_session, current_read_session])
async def test_swallowed_in_the_middle_of_a_stream(
    db: Database, backend: Backend, session_of: Callable[[], Session]
) -> None:
    """P2: an error among the rows of a stream gives up what was written before."""
    statement = "SELECT 1 / (200 - i) FROM generate_series(1, 300) AS i"

    async def handler() -> None:
        await shop.insert(1)
        rows = await session_of().stream_scalars(statement)
        with pytest.raises(Exception, match="division by zero"):
            await rows.all()

    sent = Request(db, handler)
    response = await sent.send()

    assert 500 == response.status
    assert isinstance(response.error, DoomedError)
    assert ["rollback"] == sent.fired
    assert [] == await shop.items(backend)


async def test_swallowed_on_the_raw_connection(db: Database, backend: Backend) -> None:
    """P2: the same for a statement through the driver itself, which nobody sees."""

    async def handler() -> None:
        await shop.insert(1)
        connection = await current_session().connection()
        raw: Any = (await connection.get_raw_connection()).driver_connection
        with suppress(Exception):
            if isinstance(backend, MariaDBBackend):
                await raw.cursor().execute("INSERT INTO items (id) VALUES (1)")
            else:
                await raw.execute("INSERT INTO items (id) VALUES (1)")

    sent = Request(db, handler)
    response = await sent.send()

    if is_postgresql(backend):
        assert 500 == response.status
        assert isinstance(response.error, DoomedError)
        assert ["rollback"] == sent.fired
        assert [] == await shop.items(backend)
    else:
        assert 200 == response.status
        assert ["commit"] == sent.fired
        assert [1] == await shop.items(backend)


async def test_rolled_back_on_the_raw_connection(
    sqlite: SQLiteBackend,
) -> None:
    """P2: a transaction that was rolled back through the driver itself is gone."""

    async def handler() -> None:
        await shop.insert(1)
        connection = await current_session().connection()
        raw: Any = (await connection.get_raw_connection()).driver_connection
        await raw.rollback()

    async with shop_database(sqlite) as db:
        sent = Request(db, handler)
        response = await sent.send()

    assert 500 == response.status
    assert isinstance(response.error, DoomedError)
    assert [] == await shop.items(sqlite)


async def test_swallowed_inside_a_savepoint(db: Database, backend: Backend) -> None:
    """P2: what a savepoint has undone dooms nothing."""

    async def handler() -> None:
        await shop.insert(1)
        with suppress(sa_exc.IntegrityError):
            async with savepoint():
                await shop.insert(1)
        with suppress(sa_exc.IntegrityError):
            async with current_session().begin_nested():
                await shop.insert(2)
                async with current_session().begin_nested():
                    await shop.insert(1)
        async with savepoint():
            await shop.insert(3)

    sent = Request(db, handler)
    response = await sent.send()

    assert 200 == response.status
    assert ["commit"] == sent.fired
    assert [1, 3] == await shop.items(backend)


async def test_error_swallowed_inside_an_open_savepoint(
    db: Database, backend: Backend
) -> None:
    """P2: PostgreSQL refuses to release such a savepoint, and then everything else.

    SQLAlchemy does not roll back to a savepoint whose RELEASE has failed.
    """

    async def handler() -> None:
        await shop.insert(1)
        with suppress(sa_exc.DBAPIError):
            async with savepoint():
                await shop.insert(2)
                with suppress(sa_exc.IntegrityError):
                    await shop.insert(1)

    sent = Request(db, handler)
    response = await sent.send()

    assert (500 if is_postgresql(backend) else 200) == response.status
    kept = [] if is_postgresql(backend) else [1, 2]
    assert kept == await shop.items(backend)


async def test_outer_savepoint_undoes_what_the_inner_could_not(
    db: Database, backend: Backend
) -> None:
    """P2: rolled back to the outer savepoint, the unit is whole again."""

    async def handler() -> None:
        await shop.insert(1)
        with suppress(ZeroDivisionError):
            async with savepoint():
                await shop.insert(2)
                with suppress(sa_exc.DBAPIError):
                    async with savepoint():
                        with suppress(sa_exc.IntegrityError):
                            await shop.insert(1)
                raise ZeroDivisionError

    response = await Request(db, handler).send()

    assert 200 == response.status
    assert [1] == await shop.items(backend)


async def test_doomed_error_response_is_left_alone(
    db: Database, backend: Backend
) -> None:
    """A response at or above 400 says no success and passes unchanged."""

    async def handler() -> None:
        await shop.insert(1)
        with suppress(sa_exc.IntegrityError):
            await shop.insert(1)

    sent = Request(db, handler)
    response = await sent.send(409)

    assert 409 == response.status
    assert response.error is None
    assert ["rollback"] == sent.fired
    assert [] == await shop.items(backend)


async def test_doomed_outside_a_request(postgresql: PostgreSQLBackend) -> None:
    """Leaving `async with db:` raises when the work is gone."""
    async with shop_database(postgresql) as db:
        with pytest.raises(DoomedError, match="already given"):
            async with db:
                await shop.insert(1)
                with suppress(sa_exc.IntegrityError):
                    await shop.insert(1)

        assert [] == await shop.items(postgresql)


async def test_doomed_by_a_before_commit_hook(postgresql: PostgreSQLBackend) -> None:
    """An error swallowed in a before_commit hook is seen just before COMMIT."""

    async def swallow() -> None:
        with suppress(sa_exc.IntegrityError):
            await shop.insert(1)

    async with shop_database(postgresql) as db:

        async def handler() -> None:
            await shop.insert(1)
            current_unit_of_work().register("before_commit", swallow, (), {})

        response = await Request(db, handler).send()

        assert isinstance(response.error, DoomedError)
        assert [] == await shop.items(postgresql)


async def test_swallowed_flush_error(db: Database, backend: Backend) -> None:
    """A failed flush dooms everywhere: SQLAlchemy has rolled back."""

    async def handler() -> None:
        await shop.insert(1)
        current_session().add(Item(id=1))
        with suppress(sa_exc.IntegrityError):
            await current_session().flush()

    sent = Request(db, handler)
    response = await sent.send()

    assert 500 == response.status
    assert isinstance(response.error, DoomedError)
    assert isinstance(response.error.__cause__, sa_exc.IntegrityError)
    assert ["rollback"] == sent.fired
    assert [] == await shop.items(backend)


async def test_client_side_error_dooms_nothing(postgresql: PostgreSQLBackend) -> None:
    """An error that never reached the server has aborted no transaction."""
    async with shop_database(postgresql) as db:

        async def handler() -> None:
            await shop.insert(1)
            with pytest.raises(sa_exc.DBAPIError):
                await current_session().execute(
                    "INSERT INTO items (id) VALUES (:id)", id="text"
                )

        response = await Request(db, handler).send()

        assert 200 == response.status
        assert [1] == await shop.items(postgresql)


async def test_read_session_error_dooms_nothing(db: Database, backend: Backend) -> None:
    """An error on the read session, on its own connection, is not the writer's."""

    async def handler() -> None:
        with pytest.raises(sa_exc.DBAPIError):
            await current_read_session().execute("SELECT * FROM nowhere")
        await shop.insert(1)

    response = await Request(db, handler).send()

    assert 200 == response.status
    assert [1] == await shop.items(backend)


async def test_joined_read_error_dooms(postgresql: PostgreSQLBackend) -> None:
    """Once reads share the writer's transaction, so does what fails there."""
    async with shop_database(postgresql) as db:

        async def handler() -> None:
            await shop.insert(1)
            with pytest.raises(sa_exc.DBAPIError):
                await current_read_session().execute("SELECT * FROM nowhere")

        response = await Request(db, handler).send()

        assert isinstance(response.error, DoomedError)
        assert [] == await shop.items(postgresql)


async def deadlock(victim: Database, other: Database) -> None:
    """Make the statement of the current unit the victim of a real deadlock.

    MariaDB ends the transaction that has changed fewer rows.
    """
    await current_session(victim).execute("UPDATE items SET parent = 1 WHERE id = 1")
    async with other.engine.connect() as rival:
        for number in (2, 3, 4, 5):
            await rival.exec_driver_sql(
                f"UPDATE items SET parent = 2 WHERE id = {number}"
            )
        blocked = asyncio.create_task(
            rival.exec_driver_sql("UPDATE items SET parent = 3 WHERE id = 1")
        )
        try:
            await current_session(victim).execute(
                "UPDATE items SET parent = 4 WHERE id = 2",
            )
        finally:
            await blocked


@pytest.mark.parametrize("inside_savepoint", [False, True])
async def test_swallowed_deadlock(
    mariadb: MariaDBBackend, inside_savepoint: bool
) -> None:
    """P2: after a swallowed deadlock nothing is kept, later writes included.

    Inside a savepoint it surfaces as 1305; the journal still knows of 1213.
    """
    async with shop_database(mariadb) as db, mariadb_rival(mariadb) as rival:
        await mariadb.execute("INSERT INTO items (id) VALUES (1), (2), (3), (4), (5)")

        async def handler() -> None:
            await shop.insert(100)
            with suppress(sa_exc.DBAPIError):
                if inside_savepoint:
                    async with savepoint():
                        await deadlock(db, rival)
                else:
                    await deadlock(db, rival)
            await shop.insert(200)

        sent = Request(db, handler)
        response = await sent.send()

        assert 503 == response.status
        assert isinstance(response.error, DoomedError)
        assert ["rollback"] == sent.fired
        assert 1213 == next(e.code for e in sent.events if isinstance(e, CommitFailed))
        assert [1, 2, 3, 4, 5] == await shop.items(mariadb)


def mariadb_rival(mariadb: MariaDBBackend) -> _Rival:
    return _Rival(mariadb.url)


class _Rival:
    def __init__(self, url: str) -> None:
        self.db = Database.from_url(url)

    async def __aenter__(self) -> Database:
        return self.db

    async def __aexit__(self, *exc_info: object) -> None:
        await self.db.dispose()


async def test_sqlite_busy(sqlite: SQLiteBackend) -> None:
    """BUSY at BEGIN is an error of the statement; nothing was there to be lost."""
    async with shop_database(sqlite, connect_args={"timeout": 0}) as db:
        async with db:
            await db.write.execute("PRAGMA user_version")

        async def handler() -> None:
            await current_session().execute("PRAGMA busy_timeout = 0")

        async def locked() -> None:
            await shop.insert(1)

        await Request(db, handler).send()
        with closing(sqlite3.connect(sqlite.path)) as other:
            other.execute("BEGIN IMMEDIATE")
            sent = Request(db, locked)
            response = await sent.send()

        assert isinstance(response.error, sa_exc.OperationalError)
        assert "SQLITE_BUSY" == response.error.orig.sqlite_errorname  # type: ignore[union-attr]
        assert ["rollback"] == sent.fired
        assert [] == await shop.items(sqlite)


async def test_sqlite_that_rolled_back_by_itself(sqlite: SQLiteBackend) -> None:
    """An error after which SQLite has rolled everything back dooms the unit."""
    async with shop_database(sqlite) as db:

        async def handler() -> None:
            await shop.insert(1)
            await shop.insert(2)
            with suppress(sa_exc.IntegrityError):
                await current_session().execute(
                    "INSERT OR ROLLBACK INTO items (id) VALUES (1)"
                )

        sent = Request(db, handler)
        response = await sent.send()

        assert isinstance(response.error, DoomedError)
        assert ["rollback"] == sent.fired
        assert [] == await shop.items(sqlite)


async def test_swallowed_cancellation_of_a_statement(
    db: Database, backend: Backend
) -> None:
    """A statement cut off by a time-out has cost the connection: doomed."""
    slow = {
        "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
        " SELECT max(i) FROM n",
        "mariadb": "SELECT sleep(60)",
        "postgresql": "SELECT pg_sleep(60)",
    }[backend.name]

    async def handler() -> None:
        await shop.insert(1)
        with suppress(TimeoutError):
            await asyncio.wait_for(current_session().execute(slow), 0.05)

    sent = Request(db, handler)
    response = await sent.send()

    assert response.status >= 500
    assert isinstance(response.error, DoomedError)
    assert [] == await shop.items(backend)
    assert 0 == await backend.open_transactions()


async def test_implicit_commit_is_reported(mariadb: MariaDBBackend) -> None:
    """DDL commits what was written before it; committed, the unit is whole."""
    async with shop_database(mariadb) as db:

        async def handler() -> None:
            await shop.insert(1)
            await current_session().execute("CREATE TABLE other (id INTEGER)")
            await shop.insert(2)

        sent = Request(db, handler)
        response = await sent.send()

        assert 200 == response.status
        assert [1, 2] == await shop.items(mariadb)
        assert ImplicitCommit("CREATE TABLE other (id INTEGER)") in sent.events
        assert ["commit"] == sent.fired


async def test_implicit_commit_cannot_be_rolled_back(mariadb: MariaDBBackend) -> None:
    """Rolled back after DDL, a part is kept: PARTIAL, a plain 500, no hook."""
    async with shop_database(mariadb) as db:

        async def handler() -> None:
            await shop.insert(1)
            await current_session().execute("CREATE TABLE other (id INTEGER)")
            await shop.insert(2)

        sent = Request(db, handler)
        response = await sent.send(404)

        assert 500 == response.status
        assert isinstance(response.error, PartialCommitError)
        assert "CREATE TABLE other" in str(response.error)
        assert Outcome.PARTIAL is sent.units[0].outcome
        assert [] == sent.fired
        assert [1] == await shop.items(mariadb)


async def test_ddl_that_is_not_understood(mariadb: MariaDBBackend) -> None:
    """A syntax error in DDL has committed nothing, then or later."""
    async with shop_database(mariadb) as db:

        async def handler() -> None:
            await shop.insert(1)
            with suppress(sa_exc.ProgrammingError):
                await current_session().execute("CREATE TABLET other (id INTEGER)")
            await shop.insert(2)

        sent = Request(db, handler)
        response = await sent.send(404)

        assert 404 == response.status
        assert ["rollback"] == sent.fired
        assert [] == await shop.items(mariadb)


@pytest.mark.parametrize("how", ["connection", "transaction"])
async def test_commit_by_hand_through_the_back_door(
    db: Database, backend: Backend, how: str
) -> None:
    """COMMIT through the connection or the transaction is refused, and nothing kept."""

    async def handler() -> None:
        await shop.insert(1)
        session = current_session()
        transaction = session.get_transaction()
        assert transaction is not None
        back_door = await session.connection() if how == "connection" else transaction
        with suppress(ManagedTransactionError):
            await back_door.commit()

    sent = Request(db, handler)
    response = await sent.send()

    assert 500 == response.status
    assert isinstance(response.error, DoomedError)
    assert isinstance(response.error.__cause__, ManagedTransactionError)
    assert ["rollback"] == sent.fired
    assert [] == await shop.items(backend)


@pytest.mark.parametrize("how", ["connection", "transaction"])
async def test_rollback_by_hand_through_the_back_door(
    db: Database, backend: Backend, how: str
) -> None:
    """ROLLBACK through the back door dooms: what came before is gone."""

    async def handler() -> None:
        await shop.insert(1)
        session = current_session()
        transaction = session.get_transaction()
        assert transaction is not None
        back_door = await session.connection() if how == "connection" else transaction
        await back_door.rollback()
        with suppress(sa_exc.InvalidRequestError, TransactionGoneError):
            await shop.insert(2)

    sent = Request(db, handler)
    response = await sent.send()

    assert 500 == response.status
    assert isinstance(response.error, DoomedError)
    assert ["rollback"] == sent.fired
    assert [] == await shop.items(backend)
