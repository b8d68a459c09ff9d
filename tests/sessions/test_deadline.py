"""`deadline`: no database call of a unit of work outlives it."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.util import await_only, greenlet_spawn

import asgi_uow as uow
from asgi_uow import Database, Outcome, UnitOfWorkMiddleware, errors
from asgi_uow._sessions.deadline import Deadline
from tests.servers import eventually
from tests.servers.backend import ServerBackend, SQLiteBackend
from tests.support import shop
from tests.support.asgi import Client, Response, endpoint, handle, serve
from tests.support.databases import (
    DRIVERS,
    SERVER_DRIVERS,
    behind_proxy,
    checked_out,
    is_commit,
    memory_database,
    on,
)
from tests.support.gate import gate_at
from tests.support.shop import Item

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from sqlalchemy.orm import Session as SyncSession

    from tests.servers import Backend

pytestmark = on(*DRIVERS, pool_size=1, max_overflow=0)

SHORT = 0.3
UPDATE = "UPDATE items SET parent = NULL WHERE id = 1"


@asynccontextmanager
async def locked(backend: Backend) -> AsyncGenerator[None]:
    """Item 1 is there, and somebody else is changing it."""
    await backend.execute("INSERT INTO items (id) VALUES (1)")
    if isinstance(backend, SQLiteBackend):
        with closing(sqlite3.connect(backend.path)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield
        return
    engine = create_async_engine(backend.url)
    async with engine.begin() as other:
        await other.execute(text(UPDATE))
        yield
    await engine.dispose()


async def until_over() -> None:
    """Wait until the deadline of the current unit is over."""
    over = asyncio.Event()
    until = uow.current_unit_of_work().until
    assert until is not None
    asyncio.get_running_loop().call_at(until, over.set)
    await over.wait()


def assert_refused(response: Response) -> None:
    """The client may try again, and nothing was kept."""
    assert 503 == response.status
    assert "1" == response.headers["retry-after"]
    assert Outcome.ROLLED_BACK is response.unit.outcome


# What waits


async def execute(session: uow.Session) -> None:
    await session.execute(UPDATE)


async def execute_many(session: uow.Session) -> None:
    await session.execute(
        text("UPDATE items SET parent = :parent WHERE id = 1"),
        [{"parent": None}, {"parent": None}],
    )


async def flush(session: uow.Session) -> None:
    item = await session.get_one(Item, 1)
    item.id = 2
    await session.flush()


async def on_connection(session: uow.Session) -> None:
    connection = await session.connection()
    await connection.exec_driver_sql(UPDATE)


async def past_the_session(session: uow.Session) -> None:
    """As a relationship is loaded: without the session's turn."""
    await greenlet_spawn(session.sync_session.execute, text(UPDATE))


async def in_savepoint(session: uow.Session) -> None:
    async with uow.savepoint():
        await session.execute(update(Item).values(id=Item.id))


async def in_before_commit(session: uow.Session) -> None:
    uow.before_commit(session.execute, UPDATE)


async def at_the_last_flush(session: uow.Session) -> None:
    session.add(Item(id=3))
    await session.flush()
    (await session.get_one(Item, 1)).id = 2


CALLS = [
    execute,
    execute_many,
    flush,
    on_connection,
    past_the_session,
    in_savepoint,
    in_before_commit,
    at_the_last_flush,
]
ENDS = ["raised", "swallowed"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("end", ENDS)
async def test_lock(
    db: Database,
    backend: Backend,
    call: Callable[[uow.Session], Awaitable[None]],
    end: str,
) -> None:
    """What waits for a lock ends at the deadline, and its statement on the server."""
    if backend.name == "sqlite" and call in {flush, at_the_last_flush}:
        pytest.skip("there the first statement waits already")
    caught: list[BaseException] = []

    async def handler() -> None:
        try:
            await call(uow.current_session())
        except errors.DeadlineExceededError as error:
            caught.append(error)
            if end == "raised":
                raise

    async with db:
        await db.write.execute("SELECT 1")  # to connect takes time, too
    async with locked(backend):
        response = await handle(handler, db, deadline=SHORT)
        assert_refused(response)
        if isinstance(backend, ServerBackend):
            await eventually(1, backend.open_transactions)

    late = call in {in_before_commit, at_the_last_flush}
    assert late != bool(caught)
    if end == "raised" and not late:
        assert response.error is caught[0]
    else:
        assert isinstance(response.error, errors.UnitOfWorkFailedError)
    assert [1] == await shop.items(backend)
    assert [0, 0] == checked_out(db)
    assert 200 == (await handle(lambda: shop.insert(5, db), db, deadline=30)).status


async def test_turn(db: Database, backend: Backend) -> None:
    """What waits for its turn on the session ends too; who has it is left alone."""
    entered, leave = asyncio.Event(), asyncio.Event()

    def wait(_: SyncSession) -> None:
        entered.set()
        await_only(leave.wait())

    async with uow.unit_of_work(db, deadline=SHORT) as unit:
        holding = asyncio.create_task(db.write.run_sync(wait))
        await entered.wait()
        with pytest.raises(errors.DeadlineExceededError):
            await shop.insert(1)
        leave.set()
        await holding
    assert Outcome.COMMITTED is unit.outcome
    assert [] == await shop.items(backend)


@pytest.mark.parametrize("access", ["read", "write"])
async def test_pool(db: Database, access: str) -> None:
    """What waits for a pooled connection ends too."""
    engine = db.engine if access == "write" else db.read_engine

    async def handler() -> None:
        await getattr(db, access).execute("SELECT 1")

    async with engine.connect():
        assert_refused(await handle(handler, db, deadline=SHORT))
    assert 200 == (await handle(handler, db, deadline=30)).status


@on(*SERVER_DRIVERS)
async def test_frozen_server(backend: ServerBackend) -> None:
    """A read that gets no answer ends; what comes after it in the unit is refused."""
    async with behind_proxy(backend) as (db, proxy):

        async def handler() -> None:
            await db.read.execute(shop.COUNT)
            proxy.freeze()
            for _ in range(2):
                with pytest.raises(errors.DeadlineExceededError):
                    await db.read.execute(shop.COUNT)
            proxy.thaw()

        response = await handle(handler, db, deadline=SHORT)

        assert 200 == response.status
        assert [0, 0] == checked_out(db)


@on("asyncmy", "asyncpg")  # psycopg gets them with the first fetch
@pytest.mark.parametrize("name", ["read", "write"])
async def test_first_rows_of_a_stream(backend: ServerBackend, name: str) -> None:
    """A stream whose first rows do not come ends as well, and so does what follows."""
    async with gate_at(backend) as (db, gate):
        async with uow.unit_of_work(db, deadline=SHORT) as unit:
            session = getattr(db, name)
            for _ in range(2):
                with pytest.raises(errors.DeadlineExceededError):
                    await (await session.stream(gate.select)).all()
            with pytest.raises(errors.DeadlineExceededError):
                await session.execute("SELECT 1")
            unit.set_rollback_only("the end of what can be read")
        assert [0, 0] == checked_out(db)


@on(*SERVER_DRIVERS)
async def test_fetches_of_a_stream(backend: ServerBackend) -> None:
    """A stream that gets no more rows ends at the deadline."""
    async with behind_proxy(backend) as (db, proxy):
        await backend.execute(
            *(f"INSERT INTO items (id) VALUES ({number})" for number in range(9))
        )
        seen: list[object] = []

        async def handler() -> None:
            options = {"yield_per": 2}
            rows = await db.read.stream_scalars(
                "SELECT id FROM items", execution_options=options
            )
            with pytest.raises(errors.DeadlineExceededError):
                async for row in rows:
                    seen.append(row)
                    await until_over()

        async with db:  # so that connecting takes none of the time
            await db.read.execute(shop.COUNT)
        assert 200 == (await handle(handler, db, deadline=SHORT)).status
        assert 0 < len(seen) < 9
        proxy.thaw()


# What is not touched


async def test_other_errors(db: Database) -> None:
    """A statement that fails before the deadline fails as without one."""
    options = {"no_parameters": True}
    async with uow.unit_of_work(db, deadline=60) as unit:
        with pytest.raises(DBAPIError, match="nowhere"):
            await db.read.execute("SELECT nothing FROM nowhere")
        connection = await db.write.connection()
        result = await connection.exec_driver_sql("SELECT 7", execution_options=options)
        assert 7 == result.scalar()
    assert Outcome.COMMITTED is unit.outcome


async def test_no_further_call(db: Database, backend: Backend) -> None:
    """A request that makes no call after its deadline is answered as without one."""

    async def handler() -> None:
        assert 0 == await db.read.scalar(shop.COUNT)
        uow.current_session()
        await until_over()

    assert 200 == (await handle(handler, db, deadline=SHORT)).status


async def test_what_was_refused_throws_no_connection_away(
    db: Database, backend: Backend
) -> None:
    """Nothing was sent, so the connection is sound: it is rolled back, and kept."""
    made: list[object] = []

    def note(dbapi: object, _: object) -> None:
        made.append(dbapi)

    event.listen(db.engine.sync_engine, "connect", note)
    await backend.execute("INSERT INTO items (id) VALUES (1)")

    async def work() -> None:
        await shop.insert(2)
        connection = await uow.current_session().connection()
        await until_over()
        await connection.exec_driver_sql(shop.COUNT)

    assert_refused(await handle(work, db, deadline=SHORT))
    await handle(lambda: shop.insert(3), db)
    assert [1, 3] == await shop.items(backend)
    assert 1 == len(made)


async def test_commit_is_not_begun(db: Database, backend: Backend) -> None:
    """What was written before the deadline is not committed after it."""

    async def handler() -> None:
        await shop.insert(1)
        await until_over()

    response = await handle(handler, db, deadline=SHORT, hooks=True)

    assert_refused(response)
    assert ["rollback"] == response.hooks
    failure = response.error
    assert isinstance(failure, errors.CommitFailedError)
    assert isinstance(failure.__cause__, errors.DeadlineExceededError)
    assert "timeout" == failure.cause.value
    assert [] == await shop.items(backend)


@on(*SERVER_DRIVERS)
async def test_commit_takes_its_time(backend: ServerBackend) -> None:
    """A COMMIT that was begun goes on after the deadline."""
    async with behind_proxy(backend) as (db, proxy):
        held = proxy.hold_answer(is_commit)
        units: list[uow.UnitOfWork] = []

        async def handler() -> None:
            units.append(uow.current_unit_of_work())
            await shop.insert(1)

        request = asyncio.create_task(handle(handler, db, deadline=1.0))
        await held.fired.wait()
        [unit] = units
        over = asyncio.Event()
        asyncio.get_running_loop().call_at(unit.until or 0, over.set)
        await over.wait()
        held.release()
        assert 200 == (await request).status
        assert [1] == await shop.items(backend)


@on(*SERVER_DRIVERS)
async def test_commit_without_an_answer(backend: ServerBackend) -> None:
    """A COMMIT that was begun and has no answer is never a 503."""
    async with behind_proxy(backend) as (db, proxy):
        held = proxy.hold_answer(is_commit)
        response = await handle(
            lambda: shop.insert(1), db, deadline=1.0, commit_timeout=0.2
        )
        assert [500, Outcome.UNKNOWN] == [response.status, response.unit.outcome]
        held.release()


@on(*SERVER_DRIVERS)
async def test_two_phases(db: Database, backend: ServerBackend) -> None:
    """The statements that end a transaction in two phases are part of COMMIT."""
    db.write_options = {**db.write_options, "twophase": True}
    assert 200 == (await handle(lambda: shop.insert(1), db, deadline=30)).status
    assert [1] == await shop.items(backend)


async def test_hooks(db: Database, backend: Backend) -> None:
    """Hooks after the commit have time and units of their own."""

    async def handler() -> None:
        await shop.insert(1)
        unit = uow.current_unit_of_work()

        async def late() -> None:
            over = asyncio.Event()
            asyncio.get_running_loop().call_at(unit.until or 0, over.set)
            await over.wait()
            await shop.insert(2)
            assert uow.current_unit_of_work().until is None

        uow.after_commit(late)

    response = await handle(handler, db, deadline=1.0)

    assert [200, []] == [response.status, response.failures]
    assert [1, 2] == await shop.items(backend)


async def test_reads_after_the_commit(db: Database) -> None:
    """A stream of the response is bound by it as well."""
    found: list[object] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await shop.insert(1)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        found.append(await db.read.scalar(shop.COUNT))
        await until_over()
        with pytest.raises(errors.DeadlineExceededError):
            await db.read.scalar(shop.COUNT)
        await send({"type": "http.response.body"})

    assert 200 == (await serve(app, db, deadline=SHORT)).status
    assert [1] == found


# Units inside others


async def test_nested(db: Database, other: Database) -> None:
    """A block inside has the deadline of the unit around, or its own if earlier."""
    async with uow.unit_of_work(db, deadline=5) as outer:
        assert outer.until is not None
        async with other as inner:
            assert outer.until == inner.until
        async with uow.unit_of_work(other, deadline=50) as inner:
            assert outer.until == inner.until
        async with uow.unit_of_work(other, deadline=1) as inner:
            assert inner.until is not None
            assert inner.until < outer.until
    async with db as unit:
        assert unit.until is None


async def test_nested_middleware(db: Database, other: Database) -> None:
    """So has a middleware inside with databases of its own."""
    moments: list[float | None] = []

    async def handler() -> None:
        moments.append(uow.current_unit_of_work().until)

    for seconds in (50, 1, None):
        inner = UnitOfWorkMiddleware(endpoint(handler), other, deadline=seconds)
        outer = UnitOfWorkMiddleware(inner, db, deadline=5)
        start = asyncio.get_running_loop().time()
        await Client(outer).request()
        until = moments.pop()
        assert until is not None
        assert until - start < (2 if seconds == 1 else 6)


async def test_block(db: Database, backend: Backend) -> None:
    """`async with` raises what a request answers with a 503."""
    async with db:  # to connect may take longer on a busy machine
        await shop.insert(2)
    with pytest.raises(errors.CommitFailedError) as caught:
        async with uow.unit_of_work(db, deadline=SHORT):
            await shop.insert(1)
            await until_over()
    assert 1 == caught.value.retry_after
    assert [2] == await shop.items(backend)


# Beside


async def test_cancelled_before(db: Database, backend: Backend) -> None:
    """What is cancelled before its deadline is cancelled, and no more."""
    waiting = asyncio.Event()

    async def work() -> None:
        async with uow.unit_of_work(db, deadline=30):
            waiting.set()
            await db.write.execute(UPDATE)

    async with locked(backend):
        task = asyncio.create_task(work())
        await waiting.wait()
        if isinstance(backend, ServerBackend):
            await eventually(2, backend.open_transactions)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert [0, 0] == checked_out(db)


@on("aiosqlite")
async def test_cancelled_at_the_same_time() -> None:
    """A cancellation from outside is not taken for the deadline."""
    loop = asyncio.get_running_loop()
    until = loop.time() + SHORT

    async def work() -> None:
        task = asyncio.current_task()
        assert task is not None
        loop.call_at(until, task.cancel)
        with Deadline(until, []).limit():
            await asyncio.Event().wait()

    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(work())


@on("aiosqlite")
async def test_in_memory() -> None:
    """In memory the statement is stopped, and the database stays."""
    endless = (
        "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
        " SELECT count(*) FROM n"
    )
    async with memory_database() as db:
        async with db:
            await shop.insert(1)
        with pytest.raises(errors.DeadlineExceededError):
            async with uow.unit_of_work(db, deadline=SHORT):
                await shop.insert(2)
                await db.write.execute(endless)
        async with db:
            assert 1 == await db.read.scalar(shop.COUNT)


@pytest.mark.parametrize("wrong", [0, -1, "5", True, float("nan")])
@on("aiosqlite")
def test_no_deadline(wrong: Any) -> None:
    """What is no number of seconds is refused where it is given."""
    db = Database.from_url("sqlite:///app.db")
    with pytest.raises(errors.ConfigurationError, match="deadline must be seconds"):
        uow.unit_of_work(db, deadline=wrong)
    with pytest.raises(errors.ConfigurationError, match="deadline must be seconds"):
        UnitOfWorkMiddleware(endpoint(until_over), db, deadline=wrong)
