"""Hooks in places where they could wait for themselves, get lost or never end."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
import pytest
from sqlalchemy import event
from sqlalchemy import exc as sa_exc

import asgi_uow as uow
from asgi_uow import Database
from asgi_uow.errors import NestedUnitOfWorkError, TooManyHooksError
from asgi_uow.observers import (
    CommitFailed,
    ConnectionReleased,
    HookFailed,
    ReleaseFailed,
)
from tests.support import shop
from tests.support.asgi import BODY, START, endpoint, handle, serve
from tests.support.databases import (
    DRIVERS,
    checked_out,
    memory_database,
    on,
    shop_database,
)
from tests.support.private import concurrency, current

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from asgi_uow._asgi import Receive, Scope, Send
    from tests.servers.backend import Backend, MariaDBBackend, SQLiteBackend


async def failures(
    handler: Callable[[], Awaitable[object]], *databases: Database
) -> list[BaseException]:
    """Send a request; what did its hooks raise?"""
    response = await handle(handler, *databases, hook_timeout=30)
    assert (200, None) == (response.status, response.error)
    return [each.error for each in response.failures]


# Connections


@on(pool_size=1, max_overflow=0, pool_timeout=5)
@pytest.mark.parametrize("register", [uow.after_commit, uow.after_response])
async def test_hook_reads_with_a_pool_of_one(
    register: Callable[..., None], db: Database
) -> None:
    """P7: a hook that reads gets the connection that its request has read with."""
    found: list[object] = []

    async def read() -> None:
        found.append(await uow.current_read_session().scalar(shop.COUNT))

    async def handler() -> None:
        await read()
        await shop.insert(1)
        register(read)
        register(read)

    assert [] == await failures(handler, db)
    assert [0, 1, 1] == found
    assert [0, 0] == checked_out(db)


@pytest.mark.parametrize("register", [uow.after_commit, uow.after_response])
async def test_hook_after_a_read_in_memory(register: Callable[..., None]) -> None:
    """In memory a request that has read leaves the connection to its hooks."""

    async def handler() -> None:
        await uow.current_read_session().scalar(shop.COUNT)
        register(shop.insert, 1)

    async with memory_database(pool_timeout=5) as db:
        assert [] == await failures(handler, db)
        async with db:
            assert 1 == await db.read.scalar(shop.COUNT)


async def test_a_stream_goes_on_beside_hooks(db: Database, backend: Backend) -> None:
    """P7: a stream that is read after the response keeps its connection."""
    await backend.execute("INSERT INTO items (id) VALUES (1), (2)")
    rows: list[object] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        stream = await uow.current_read_session().stream(shop.SELECT)
        rows.append(await stream.fetchone())
        uow.after_commit(rows.append, "hook")
        await send({"type": START, "status": 200, "headers": []})
        rows.append(await stream.fetchone())
        await send({"type": BODY, "body": b""})

    response = await serve(app, db)

    assert [(1,), "hook", (2,)] == rows
    assert not {HookFailed, ReleaseFailed} & set(map(type, response.events))
    assert [0, 0] == checked_out(db)


async def test_held_seconds_of_a_connection_lent(db: Database) -> None:
    """The time for which a read session held connections is told once, in all."""

    async def handler() -> None:
        await uow.current_read_session().scalar(shop.COUNT)
        uow.after_commit(print)

    released = (await handle(handler, db)).events.only(ConnectionReleased)
    assert "read" == released.access
    assert 0 < released.seconds < 60


# Units around


async def test_savepoint_of_the_unit_around(
    sqlite: SQLiteBackend, backend: Backend
) -> None:
    """P6: a hook of an inner unit follows the savepoints of the unit around it too."""
    called: list[str] = []
    other = Database.from_url("sqlite://")
    async with shop_database(backend) as db:

        async def handler() -> None:
            await uow.current_session(db).execute("SELECT 1")
            with suppress(LookupError):
                async with uow.savepoint(db):
                    uow.after_commit(called.append, "undone")
                    uow.after_rollback(called.append, "rolled back")
                    raise LookupError
            assert ["rolled back"] == called
            async with uow.savepoint(db):
                uow.after_commit(called.append, "kept")

        app = uow.UnitOfWorkMiddleware(endpoint(handler), other)
        response = await serve(app, db)

        assert response.error is None
        assert ["rolled back", "kept"] == called
    await other.dispose()


async def test_waiting_for_oneself_is_refused(sqlite: SQLiteBackend) -> None:
    """On SQLite a hook of a hook is refused what its request still holds."""
    seen: list[type[BaseException]] = []
    other = Database.from_url("sqlite://")

    async def block() -> None:
        try:
            async with other, mine:
                raise NotImplementedError
        except NestedUnitOfWorkError as error:
            seen.append(type(error))

    async def session() -> None:
        try:
            uow.current_session()
        except NestedUnitOfWorkError as error:
            seen.append(type(error))

    async def compensate() -> None:
        uow.after_commit(session)
        await block()

    async with shop_database(sqlite) as mine:

        async def handler() -> None:
            await shop.insert(1)
            with suppress(LookupError):
                async with uow.savepoint():
                    uow.after_rollback(compensate)
                    raise LookupError

        assert [] == await failures(handler, mine)
    assert [NestedUnitOfWorkError] * 2 == seen
    await other.dispose()


async def test_unproven_on_one_of_two_databases(
    mariadb: MariaDBBackend, sqlite: SQLiteBackend
) -> None:
    """P3: a call on another database proves no rollback."""
    called: list[str] = []
    async with shop_database(mariadb) as one, shop_database(sqlite) as two:
        with pytest.raises(Exception, match="already given this transaction up"):
            async with uow.unit_of_work(one, two):
                await shop.insert(1)
                with suppress(sa_exc.DBAPIError, LookupError):
                    async with uow.savepoint(one):
                        await shop.insert(2)
                        uow.after_rollback(called.append, "rolled back")
                        await mariadb.kill_connections()
                        raise LookupError
                await uow.current_session(two).execute("SELECT 1")
                assert [] == called
    assert ["rolled back"] == called


# Ends


async def test_block_around_the_response(db: Database, backend: Backend) -> None:
    """A savepoint that is open at the decision ends with it; so does its block."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async with uow.savepoint():
            await shop.insert(1)
            await send({"type": START, "status": 200, "headers": []})
        await send({"type": BODY, "body": b""})

    response = await serve(app, db)

    assert (200, None) == (response.status, response.error)
    assert [1] == await shop.items(backend)


@on(*DRIVERS)
async def test_savepoint_in_a_cancelled_scope(backend: Backend) -> None:
    """P10: a scope that is cancelled in a savepoint undoes that and no more."""
    async with shop_database(backend) as db:

        async def handler() -> None:
            await shop.insert(1)
            with anyio.CancelScope() as scope:
                async with uow.savepoint():
                    await shop.insert(2)
                    uow.after_commit(called.append, "undone")
                    scope.cancel()
                    await anyio.sleep_forever()
            await shop.insert(3)

        called: list[str] = []
        assert [] == await failures(handler, db)

    assert [1, 3] == await shop.items(backend)
    assert [] == called


@pytest.mark.parametrize("natively", [False, True])
async def test_cancelled_savepoint_waits_for_its_turn(
    natively: bool, db: Database, backend: Backend
) -> None:
    """P10: a savepoint cancelled during another task's call is never kept.

    A scope waits until it is undone. A task that does not wait has all undone.
    """
    called: list[str] = []
    inside, using = asyncio.Event(), asyncio.Event()

    async def part() -> None:
        with anyio.CancelScope() as scope:
            async with uow.savepoint():
                await shop.insert(2)
                uow.after_commit(called.append, "undone")
                inside.set()
                await using.wait()
                if not natively:
                    scope.cancel()
                await anyio.sleep_forever()

    async def handler() -> None:
        session = uow.current_session()
        await shop.insert(1)
        uow.after_commit(called.append, "kept")
        task = asyncio.create_task(part())
        await inside.wait()
        async with session.own_lock:
            using.set()
            for _ in range(10):
                await asyncio.sleep(0)
                if natively:
                    task.cancel()
        await asyncio.wait([task])
        await shop.insert(3)

    response = await handle(handler, db)

    assert (500 if natively else 200) == response.status
    assert ([] if natively else [1, 3]) == await shop.items(backend)
    assert ([] if natively else ["kept"]) == called


async def test_pending_hook_inside_another_call(db: Database, backend: Backend) -> None:
    """A hook that waits for the session of its request is called when that is free."""
    await backend.execute("INSERT INTO items (id) VALUES (1)")
    found: list[object] = []

    async def handler() -> None:
        session = uow.current_session()

        async def compensate() -> None:
            found.append(await session.scalar(shop.COUNT))

        connection = await session.connection()
        nested = await connection.begin_nested()
        uow.after_rollback(compensate)
        await nested.rollback()
        rows = await session.stream_scalars("SELECT id FROM items")
        found.append(await rows.all())
        await rows.close()

    errors = await failures(handler, db)  # some drivers refuse it beside a stream
    assert TimeoutError not in map(type, errors)
    assert [1] in found


async def test_block_that_registers_itself(sqlite: SQLiteBackend) -> None:
    """A hook that goes on in blocks of its own comes to an end as well."""
    calls: list[int] = []
    errors: list[BaseException] = []

    async def again() -> None:
        calls.append(len(calls))
        try:
            async with mine:
                uow.after_commit(again)
        except TooManyHooksError as error:
            errors.append(error)

    async with shop_database(sqlite) as mine:

        async def handler() -> None:
            uow.after_commit(again)

        assert [] == await failures(handler, mine)
    assert 101 == len(calls)
    assert 1 == len(errors)


@on("aiosqlite")
async def test_hook_whose_name_cannot_be_read(db: Database) -> None:
    """P5: a callable that refuses its name fails like any other hook."""
    called: list[str] = []

    class Proxy:
        def __getattr__(self, name: str) -> object:
            raise RuntimeError(name)

        def __call__(self) -> None:
            raise NotImplementedError

    async def handler() -> None:
        uow.after_commit(Proxy())
        uow.after_commit(called.append, "second")

    errors = await failures(handler, db)
    assert 1 == len(errors)
    assert ["second"] == called


@on("aiosqlite")
async def test_many_before_commit_hooks(db: Database) -> None:
    """Hooks are looked through once, not once per hook."""
    called: list[int] = []

    async def note(number: int) -> None:
        called.append(number)

    async def handler() -> None:
        for number in range(3000):
            uow.before_commit(note, number)

    assert [] == await failures(handler, db)
    assert list(range(3000)) == called


@on("aiosqlite")
async def test_before_commit_hook_dropped_on_the_way(db: Database) -> None:
    """P6: a savepoint undone by a before_commit hook takes the next ones with it."""
    called: list[str] = []

    async def handler() -> None:
        opened = await uow.current_session().begin_nested()

        async def undo() -> None:
            await opened.rollback()

        uow.before_commit(undo)
        uow.before_commit(called.append, "dropped")

    await failures(handler, db)
    assert [] == called


async def test_nothing_is_current_after_a_hook(db: Database) -> None:
    """P9: hooks leave nothing behind in the context of the request."""
    seen: list[object] = []

    async def handler() -> None:
        uow.after_commit(shop.insert, 1)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        unit = uow.current_unit_of_work()
        await handler()
        await send({"type": START, "status": 200, "headers": []})
        seen.append(current.get() is unit)
        await send({"type": BODY, "body": b""})

    await serve(app, db)
    assert [True] == seen
    assert current.get() is None


@on("asyncmy")
async def test_read_connection_that_cannot_be_given_back(
    db: Database, backend: MariaDBBackend
) -> None:
    """A read connection that is lost before the hooks is no harm to them."""
    called: list[str] = []

    async def handler() -> None:
        await uow.current_read_session().scalar(shop.COUNT)
        uow.after_commit(called.append, "hook")
        await backend.kill_connections()

    await failures(handler, db)
    assert ["hook"] == called
    assert [0, 0] == checked_out(db)


async def test_task_that_reads_while_hooks_run(db: Database) -> None:
    """A read in flight at the decision keeps its connection and is not waited for."""
    go_on = asyncio.Event()
    reading = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def read() -> None:
        session = uow.current_read_session()
        async with session.own_lock:
            await session.scalar(shop.COUNT)
            reading.set()
            await go_on.wait()

    async def handler() -> None:
        tasks.append(asyncio.create_task(read()))
        await reading.wait()
        uow.after_commit(go_on.set)

    errors = await failures(handler, db)
    assert [] == errors
    await tasks[0]
    assert [0, 0] == checked_out(db)


@on("aiosqlite")
async def test_listener_that_breaks_giving_back(db: Database) -> None:
    """P5: a listener that fails when a read connection is given back stops no hook."""
    called: list[str] = []

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    async def handler() -> None:
        session = uow.current_read_session()
        await session.connection()
        event.listen(session.sync_session, "after_transaction_end", fail, once=True)
        uow.after_commit(called.append, "hook")

    response = await handle(handler, db)

    assert 200 == response.status
    assert ["hook"] == called
    failed = response.events.only(ReleaseFailed)
    assert "giving a read connection back" == failed.operation
    assert isinstance(failed.error, ZeroDivisionError)


@on("aiosqlite")
@pytest.mark.parametrize("register", [uow.before_commit, uow.after_commit])
async def test_hook_that_does_not_let_itself_be_cancelled(
    db: Database,
    backend: Backend,
    monkeypatch: pytest.MonkeyPatch,
    register: Callable[[Callable[[], object]], None],
) -> None:
    """Past hook_timeout and a grace period it is left behind; the response leaves.

    It is a success only if the hook was one for which it was too late to object.
    """
    monkeypatch.setattr(concurrency, "GRACE", 0.01)
    over = asyncio.Event()
    tasks: list[asyncio.Task[object] | None] = []

    async def stubborn() -> None:
        tasks.append(asyncio.current_task())
        while not over.is_set():
            with suppress(asyncio.CancelledError):
                await over.wait()

    async def handler() -> None:
        await shop.insert(1)
        register(stubborn)

    response = await handle(handler, db, hook_timeout=0.01)

    error: BaseException | None
    if register is uow.after_commit:
        assert 200 == response.status
        assert [1] == await shop.items(backend)
        error = response.events.only(HookFailed).error
        assert [] == response.events.of(CommitFailed)
    else:
        assert 500 == response.status
        assert [] == await shop.items(backend)
        error = response.events.only(CommitFailed).error.__cause__
        assert [] == response.failures
    assert isinstance(error, TimeoutError)
    over.set()
    await asyncio.wait([task for task in tasks if task])


@on("aiosqlite")
async def test_hook_that_was_left_behind_comes_back(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does nothing more: the hooks after it are called once, and in order."""
    monkeypatch.setattr(concurrency, "GRACE", 0.01)
    over = asyncio.Event()
    called: list[str] = []
    tasks: list[asyncio.Task[object]] = []

    async def stubborn() -> None:
        tasks.extend(filter(None, [asyncio.current_task()]))
        while not over.is_set():
            with suppress(asyncio.CancelledError):
                await over.wait()
        called.append("comes back")

    async def second() -> None:
        called.append("begins")
        over.set()
        await asyncio.wait(tasks)
        called.append("ends")

    async def handler() -> None:
        uow.after_commit(stubborn)
        uow.after_commit(second)
        uow.after_commit(called.append, "third")

    response = await handle(handler, db, hook_timeout=0.5)

    assert ["begins", "comes back", "ends", "third"] == called
    assert isinstance(response.events.only(HookFailed).error, TimeoutError)


@on("aiosqlite")
async def test_hook_that_fails_as_its_time_is_up(db: Database) -> None:
    """What it raises when it is cancelled is what is reported."""
    never = asyncio.Event()

    async def hook() -> None:
        try:
            await never.wait()
        except asyncio.CancelledError:
            raise ZeroDivisionError from None

    async def handler() -> None:
        await shop.insert(1)
        uow.after_commit(hook)

    response = await handle(handler, db, hook_timeout=0.01)

    assert 200 == response.status
    assert isinstance(response.events.only(HookFailed).error, ZeroDivisionError)
