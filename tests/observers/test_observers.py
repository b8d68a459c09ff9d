"""What an observer is told, and that nothing it does changes anything."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event as sa_event

import asgi_uow as uow
from asgi_uow import Database
from asgi_uow.errors import CommitFailedError
from asgi_uow.observers import (
    CommitFailed,
    Event,
    HookFailed,
    HookFinished,
    ImplicitCommit,
    LoggingObserver,
    ReleaseFailed,
    UnitFinished,
)
from tests.support import shop
from tests.support.asgi import endpoint, handle, request
from tests.support.databases import on
from tests.support.observer import Events
from tests.support.private import Cause

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.servers import Backend


pytestmark = on("aiosqlite")

ORDER = ["UnitStarted", "ConnectionReleased", "UnitFinished"]


async def write() -> None:
    await shop.insert(1)


def fail() -> None:
    message = "a bug in the hook"
    raise ZeroDivisionError(message)


def finished(events: list[Event]) -> list[Event]:
    """Give the ends of units, without durations and the request."""
    ends = [each for each in events if isinstance(each, UnitFinished)]
    assert all(0 <= end.ending <= end.seconds < 60 for end in ends)
    left_out: dict[str, Any] = {"method": None, "path": None, "usage": (), "hooks": 0}
    left_out |= {"seconds": 0.0, "ending": 0.0, "hook_seconds": 0.0}
    return [dataclasses.replace(end, **left_out) for end in ends]


# Events


async def test_committed(db: Database) -> None:
    """The end of a unit names its outcome and the databases that it wrote to."""
    response = await handle(write, db)
    [end] = finished(response.events)
    assert end == UnitFinished(uow.Outcome.COMMITTED, None, None, (db.name,), 0.0)
    assert ORDER == response.events.kinds


async def test_rolled_back_for_the_status(db: Database) -> None:
    """An intended rollback is no failure; its cause is named."""
    response = await handle(write, db, status=404)
    [end] = finished(response.events)
    expected = UnitFinished(
        uow.Outcome.ROLLED_BACK, Cause.STATUS, None, (db.name,), 0.0
    )
    assert expected == end
    assert ORDER == response.events.kinds


async def test_rolled_back_on_request(db: Database) -> None:
    """What set_rollback_only() was told reaches the observers."""

    async def dry_run() -> None:
        await write()
        uow.set_rollback_only("dry run")

    response = await handle(dry_run, db)
    [end] = finished(response.events)
    assert end == UnitFinished(
        uow.Outcome.ROLLED_BACK, Cause.EXPLICIT, "dry run", (db.name,), 0.0
    )


async def test_only_read(db: Database) -> None:
    """A unit that only read is committed in name, and names no database."""

    response = await handle(lambda: uow.current_read_session().execute("SELECT 1"), db)
    expected = [UnitFinished(uow.Outcome.COMMITTED, None, None, (), 0.0)]
    assert expected == finished(response.events)


async def test_untouched(db: Database) -> None:
    """A request that asks for no session and registers nothing is no event."""

    async def health() -> None:
        uow.current_unit_of_work()

    response = await handle(health, db)
    assert [] == response.events


async def test_commit_failed(db: Database) -> None:
    """A failed COMMIT is an event with the failure and the driver's code."""
    response = await handle(shop.insert_orphan, db)
    expected_kinds = ["UnitStarted", "ConnectionReleased", "CommitFailed"]
    assert [*expected_kinds, "UnitFinished"] == response.events.kinds
    failed = response.events.only(CommitFailed)
    assert isinstance(failed.error, CommitFailedError)
    assert response.error is failed.error
    assert uow.Outcome.ROLLED_BACK is failed.outcome
    assert Cause.COMMIT_FAILED is failed.cause
    assert "SQLITE_CONSTRAINT_FOREIGNKEY" == failed.code
    expected = UnitFinished(
        uow.Outcome.ROLLED_BACK, Cause.COMMIT_FAILED, None, (db.name,), 0.0
    )
    assert [expected] == finished(response.events)


@pytest.mark.parametrize(
    ("register", "phase", "status"),
    [
        (uow.after_commit, "after_commit", 200),
        (uow.after_response, "after_response", 200),
        (uow.after_rollback, "after_rollback", 404),
    ],
)
async def test_hook_failed(
    db: Database,
    register: Callable[[Callable[[], None]], None],
    phase: str,
    status: int,
) -> None:
    """A hook that raises is an event with its phase, its name and its error."""

    async def work() -> None:
        register(fail)

    response = await handle(work, db, status=status)
    assert status == response.status
    failed = response.events.only(HookFailed)
    assert (phase, "fail") == (failed.phase, failed.hook)
    assert isinstance(failed.error, ZeroDivisionError)
    assert failed.error is response.events.only(HookFinished).error


async def test_hook_timed_out(db: Database) -> None:
    """A hook that takes too long is an event with a TimeoutError."""

    async def forever() -> None:
        await asyncio.Event().wait()

    async def work() -> None:
        uow.after_commit(forever)

    response = await handle(work, db, hook_timeout=0.01)
    assert isinstance(response.events.only(HookFailed).error, TimeoutError)
    assert isinstance(response.events.only(HookFinished).error, asyncio.CancelledError)


async def test_release_failed(db: Database) -> None:
    """A connection that cannot be rolled back is an event; it is thrown away."""
    broken = OSError("the disk is gone")

    async def work() -> None:
        await write()
        sa_event.listen(db.engine.sync_engine, "rollback", disk_fails, once=True)

    def disk_fails(_: object) -> None:
        raise broken

    response = await handle(work, db, status=404)
    assert 404 == response.status
    failed = response.events.only(ReleaseFailed)
    assert "session" in failed.operation
    assert broken is failed.error
    [rolled_back] = finished(response.events)
    response = await handle(write, db)
    assert response.error is None
    [committed] = finished(response.events)
    assert rolled_back == UnitFinished(
        uow.Outcome.ROLLED_BACK, Cause.STATUS, None, (db.name,), 0.0
    )
    assert committed == UnitFinished(uow.Outcome.COMMITTED, None, None, (db.name,), 0.0)


@on("asyncmy")
async def test_implicit_commit(db: Database) -> None:
    """DDL that has MySQL commit in the middle of a unit is an event."""

    async def migrate() -> None:
        await write()
        await uow.current_session().execute("CREATE TABLE other (id INTEGER)")

    response = await handle(migrate, db)
    assert ImplicitCommit("CREATE TABLE") in response.events


async def test_unit_inside_a_request(db: Database) -> None:
    """A unit that a hook opens reports to the request's observers, before it does."""

    async def hook() -> None:
        async with db:
            await write()
            uow.after_commit(fail)

    async def work() -> None:
        uow.after_commit(hook)

    response = await handle(work, db)
    request_end = UnitFinished(uow.Outcome.COMMITTED, None, None, (), 0.0)
    hook_end = UnitFinished(uow.Outcome.COMMITTED, None, None, (db.name,), 0.0)
    assert [hook_end, request_end] == finished(response.events)
    results = [type(each) for each in response.events.results]
    assert [UnitFinished, HookFailed, UnitFinished] == results


# The logging observer


def levels(caplog: pytest.LogCaptureFixture, name: str = "asgi_uow") -> list[int]:
    return [each.levelno for each in caplog.records if each.name == name]


@pytest.mark.parametrize("status", [200, 404])
async def test_intended_end_is_logged_at_debug(
    db: Database, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    """An intended end is one line at DEBUG, whichever it was."""
    caplog.set_level(logging.DEBUG, "asgi_uow")
    await handle(write, db, observers=[LoggingObserver()], status=status)
    assert [logging.DEBUG] == levels(caplog)
    assert db.name in caplog.text


async def test_failed_commit_is_logged_as_an_error(
    db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """A failed COMMIT is one line at ERROR with the driver's code and traceback."""
    response = await handle(shop.insert_orphan, db, observers=[LoggingObserver()])
    [record] = [each for each in caplog.records if each.name == "asgi_uow"]
    assert logging.ERROR == record.levelno
    assert "SQLITE_CONSTRAINT_FOREIGNKEY" in record.getMessage()
    assert record.exc_info is not None
    assert response.error is record.exc_info[1]


async def test_failed_hook_is_logged_as_an_error(
    db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """A hook that raises is one line at ERROR with its name and traceback."""

    async def work() -> None:
        uow.after_commit(fail)

    await handle(work, db, observers=[LoggingObserver()])
    assert [logging.ERROR] == levels(caplog)
    assert "after_commit hook fail failed" in caplog.text
    assert "ZeroDivisionError: a bug in the hook" in caplog.text


def test_other_failures_are_logged_as_errors(caplog: pytest.LogCaptureFixture) -> None:
    """So are a connection thrown away, and a commit by DDL; another logger will do."""
    observer = LoggingObserver(logging.getLogger("elsewhere"))
    observer(ReleaseFailed("closing the write session", OSError("the disk is gone")))
    observer(ImplicitCommit("CREATE TABLE"))
    assert [logging.ERROR, logging.ERROR] == levels(caplog, "elsewhere")
    assert "OSError: the disk is gone" in caplog.text
    assert "CREATE TABLE" in caplog.text


async def test_logging_is_the_default(
    db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Without observers given, failures are logged, also outside requests."""
    with pytest.raises(CommitFailedError):
        async with db:
            await shop.insert_orphan()
    await request(uow.UnitOfWorkMiddleware(endpoint(shop.insert_orphan), db))
    assert [logging.ERROR, logging.ERROR] == levels(caplog)


# An observer that fails


async def test_failing_observer(
    db: Database, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    """An observer that raises changes nothing, stops no other one and is logged."""
    ran: list[str] = []

    def failing(event: Event, /) -> None:
        message = f"no line to the tracker for {type(event).__name__}"
        raise ConnectionError(message)

    async def work() -> None:
        await write()
        uow.after_commit(fail)
        uow.after_commit(ran.append, "hook")

    events = Events()
    response = await handle(work, db, observers=[failing, events])
    assert 200 == response.status
    assert response.error is None
    hooks = ["HookStarted", "HookFinished"] * 2
    ended = ["ConnectionReleased", "UnitFinished", "HookFailed"]
    assert ["UnitStarted", *hooks, *ended] == events.kinds
    assert ["hook"] == ran
    assert [1] == await shop.items(backend)
    assert [logging.ERROR] * len(events) == levels(caplog)
    for event in events:
        assert f"no line to the tracker for {type(event).__name__}" in caplog.text
