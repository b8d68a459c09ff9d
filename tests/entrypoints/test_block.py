"""Units of work outside requests: `async with db:`, in whatever order and task."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import sqlite3
import sys
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from typing import TYPE_CHECKING
from unittest import IsolatedAsyncioTestCase
from weakref import WeakSet

import pytest
from sqlalchemy import exc as sa_exc
from sqlalchemy.ext.asyncio import create_async_engine

import asgi_uow as uow
from asgi_uow import Database, errors
from tests.servers.backend import eventually
from tests.support import shop
from tests.support.asgi import BODY, START, serve
from tests.support.databases import DRIVERS, SERVERS, checked_out, memory_database, on
from tests.support.keys import create_table
from tests.support.private import Cause, State

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
    from pathlib import Path
    from types import FrameType

    from asgi_uow._asgi import Receive, Scope, Send
    from tests.servers import Backend, MariaDBBackend


# How it ends


async def test_leaving_the_block_commits(db: Database, backend: Backend) -> None:
    """Outside a request `async with db:` commits, then runs the hooks."""
    fired: list[str] = []

    async with db as unit:
        await db.write.execute("INSERT INTO items (id) VALUES (1)")
        uow.after_commit(fired.append, "hook")
        assert [] == fired
        states = [unit.state]
        assert 1 == unit.attempt
        assert unit.doomed_by is None

    assert [1] == await shop.items(backend)
    assert ["hook"] == fired
    assert uow.Outcome.COMMITTED is unit.outcome
    assert [State.ACTIVE, State.CLOSED] == [*states, unit.state]
    assert [0, 0] == checked_out(db)


async def test_exception_rolls_back(db: Database, backend: Backend) -> None:
    """An exception that leaves the block rolls back and goes on as it is."""
    failure = LookupError("mine")

    block = uow.unit_of_work(db)
    with pytest.raises(LookupError) as caught:
        async with block:
            await shop.insert(1)
            raise failure

    unit = block.unit
    assert failure is caught.value
    assert (uow.Outcome.ROLLED_BACK, Cause.EXCEPTION) == (unit.outcome, unit.cause)
    assert [] == await shop.items(backend)


async def test_failed_commit_raises(db: Database, backend: Backend) -> None:
    """A COMMIT that fails is raised out of the block; the connection is clean."""
    with pytest.raises(errors.CommitFailedError) as caught:
        async with db:
            await shop.insert_then_break_commit(backend, 1)

    assert uow.Outcome.ROLLED_BACK is caught.value.outcome
    assert [] == await shop.items(backend)
    async with db:
        await shop.insert(2)
    assert [2] == await shop.items(backend)


async def test_rollback_only_and_force(db: Database, backend: Backend) -> None:
    """set_rollback_only keeps nothing without raising; asked twice, it is the same."""
    async with db as unit:
        await shop.insert(1)
        uow.set_rollback_only("first reason")
        uow.set_rollback_only("second reason")
        uow.force_commit()

    assert "second reason" == unit.reason
    assert (uow.Outcome.ROLLED_BACK, Cause.EXPLICIT) == (unit.outcome, unit.cause)
    assert [] == await shop.items(backend)


@on("aiosqlite", commit_on_exit=False)
async def test_database_without_commit_on_exit(db: Database, backend: Backend) -> None:
    """A database that says no has nothing committed on exit, unless it is forced."""
    async with db as unit:
        await shop.insert(1)
    assert (uow.Outcome.ROLLED_BACK, Cause.EXPLICIT) == (unit.outcome, unit.cause)
    async with db:
        await shop.insert(2)
        uow.force_commit()
    assert [2] == await shop.items(backend)


async def test_cancelled_block_rolls_back(db: Database, backend: Backend) -> None:
    """A cancellation inside the block rolls back, cause cancelled."""
    units: list[uow.UnitOfWork] = []
    inserted = asyncio.Event()

    async def work() -> None:
        async with db as unit:
            units.append(unit)
            await shop.insert(1)
            inserted.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await inserted.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert (uow.Outcome.ROLLED_BACK, Cause.CANCELLED) == (
        units[0].outcome,
        units[0].cause,
    )
    assert [] == await shop.items(backend)


@on("asyncpg")
async def test_redirect_does_not_hide_a_lost_unit(
    db: Database, backend: Backend
) -> None:
    """A redirect raised as an exception claims a success; the doomed unit raises."""

    class RedirectError(Exception):
        status_code = 302

    with pytest.raises(errors.DoomedError):
        async with uow.unit_of_work(db):
            await shop.insert(1)
            with suppress(sa_exc.IntegrityError):
                await shop.insert(1)
            raise RedirectError

    assert [] == await shop.items(backend)


# Nesting


async def test_nested_unit_of_the_same_database_is_refused(
    db: Database, backend: Backend
) -> None:
    """A unit inside a unit of the same database names the two ways out."""
    async with db:
        await shop.insert(1)
        with pytest.raises(errors.NestedUnitOfWorkError, match=r"savepoint\(\)"):
            await db.__aenter__()
        await shop.insert(2)

    assert [1, 2] == await shop.items(backend)


@on(*SERVERS)
async def test_independent_unit_has_its_own_outcome(
    db: Database, backend: Backend
) -> None:
    """independent=True: a connection and an outcome of its own."""
    with pytest.raises(ZeroDivisionError):
        async with db:
            await shop.insert(1)
            async with uow.unit_of_work(db, independent=True):
                await shop.insert(2)
            assert [2] == await shop.items(backend)
            raise ZeroDivisionError

    assert [2] == await shop.items(backend)


@on("aiosqlite")
async def test_independent_unit_on_sqlite(db: Database, backend: Backend) -> None:
    """On SQLite a second writer would wait for the first forever: refused."""
    async with db:
        async with uow.unit_of_work(db, independent=True):
            await shop.insert(1)
        await shop.insert(2)
        with pytest.raises(errors.NestedUnitOfWorkError):
            await uow.unit_of_work(db, independent=True).__aenter__()

    assert [1, 2] == await shop.items(backend)


async def test_independent_unit_in_memory() -> None:
    """In memory also a read holds the only connection: refused after one."""
    async with memory_database() as db, db:
        await db.read.execute("SELECT 1")
        with pytest.raises(errors.NestedUnitOfWorkError):
            await uow.unit_of_work(db, independent=True).__aenter__()


async def test_memory_read_after_the_start_holds_the_connection() -> None:
    """A unit that would wait for the request's own stream is refused, not hung."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": START, "status": 200, "headers": []})
        result = await uow.current_read_session().stream("SELECT 1")
        with pytest.raises(errors.NestedUnitOfWorkError):
            await db.__aenter__()
        await result.close()
        async with db:
            assert 1 == await db.write.scalar("SELECT 1")
        await send({"type": BODY, "body": b""})

    async with memory_database() as db:
        assert None is (await serve(app, db)).error


@on("aiosqlite")
async def test_unit_of_another_database_inside(
    db: Database, backend: Backend, other: Database, mariadb: MariaDBBackend
) -> None:
    """A unit of another database is no nesting; both databases are reached."""
    async with db:
        await shop.insert(1)
        async with other:
            await shop.insert(2)
            await shop.insert(3, db)
            for block in (uow.unit_of_work(db), uow.unit_of_work(db, independent=True)):
                with pytest.raises(errors.NestedUnitOfWorkError):
                    await block.__aenter__()
            result = await db.read.execute("SELECT id FROM items ORDER BY id")
            assert [1, 3] == [row[0] for row in result]
        assert [2] == await shop.items(mariadb)

    assert [1, 3] == await shop.items(backend)


# Tasks


async def test_units_of_parallel_tasks_are_apart(
    db: Database, backend: Backend
) -> None:
    """Tasks that open a unit each on the same Database do not meet."""
    units: set[uow.UnitOfWork] = set()

    async def work(number: int) -> None:
        async with db as unit:
            units.add(unit)
            await shop.insert(number)

    await asyncio.gather(*(work(number) for number in range(4)))

    assert 4 == len(units)
    assert [0, 1, 2, 3] == await shop.items(backend)


@on("aiosqlite")
async def test_blocks_that_end_out_of_order(
    db: Database, backend: Backend, other: Database, mariadb: MariaDBBackend
) -> None:
    """Each block ends its own unit: one fails, the other is kept."""

    async def block(db: Database, number: int) -> AsyncIterator[None]:
        async with db:
            await shop.insert(number, db)
            yield

    one, two = block(db, 1), block(other, 2)
    await anext(one)
    await anext(two)
    with pytest.raises(ZeroDivisionError):
        await one.athrow(ZeroDivisionError())  # type: ignore[attr-defined]
    with pytest.raises(StopAsyncIteration):
        await anext(two)

    assert [] == await shop.items(backend)
    assert [2] == await shop.items(mariadb)
    with pytest.raises(errors.NoUnitOfWorkError):
        uow.current_unit_of_work()
    assert [0, 0, 0, 0] == checked_out(db, other)


# Left by somebody else


@asynccontextmanager
async def many_open(db: Database, number: int = 300) -> AsyncGenerator[None]:
    """Blocks of the same database that other tasks have open meanwhile."""
    over, entered = asyncio.Event(), asyncio.Barrier(number + 1)

    async def stay() -> None:
        async with db:
            await entered.wait()
            await over.wait()

    tasks = [asyncio.create_task(stay()) for _ in range(number)]
    await entered.wait()
    yield
    over.set()
    await asyncio.gather(*tasks)


class Stream:
    """A generator that is suspended in its block."""

    def __init__(self, db: Database, number: int) -> None:
        self.db, self.number = db, number
        self.iterator: AsyncGenerator[None] | None = self._rows()

    async def _rows(self) -> AsyncGenerator[None]:
        async with self.db as self.unit:
            await shop.insert(self.number, self.db)
            yield

    async def begin(self) -> None:
        """In a task that is over then."""
        await asyncio.create_task(self.move())

    async def move(self) -> None:
        assert self.iterator is not None
        await anext(self.iterator, None)

    async def close(self) -> None:
        assert self.iterator is not None
        await self.iterator.aclose()

    async def drop(self) -> None:
        """As a framework does; the event loop closes it, in a task of its own."""
        self.iterator = None

    async def state(self) -> State:
        return self.unit.state


async def close(stream: Stream) -> None:
    await stream.close()


async def close_in_a_task(stream: Stream) -> None:
    await asyncio.create_task(stream.close())


async def close_in_another_context(stream: Stream) -> None:
    await asyncio.create_task(stream.close(), context=contextvars.Context())


@on(*DRIVERS)
@pytest.mark.parametrize(
    "end", [close, close_in_a_task, close_in_another_context, Stream.drop]
)
async def test_stream_that_its_client_leaves(
    db: Database, backend: Backend, end: Callable[[Stream], Awaitable[None]]
) -> None:
    """A generator suspended in its block rolls back, whoever closes it.

    Its connection is back, and on SQLite somebody else can write.
    """
    async with many_open(db):
        stream = Stream(db, 1)
        await stream.move()
        await end(stream)
        await eventually(State.CLOSED, stream.state)
        assert uow.Outcome.ROLLED_BACK is stream.unit.outcome
        assert Cause.CANCELLED is stream.unit.cause
        assert [0, 0] == checked_out(db)
        async with db:
            await shop.insert(2)

    assert [2] == await shop.items(backend)


async def test_fixture(db: Database, backend: Backend) -> None:
    """A generator may enter its block in one task and leave it in another."""
    async with many_open(db):
        stream = Stream(db, 1)
        await stream.begin()
        await asyncio.create_task(stream.move(), context=contextvars.Context())

    assert [1] == await shop.items(backend)
    assert [0, 0] == checked_out(db)


@on("aiosqlite")
async def test_streams_closed_by_others_are_forgotten(db: Database) -> None:
    """A task that begins one stream after the other keeps the last unit, not all."""
    units: WeakSet[uow.UnitOfWork] = WeakSet()
    for number in range(10):
        stream = Stream(db, number)
        await stream.move()
        await close_in_another_context(stream)
        units.add(stream.unit)
        del stream
    gc.collect()
    assert 2 >= len(units)


@on(*DRIVERS)
async def test_exit_stack_closed_in_another_task(
    db: Database, backend: Backend
) -> None:
    """An exit stack ends the block that was entered through it, whose task is over."""
    async with AsyncExitStack() as first, AsyncExitStack() as last, many_open(db):

        async def enter(stack: AsyncExitStack, number: int | None) -> None:
            await stack.enter_async_context(db)
            if number is not None:
                await shop.insert(number)

        await asyncio.create_task(enter(first, 1))
        await asyncio.create_task(enter(last, None))
        await first.aclose()  # not in the order of their beginnings
        assert [1] == await shop.items(backend)
        stack = first.pop_all()
        await asyncio.create_task(enter(stack, 2))
        with pytest.raises(ZeroDivisionError):
            async with stack:
                raise ZeroDivisionError

    assert [1] == await shop.items(backend)
    assert [0, 0] == checked_out(db)


def test_unittest(tmp_path: Path) -> None:
    """`enterAsyncContext(db)` of unittest commits at the end of the test."""
    db = Database.from_url(f"sqlite:///{tmp_path / 'a.sqlite'}")

    class Case(IsolatedAsyncioTestCase):
        async def runTest(self) -> None:  # noqa: N802  # its name in unittest
            self.addAsyncCleanup(db.dispose)
            await self.enterAsyncContext(db)
            await shop.insert(1)

    with closing(sqlite3.connect(tmp_path / "a.sqlite")) as connection:
        connection.execute("CREATE TABLE items (id INTEGER)")
        result = Case().run()
        assert result is not None
        assert [] == [*result.errors, *result.failures]
        assert [(1,)] == connection.execute(shop.SELECT).fetchall()


@on(*DRIVERS)
async def test_block_that_nobody_can_leave(db: Database, backend: Backend) -> None:
    """An exit stack that is dropped open has its unit rolled back, with a warning."""
    fired: list[str] = []
    stack = AsyncExitStack()
    unit = await stack.enter_async_context(db)
    await shop.insert(1)
    uow.after_rollback(fired.append, "undone")
    with pytest.warns(ResourceWarning, match="nobody has left the block of"):
        del stack

    async def state() -> State:
        return unit.state

    await eventually(State.CLOSED, state)
    assert (uow.Outcome.ROLLED_BACK, Cause.ABANDONED) == (unit.outcome, unit.cause)
    assert ["undone"] == fired
    assert [0, 0] == checked_out(db)
    async with db:
        await shop.insert(2)
    assert [2] == await shop.items(backend)


async def test_block_with_a_key_that_nobody_can_leave(
    db: Database, backend: Backend
) -> None:
    """Its key is free again."""
    await create_table(backend)
    block = uow.unit_of_work(db, key="job")
    unit = await block.__aenter__()
    with pytest.warns(ResourceWarning, match="nobody has left the block of"):
        del block

    async def state() -> State:
        return unit.state

    await eventually(State.CLOSED, state)
    async with uow.unit_of_work(db, key="job") as later:
        assert not later.replayed


def test_block_that_outlives_its_loop(tmp_path: Path) -> None:
    """Without a loop that runs there is the warning, and no other noise."""
    db = Database.from_url(f"sqlite:///{tmp_path / 'a.sqlite'}")
    stack = AsyncExitStack()
    asyncio.run(stack.enter_async_context(db))
    with pytest.warns(ResourceWarning, match="nobody has left the block of"):
        del stack


@on(*DRIVERS)
async def test_unit_is_held_by_its_block(db: Database, backend: Backend) -> None:
    """A block whose handler keeps nothing keeps its unit, and its connection."""
    stream = Stream(db, 1)
    await stream.begin()
    del stream.unit
    gc.collect()
    assert [1, 0] == checked_out(db)
    await stream.move()
    assert [1] == await shop.items(backend)


async def test_blocks_cost_the_same_among_many() -> None:
    """Whoever leaves a block does as much with 2 other blocks as with 200."""
    db = Database.from_url("sqlite://")
    calls: list[int] = []

    def count(_: FrameType, event: str, __: object) -> None:  # pragma: no cover
        calls[-1] += event in {"call", "c_call"}

    async def pause() -> AsyncGenerator[None]:
        async with db:
            yield

    for number in (2, 200):
        async with many_open(db, number):
            block = pause()
            await asyncio.create_task(anext(block))
            calls.append(0)
            sys.setprofile(count)
            with pytest.raises(StopAsyncIteration):
                await anext(block)
            sys.setprofile(None)
    assert calls[0] == calls[1]
    await db.dispose()


# Without `async with`


@on(*DRIVERS)
async def test_entered_and_left_by_hand(db: Database, backend: Backend) -> None:
    """`db.__aexit__()` leaves what its context has entered by hand, in any order."""
    other = Database(create_async_engine(backend.url), commit_on_exit=False)
    async with many_open(db):
        assert hasattr(db, "__aexit__")  # to look is not to enter
        await db.__aenter__()
        await other.__aenter__()
        await shop.insert(1, db)
        await db.__aexit__(None, None, None)
        assert other is uow.current_unit_of_work().databases[0]
        await type(other).__aexit__(other, None, None, None)

    assert [1] == await shop.items(backend)
    assert [0, 0, 0, 0] == checked_out(db, other)
    await other.dispose()


@on("aiosqlite")
async def test_looked_up_long_before(db: Database, backend: Backend) -> None:
    """What looked `__aexit__` up without entering never gets another's block."""
    kept: list[Callable[..., Awaitable[None]]] = []

    def look() -> None:
        kept.append(db.__aexit__)

    look()
    await db.__aenter__()
    await shop.insert(1)
    with pytest.raises(errors.NoUnitOfWorkError, match="another context"):
        await asyncio.create_task(
            kept[0](None, None, None),  # type: ignore[arg-type]
            context=contextvars.Context(),
        )
    await db.__aexit__(None, None, None)
    assert [1] == await shop.items(backend)


@on("aiosqlite")
async def test_whose_block_it_is_must_be_known(db: Database, backend: Backend) -> None:
    """Leaving by hand what another context has entered is an error with the remedy."""

    async def enter() -> None:
        await db.__aenter__()
        left.set()
        await over.wait()
        await shop.insert(1)
        await db.__aexit__(None, None, None)

    left, over = asyncio.Event(), asyncio.Event()
    task = asyncio.create_task(enter())
    await left.wait()
    async with many_open(db, 2):
        with pytest.raises(errors.NoUnitOfWorkError, match=r"unit_of_work\(db\)"):
            await db.__aexit__(None, None, None)
    over.set()
    await task
    assert [1] == await shop.items(backend)


@on("aiosqlite")
async def test_object_may_be_left_anywhere(db: Database, backend: Backend) -> None:
    """An object of unit_of_work(db) knows its unit, in whatever task it is left."""
    block = uow.unit_of_work(db)

    async def enter() -> None:
        await block.__aenter__()
        await shop.insert(1)

    async with many_open(db, 2):
        await asyncio.create_task(enter())
        await block.__aexit__(None, None, None)
    assert [1] == await shop.items(backend)


@on("aiosqlite")
async def test_object_is_one_block(db: Database, backend: Backend) -> None:
    """One unit_of_work(db) is entered once: not inside, at once, nor afterwards."""
    block = uow.unit_of_work(db, independent=True)
    reused = pytest.raises(errors.BlockReusedError, match="a new one for each block")

    async def enter_again() -> None:
        with reused:
            await block.__aenter__()

    async with block:
        await shop.insert(1)
        await enter_again()
        await asyncio.create_task(enter_again(), context=contextvars.Context())
    await enter_again()
    assert [1] == await shop.items(backend)


@on("aiosqlite")
async def test_object_that_was_refused_may_be_entered(
    db: Database, backend: Backend
) -> None:
    """Where entering was refused nothing was entered."""
    block = uow.unit_of_work(db)
    async with db:
        with pytest.raises(errors.NestedUnitOfWorkError):
            await block.__aenter__()
    async with block:
        await shop.insert(1)
    assert [1] == await shop.items(backend)


@on("aiosqlite")
async def test_leaving_what_was_not_entered(db: Database) -> None:
    """Leaving without having entered is an error, not a commit of something else."""
    with pytest.raises(errors.NoUnitOfWorkError, match="another context"):
        await db.__aexit__(None, None, None)
