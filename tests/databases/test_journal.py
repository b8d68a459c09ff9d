"""Swallowed errors: what the database gave up is never reported as a success."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing, nullcontext, suppress
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event
from sqlalchemy import exc as sa_exc

import asgi_uow as uow
from asgi_uow import Database, errors
from asgi_uow.observers import CommitFailed, ImplicitCommit, UnitFinished
from tests.servers import MariaDB, MariaDBBackend
from tests.support import shop
from tests.support.asgi import Response, handle
from tests.support.conflicts import deadlock, rival_of
from tests.support.databases import DRIVERS, on, shop_database
from tests.support.private import Cause, ManagedSession
from tests.support.shop import Item
from tests.support.writes import driver_connection

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.servers.backend import Backend, PostgreSQLBackend, SQLiteBackend

pytestmark = on(*DRIVERS)


INSERT_OR_ROLLBACK = "INSERT OR ROLLBACK INTO items (id) VALUES (1)"


async def check_doomed(
    response: Response, backend: Backend, status: int = 500
) -> BaseException | None:
    """Nothing was kept, and client and hooks were told so; give the cause."""
    assert status == response.status
    assert isinstance(response.error, errors.DoomedError)
    assert Cause.DOOMED is response.unit.cause
    assert ["rollback"] == response.hooks
    assert [] == await shop.items(backend)
    return response.error.__cause__


def is_postgresql(backend: Backend) -> bool:
    return backend.name == "postgresql"


async def test_swallowed_statement_error(db: Database, backend: Backend) -> None:
    """P2: PostgreSQL keeps nothing after a failed statement; the others go on."""

    async def handler() -> None:
        await shop.insert(1)
        with suppress(sa_exc.IntegrityError):
            await shop.insert(1)

    response = await handle(handler, db, hooks=True)

    if is_postgresql(backend):
        cause = await check_doomed(response, backend)
        assert isinstance(cause, sa_exc.IntegrityError)
        assert cause is response.unit.doomed_by
        assert "23505" == response.events.only(CommitFailed).code
        assert Cause.DOOMED is response.events.only(UnitFinished).cause
    else:
        assert 200 == response.status
        assert ["commit"] == response.hooks
        assert [1] == await shop.items(backend)


@on("asyncpg", "psycopg")
@pytest.mark.parametrize("session_of", [uow.current_session, uow.current_read_session])
async def test_swallowed_in_the_middle_of_a_stream(
    db: Database, backend: Backend, session_of: Callable[[], uow.Session]
) -> None:
    """P2: an error among the rows of a stream gives up what was written before."""
    statement = "SELECT 1 / (200 - i) FROM generate_series(1, 300) AS i"

    async def handler() -> None:
        await shop.insert(1)
        rows = await session_of().stream_scalars(statement)
        with pytest.raises(Exception, match="division by zero"):
            await rows.all()

    response = await handle(handler, db, hooks=True)

    await check_doomed(response, backend)


async def test_swallowed_on_the_raw_connection(db: Database, backend: Backend) -> None:
    """P2: the same for a statement through the driver itself, which nobody sees."""

    async def handler() -> None:
        await shop.insert(1)
        connection = await uow.current_session().connection()
        raw: Any = (await connection.get_raw_connection()).driver_connection
        with suppress(Exception):
            if isinstance(backend, MariaDBBackend):
                await raw.cursor().execute("INSERT INTO items (id) VALUES (1)")
            else:
                await raw.execute("INSERT INTO items (id) VALUES (1)")

    response = await handle(handler, db, hooks=True)

    if is_postgresql(backend):
        await check_doomed(response, backend)
    else:
        assert 200 == response.status
        assert ["commit"] == response.hooks
        assert [1] == await shop.items(backend)


@on("aiosqlite")
async def test_rolled_back_on_the_raw_connection(
    db: Database, backend: SQLiteBackend
) -> None:
    """P2: after the driver itself was used nobody knows what it has ended, or how."""

    async def handler() -> None:
        await shop.insert(1)
        connection = await uow.current_session().connection()
        raw: Any = (await connection.get_raw_connection()).driver_connection
        await raw.rollback()

    response = await handle(handler, db, hooks=True)

    assert 500 == response.status
    assert isinstance(response.error, errors.OutcomeUnknownError)
    assert [] == await shop.items(backend)


async def test_closed_on_the_raw_connection(db: Database, backend: Backend) -> None:
    """P13: a driver that was used may have committed what it does not show any more."""

    async def handler() -> None:
        await shop.insert(1)
        raw = await driver_connection(uow.current_session())
        if backend.driver == "asyncpg":
            await raw.execute("COMMIT")
        else:
            await raw.commit()
        closed = raw.close()
        if closed is not None:  # asyncmy's is no coroutine
            await closed

    response = await handle(handler, db, status=404, hooks=True)

    assert uow.Outcome.UNKNOWN is response.unit.outcome
    assert [] == response.hooks
    assert [1] == await shop.items(backend)


async def test_invalidated_connection(db: Database) -> None:
    """What a handler did before it threw its connection away is not known any more."""

    async def handler() -> None:
        await shop.insert(1)
        await (await uow.current_session().connection()).invalidate()

    response = await handle(handler, db)

    assert isinstance(response.error, errors.OutcomeUnknownError)


@pytest.mark.parametrize("end", ["invalidate", "close"])
async def test_given_up_after_a_commit_of_the_driver(
    db: Database, backend: Backend, end: str
) -> None:
    """P13: nor is what the driver's own COMMIT may have kept called rolled back."""

    async def handler() -> None:
        await shop.insert(1)
        connection = await uow.current_session().connection()
        raw = await driver_connection(uow.current_session())
        if backend.driver == "asyncpg":
            await raw.execute("COMMIT")
        else:
            await raw.commit()
        await getattr(connection, end)()

    response = await handle(handler, db, status=404, hooks=True)

    assert uow.Outcome.UNKNOWN is response.unit.outcome
    assert [] == response.hooks
    assert [1] == await shop.items(backend)


async def test_swallowed_inside_a_savepoint(db: Database, backend: Backend) -> None:
    """P2: what a savepoint has undone dooms nothing."""

    async def handler() -> None:
        await shop.insert(1)
        with suppress(sa_exc.IntegrityError):
            async with uow.savepoint():
                await shop.insert(1)
        with suppress(sa_exc.IntegrityError):
            async with uow.current_session().begin_nested():
                await shop.insert(2)
                async with uow.current_session().begin_nested():
                    await shop.insert(1)
        async with uow.savepoint():
            await shop.insert(3)

    response = await handle(handler, db, hooks=True)

    assert 200 == response.status
    assert ["commit"] == response.hooks
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
            async with uow.savepoint():
                await shop.insert(2)
                with suppress(sa_exc.IntegrityError):
                    await shop.insert(1)

    response = await handle(handler, db, hooks=True)

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
            async with uow.savepoint():
                await shop.insert(2)
                with suppress(sa_exc.DBAPIError):
                    async with uow.savepoint():
                        with suppress(sa_exc.IntegrityError):
                            await shop.insert(1)
                raise ZeroDivisionError

    response = await handle(handler, db)

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

    response = await handle(handler, db, status=409, hooks=True)

    assert 409 == response.status
    assert response.error is None
    assert ["rollback"] == response.hooks
    assert [] == await shop.items(backend)


@on("asyncpg")
async def test_doomed_outside_a_request(
    db: Database, backend: PostgreSQLBackend
) -> None:
    """Leaving `async with db:` raises when the work is gone."""
    with pytest.raises(errors.DoomedError, match="already given"):
        async with db:
            await shop.insert(1)
            with suppress(sa_exc.IntegrityError):
                await shop.insert(1)

    assert [] == await shop.items(backend)


@on("asyncpg")
async def test_doomed_by_a_before_commit_hook(
    db: Database, backend: PostgreSQLBackend
) -> None:
    """An error swallowed in a before_commit hook is seen just before COMMIT."""

    async def swallow() -> None:
        with suppress(sa_exc.IntegrityError):
            await shop.insert(1)

    async def handler() -> None:
        await shop.insert(1)
        uow.before_commit(swallow)

    response = await handle(handler, db)

    assert isinstance(response.error, errors.DoomedError)
    assert [] == await shop.items(backend)


async def test_swallowed_flush_error(db: Database, backend: Backend) -> None:
    """A failed flush dooms everywhere: SQLAlchemy has rolled back."""

    async def handler() -> None:
        await shop.insert(1)
        uow.current_session().add(Item(id=1))
        with suppress(sa_exc.IntegrityError):
            await uow.current_session().flush()

    response = await handle(handler, db, hooks=True)

    cause = await check_doomed(response, backend)
    assert isinstance(cause, sa_exc.IntegrityError)


@on("asyncpg")
async def test_client_side_error_dooms_nothing(
    db: Database, backend: PostgreSQLBackend
) -> None:
    """An error that never reached the server has aborted no transaction."""

    async def handler() -> None:
        await shop.insert(1)
        with pytest.raises(sa_exc.DBAPIError):
            await uow.current_session().execute(
                "INSERT INTO items (id) VALUES (:id)", id="text"
            )

    response = await handle(handler, db)

    assert 200 == response.status
    assert [1] == await shop.items(backend)


async def test_read_session_error_dooms_nothing(db: Database, backend: Backend) -> None:
    """An error on the read session, on its own connection, is not the writer's."""

    async def handler() -> None:
        with pytest.raises(sa_exc.DBAPIError):
            await uow.current_read_session().execute("SELECT * FROM nowhere")
        await shop.insert(1)

    response = await handle(handler, db)

    assert 200 == response.status
    assert [1] == await shop.items(backend)


@on("asyncpg")
async def test_joined_read_error_dooms(
    db: Database, backend: PostgreSQLBackend
) -> None:
    """Once reads share the writer's transaction, so does what fails there."""

    async def handler() -> None:
        await shop.insert(1)
        with pytest.raises(sa_exc.DBAPIError):
            await uow.current_read_session().execute("SELECT * FROM nowhere")

    response = await handle(handler, db)

    assert isinstance(response.error, errors.DoomedError)
    assert [] == await shop.items(backend)


@on("asyncmy")
@pytest.mark.parametrize("inside_savepoint", [False, True])
async def test_swallowed_deadlock(
    db: Database, backend: MariaDBBackend, inside_savepoint: bool
) -> None:
    """P2: after a swallowed deadlock nothing is kept, later writes included.

    Inside a savepoint it surfaces as 1305; the journal still knows of 1213.
    """
    await backend.execute("INSERT INTO items (id) VALUES (1), (2), (3), (4), (5)")

    async def handler() -> None:
        await shop.insert(100)
        with suppress(sa_exc.DBAPIError):
            async with uow.savepoint() if inside_savepoint else nullcontext():
                await deadlock(backend)
        await shop.insert(200)

    response = await handle(handler, db, hooks=True)

    assert 503 == response.status
    assert isinstance(response.error, errors.DoomedError)
    assert ["rollback"] == response.hooks
    assert 1213 == response.events.only(CommitFailed).code
    assert [1, 2, 3, 4, 5] == await shop.items(backend)


@on("aiosqlite", connect_args={"timeout": 0})
async def test_sqlite_busy(db: Database, backend: SQLiteBackend) -> None:
    """BUSY at BEGIN is an error of the statement; nothing was there to be lost."""
    async with db:
        await db.write.execute("PRAGMA user_version")

    await handle(lambda: uow.current_session().execute("PRAGMA busy_timeout = 0"), db)
    with closing(sqlite3.connect(backend.path)) as other:
        other.execute("BEGIN IMMEDIATE")
        response = await handle(lambda: shop.insert(1), db, hooks=True)

    assert isinstance(response.error, sa_exc.OperationalError)
    assert "SQLITE_BUSY" == response.error.orig.sqlite_errorname  # type: ignore[union-attr]
    assert ["rollback"] == response.hooks
    assert [] == await shop.items(backend)


@on("aiosqlite")
async def test_sqlite_that_rolled_back_by_itself(
    db: Database, backend: SQLiteBackend
) -> None:
    """An error after which SQLite has rolled everything back dooms the unit."""

    async def handler() -> None:
        await shop.insert(1)
        await shop.insert(2)
        with suppress(sa_exc.IntegrityError):
            await uow.current_session().execute(INSERT_OR_ROLLBACK)

    response = await handle(handler, db, hooks=True)

    await check_doomed(response, backend)


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
            await asyncio.wait_for(uow.current_session().execute(slow), 0.05)

    response = await handle(handler, db, hooks=True)

    assert response.status >= 500
    assert isinstance(response.error, errors.DoomedError)
    assert [] == await shop.items(backend)
    assert 0 == await backend.open_transactions()


@on("asyncmy")
async def test_implicit_commit_is_reported(
    db: Database, backend: MariaDBBackend
) -> None:
    """DDL commits what was written before it; committed, the unit is whole."""

    async def handler() -> None:
        await shop.insert(1)
        await uow.current_session().execute("CREATE TABLE other (id INTEGER)")
        await shop.insert(2)

    response = await handle(handler, db, hooks=True)

    assert 200 == response.status
    assert [1, 2] == await shop.items(backend)
    assert ImplicitCommit("CREATE TABLE") in response.events
    assert ["commit"] == response.hooks


@on("asyncmy")
async def test_implicit_commit_cannot_be_rolled_back(
    db: Database, backend: MariaDBBackend
) -> None:
    """Rolled back after DDL, a part is kept: PARTIAL, a plain 500, no hook."""

    async def handler() -> None:
        await shop.insert(1)
        await uow.current_session().execute("CREATE TABLE other (id INTEGER)")
        await shop.insert(2)

    response = await handle(handler, db, status=404, hooks=True)

    assert 500 == response.status
    assert isinstance(response.error, errors.PartialCommitError)
    assert "committed by itself for CREATE TABLE" in str(response.error)
    assert "other" not in str(response.error)
    assert uow.Outcome.PARTIAL is response.unit.outcome
    assert [] == response.hooks
    assert [1] == await shop.items(backend)


@on("asyncmy")
async def test_ddl_comes_first(db: Database, backend: MariaDBBackend) -> None:
    """With nothing before it, DDL is kept by itself: no rollback undoes it."""

    async def handler() -> None:
        await uow.current_session().execute("CREATE TABLE other (id INTEGER)")
        await uow.current_session().execute("CREATE TABLE another (id INTEGER)")
        await shop.insert(1)

    response = await handle(handler, db, status=404, hooks=True)

    assert 500 == response.status
    assert "committed by itself for CREATE TABLE" in str(response.error)
    assert uow.Outcome.PARTIAL is response.unit.outcome
    assert [] == response.hooks
    assert [] == response.events.of(ImplicitCommit)
    assert [] == await shop.items(backend)
    assert 0 == await backend.scalar("SELECT count(*) FROM other, another")


@on("asyncmy")
@pytest.mark.parametrize(
    "statement", ["CREATE TABLE items (id INTEGER)", "ANALYZE TABLE items"]
)
async def test_ddl_that_keeps_nothing(
    db: Database, backend: MariaDBBackend, statement: str
) -> None:
    """What failed, or changes nothing, is no part that was kept."""

    async def handler() -> None:
        with suppress(sa_exc.OperationalError):
            await uow.current_session().execute(statement)
        await shop.insert(1)

    response = await handle(handler, db, status=404, hooks=True)

    assert 404 == response.status
    assert uow.Outcome.ROLLED_BACK is response.unit.outcome
    assert ["rollback"] == response.hooks
    assert [] == await shop.items(backend)


@on("asyncmy")
async def test_ddl_that_is_not_understood(
    db: Database, backend: MariaDBBackend
) -> None:
    """A syntax error in DDL has committed nothing, then or later."""

    async def handler() -> None:
        await shop.insert(1)
        with suppress(sa_exc.ProgrammingError):
            await uow.current_session().execute("CREATE TABLET other (id INTEGER)")
        await shop.insert(2)

    response = await handle(handler, db, status=404, hooks=True)

    assert 404 == response.status
    assert ["rollback"] == response.hooks
    assert [] == await shop.items(backend)


@on("asyncmy")
async def test_ddl_that_failed(db: Database, backend: MariaDBBackend) -> None:
    """DDL that is understood commits what was before it, even if it fails then."""

    async def handler() -> None:
        await shop.insert(1)
        with suppress(sa_exc.OperationalError):
            await uow.current_session().execute("CREATE TABLE items (id INTEGER)")

    response = await handle(handler, db, status=404)

    assert isinstance(response.error, errors.PartialCommitError)
    assert "CREATE TABLE" in str(response.error)
    assert [1] == await shop.items(backend)


@pytest.mark.parametrize("how", ["connection", "transaction"])
@pytest.mark.parametrize("by_hand", ["commit", "rollback"])
async def test_ended_by_hand_through_the_back_door(
    db: Database, backend: Backend, by_hand: str, how: str
) -> None:
    """Through connection or transaction COMMIT is refused; either dooms the unit."""

    async def handler() -> None:
        await shop.insert(1)
        session = uow.current_session()
        transaction = session.get_transaction()
        assert transaction is not None
        back_door = await session.connection() if how == "connection" else transaction
        if by_hand == "commit":
            with suppress(errors.ManagedTransactionError):
                await back_door.commit()
        else:
            await back_door.rollback()
            with suppress(sa_exc.InvalidRequestError, errors.TransactionGoneError):
                await shop.insert(2)

    response = await handle(handler, db, hooks=True)

    cause = await check_doomed(response, backend)
    if by_hand == "commit":
        assert isinstance(cause, errors.ManagedTransactionError)


# Errors of the databases' own kinds


@on("aiosqlite")
async def test_listener_that_dooms_before_commit(
    db: Database, backend: SQLiteBackend
) -> None:
    """A SQLAlchemy before_commit listener that swallows what dooms is seen too."""

    def doom(session: ManagedSession) -> None:
        with suppress(sa_exc.IntegrityError):
            [connection] = session.connections
            connection.exec_driver_sql(INSERT_OR_ROLLBACK)

    async def handler() -> None:
        await shop.insert(1)
        event.listen(uow.current_session().sync_session, "before_commit", doom)

    response = await handle(handler, db, hooks=True)

    await check_doomed(response, backend)


@on("aiosqlite")
@pytest.mark.parametrize("status", [200, 409])
async def test_nothing_is_kept_alone(
    db: Database, backend: SQLiteBackend, status: int
) -> None:
    """After SQLite's own rollback a statement would commit itself: refused."""

    async def handler() -> None:
        await shop.insert(1)
        with suppress(sa_exc.IntegrityError):
            await uow.current_session().execute(INSERT_OR_ROLLBACK)
        with pytest.raises(errors.TransactionGoneError, match="leave the handler"):
            await shop.insert(2)

    response = await handle(handler, db, status=status, hooks=True)

    assert (500 if status == 200 else 409) == response.status
    assert ["rollback"] == response.hooks
    assert [] == await shop.items(backend)


async def test_lock_wait_timeout_that_rolls_back(mariadb_port: int) -> None:
    """With innodb_rollback_on_timeout 1205 has undone everything: doomed."""

    async def handler() -> None:
        session = uow.current_session()
        await session.execute("SET innodb_lock_wait_timeout = 1")
        await shop.insert(1)
        with suppress(sa_exc.OperationalError):
            await shop.insert(2)
        await shop.insert(3)

    with MariaDB("--innodb-rollback-on-timeout=ON") as server:
        async with (
            MariaDBBackend(server.port) as backend,
            shop_database(backend) as db,
            rival_of(backend) as rival,
        ):
            await rival.exec_driver_sql("INSERT INTO items (id) VALUES (2)")
            response = await handle(handler, db, hooks=True)
            await rival.rollback()

            await check_doomed(response, backend, status=503)
