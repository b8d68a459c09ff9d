"""Tasks of one request that read at the same time."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event
from sqlalchemy.util import await_only

import asgi_uow as uow
from asgi_uow import Database, errors
from asgi_uow.observers import ConnectionReleased
from tests.support import shop
from tests.support.asgi import BODY, START, handle, serve
from tests.support.databases import SERVERS, checked_out, on, shop_database
from tests.support.gate import gate_at
from tests.support.shop import Item

if TYPE_CHECKING:
    from collections.abc import Generator

    from asgi_uow._asgi import Receive, Scope, Send
    from tests.servers.backend import Backend, ServerBackend, SQLiteBackend


async def test_at_the_same_time(db: Database) -> None:
    """Each task has a connection of its own while all of them hold one."""
    everybody = asyncio.Barrier(3)
    held: list[int] = []

    async def read() -> object:
        async with uow.parallel_read() as session:
            found = await session.scalar(shop.COUNT)
            await session.connection()
            await everybody.wait()
            held.append(checked_out(db)[1])
            await everybody.wait()
            return found

    async with db:
        assert [0, 0, 0] == list(await asyncio.gather(read(), read(), read()))
        assert [3, 3, 3] == held
        assert [0, 0] == checked_out(db)


async def test_cannot_write(db: Database) -> None:
    """It refuses what the read session refuses."""
    async with db:
        async with uow.parallel_read() as session:
            with pytest.raises(errors.ReadOnlySessionError):
                await session.execute("INSERT INTO items (id) VALUES (1)")
        with pytest.raises(errors.ReadOnlySessionError):
            async with uow.parallel_read() as session:
                session.add(Item(id=1))
                await session.flush()


async def test_objects_stay_loaded(db: Database, backend: Backend) -> None:
    """The objects of the request's read session stay."""
    await backend.execute("INSERT INTO items (id) VALUES (1)")
    async with db:
        item = await uow.current_read_session().get_one(Item, 1)
        async with uow.parallel_read() as session:
            assert 1 == await session.scalar(shop.COUNT)
        assert 1 == item.id
        assert item is await uow.current_read_session().get(Item, 1)
        assert 1 == await uow.current_read_session().scalar(shop.COUNT)


async def test_stream_keeps_its_connection(db: Database, backend: Backend) -> None:
    """A stream that is being read goes on beside parallel reads."""
    await backend.execute("INSERT INTO items (id) VALUES (1), (2)")
    async with db:
        rows = await uow.current_read_session().stream(
            "SELECT id FROM items ORDER BY id"
        )
        first = await rows.fetchone()
        async with uow.parallel_read() as session:
            assert 2 == await session.scalar(shop.COUNT)
        assert [(1,), (2,)] == [first, await rows.fetchone()]


@contextmanager
def stopped_at_begin(
    db: Database, go_on: asyncio.Event
) -> Generator[asyncio.Queue[None]]:
    """Have readers wait in the middle of a call, between connecting and BEGIN."""
    stopped = asyncio.Queue[None]()

    def stop(_: object, __: object, statement: str, *___: object) -> None:
        if statement == "BEGIN":
            stopped.put_nowait(None)
            await_only(go_on.wait())

    event.listen(db.read_engine.sync_engine, "before_cursor_execute", stop)
    yield stopped
    event.remove(db.read_engine.sync_engine, "before_cursor_execute", stop)


@on("asyncpg", "psycopg")
async def test_a_stream_that_is_being_opened(db: Database) -> None:
    """A call in flight keeps its connection while another task reads in parallel."""
    go_on = asyncio.Event()
    with stopped_at_begin(db, go_on) as stopped:
        async with db:
            opening = asyncio.create_task(db.read.stream_scalars(shop.COUNT))
            await stopped.get()
            async with uow.parallel_read() as session:
                assert 0 == await session.scalar(shop.COUNT)
            assert [0, 1] == checked_out(db)
            go_on.set()
            assert [0] == await (await opening).all()
            assert [0, 0] == checked_out(db)


@on("asyncpg", "psycopg")
async def test_a_stream_that_is_being_opened_at_the_end(db: Database) -> None:
    """So it does when the hooks of its unit are run."""
    go_on = asyncio.Event()
    found: list[object] = []
    with stopped_at_begin(db, go_on) as stopped:

        async def app(_: Scope, __: Receive, send: Send) -> None:
            reader = uow.current_read_session()
            opening = asyncio.create_task(reader.stream_scalars(shop.COUNT))
            await stopped.get()
            uow.after_commit(found.extend, "ok")
            await send({"type": START, "status": 200, "headers": []})
            assert [0, 1] == checked_out(db)
            go_on.set()
            found.extend(await (await opening).all())
            await send({"type": BODY, "body": b""})

        response = await serve(app, db)
    assert (["o", "k", 0], None) == (found, response.error)


async def test_streams_beside_parallel_reads(db: Database, backend: Backend) -> None:
    """A task that opens one stream after another goes on beside parallel reads."""
    await backend.execute("INSERT INTO items (id) VALUES (1), (2)")

    async def stream() -> None:
        for _ in range(20):
            rows = await uow.current_read_session().stream_scalars(shop.SELECT)
            assert [1, 2] == await rows.all()

    async def read() -> None:
        for _ in range(30):
            async with uow.parallel_read() as session:
                assert 2 == await session.scalar(shop.COUNT)

    async with db:
        await asyncio.gather(stream(), read())
        assert [0, 0] == checked_out(db)


async def test_after_a_write(db: Database) -> None:
    """Once the unit has written, the tasks read in its transaction, taking turns."""

    async def count() -> object:
        async with uow.parallel_read() as session:
            return await session.scalar(shop.COUNT)

    async with db:
        await shop.insert(1)
        assert [1, 1, 1] == list(await asyncio.gather(count(), count(), count()))
        assert [1, 0] == checked_out(db)


@on(*SERVERS)
async def test_pool_of_one(backend: ServerBackend) -> None:
    """20 requests with 3 parallel reads each share one connection; none hangs."""
    async with shop_database(
        backend, pool_size=1, max_overflow=0, pool_timeout=20
    ) as db:

        async def count() -> object:
            async with uow.parallel_read() as session:
                return await session.scalar(shop.COUNT)

        async def handler() -> None:
            await uow.current_read_session().scalar(shop.COUNT)
            assert [0] * 3 == list(await asyncio.gather(count(), count(), count()))
            await uow.current_read_session().scalar(shop.COUNT)

        responses = await asyncio.gather(*(handle(handler, db) for _ in range(20)))

        assert {200} == {response.status for response in responses}
        assert [0, 0] == checked_out(db)


async def test_after_the_response_has_started(db: Database) -> None:
    """Generators may read in parallel too."""
    found: list[object] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": START, "status": 200, "headers": []})
        async with uow.parallel_read() as session:
            found.append(await session.scalar(shop.COUNT))
        await send({"type": BODY, "body": b""})

    await serve(app, db)
    assert [0] == found


async def test_left_open(db: Database) -> None:
    """P7: a block that a task never left is closed with the request."""
    sessions: list[uow.Session] = []
    forever = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def leak(reading: asyncio.Event) -> None:
        async with uow.parallel_read() as session:
            sessions.append(session)
            await session.scalar(shop.COUNT)
            reading.set()
            await forever.wait()

    async def handler() -> None:
        reading = asyncio.Event()
        tasks.append(asyncio.create_task(leak(reading)))
        await reading.wait()

    response = await handle(handler, db)

    assert [0, 0] == checked_out(db)
    with pytest.raises(errors.UnitOfWorkClosedError):
        await sessions[0].scalar(shop.COUNT)
    assert 1 == len(response.events.of(ConnectionReleased))
    forever.set()
    await tasks[0]


async def test_cancelled(db: Database) -> None:
    """P10: a block whose task is cancelled gives its connection back."""
    reading = asyncio.Event()

    async def read() -> None:
        async with uow.parallel_read() as session:
            await session.scalar(shop.COUNT)
            reading.set()
            await asyncio.Event().wait()

    async with db:
        task = asyncio.create_task(read())
        await reading.wait()
        task.cancel()
        await asyncio.wait((task,))
        assert [0, 0] == checked_out(db)


@on(*SERVERS)
async def test_several_databases(sqlite: SQLiteBackend, backend: ServerBackend) -> None:
    """The database can be named, also one of the unit around."""
    async with (
        shop_database(sqlite) as one,
        shop_database(backend) as two,
        uow.unit_of_work(one),
    ):
        with pytest.raises(errors.UnknownDatabaseError):
            await uow.parallel_read(two).__aenter__()
        async with uow.unit_of_work(two), uow.parallel_read(one) as session:
            assert 0 == await session.scalar(shop.COUNT)
        assert [0, 0] == checked_out(one)


async def test_without_a_unit() -> None:
    """Outside a unit of work it says what is missing."""
    with pytest.raises(errors.NoUnitOfWorkError):
        await uow.parallel_read().__aenter__()


async def test_in_memory() -> None:
    """In memory there is one connection, and tasks take turns on it."""
    db = Database.from_url("sqlite://", pool_timeout=5)

    async def count() -> object:
        async with uow.parallel_read() as session:
            return await session.scalar(shop.COUNT)

    async with db:
        await uow.current_session().execute("CREATE TABLE items (id INTEGER)")
        assert [0, 0] == list(await asyncio.gather(count(), count()))
    async with db:
        assert [0, 0] == list(await asyncio.gather(count(), count()))
    await db.dispose()


@on("asyncpg", "psycopg")
async def test_cancelled_before_it_is_open(backend: ServerBackend) -> None:
    """The connection that is given back for it is not lost, whoever is in its way."""
    opening = asyncio.Event()
    async with gate_at(backend) as (db, gate):

        async def read() -> None:
            async with db:
                await db.read.execute("SELECT 1")
                connection = await db.read.connection()
                raw: Any = (await connection.get_raw_connection()).driver_connection
                waiting = asyncio.create_task(raw.execute(gate.select))
                await gate.reached()
                opening.set()
                try:
                    await uow.parallel_read().__aenter__()
                finally:
                    await asyncio.wait([waiting])

        task = asyncio.create_task(read())
        await opening.wait()
        await asyncio.sleep(0)
        task.cancel()
        await gate.open()
        await asyncio.wait([task])

        assert task.cancelled()
        assert [0, 0] == checked_out(db)
