"""One `Database`, many event loops: in jobs, in threads, in test clients."""

from __future__ import annotations

import asyncio
import gc
import threading
import warnings
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from anyio import to_thread
from sqlalchemy import NullPool, event, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.util import await_only, greenlet_spawn
from starlette.applications import Starlette
from starlette.routing import Mount

from asgi_uow import Database, UnitOfWorkMiddleware, errors, unit_of_work
from tests.servers import ServerBackend, eventually
from tests.support import shop
from tests.support.asgi import endpoint, request
from tests.support.databases import (
    DRIVERS,
    SERVER_DRIVERS,
    checked_out,
    on,
    shop_database,
)
from tests.support.private import SetUpLock

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it wants another client than httpx
    from starlette.testclient import TestClient

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    from tests.servers import Backend

T = TypeVar("T")
pytestmark = on(*DRIVERS, pool_size=1, max_overflow=0)


async def insert(db: Database, number: int) -> int:
    """Insert one item, and tell how many a later unit reads."""
    async with db:
        await shop.insert(number)
    async with db:
        return int(await db.read.scalar(shop.COUNT) or 0)


def run_and_close(job: Coroutine[object, object, T]) -> T:
    """Run it as those do who do not know of `asyncio.run()`."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(job)
    finally:
        loop.close()


@pytest.fixture
def garbage() -> Iterator[None]:
    """Collected while drivers may warn of what their loop has not closed."""
    yield
    gc.collect()


# One loop after the other


async def test_a_loop_for_each_job(db: Database, backend: Backend) -> None:
    """A worker may call `asyncio.run()` for each job; each ends its connections."""

    def work() -> list[int]:
        return [asyncio.run(insert(db, number)) for number in (1, 2, 3)]

    assert [1, 2, 3] == await to_thread.run_sync(work)
    assert [1, 2, 3] == await shop.items(backend)
    if isinstance(backend, ServerBackend):
        await eventually(0, backend.connections)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.usefixtures("garbage")
async def test_a_loop_that_was_only_closed(db: Database, backend: Backend) -> None:
    """What a loop leaves that ended without a word is not used in the next one."""

    def work() -> list[int]:
        return [run_and_close(insert(db, number)) for number in (1, 2, 3)]

    assert [1, 2, 3] == await to_thread.run_sync(work)
    assert 4 == await to_thread.run_sync(lambda: asyncio.run(insert(db, 4)))
    if isinstance(backend, ServerBackend):
        await eventually(0, backend.connections)


async def test_a_test_client_without_start_up(db: Database, backend: Backend) -> None:
    """`TestClient(app)` without `with` has a loop for each request, with it has one."""
    numbers = iter((1, 2, 3, 4))

    async def handler() -> None:
        await shop.insert(next(numbers))
        await db.read.execute(shop.SELECT)

    routes = Starlette(routes=[Mount("/", endpoint(handler))])
    app = UnitOfWorkMiddleware(routes, db)

    def work() -> list[int]:
        client = TestClient(app)
        alone = [client.get("/").status_code for _ in range(2)]
        with client:
            return alone + [client.get("/").status_code for _ in range(2)]

    assert [200] * 4 == await to_thread.run_sync(work)
    assert [1, 2, 3, 4] == await shop.items(backend)


# Loops side by side


async def test_loops_side_by_side(db: Database, backend: Backend) -> None:
    """Threads with loops of their own share a `Database`; each has a pool of its own.

    More units want a connection in each loop than its pool has, so all loops wait.
    """
    most = 10

    async def insert_many(begin: int) -> None:
        numbers = range(begin, begin + most)
        await asyncio.gather(*(insert(db, number) for number in numbers))

    def thread(begin: int) -> None:
        asyncio.run(insert_many(begin))

    threads = [to_thread.run_sync(thread, begin) for begin in (most, 2 * most)]
    await asyncio.gather(insert_many(0), *threads)
    assert list(range(3 * most)) == await shop.items(backend)


async def test_listeners_reach_every_loop(db: Database) -> None:
    """A listener on the engine sees the connections of all loops, whenever attached."""
    seen: list[str] = []
    await insert(db, 1)

    async def listen_and_use() -> None:
        await insert(db, 2)
        event.listen(db.engine.sync_engine, "checkout", lambda *_: seen.append("out"))
        await insert(db, 3)

    await to_thread.run_sync(asyncio.run, listen_and_use())
    await insert(db, 4)
    assert 4 * ["out"] == seen  # of the write engine, and of the read engine


async def test_pools_seen_from_a_thread(backend: Backend) -> None:
    """A thread that asks the pool for its numbers is told those of the only loop."""

    def make() -> Database:
        return Database.from_url(backend.url)

    db = await to_thread.run_sync(make)  # where no loop runs, as modules do
    async with db.engine.connect():
        assert [1, 0] == await to_thread.run_sync(checked_out, db)
    await db.dispose()


async def test_derived_engines(backend: Backend) -> None:
    """`engine.execution_options()` has the pools of its original, in every loop."""
    await shop.create(backend)
    original = create_async_engine(backend.url, pool_size=1, max_overflow=0)
    db = Database(original.execution_options(some="option"))
    assert 1 == await insert(db, 1)
    assert 2 == await to_thread.run_sync(asyncio.run, insert(db, 2))
    again = Database(original)
    assert db.engine.pool is again.engine.pool
    for each in (db, again):
        await each.dispose()


async def test_options_of_an_engine(db: Database) -> None:
    """What connects with options of its own does so in the pool of its loop."""
    derived = db.engine.execution_options(isolation_level="AUTOCOMMIT")

    async def select() -> object:
        async with derived.connect() as connection:
            return await connection.scalar(text("SELECT 1"))

    assert 1 == await select()
    assert 1 == await to_thread.run_sync(lambda: asyncio.run(select()))


async def test_an_engine_that_was_used_before(backend: Backend) -> None:
    """What an engine has connected before its `Database` is made is used here alone."""
    engine = create_async_engine(backend.url, pool_size=1, max_overflow=0)
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
    async with shop_database(backend) as other, unit_of_work(other):
        pass
    db = Database(engine)
    assert 1 == await insert(db, 1)
    assert 2 == await to_thread.run_sync(lambda: asyncio.run(insert(db, 2)))
    assert 3 == await insert(db, 3)
    await db.dispose()


@on(*SERVER_DRIVERS)
async def test_dispose_ends_all(db: Database, backend: ServerBackend) -> None:
    """`db.dispose()` closes what idles in every loop; each loop can connect again."""
    used, disposed = threading.Event(), threading.Event()

    async def use_twice() -> int:
        await insert(db, 1)
        used.set()
        await to_thread.run_sync(disposed.wait)
        await eventually(0, backend.connections)
        return await insert(db, 3)

    async def dispose_between() -> None:
        await to_thread.run_sync(used.wait)
        await insert(db, 2)
        await db.dispose()
        disposed.set()

    def thread() -> int:
        return asyncio.run(use_twice())

    _, count = await asyncio.gather(dispose_between(), to_thread.run_sync(thread))
    assert 3 == count
    assert 4 == await insert(db, 4)


@on(*SERVER_DRIVERS, pool_size=3)
async def test_dispose_while_a_loop_ends(
    db: Database, backend: ServerBackend, caplog: pytest.LogCaptureFixture
) -> None:
    """A loop that ends meanwhile interrupts no close that `db.dispose()` asked for."""
    used, disposed = threading.Event(), threading.Event()

    async def use() -> None:
        async with AsyncExitStack() as stack:
            for _ in range(3):
                await stack.enter_async_context(db.engine.connect())
        used.set()
        disposed.wait()
        for _ in range(2):  # turns in which the loop begins to close them
            await asyncio.sleep(0)

    async def dispose() -> None:
        await to_thread.run_sync(used.wait)
        await db.dispose()
        disposed.set()

    await asyncio.gather(to_thread.run_sync(asyncio.run, use()), dispose())
    await eventually(0, backend.connections)
    assert [] == caplog.records


async def test_first_connections_at_once(db: Database) -> None:
    """Connections of several loops set the dialect up one after the other."""
    entered, leave = asyncio.Event(), asyncio.Event()
    order: list[str] = []
    lock = SetUpLock()

    def set_up(name: str) -> None:
        with lock:
            order.append(f"{name} begins")
            entered.set()
            await_only(leave.wait())
            order.append(f"{name} ends")

    first = asyncio.create_task(greenlet_spawn(set_up, "first"))
    await entered.wait()
    second = asyncio.create_task(greenlet_spawn(set_up, "second"))
    await asyncio.sleep(0)
    leave.set()
    await asyncio.gather(first, second)
    assert ["first begins", "first ends", "second begins", "second ends"] == order


# In memory


async def test_memory_goes_from_loop_to_loop() -> None:
    """An in-memory database goes on in another loop when the one before has ended."""

    async def insert_some(*numbers: int) -> int:
        await asyncio.gather(*(insert(db, number) for number in numbers))
        async with db:
            return int(await db.read.scalar(shop.COUNT) or 0)

    async def create() -> None:
        async with db:
            await db.write.execute("CREATE TABLE items (id INTEGER PRIMARY KEY)")

    def work() -> list[int]:
        asyncio.run(create())
        return [asyncio.run(insert_some(10 * n, 10 * n + 1)) for n in (1, 2, 3)]

    db = Database.from_url("sqlite://")
    assert [2, 4, 6] == await to_thread.run_sync(work)
    await db.dispose()


@on("aiosqlite")
async def test_memory_beside_a_file(backend: Backend) -> None:
    """It is not lost where the next loop uses another database first."""
    memory, file = Database.from_url("sqlite://"), Database.from_url(backend.url)

    async def create() -> None:
        async with memory:
            await memory.write.execute("CREATE TABLE numbers (id INTEGER)")

    async def count() -> object:
        async with file:
            await file.write.execute("SELECT 1")
        async with memory:
            return await memory.read.scalar("SELECT count(*) FROM numbers")

    await to_thread.run_sync(lambda: asyncio.run(create()))
    assert 0 == await to_thread.run_sync(lambda: asyncio.run(count()))
    await memory.dispose()


async def test_memory_that_nobody_needs_any_more() -> None:
    """It ends with its engine: no thread is left, and no warning."""
    threads: list[threading.Thread] = []

    async def use() -> None:
        async with Database.from_url("sqlite://") as unit:
            connection = await unit.session().connection()
            raw: Any = await connection.get_raw_connection()
            threads.append(raw.driver_connection._thread)

    await to_thread.run_sync(lambda: asyncio.run(use()))
    gc.collect()
    await to_thread.run_sync(threads[0].join, 10)
    assert not threads[0].is_alive()


async def test_memory_in_two_loops() -> None:
    """An in-memory database refuses a second loop only while another uses it."""
    db = Database.from_url("sqlite://")

    def work() -> int:
        return asyncio.run(insert(db, 1))

    async with db:
        await db.write.execute("CREATE TABLE items (id INTEGER PRIMARY KEY)")
    async with db.engine.connect():
        with pytest.raises(errors.WrongLoopError, match=r"running=True.*use a file"):
            await to_thread.run_sync(work)
    assert 1 == await to_thread.run_sync(work)
    assert 2 == await insert(db, 2)
    await db.dispose()


async def test_memory_that_connections_share() -> None:
    """A database in shared memory goes on as well, whatever the pool."""
    url = "sqlite+aiosqlite:///file:shared?mode=memory&cache=shared&uri=true"
    db = Database(create_async_engine(url, poolclass=NullPool))

    async def count() -> int:
        async with db:
            return int(await db.read.scalar(shop.COUNT) or 0)

    async with db.engine.connect() as kept:  # otherwise it would be gone
        await kept.execute(text("CREATE TABLE items (id INTEGER PRIMARY KEY)"))
        await kept.commit()
        assert 1 == await insert(db, 1)
        assert 1 == await to_thread.run_sync(asyncio.run, count())
        assert 2 == await insert(db, 2)


async def test_memory_and_a_test_client() -> None:
    """What an asynchronous test has prepared in memory is there for a `TestClient`."""
    db = Database.from_url("sqlite://")
    numbers = iter((1, 2, 3))

    async def handler() -> None:
        await shop.insert(next(numbers))

    app = UnitOfWorkMiddleware(Starlette(routes=[Mount("/", endpoint(handler))]), db)
    async with db:
        await db.write.execute("CREATE TABLE items (id INTEGER PRIMARY KEY)")
    with TestClient(app) as client:
        answers = [client.get("/"), TestClient(app).get("/"), client.get("/")]
        assert [200] * 3 == [response.status_code for response in answers]
        assert 4 == await insert(db, 4)


# Sessions and units of another loop


async def test_a_session_in_another_loop(db: Database, backend: Backend) -> None:
    """A session that is used in another loop refuses, and goes on in its own."""
    async with db as uow:
        await shop.insert(1)
        session = uow.session()

        def work() -> None:
            asyncio.run(session.execute(text(shop.SELECT)))

        with pytest.raises(
            errors.WrongLoopError, match="Open another unit of work here"
        ):
            await to_thread.run_sync(work)
        await shop.insert(2)
    assert [1, 2] == await shop.items(backend)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.usefixtures("garbage")
async def test_a_unit_kept_over_a_loop(db: Database, backend: Backend) -> None:
    """A unit that outlives its loop cannot be committed: nothing of it is kept."""
    block = unit_of_work(db)

    async def begin() -> None:
        await block.__aenter__()
        await shop.insert(1)

    async def leave() -> None:
        await block.__aexit__(None, None, None)

    def work() -> None:
        asyncio.run(begin())
        with pytest.raises(errors.CommitFailedError) as caught:
            asyncio.run(leave())
        assert isinstance(caught.value.__cause__, errors.WrongLoopError)

    await to_thread.run_sync(work)
    assert 1 == await insert(db, 2)
    assert [2] == await shop.items(backend)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.usefixtures("garbage")
async def test_a_request_that_used_another_loop(db: Database, backend: Backend) -> None:
    """A request whose session belongs to a loop that has ended commits nothing."""

    async def handler() -> None:
        await to_thread.run_sync(lambda: asyncio.run(shop.insert(1)))

    answer = await request(UnitOfWorkMiddleware(endpoint(handler), db, observers=()))
    assert 500 == answer.status
    cause = answer.error and answer.error.__cause__
    assert isinstance(cause, errors.WrongLoopError)
    assert 1 == await insert(db, 2)
    assert [2] == await shop.items(backend)


async def test_sessions_from_threads_without_a_loop(db: Database) -> None:
    """Synchronous code in a thread may ask for the session that the loop uses."""
    async with db as uow:
        session = await to_thread.run_sync(uow.session)
        await session.execute(text(shop.SELECT))
