"""When and where observers are told what, and about which unit of work."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

import pytest

import asgi_uow as uow
from asgi_uow import Database
from asgi_uow.errors import CommitFailedError
from asgi_uow.observers import (
    CommitFailed,
    ConnectionReleased,
    Event,
    HookFailed,
    HookFinished,
    HookStarted,
    ImplicitCommit,
    LoggingObserver,
    Observer,
    ReaderFailed,
    ReleaseFailed,
    UnitFinished,
    UnitStarted,
)
from tests.support.asgi import Handler, handle
from tests.support.databases import DRIVERS, on
from tests.support.observer import Events
from tests.support.private import Cause
from tests.support.shop import insert, insert_orphan

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


pytestmark = on("aiosqlite")

T = TypeVar("T")
BROKEN = ZeroDivisionError("a bug")
ALL: list[Event] = [
    UnitStarted(),
    UnitFinished(uow.Outcome.COMMITTED, None, None, (), 2.0, 1.0),
    CommitFailed(BROKEN, uow.Outcome.ROLLED_BACK, Cause.COMMIT_FAILED, "23505"),
    HookStarted("after_commit", "send_email"),
    HookFinished("after_commit", "send_email", 1.0, None),
    HookFailed("after_commit", "send_email", BROKEN),
    ConnectionReleased("sqlite://", "read", 1.0),
    ReleaseFailed("closing the session", BROKEN),
    ImplicitCommit("CREATE TABLE"),
    ReaderFailed("sqlite://", BROKEN, 0.1),
]
PHASES = [
    (uow.before_commit, 200),
    (uow.after_commit, 200),
    (uow.after_response, 200),
    (uow.after_rollback, 404),
]

every_event = pytest.mark.parametrize("event", ALL, ids=lambda e: type(e).__name__)
every_phase = pytest.mark.parametrize(
    ("register", "status"), PHASES, ids=[register.__name__ for register, _ in PHASES]
)


class Recorder(Events):
    """Keeps the events, and the task in which each was told."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks: list[asyncio.Task[object] | None] = []

    def __call__(self, event: Event, /) -> None:
        super().__call__(event)
        self.tasks.append(asyncio.current_task())

    def tasks_of(self, *kinds: type) -> list[asyncio.Task[object] | None]:
        told = zip(self, self.tasks, strict=True)
        return [task for each, task in told if isinstance(each, kinds)]


async def request(
    db: Database, work: Handler, status: int = 200, *others: Observer
) -> Recorder:
    """Do some work as a request does, and give what was told."""
    recorded = Recorder()
    await handle(work, db, status=status, observers=[*others, recorded])
    return recorded


async def insert_1() -> None:
    await insert(1)


# The events themselves


@every_event
def test_frozen(event: Event) -> None:
    """An event cannot be changed: all observers are given the same one."""
    for field in dataclasses.fields(event):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(event, field.name, None)


@every_event
def test_equal(event: Event) -> None:
    """Events are compared by what happened, not by the unit or the time."""
    other = dataclasses.replace(event, unit=object(), at=0)
    if isinstance(other, HookStarted | HookFinished):
        other = dataclasses.replace(other, of=object())
    assert event == other
    assert repr(event) == repr(other)


# Order


async def test_commit(db: Database) -> None:
    """Beginnings are told at once, what became of it once the end is over."""

    async def work() -> None:
        await insert(1)
        uow.before_commit(insert, 2)
        uow.after_commit(insert, 3)
        uow.after_response(insert, 4)

    recorded = await request(db, work)
    hook = ["HookStarted", "HookFinished"]
    own = ["HookStarted", "UnitStarted", "HookFinished"]
    ended = ["ConnectionReleased", "UnitFinished"]
    expected = ["UnitStarted", *hook, *own, *ended, *ended, *own, *ended]
    assert expected == recorded.kinds


async def test_rollback(db: Database) -> None:
    """The same for a rollback."""

    async def work() -> None:
        await insert(1)
        uow.after_rollback(insert, 2)

    recorded = await request(db, work, 404)
    own = ["HookStarted", "UnitStarted", "HookFinished"]
    ended = ["ConnectionReleased", "UnitFinished"]
    assert ["UnitStarted", *own, *ended, *ended] == recorded.kinds


async def test_times(db: Database) -> None:
    """`at` is when it happened: the end of a unit is before its after_commit hooks."""

    async def work() -> None:
        await insert(1)
        uow.after_commit(insert, 2)

    recorded = await request(db, work)
    in_order = sorted(recorded, key=lambda event: event.at)
    ended = ["ConnectionReleased", "UnitFinished"]
    own = ["HookStarted", "UnitStarted", "HookFinished", *ended]
    assert ["UnitStarted", *ended, *own] == [type(each).__name__ for each in in_order]


async def test_seconds_of_a_hook(db: Database) -> None:
    """What observers are told of a hook is the time that it took."""

    async def work() -> None:
        uow.after_commit(insert, 1)

    began = time.perf_counter()
    recorded = await request(db, work)
    took = time.perf_counter() - began
    [finished] = [each for each in recorded if isinstance(each, HookFinished)]
    assert 0 < finished.seconds < took


@pytest.mark.parametrize(
    ("work", "status"), [(insert_1, 200), (insert_1, 404), (insert_orphan, 200)]
)
async def test_ending(
    db: Database, work: Callable[[], Awaitable[object]], status: int
) -> None:
    """`ending` is the last part of `seconds`."""
    [end] = (await request(db, work, status)).of(UnitFinished)
    assert 0 < end.ending < end.seconds


# Task and context


async def test_started_at_once(db: Database) -> None:
    """UnitStarted is told at once, in the task that asks for a session or a hook."""
    seen: list[str] = []
    recorder = Recorder()

    async def ask() -> asyncio.Task[object] | None:
        uow.current_read_session()
        seen.extend(recorder.kinds)
        return asyncio.current_task()

    async def work() -> None:
        task = asyncio.create_task(ask())
        assert [await task] == recorder.tasks
        uow.current_session()
        uow.after_commit(print)

    await request(db, work, 404, recorder)
    assert ["UnitStarted"] == seen
    assert ["UnitStarted", "UnitFinished"] == recorder.kinds


@every_phase
async def test_hook_is_told_of_where_it_runs(
    db: Database, register: Callable[[Callable[[], object]], None], status: int
) -> None:
    """An observer can set a context variable for a hook, whatever its phase."""
    span: ContextVar[str] = ContextVar("span", default="none")
    seen: list[object] = []

    def observer(event: Event, /) -> None:
        if isinstance(event, HookStarted):
            span.set(event.hook.rpartition(".")[2])

    async def awaited() -> None:
        seen.append((span.get(), asyncio.current_task()))

    def threaded() -> None:
        seen.append(span.get())

    async def work() -> None:
        register(awaited)

    recorded = await request(db, work, status, observer)
    [task] = recorded.tasks_of(HookStarted)
    assert [task] == recorded.tasks_of(HookFinished)
    assert [("awaited", task)] == seen
    seen.clear()

    async def work_threaded() -> None:
        register(threaded)

    await request(db, work_threaded, status, observer)
    assert ["threaded"] == seen


async def test_the_rest_is_told_in_the_request(db: Database) -> None:
    """What became of a unit, and of its hooks, is told in the task of the request."""

    def fail() -> None:
        raise BROKEN

    async def work() -> None:
        await insert(1)
        uow.after_commit(fail)
        uow.after_response(fail)

    recorded = await request(db, work)
    told = (UnitFinished, ConnectionReleased, HookFailed)
    assert [asyncio.current_task()] * 4 == recorded.tasks_of(*told)
    recorded = await request(db, insert_orphan)
    assert [asyncio.current_task()] == recorded.tasks_of(CommitFailed)


# The unit


async def test_unit(db: Database) -> None:
    """All events of a unit name it; a hook's its own unit, and whose hook it is."""
    units: list[object] = []

    async def hook() -> None:
        units.append(uow.current_unit_of_work())
        await insert(2)

    async def work() -> None:
        units.append(uow.current_unit_of_work())
        uow.before_commit(insert, 1)
        uow.after_commit(hook)

    recorded = await request(db, work)
    request_unit, hook_unit = units
    by_unit = {request_unit: "request", hook_unit: "hook"}
    told = [(type(e).__name__, by_unit[e.unit]) for e in recorded]
    assert told == [
        ("UnitStarted", "request"),
        ("HookStarted", "request"),
        ("HookFinished", "request"),
        ("HookStarted", "hook"),
        ("UnitStarted", "hook"),
        ("HookFinished", "hook"),
        ("ConnectionReleased", "request"),
        ("UnitFinished", "request"),
        ("ConnectionReleased", "hook"),
        ("UnitFinished", "hook"),
    ]
    hooks = [e.of for e in recorded if isinstance(e, HookStarted | HookFinished)]
    assert [request_unit] * 4 == hooks


async def test_two_requests(db: Database) -> None:
    """Each request has a unit of its own."""
    first = await request(db, insert_1)
    second = await request(db, insert_1, 404)
    assert 1 == len({id(each.unit) for each in first})
    assert 1 == len({id(each.unit) for each in second})
    assert first[0].unit is not second[0].unit


# Hooks that fail


async def test_hook_whose_commit_fails(db: Database) -> None:
    """It is one HookFailed with the hook's name, about the unit that registered it.

    No CommitFailed: the work of the request was kept.
    """

    async def work() -> None:
        uow.after_commit(insert_orphan)
        uow.after_commit(insert, 2)

    recorded = await request(db, work)
    [failed] = recorded.of(HookFailed)
    assert ("after_commit", "insert_orphan") == (failed.phase, failed.hook)
    assert isinstance(failed.error, CommitFailedError)
    assert [None, None] == [each.error for each in recorded.of(HookFinished)]
    assert [] == recorded.of(CommitFailed)
    ends = recorded.of(UnitFinished)
    assert [True, False, False] == [each.unit is failed.unit for each in ends]
    kept, lost = uow.Outcome.COMMITTED, uow.Outcome.ROLLED_BACK
    assert [kept, lost, kept] == [each.outcome for each in ends]


async def test_one_event_per_failing_hook(db: Database) -> None:
    """Every hook that raises is one HookFailed, in order; its unit ends for that."""

    async def first() -> None:
        raise BROKEN

    async def second() -> None:
        await insert_orphan()
        raise BROKEN

    async def work() -> None:
        uow.after_commit(first)
        uow.after_commit(second)

    recorded = await request(db, work)
    failed = recorded.of(HookFailed)
    expected = [first.__qualname__, second.__qualname__]
    assert expected == [each.hook for each in failed]
    assert [BROKEN, BROKEN] == [each.error for each in failed]
    assert [BROKEN, BROKEN] == [each.error for each in recorded.of(HookFinished)]
    assert Cause.EXCEPTION is recorded.of(UnitFinished)[-1].cause


# Connections


@on(*DRIVERS)
async def test_released(db: Database) -> None:
    """Each session that held a connection tells for how long, whatever the driver."""

    async def work() -> None:
        await uow.current_read_session().execute("SELECT 1")
        await uow.current_session().execute("SELECT 1")

    released = (await request(db, work)).of(ConnectionReleased)
    expected = [("write", db.name), ("read", db.name)]
    assert expected == [(each.access, each.database) for each in released]
    assert all(0 < each.seconds < 60 for each in released)


async def test_released_by_reads_alone(db: Database) -> None:
    """A write session that was never used held nothing."""

    async def work() -> None:
        uow.current_session()
        await uow.current_read_session().execute("SELECT 1")

    released = (await request(db, work)).of(ConnectionReleased)
    assert ["read"] == [each.access for each in released]


async def test_released_once_for_reads_of_the_writer(db: Database) -> None:
    """Reads that joined the writer's connection held none of their own."""

    async def work() -> None:
        await insert(1)
        async with uow.savepoint():
            await uow.current_read_session().execute("SELECT 1")

    released = (await request(db, work)).of(ConnectionReleased)
    assert ["write"] == [each.access for each in released]


# The logging observer


def test_failed_reader_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """It is one line at WARNING; the error's message, which may hold data, is not."""
    LoggingObserver()(ReaderFailed("sqlite://", ValueError("ann@example.com"), 0.25))
    [record] = caplog.records
    assert logging.WARNING == record.levelno
    expected = "reader sqlite:// is left alone for 0.2 s after ValueError"
    assert expected == record.getMessage()


async def test_beginnings_are_not_logged(
    db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a unit that went well only its end is logged."""
    caplog.set_level(logging.DEBUG, "asgi_uow")

    async def work() -> None:
        await insert(1)
        uow.after_commit(insert, 2)

    await request(db, work, 200, LoggingObserver())
    lines = [each.getMessage() for each in caplog.records if each.name == "asgi_uow"]
    assert ["unit of work committed"] * 2 == [
        line.partition(" in ")[0] for line in lines
    ]
