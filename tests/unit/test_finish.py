"""The end of a unit: what runs before COMMIT, what stops it, what is released."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError
from sqlalchemy.util import await_only

import asgi_uow as uow
from asgi_uow import Database, errors
from asgi_uow.observers import CommitFailed, HookFailed, ReleaseFailed, UnitFinished
from tests.support import shop
from tests.support.asgi import START, Response, handle, respond, serve
from tests.support.databases import SERVERS, behind_proxy, checked_out, is_commit, on
from tests.support.private import Cause, State, finish, rollback

if TYPE_CHECKING:
    from asgi_uow._asgi import Receive, Scope, Send
    from tests.servers import Backend, MariaDBBackend, ServerBackend

pytestmark = on("aiosqlite")


# Before COMMIT


async def test_before_commit_runs_inside_the_transaction(
    db: Database, backend: Backend
) -> None:
    """before_commit hooks write in the same transaction, also those they register."""

    async def enqueue() -> None:
        await shop.insert(2)
        uow.before_commit(shop.insert, 3)

    async def handler() -> None:
        uow.before_commit(enqueue)
        await shop.insert(1)

    response = await handle(handler, db, probe=lambda: shop.items(backend))

    assert [[1, 2, 3]] == response.seen


async def test_listener_may_add_during_the_last_flush(
    db: Database, backend: Backend
) -> None:
    """What a listener adds while the session is flushed is committed too."""

    async def handler() -> None:
        session = uow.current_session()
        session.add(shop.Item(id=1))

        def add_another(*_: object) -> None:
            uow.current_session().add(shop.Item(id=2))

        event.listen(session.sync_session, "after_flush", add_another, once=True)

    response = await handle(handler, db)

    assert 200 == response.status
    assert [1, 2] == await shop.items(backend)


async def test_flush_may_register_before_commit(db: Database, backend: Backend) -> None:
    """A hook registered while the session is flushed still runs before COMMIT."""

    async def handler() -> None:
        session = uow.current_session()
        session.add(shop.Item(id=1))
        event.listen(
            session.sync_session,
            "before_flush",
            lambda *_: uow.before_commit(shop.insert, 2),
        )

    await handle(handler, db)

    assert [1, 2] == await shop.items(backend)


async def test_change_on_the_read_session_is_never_lost(
    db: Database, backend: Backend
) -> None:
    """What nobody would ever flush fails the request instead of being dropped."""

    async def add() -> None:
        await shop.insert(1)
        uow.current_read_session().add(shop.Item(id=2))

    async def change() -> None:
        item = await uow.current_read_session().get_one(shop.Item, 3)
        item.id = 4

    await backend.execute("INSERT INTO items (id) VALUES (3)")
    for handler in (add, change):
        response = await handle(handler, db, hooks=True)

        assert 500 == response.status
        assert isinstance(response.error, errors.CommitFailedError)
        assert isinstance(response.error.__cause__, errors.ReadOnlySessionError)
        assert ["rollback"] == response.hooks
    assert [3] == await shop.items(backend)


@pytest.mark.parametrize("kind", ["raises", "hangs", "goes on after its time"])
async def test_before_commit_stops_the_commit(
    db: Database, backend: Backend, kind: str
) -> None:
    """A before_commit hook that raises or hangs has everything rolled back.

    So has one that returns all the same when it is cancelled.
    """
    called: list[str] = []

    async def refuse() -> None:
        if kind == "raises":
            raise ZeroDivisionError
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if kind == "hangs":
                raise

    async def handler() -> None:
        await shop.insert(1)
        uow.before_commit(refuse)
        uow.before_commit(called.append, "second")

    response = await handle(handler, db, hooks=True, hook_timeout=0.5)

    cause = Cause.BEFORE_COMMIT if kind == "raises" else Cause.TIMEOUT
    assert 500 == response.status
    assert isinstance(response.error, errors.BeforeCommitError)
    assert "refuse" in str(response.error)
    assert [] == called
    assert ["rollback"] == response.hooks
    assert [] == await shop.items(backend)
    assert [CommitFailed, UnitFinished] == list(map(type, response.events.results))
    finished = response.events.only(UnitFinished)
    assert (uow.Outcome.ROLLED_BACK, cause) == (finished.outcome, finished.cause)


async def test_what_doomed_a_unit_is_still_known(db: Database) -> None:
    """`doomed_by` is the error of a flush that stopped the commit, afterwards too."""

    async def handler() -> None:
        session = uow.current_session()
        session.add_all([shop.Item(id=1), shop.Item(id=1)])

    response = await handle(handler, db)

    assert 500 == response.status
    assert isinstance(response.unit.doomed_by, IntegrityError)


async def test_before_commit_without_a_name(db: Database) -> None:
    """A hook that has an empty name has one all the same."""

    async def refuse() -> None:
        raise ZeroDivisionError

    async def handler() -> None:
        uow.before_commit(refuse)

    refuse.__qualname__ = ""
    response = await handle(handler, db)

    assert isinstance(response.error, errors.BeforeCommitError)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
async def test_before_commit_that_ends_the_process_stops_the_commit(
    db: Database, backend: Backend, kind: type[BaseException]
) -> None:
    """What is no `Exception` rolls back as well, and is raised as it is."""
    response, raised = Response(), kind()

    async def leave() -> None:
        raise raised

    async def handler() -> None:
        await shop.insert(1)
        uow.before_commit(leave)

    with pytest.raises(kind) as caught:
        await handle(handler, db, hooks=True, into=response)

    assert raised is caught.value
    assert ["rollback"] == response.hooks
    assert [] == await shop.items(backend)


# Cancelled before COMMIT


@pytest.mark.parametrize("answer", ["nothing", "success"])
async def test_cancelled_before_commit_rolls_back(
    db: Database, backend: Backend, answer: str
) -> None:
    """A cancellation before COMMIT is sent rolls back and cannot become a success."""
    reached = asyncio.Event()
    units = []

    async def hang() -> None:
        reached.set()
        await asyncio.Event().wait()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        units.append(uow.current_unit_of_work())
        await shop.insert(1)
        uow.before_commit(hang)
        try:
            await respond(send)
        finally:
            if answer == "success":
                await respond(send)

    task = asyncio.create_task(serve(app, db))
    await reached.wait()
    task.cancel()
    if answer == "nothing":
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        response = await task
        assert 500 == response.status
        assert isinstance(response.error, errors.CommitFailedError)

    assert uow.Outcome.ROLLED_BACK is units[0].outcome
    assert Cause.CANCELLED is units[0].cause
    assert [] == await shop.items(backend)
    assert [0, 0] == checked_out(db)


async def test_cancelled_while_a_hook_runs(db: Database, backend: Backend) -> None:
    """A request that is cancelled in a before_commit hook cancels the hook as well."""
    begun = asyncio.Event()
    ended: list[str] = []

    async def hook() -> None:
        try:
            begun.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await uow.current_session().execute("SELECT 1")
            ended.append("hook")
            raise

    async def handler() -> None:
        await shop.insert(1)
        uow.before_commit(hook)
        uow.after_rollback(ended.append, "unit")

    task = asyncio.create_task(handle(handler, db))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ["hook", "unit"] == ended
    assert [] == await shop.items(backend)
    assert [0, 0] == checked_out(db)


# Who ends it


async def test_send_in_a_task_of_its_own_is_waited_for(mariadb: MariaDBBackend) -> None:
    """An app that returns while its own task is still committing is waited for."""
    units = []
    tasks: list[asyncio.Task[None]] = []

    async with behind_proxy(mariadb) as (db, proxy):
        hold = proxy.hold_answer(is_commit)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            units.append(uow.current_unit_of_work())
            await shop.insert(1)
            tasks.append(asyncio.create_task(respond(send)))
            await hold.fired.wait()

        serving = asyncio.create_task(serve(app, db))
        await hold.answered.wait()
        assert not serving.done()
        assert State.COMMITTING is units[0].state
        hold.release()
        await serving
        await tasks[0]

        assert uow.Outcome.COMMITTED is units[0].outcome
        assert [1] == await shop.items(mariadb)


async def test_finishing_by_hand_hangs_nothing(db: Database) -> None:
    """A handler that ends the unit itself gets no success out, and no hang."""
    response = Response()

    async def handler() -> None:
        await shop.insert(1)
        await finish(uow.current_unit_of_work(), rollback(Cause.EXPLICIT))

    await asyncio.wait_for(handle(handler, db, into=response), 5)

    assert [] == response.types
    assert isinstance(response.error, errors.UnitOfWorkClosedError)
    assert uow.Outcome.ROLLED_BACK is response.unit.outcome


@pytest.mark.parametrize("swallows", [False, True])
async def test_start_inside_a_call_of_the_session(
    db: Database, backend: Backend, swallows: bool
) -> None:
    """A start sent inside `run_sync()` would wait for itself: refused, rolled back."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        def work(_: object) -> None:
            await_only(send({"type": START, "status": 200, "headers": []}))

        await shop.insert(1)
        with suppress(errors.ConcurrentUseError) if swallows else nullcontext():
            await uow.current_session().run_sync(work)
        await respond(send)

    response = await asyncio.wait_for(serve(app, db), 5)

    assert ([500] if swallows else []) == [
        each["status"] for each in response.messages if each["type"] == START
    ]
    kind = errors.DoomedError if swallows else errors.ConcurrentUseError
    assert isinstance(response.error, kind)
    assert [] == await shop.items(backend)
    assert [0, 0] == checked_out(db)


# What breaks afterwards


@pytest.mark.parametrize("savepoint_open", [False, True])
async def test_listener_that_raises_after_commit(
    db: Database, backend: Backend, savepoint_open: bool
) -> None:
    """A SQLAlchemy listener that raises after COMMIT does not make it a rollback."""
    sessions: list[uow.Session] = []

    def broken(_: object) -> None:
        if sessions[0].get_nested_transaction() is None:
            raise ZeroDivisionError

    async def handler() -> None:
        sessions.append(uow.current_session())
        event.listen(sessions[0].sync_session, "after_commit", broken)
        await shop.insert(1)
        if savepoint_open:
            await sessions[0].begin_nested().start()

    response = await handle(handler, db, hooks=True)

    assert 200 == response.status
    assert ["commit"] == response.hooks
    assert [1] == await shop.items(backend)
    assert [ReleaseFailed, UnitFinished] == list(map(type, response.events.results))
    assert [0, 0] == checked_out(db)


@on("asyncmy")
async def test_connection_that_dies_before_rollback(
    db: Database, backend: MariaDBBackend
) -> None:
    """A connection that is dead needs no rollback: nothing is kept, nothing leaks."""

    async def handler() -> None:
        await shop.insert(1)
        await uow.current_read_session().execute("SELECT 1")
        await backend.kill_connections()

    response = await handle(handler, db, status=404, hooks=True)

    assert 404 == response.status
    assert response.error is None
    assert ["rollback"] == response.hooks
    assert [0, 0] == checked_out(db)
    kinds = set(map(type, response.events))
    assert UnitFinished in kinds
    assert not {CommitFailed, HookFailed, ReleaseFailed} & kinds
    assert [] == await shop.items(backend)


@on(*SERVERS)
async def test_connection_that_dies_at_rollback(backend: ServerBackend) -> None:
    """A connection that is lost at its ROLLBACK is no failure of the release."""
    async with behind_proxy(backend) as (db, proxy):

        async def handler() -> None:
            await shop.insert(1)
            proxy.cut_before(lambda trip: trip == "ROLLBACK")

        response = await handle(handler, db, status=404)

        assert 404 == response.status
        assert [] == response.events.of(ReleaseFailed)
        assert [] == await shop.items(backend)
        assert [0, 0] == checked_out(db)


async def test_connection_that_cannot_even_be_thrown_away(
    db: Database, backend: Backend
) -> None:
    """A listener that breaks every rollback is reported; the response leaves."""

    def broken(_: object) -> None:
        raise ZeroDivisionError

    async def handler() -> None:
        await shop.insert(1)
        await uow.current_session().begin_nested().start()
        event.listen(db.engine.sync_engine, "rollback", broken)

    response = await handle(handler, db, status=404)
    event.remove(db.engine.sync_engine, "rollback", broken)

    assert 404 == response.status
    failed = response.events.only(ReleaseFailed)
    assert "closing the session" == failed.operation
    assert isinstance(failed.error, ZeroDivisionError)
    assert [] == await shop.items(backend)
    assert [0, 0] == checked_out(db)


async def test_read_session_that_cannot_be_closed(db: Database) -> None:
    """It is reported, and reported again if its connection resists, too."""
    target = db.read_engine.sync_engine

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    async def handler() -> None:
        await uow.current_read_session().connection()
        for name in ("rollback", "invalidate"):
            event.listen(target, name, broken)

    response = await handle(handler, db)
    for name in ("rollback", "invalidate"):
        event.remove(target, name, broken)

    assert 200 == response.status
    failed = response.events.of(ReleaseFailed)
    assert [ZeroDivisionError] * 2 == [type(each.error) for each in failed]
    assert ["closing the session", "throwing the connection away"] == [
        each.operation for each in failed
    ]
