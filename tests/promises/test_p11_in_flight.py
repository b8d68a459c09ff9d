"""P11: statements that pass the session's lock: `session.connection()`, cursors."""

from __future__ import annotations

import asyncio
import functools
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from sqlalchemy import event, literal_column
from sqlalchemy.exc import DBAPIError, SQLAlchemyError, StatementError
from sqlalchemy.ext.asyncio import AsyncAttrs
from sqlalchemy.orm import DeclarativeBase, Mapped, column_property, mapped_column
from sqlalchemy.util import await_only, greenlet_spawn

import asgi_uow as uow
from asgi_uow import Database
from asgi_uow.errors import AsgiUowError, ConcurrentUseError
from tests.servers import eventually
from tests.support import shop
from tests.support.asgi import Response, handle
from tests.support.databases import (
    DRIVERS,
    SERVER_DRIVERS,
    behind_proxy,
    checked_out,
    is_commit,
    on,
)
from tests.support.gate import gate_at
from tests.support.private import State, driver_of
from tests.support.writes import driver_connection

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from sqlalchemy.engine import ExceptionContext
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.pool import PoolProxiedConnection

    from asgi_uow import Session
    from tests.servers import Backend, ServerBackend

SECONDS = 10.0
"""For what takes milliseconds: whatever takes longer hangs."""
ONE_CONNECTION = {"pool_size": 1, "max_overflow": 0}


# The ways past the session's lock


async def on_connection(session: Session, statement: str) -> None:
    connection = await session.connection()
    await connection.exec_driver_sql(statement)


async def on_cursor(session: Session, statement: str) -> None:
    await by_cursor(await (await session.connection()).get_raw_connection(), statement)


async def by_cursor(raw: PoolProxiedConnection, statement: str) -> None:
    def execute() -> None:
        cursor = raw.cursor()
        cursor.execute(statement)
        cursor.close()

    await greenlet_spawn(execute)


async def on_driver(session: Session, statement: str) -> None:
    raw = await driver_connection(session)
    if hasattr(raw, "execute"):
        await raw.execute(statement)
    else:  # asyncmy
        async with raw.cursor() as cursor:
            await cursor.execute(statement)


WAYS: dict[str, Callable[[Session, str], Coroutine[Any, Any, None]]] = {
    "connection": on_connection,
    "cursor": on_cursor,
    "driver": on_driver,
}
ways = pytest.mark.parametrize("way", WAYS)


async def fail() -> None:
    raise ZeroDivisionError


async def end_while_in_flight(
    db: Database,
    gate: Any,
    start: Callable[[], Awaitable[None]],
    status: int | None,
    **options: Any,
) -> tuple[Response, asyncio.Task[Response], asyncio.Task[None]]:
    """Have a handler leave a statement in flight; return when its unit is ending.

    Without a status the handler raises.
    """
    response, leaked = Response(), list[asyncio.Task[None]]()

    async def leak() -> None:
        await start()

    async def handler() -> None:
        await shop.insert(1)
        leaked.append(asyncio.create_task(leak()))
        await gate.reached()
        if status is None:
            await fail()

    work = handle(
        handler, db, status=status or 200, hooks=True, into=response, **options
    )
    request = asyncio.create_task(work)
    ending = State.COMMITTING if status == 200 else State.ROLLING_BACK

    async def is_ending() -> bool:
        return bool(response.units) and (
            request.done() or response.unit.state is ending
        )

    await eventually(True, is_ending)
    return response, request, leaked[0]


async def works(db: Database, backend: Backend, kept: list[int]) -> None:
    """The next users of the pool are served, on a connection without a past."""
    assert [0, 0] == checked_out(db)
    for number in (98, 99):
        work = functools.partial(shop.insert, number)
        async with asyncio.timeout(SECONDS):
            after = await handle(work, db)
        assert (200, None) == (after.status, after.error)
    assert [*kept, 98, 99] == await shop.items(backend)
    assert 0 == await backend.open_transactions()


# The end


@on(*DRIVERS)
@ways
@pytest.mark.parametrize("status", [200, 404, None])
async def test_the_end_waits(backend: Backend, way: str, status: int | None) -> None:
    """COMMIT and ROLLBACK come after the answer to what a leaked task has sent."""
    async with gate_at(backend, **ONE_CONNECTION) as (db, gate):

        async def start() -> None:
            await WAYS[way](uow.current_session(), gate.insert)

        async with asyncio.timeout(SECONDS):
            response, request, leaked = await end_while_in_flight(
                db, gate, start, status
            )
            assert not request.done()
            await gate.open()
            await request
            await leaked
        if status is None:
            assert isinstance(response.error, ZeroDivisionError)
        else:
            assert (status, None) == (response.status, response.error)
        assert ["commit" if status == 200 else "rollback"] == response.hooks
        await works(db, backend, [1, 2] if status == 200 else [])


@on("asyncmy", "psycopg")
@pytest.mark.parametrize("way", ["connection", "cursor"])
async def test_what_is_in_flight_ends_the_transaction(
    backend: Backend, way: str
) -> None:
    """P13: a rollback is not said to be proven where a hidden COMMIT came before."""
    async with gate_at(backend, **ONE_CONNECTION) as (db, gate):
        if backend.name == "mariadb":
            body = f"BEGIN DO {gate.expression}; COMMIT; END"
            await backend.execute(f"CREATE PROCEDURE commits_behind_gate() {body}")
        hidden = {
            "mariadb": "CALL commits_behind_gate()",
            "postgresql": f"{gate.select}; COMMIT",
        }

        async def start() -> None:
            await WAYS[way](uow.current_session(), hidden[backend.name])

        async with asyncio.timeout(SECONDS):
            response, request, leaked = await end_while_in_flight(db, gate, start, 404)
            await gate.open()
            await request
            await asyncio.wait([leaked])
        assert response.unit.outcome is uow.Outcome.UNKNOWN
        assert [] == response.hooks
        await works(db, backend, [1])


def mapped(expression: str = "7") -> Any:
    """Map a class of items with attributes that are loaded when they are asked for."""

    class Base(AsyncAttrs, DeclarativeBase):
        pass

    class Item(Base):
        __tablename__ = "items"
        id: Mapped[int] = mapped_column(primary_key=True)
        late: Mapped[str] = column_property(literal_column(expression), deferred=True)
        soon: Mapped[int] = column_property(literal_column("7"), deferred=True)

    return Item


@on(*DRIVERS)
async def test_the_end_waits_for_attributes(backend: Backend) -> None:
    """Nor does it come in between what `awaitable_attrs` reads."""

    async with gate_at(backend, **ONE_CONNECTION) as (db, gate):
        item_class = mapped(gate.expression)

        async def start() -> None:
            item = await uow.current_session().get_one(item_class, 1)
            await item.awaitable_attrs.late

        async with asyncio.timeout(SECONDS):
            response, request, leaked = await end_while_in_flight(db, gate, start, 200)
            assert not request.done()
            await gate.open()
            await request
            await leaked
        assert (200, None) == (response.status, response.error)
        await works(db, backend, [1])


@on(*SERVER_DRIVERS)
@pytest.mark.parametrize("cancelled", ["call", "attribute"])
async def test_cancelled_beside_attributes(
    backend: ServerBackend, cancelled: str
) -> None:
    """One task that reads is cancelled: those beside it have their answers."""

    async with gate_at(backend, **ONE_CONNECTION) as (db, gate):
        item_class = mapped(gate.expression)

        await backend.execute("INSERT INTO items (id) VALUES (1)")
        async with asyncio.timeout(SECONDS), db:
            item = await db.read.get_one(item_class, 1)
            waits: dict[str, Callable[[], Awaitable[object]]] = {
                "call": lambda: db.read.scalar(gate.select),
                "attribute": lambda: item.awaitable_attrs.late,
            }
            task = asyncio.ensure_future(waits[cancelled]())
            await gate.reached()
            others = asyncio.gather(
                item.awaitable_attrs.soon, db.read.scalar("SELECT 8")
            )
            await asyncio.sleep(0)
            task.cancel()
            assert [7, 8] == [*await others]
            assert task.cancelled()
            assert 9 == await db.read.scalar("SELECT 9")
        assert [0, 0] == checked_out(db)


@on(*DRIVERS)
async def test_attributes_inside_a_call_of_the_writer(
    db: Database, backend: Backend
) -> None:
    """A read that waits for that call does not keep the attribute from it."""
    item_class = mapped()

    await backend.execute("INSERT INTO items (id) VALUES (1)")
    entered, go_on = asyncio.Event(), asyncio.Event()
    async with asyncio.timeout(SECONDS), db:
        item = await db.read.get_one(item_class, 1)
        await db.write.scalar("SELECT 1")

        def load(_: object) -> int:
            entered.set()
            await_only(go_on.wait())
            return int(item.soon)

        loading = asyncio.create_task(db.write.run_sync(load))
        await entered.wait()
        reading = asyncio.create_task(db.read.scalar("SELECT 8"))
        await asyncio.sleep(0)
        assert db.read.own_lock.owner is reading
        go_on.set()
        assert [7, 8] == [await loading, await reading]
    assert [0, 0] == checked_out(db)


@on(*DRIVERS)
@ways
@pytest.mark.parametrize("hook", [False, True])
async def test_a_reader_is_given_back(
    backend: Backend, way: str, *, hook: bool
) -> None:
    """The connection of a reader is given back when it has its answer."""
    async with gate_at(backend, **ONE_CONNECTION) as (db, gate):
        response, leaked = Response(), list[asyncio.Task[None]]()

        async def handler() -> None:
            if hook:
                uow.after_commit(fail)
            session = uow.current_read_session()
            leaked.append(asyncio.create_task(WAYS[way](session, gate.select)))
            await gate.reached()

        async with asyncio.timeout(SECONDS):
            request = asyncio.create_task(handle(handler, db, into=response))

            async def is_ending() -> bool:
                ended = {State.COMMITTED, State.CLOSED}
                is_over = bool(response.units) and response.unit.state in ended
                return is_over or request.done()

            await eventually(True, is_ending)
            # SQLite's thread does one thing after the other: nobody has to wait.
            assert backend.name == "sqlite" or not request.done()
            await gate.open()
            await request
            await leaked[0]
        assert (200, None) == (response.status, response.error)
        async with asyncio.timeout(SECONDS):
            async with db:
                assert 42 == await db.read.scalar("SELECT 42")
        await works(db, backend, [])


@on(*DRIVERS)
@ways
@pytest.mark.parametrize("status", [200, 404])
async def test_an_end_that_cannot_wait(backend: Backend, way: str, status: int) -> None:
    """After `commit_timeout` the connection is thrown away, and nothing hangs.

    It is closed when what was in flight has failed: psycopg crashes the process else.
    """
    in_flight_at_close: list[bool] = []
    async with gate_at(backend, **ONE_CONNECTION) as (db, gate):
        driver = driver_of(db.engine.dialect)

        async def start() -> None:
            await WAYS[way](uow.current_session(), gate.insert)

        @event.listens_for(db.engine.sync_engine, "close")
        def look(connection: Any, _: object) -> None:
            in_flight_at_close.append(driver.is_busy(connection._connection))

        async with asyncio.timeout(SECONDS):
            response, request, leaked = await end_while_in_flight(
                db, gate, start, status, commit_timeout=0.05
            )
            if backend.name == "sqlite":
                await asyncio.wait([request], timeout=0.2)
                await gate.open()
            await request
            await asyncio.wait([leaked])
        # Nobody knows of what it was that had no answer: it may be a COMMIT. SQLite's
        # thread answers in the end, and may have got ours.
        known = {404} if status == 404 else {503}
        is_seen = way == "connection" and status == 404 and backend.name != "sqlite"
        refused = {500} if backend.name != "sqlite" else {500, *known}
        assert response.status in (known if is_seen else refused)
        assert leaked.exception() is not None or backend.name == "sqlite"
        await gate.open()
        await works(db, backend, [])
    assert in_flight_at_close
    assert not any(in_flight_at_close)


@on(*SERVER_DRIVERS)
async def test_what_comes_during_commit(backend: ServerBackend) -> None:
    """A statement is refused; a cursor waits, and finds its connection closed."""
    late: list[asyncio.Task[None]] = []
    opened: list[AsyncConnection] = []

    async def handler() -> None:
        await shop.insert(1)
        opened.append(await uow.current_session().connection())

    async with behind_proxy(backend, **ONE_CONNECTION) as (db, proxy):
        hold = proxy.hold_answer(is_commit)
        request = asyncio.create_task(handle(handler, db, hooks=True))
        async with asyncio.timeout(SECONDS):
            await hold.answered.wait()
            [connection] = opened
            raw = await connection.get_raw_connection()
            insert = "INSERT INTO items (id) VALUES (2)"
            with pytest.raises(ConcurrentUseError):
                await connection.exec_driver_sql(insert)
            late.append(asyncio.create_task(by_cursor(raw, insert)))
            await asyncio.sleep(0)
            hold.release()
            response = await request
            await asyncio.wait(late)
        assert (200, None) == (response.status, response.error)
        assert ["commit"] == response.hooks
        assert late[0].exception() is not None
        await works(db, backend, [1])


@on(*SERVER_DRIVERS, **ONE_CONNECTION)
@pytest.mark.parametrize("end", ["deadline", "close", "invalidate"])
@pytest.mark.parametrize("cancelled_by", ["task", "scope"])
async def test_what_waits_when_its_connection_is_closed(
    db: Database, backend: ServerBackend, end: str, cancelled_by: str
) -> None:
    """Each of several statements is told why it failed, also when it hears it last.

    A scope cancels again in each turn of the loop.
    """
    seconds, scope = 0.3 if end == "deadline" else None, anyio.CancelScope()
    tasks: list[asyncio.Task[None]] = []

    async def slow() -> None:
        await connection.exec_driver_sql(backend.slow)

    async def first() -> None:
        with scope:
            await slow()

    async with asyncio.timeout(SECONDS):
        with pytest.raises((AsgiUowError, DBAPIError)):
            async with uow.unit_of_work(db, deadline=seconds):
                connection = await uow.current_session().connection()
                tasks += [asyncio.create_task(first())]
                tasks += [asyncio.create_task(slow()) for _ in range(5)]
                await eventually(1, functools.partial(backend.running, backend.slow))
                if end != "deadline":
                    (tasks[0] if cancelled_by == "task" else scope).cancel()
                    await asyncio.sleep(0)
                    await getattr(connection, end)()
        await asyncio.wait(tasks)
    told, *failures = await asyncio.gather(*tasks, return_exceptions=True)
    kinds: tuple[type[Exception], ...] = (AsgiUowError, SQLAlchemyError)
    if backend.driver == "asyncpg":  # it takes the None of an end for an answer
        kinds += (AttributeError, TypeError)
    assert [] == [each for each in failures if not isinstance(each, kinds)]
    if end == "deadline":
        assert isinstance(told, kinds)
    elif cancelled_by == "task":
        assert isinstance(told, asyncio.CancelledError)
    else:
        assert told is None
    await works(db, backend, [])


@on(*SERVER_DRIVERS, **ONE_CONNECTION)
async def test_closed_while_its_error_is_looked_at(
    db: Database, backend: ServerBackend
) -> None:
    """What is raised is the database's error: there is nothing left to throw away."""

    @event.listens_for(db.engine.sync_engine, "handle_error")
    def close(context: ExceptionContext) -> None:
        assert context.connection is not None
        with suppress(DBAPIError):  # of its ROLLBACK
            context.connection.close()

    with pytest.raises(DBAPIError) as caught:
        async with db:
            connection = await uow.current_session().connection()
            await backend.kill_connections()
            await connection.exec_driver_sql("SELECT 1")
    assert caught.value.connection_invalidated
    event.remove(db.engine.sync_engine, "handle_error", close)
    await works(db, backend, [])


@on(*SERVER_DRIVERS, **ONE_CONNECTION)
async def test_nothing_is_in_flight_on_a_lost_connection(
    db: Database, backend: ServerBackend
) -> None:
    """Nobody waits for it."""

    async def handler() -> None:
        await shop.insert(1)
        await uow.current_session().connection()
        await backend.kill_connections()
        await shop.insert(2)

    async with asyncio.timeout(SECONDS):
        response = await handle(handler, db)
    assert isinstance(response.error, DBAPIError)
    await works(db, backend, [])


@on(*DRIVERS, **ONE_CONNECTION)
@pytest.mark.parametrize("status", [200, 404])
async def test_connection_after_its_unit(
    db: Database, backend: Backend, status: int
) -> None:
    """It does not connect anew: nobody would close what it then holds."""
    kept: list[AsyncConnection] = []

    async def handler() -> None:
        await shop.insert(1)
        kept.append(await uow.current_session().connection())

    await handle(handler, db, status=status)
    for _ in range(2):
        with pytest.raises(StatementError, match="TransactionGoneError"):
            await kept[0].exec_driver_sql("INSERT INTO items (id) VALUES (2)")
    await works(db, backend, [1] if status == 200 else [])


# In the middle


async def insert_at_once(way: str) -> None:
    session = uow.current_session()
    inserts = [f"INSERT INTO items (id) VALUES ({number})" for number in range(10)]
    await asyncio.gather(*(WAYS[way](session, each) for each in inserts))


@on(*DRIVERS)
@pytest.mark.parametrize("way", ["connection", "cursor"])
async def test_statements_at_once(db: Database, backend: Backend, way: str) -> None:
    """Ten of them, the first of which begins the transaction, take turns."""
    async with asyncio.timeout(SECONDS):
        response = await handle(lambda: insert_at_once(way), db, hooks=True)
    assert (200, None) == (response.status, response.error)
    await works(db, backend, [*range(10)])


@on("aiosqlite", "asyncpg", "psycopg", **ONE_CONNECTION)
async def test_statements_at_once_by_the_driver(db: Database, backend: Backend) -> None:
    """They take turns, or asyncpg refuses; asyncmy cannot do it."""

    async def handler() -> None:
        await shop.insert(10)
        await insert_at_once("driver")

    async with asyncio.timeout(SECONDS):
        response = await handle(handler, db, hooks=True)
    takes_turns = backend.driver != "asyncpg"
    assert takes_turns is (response.error is None)
    assert takes_turns is ("commit" in response.hooks)
    await works(db, backend, [*range(11)] if takes_turns else [])
