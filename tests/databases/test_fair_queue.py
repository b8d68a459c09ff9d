"""Waiting for a connection: in order, in time, and none is lost or made for nothing."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import pytest
from sqlalchemy import AsyncAdaptedQueuePool, event, text
from sqlalchemy import exc as sa_exc
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.util import await_only, greenlet_spawn
from sqlalchemy.util.queue import AsyncAdaptedQueue

from asgi_uow import Database
from tests.support.databases import DRIVERS, checked_out, on
from tests.support.private import FairQueue, make_fair, pool_states

if TYPE_CHECKING:
    from tests.servers import Backend

pytestmark = on("aiosqlite", pool_size=1, max_overflow=0)


class OwnPool(AsyncAdaptedQueuePool):
    """A pool of the user's."""


async def take(engine: AsyncEngine, name: str, order: list[str]) -> None:
    """Use a connection for a moment, and sign the list."""
    async with engine.connect() as connection:
        order.append(name)
        await connection.execute(text("SELECT 1"))


def waiting(engine: AsyncEngine) -> int:
    """Tell how many wait for a connection of this engine to be given back."""
    counts = {each.waiting for each in pool_states() if each.url == engine.url}
    return max(counts)


async def wait_in_line(
    engine: AsyncEngine, names: str, order: list[str]
) -> list[asyncio.Task[None]]:
    """Have a task for each name wait, one behind the other."""
    tasks = []
    for number, name in enumerate(names, start=1):
        tasks.append(asyncio.create_task(take(engine, name, order)))
        while waiting(engine) < number:
            await asyncio.sleep(0)
    return tasks


# In order


async def ask_in_order(engine: AsyncEngine) -> None:
    """Have three wait; who comes when the connection comes back is the fourth."""
    order: list[str] = []
    async with engine.connect():
        tasks = await wait_in_line(engine, "abc", order)
    await take(engine, "newcomer", order)
    await asyncio.gather(*tasks)
    assert ["a", "b", "c", "newcomer"] == order


@on(*DRIVERS, pool_size=1, max_overflow=0)
async def test_nobody_passes(db: Database) -> None:
    """Who waits longest is next: of those who read, and of those who write."""
    for engine in (db.engine, db.read_engine):
        await ask_in_order(engine)


@pytest.mark.parametrize(
    "options",
    [{"pool_use_lifo": True}, {"poolclass": OwnPool}],
    ids=["last in, first out", "a class of its own"],
)
async def test_nobody_passes_in_other_pools(
    backend: Backend, options: dict[str, Any]
) -> None:
    """It is so whatever pool an engine has, and after it was disposed of."""
    engine = create_async_engine(backend.url, pool_size=1, max_overflow=0, **options)
    db = Database(engine)
    for _ in range(2):
        await ask_in_order(engine)
        await db.dispose()


async def test_a_line_before_the_database(backend: Backend) -> None:
    """Who waited already when the engine was given to a `Database` is served."""
    engine = create_async_engine(backend.url, pool_size=1, max_overflow=0)
    order: list[str] = []
    async with engine.connect():
        first = asyncio.create_task(take(engine, "a", order))
        await asyncio.sleep(0)
        db = Database(engine)
        tasks = await wait_in_line(engine, "bc", order)
    await asyncio.gather(first, *tasks)
    assert ["a", "b", "c"] == sorted(order)
    await db.dispose()


@on(*DRIVERS, pool_size=1, max_overflow=2)
async def test_a_crowd_makes_no_connections(db: Database) -> None:
    """What comes back while others wait is theirs: it is not closed and made anew."""
    connected: list[object] = []
    event.listen(db.engine.sync_engine, "connect", lambda *made: connected.append(made))
    order: list[str] = []
    await asyncio.gather(*(take(db.engine, "one", order) for _ in range(60)))
    assert 60 == len(order)
    assert 3 == len(connected)


@on(*DRIVERS, pool_size=1, max_overflow=0)
async def test_what_comes_back_was_thrown_away(db: Database) -> None:
    """Then who is next makes a new connection in its place."""
    order: list[str] = []
    async with db.engine.connect() as connection:
        tasks = await wait_in_line(db.engine, "ab", order)
        await connection.invalidate()
    await asyncio.gather(*tasks)
    assert ["a", "b"] == order
    assert [0, 0] == checked_out(db)


# In time


@on("aiosqlite", pool_size=1, max_overflow=0, pool_timeout=0.05)
async def test_who_waits_too_long(db: Database) -> None:
    """They leave the line, with the error of SQLAlchemy's own queue."""
    async with db.engine.connect():
        with pytest.raises(sa_exc.TimeoutError, match=r"timeout 0\.05") as caught:
            await take(db.engine, "late", [])
        assert caught.value.__cause__ is None
        assert 0 == waiting(db.engine)
    await take(db.engine, "in time", [])


# Cancelled


def fair() -> FairQueue:
    queue: Any = AsyncAdaptedQueue(1)
    make_fair(queue)
    return cast("FairQueue", queue)


async def get(queue: FairQueue) -> object:
    return await greenlet_spawn(queue.get, True, 5.0)


async def first_and_second(queue: FairQueue) -> list[asyncio.Task[object]]:
    tasks = []
    for number in (1, 2):
        tasks.append(asyncio.create_task(get(queue)))
        while len(queue.waiters) < number:
            await asyncio.sleep(0)
    return tasks


async def test_cancelled_while_it_waits() -> None:
    """The next one is served, whether or not the first has left the line yet."""
    queue = fair()
    first, second = await first_and_second(queue)
    first.cancel()
    queue.put_nowait("connection")
    assert "connection" == await second
    first, second = await first_and_second(queue)
    first.cancel()
    await asyncio.wait([first])
    assert 1 == len(queue.waiters)
    queue.put_nowait("connection")
    assert "connection" == await second


async def test_cancelled_when_it_came() -> None:
    """What nobody takes goes to the next in line, then back."""
    queue = fair()
    first, second = await first_and_second(queue)
    queue.put_nowait("connection")
    first.cancel()
    assert "connection" == await second
    assert first.cancelled()
    first, second = await first_and_second(queue)
    queue.put_nowait("connection")
    queue.put_nowait("another")
    first.cancel()
    second.cancel()
    await asyncio.wait([first, second])
    both = {await get(queue), await get(queue)}
    assert {"connection", "another"} == both, "one more than it has room for"


def test_who_waits_in_a_loop_that_was_closed() -> None:
    """They are passed over: what comes back is kept."""
    queue, loop = fair(), asyncio.new_event_loop()

    async def begin() -> asyncio.Task[object]:
        task = asyncio.ensure_future(get(queue))
        await asyncio.sleep(0)
        return task

    task = loop.run_until_complete(begin())
    loop.close()
    queue.put_nowait("connection")
    assert "connection" == asyncio.run(get(queue))
    with pytest.raises(RuntimeError, match="closed"):
        task.cancel()


@on(*DRIVERS, pool_size=1, max_overflow=1)
async def test_a_crowd_of_which_many_leave(db: Database) -> None:
    """However many are cancelled, and when: none takes a connection with it."""

    async def cancel_after(turns: int) -> None:
        task = asyncio.create_task(take(db.engine, "one", order))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])

    order: list[str] = []
    leaving = (cancel_after(turns) for turns in range(60))
    staying = (take(db.engine, "one", order) for _ in range(20))
    await asyncio.gather(*leaving, *staying)
    assert len(order) >= 20
    assert 0 == waiting(db.engine)
    assert [0, 0] == checked_out(db)
    async with db.engine.connect(), db.engine.connect():
        pass


# Connecting fails


@on(*DRIVERS, pool_size=1, max_overflow=0)
async def test_connecting_fails_while_others_wait(db: Database) -> None:
    """Each who waits tries for itself, at once, and not when its time is up."""
    tried, may_fail, errors = [], asyncio.Event(), []

    def refuse(*_: object) -> None:
        tried.append(waiting(db.engine))
        await_only(may_fail.wait())
        if len(tried) < 3:
            message = "it is down"
            raise ConnectionRefusedError(message)

    async def try_to_take() -> None:
        try:
            await take(db.engine, "one", order)
        except ConnectionRefusedError as error:
            errors.append(error)

    order: list[str] = []
    event.listen(db.engine.sync_engine, "do_connect", refuse)
    tasks = [asyncio.create_task(try_to_take()) for _ in range(4)]
    while waiting(db.engine) < 3:
        await asyncio.sleep(0)
    may_fail.set()
    await asyncio.wait_for(asyncio.gather(*tasks), 10)
    assert (2, ["one", "one"]) == (len(errors), order)
    assert [0, 2, 1] == tried
    assert [0, 0] == checked_out(db)


@on(*DRIVERS, pool_size=1, max_overflow=1)
async def test_closing_while_others_wait(db: Database) -> None:
    """When one too many is closed, who came meanwhile does not wait for the others."""
    order: list[str] = []
    is_closing, may_close = asyncio.Event(), asyncio.Event()

    def close(*_: object) -> None:
        is_closing.set()
        await_only(may_close.wait())

    first, second = await db.engine.connect(), await db.engine.connect()
    await first.close()
    event.listen(db.engine.sync_engine, "close", close)
    closing = asyncio.create_task(second.close())
    await is_closing.wait()
    async with db.engine.connect():
        tasks = await wait_in_line(db.engine, "a", order)
        may_close.set()
        await asyncio.wait_for(asyncio.gather(closing, *tasks), 10)
    assert ["a"] == order
    assert [0, 0] == checked_out(db)
