"""Units of work outside requests: `async with db:`, in whatever order and task."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import exc as sa_exc

import asgi_uow as uow
from asgi_uow import Database, errors
from tests.support import shop
from tests.support.asgi import BODY, START, serve
from tests.support.databases import DRIVERS, SERVERS, checked_out, memory_database, on
from tests.support.private import Cause, State

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

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
    """A unit that would wait for the request's own read is refused, not hung."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": START, "status": 200, "headers": []})
        await uow.current_read_session().execute("SELECT 1")
        with pytest.raises(errors.NestedUnitOfWorkError):
            await db.__aenter__()
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


@on(*DRIVERS)
async def test_block_left_in_another_task(db: Database, backend: Backend) -> None:
    """A block entered by a task that is over is ended by the one that leaves it."""

    async def enter() -> None:
        await db.__aenter__()
        await shop.insert(1)

    await asyncio.create_task(enter())
    await db.__aexit__(None, None, None)

    assert [1] == await shop.items(backend)
    assert [0, 0] == checked_out(db)


@on("aiosqlite")
async def test_whose_block_it_is_must_be_known(db: Database) -> None:
    """Of two blocks of tasks that still run, neither is ended by a third."""
    entered, over = [asyncio.Event(), asyncio.Event()], asyncio.Event()

    async def stay(number: int) -> None:
        async with db:
            entered[number].set()
            await over.wait()

    tasks = [asyncio.create_task(stay(number)) for number in range(2)]
    for each in entered:
        await each.wait()
    with pytest.raises(errors.NoUnitOfWorkError, match="another task has entered"):
        await db.__aexit__(None, None, None)
    over.set()
    await asyncio.gather(*tasks)


@on("aiosqlite")
async def test_leaving_what_was_not_entered(db: Database) -> None:
    """Leaving without having entered is an error, not a commit of something else."""
    with pytest.raises(errors.NoUnitOfWorkError, match="leaving"):
        await db.__aexit__(None, None, None)
