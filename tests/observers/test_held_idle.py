"""`HeldIdle`: who holds a connection while nothing is executed, and where."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import logging
import sys
import time
import weakref
from collections.abc import Coroutine
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncAttrs
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import StreamingResponse
from starlette.routing import Route

import asgi_uow as uow
from asgi_uow import Database, UnitOfWorkMiddleware
from asgi_uow import _timers as timers
from asgi_uow._unit.held import Watch
from asgi_uow.errors import ConfigurationError
from asgi_uow.observers import HeldIdle, UnitFinished
from asgi_uow.testing import sandbox
from tests.support import shop
from tests.support.asgi import Client, endpoint, respond
from tests.support.databases import DRIVERS, memory_database, on
from tests.support.observer import Events
from tests.support.streams import ROWS, SELECT, fill

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from asgi_uow._asgi import ASGIApp, Receive, Scope, Send
    from asgi_uow.observers import Event
    from tests.servers import Backend
    from tests.servers.backend import ServerBackend
    from tests.support.asgi import Response

pytestmark = on("aiosqlite")

SECONDS = 0.1
UNENDED = (
    "ignore:Exception ignored in. <coroutine object .*(wait_for_ever|leave) at"
    ":pytest.PytestUnraisableExceptionWarning"
)
# Before Python 3.12 every end waits for a turn of the loop, and what the collector
# closes has none.
CLOSED = () if sys.version_info >= (3, 12) else (UNENDED,)
USER: ContextVar[str] = ContextVar("user", default="nobody")


class Alarm(Events):
    """Keeps what is told, and lets somebody wait for a `HeldIdle`."""

    def __init__(self) -> None:
        self.rings = asyncio.Event()
        self.users: list[str] = []

    def __call__(self, event: Event, /) -> None:
        super().__call__(event)
        if isinstance(event, HeldIdle):
            self.users.append(USER.get())
            self.rings.set()

    @property
    def place(self) -> str:
        return self.only(HeldIdle).place

    async def request(self, app: ASGIApp, db: Database, **options: Any) -> Response:
        options = {"held_idle": SECONDS, "observers": [self], **options}
        return await Client(UnitOfWorkMiddleware(app, db, **options)).request()


def line_of(function: Callable[..., object], mark: str) -> str:
    """Give file and number of the line of a function that has a comment."""
    lines, first = inspect.getsourcelines(function)
    [index] = [i for i, line in enumerate(lines) if line.endswith(f"# {mark}\n")]
    return f"{inspect.getsourcefile(function)}:{first + index} in "


# Where


async def wait(alarm: Alarm) -> None:
    """Stand for code of the user that waits in a library."""
    await asyncio.wait_for(asyncio.shield(alarm.rings.wait()), 60)  # waits


PLACE = line_of(wait, "waits") + "wait"


@on(*DRIVERS)
async def test_handler(db: Database) -> None:
    """The place is the innermost line of the user's code, whatever it waits in.

    Told once, at once, in the context of the request, with the unit and its database.
    """
    alarm, units = Alarm(), list[Any]()

    async def work() -> None:
        units.append(uow.current_unit_of_work())
        USER.set("Ann")
        await shop.insert(1)
        for _ in range(2):
            await wait(alarm)
            alarm.rings.clear()
            asyncio.get_running_loop().call_later(2 * SECONDS, alarm.rings.set)

    response = await alarm.request(endpoint(work), db)
    assert response.error is None
    assert PLACE == alarm.place
    told = alarm.only(HeldIdle)
    assert SECONDS <= told.seconds < alarm.only(UnitFinished).seconds
    assert ([told.unit], db.name) == (units, told.database)
    assert ["Ann"] == alarm.users
    assert alarm.index(told) < alarm.kinds.index("UnitFinished")


async def test_fastapi_dependency(db: Database) -> None:
    """A dependency with `yield` that waits is named."""

    async def opens() -> AsyncIterator[None]:
        await shop.insert(1)
        await wait(alarm)
        yield

    async def handler() -> None:
        pass

    alarm, app = Alarm(), FastAPI()
    app.add_api_route("/", handler, dependencies=[Depends(opens)])
    await alarm.request(app, db)
    assert PLACE == alarm.place


async def test_tasks(db: Database) -> None:
    """The task that made the last call is the one that is asked for its place."""

    async def child() -> None:
        await shop.insert(1)
        await wait(alarm)

    async def work() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(child())

    alarm = Alarm()
    await alarm.request(endpoint(work), db)
    assert PLACE == alarm.place


async def test_task_that_has_ended(db: Database) -> None:
    """Where the last caller is gone the request's own task is asked."""

    async def work() -> None:
        await asyncio.create_task(shop.insert(1))
        await wait(alarm)

    alarm = Alarm()
    await alarm.request(endpoint(work), db)
    assert PLACE == alarm.place


async def test_all_tasks_have_ended(db: Database) -> None:
    """A hook's own unit has no task of its own: then nobody can be named."""
    alarm, left = Alarm(), list[Any]()

    async def hook() -> None:
        await asyncio.create_task(shop.insert(2))
        await alarm.rings.wait()

    async def work() -> None:
        uow.after_commit(hook)
        left.append(None)

    await alarm.request(endpoint(work), db)
    assert left
    assert "a task that has ended" == alarm.place


async def test_base_http_middleware(db: Database) -> None:
    """The handler runs in a task of Starlette's; that is found."""

    async def handler(_: Any) -> StreamingResponse:
        await shop.insert(1)
        await wait(alarm)
        return StreamingResponse([])

    async def dispatch(request: Any, call_next: Any) -> Any:
        return await call_next(request)

    alarm = Alarm()
    app = Starlette(routes=[Route("/", handler)])
    await alarm.request(BaseHTTPMiddleware(app, dispatch), db)
    assert PLACE == alarm.place


async def test_hook(db: Database) -> None:
    """A `before_commit` hook that waits is named as well."""

    async def work() -> None:
        await shop.insert(1)
        uow.before_commit(wait, alarm)

    alarm = Alarm()
    await alarm.request(endpoint(work), db)
    assert PLACE == alarm.place


async def test_thread(db: Database) -> None:
    """Of a task that waits for nothing of the user's, the innermost line is told."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session = uow.current_session()
        await asyncio.create_task(session.execute(shop.COUNT))
        await asyncio.to_thread(rings.wait)  # thread
        await respond(send)

    class Rings:
        def wait(self) -> None:
            asyncio.run_coroutine_threadsafe(alarm.rings.wait(), loop).result()

    alarm, rings, loop = Alarm(), Rings(), asyncio.get_running_loop()
    await alarm.request(app, db)
    assert alarm.place.startswith(line_of(app, "thread"))


async def test_block(db: Database, caplog: pytest.LogCaptureFixture) -> None:
    """Outside of requests the log warns after a second, and says what to do."""
    warned = asyncio.Event()
    listening = Listening(warned)
    logging.getLogger("asgi_uow").addHandler(listening)
    try:
        async with db:
            await shop.insert(1)
            await warned.wait()
    finally:
        logging.getLogger("asgi_uow").removeHandler(listening)
    [record] = caplog.records
    assert "WARNING" == record.levelname
    assert "was held for 1.0 s while nothing was executed" in caplog.text
    assert f"waiting at {__file__}" in caplog.text
    assert "how-to `Slow calls`" in caplog.text


class Listening(logging.Handler):
    """Says that something was logged."""

    def __init__(self, event: asyncio.Event) -> None:
        super().__init__()
        self._event = event

    def emit(self, record: logging.LogRecord) -> None:
        assert logging.WARNING == record.levelno
        self._event.set()


async def test_session_from_a_thread(db: Database) -> None:
    """A dependency that is no coroutine function asks for the session in a thread."""

    def depends() -> uow.Session:
        return uow.current_session()

    async def handler(session: Any = Depends(depends)) -> None:  # noqa: B008
        await session.execute(shop.COUNT)
        await wait(alarm)

    alarm, app = Alarm(), FastAPI()
    app.add_api_route("/", handler)
    await alarm.request(app, db)
    assert PLACE == alarm.place


class Compiled:
    """Stands for a coroutine that is no Python function's: it shows no frames."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self.send = coroutine.send


ABSTRACT: Any = Coroutine
ABSTRACT.register(Compiled)


async def test_coroutine_without_frames(db: Database) -> None:
    """Where nothing can be named, that is said, and other units are told of."""
    alarm, other = Alarm(), Alarm()
    async with memory_database() as clock:
        work = functools.partial(hold, alarm)
        hidden: Any = Compiled(alarm.request(endpoint(work), db))
        task = asyncio.Task(hidden)
        await other.request(endpoint(functools.partial(hold, other)), clock)
        await task
    assert "a coroutine that shows no frames" == alarm.place
    assert PLACE == other.place


def watches() -> list[Watch]:
    """Give those that the timer of this loop still looks at."""
    timer = timers._here.timer()
    found = () if timer is None else [each() for each in timer.limited]
    return [each for each in found if isinstance(each, Watch)]


@pytest.mark.filterwarnings(*CLOSED)
async def test_lost_task(db: Database) -> None:
    """A task that nobody refers to is not kept alive to be looked after."""

    async def wait_for_ever() -> None:
        async with db:
            uow.current_session()
            begun.set()
            await asyncio.get_running_loop().create_future()

    begun, loop = asyncio.Event(), asyncio.get_running_loop()
    told: list[Any] = []
    loop.set_exception_handler(lambda _, about: told.append(about))
    lost = weakref.ref(asyncio.create_task(wait_for_ever()))
    await begun.wait()
    gc.collect()
    assert lost() is None
    await pass_by()
    assert not watches()
    assert told  # asyncio tells of such a task
    told.clear()
    gc.collect()  # the block of that task too


@on("asyncmy", "asyncpg", "aiosqlite", read_isolation="REPEATABLE READ")
async def test_snapshot(db: Database) -> None:
    """A snapshot that is held is a transaction, too."""

    async def work() -> None:
        await uow.current_read_session().execute(shop.COUNT)
        await wait(alarm)

    alarm = Alarm()
    await alarm.request(endpoint(work), db)
    assert PLACE == alarm.place


@on(*DRIVERS)
async def test_sandbox(db: Database) -> None:
    """In a test's sandbox it is told as well: its connection is looked at the same."""
    alarm = Alarm()
    async with sandbox(db):
        await alarm.request(endpoint(functools.partial(hold, alarm)), db)
    assert PLACE == alarm.place


async def test_look_that_fails(db: Database) -> None:
    """What one look raises is the loop's to tell, and other units are looked after."""
    broken, alarm, told = Alarm(), Alarm(), list[Any]()
    asyncio.get_running_loop().set_exception_handler(lambda _, it: told.append(it))

    async def work() -> None:
        await shop.insert(1)
        [connection] = uow.current_session().sync_session.connections
        connection.sent = "never"  # type: ignore[attr-defined]
        async with memory_database() as clock:
            await alarm.request(endpoint(functools.partial(hold, alarm)), clock)

    await broken.request(endpoint(work), db)
    assert PLACE == alarm.place
    assert [TypeError] == [type(each["exception"]) for each in told]
    assert [] == broken.of(HeldIdle)


# No alarm


async def pass_by(times: int = 2) -> None:
    """Let more than `SECONDS` pass, so often; another unit has a watch, and tells."""
    async with memory_database() as clock:
        for _ in range(times):
            alarm = Alarm()
            await alarm.request(endpoint(functools.partial(hold, alarm)), clock)


async def hold(alarm: Alarm) -> None:
    await uow.current_session().execute(shop.COUNT)
    await wait(alarm)


@on(*DRIVERS)
@pytest.mark.parametrize("level", [None, "REPEATABLE READ"])
async def test_stream_of_the_read_session(backend: Backend, level: Any) -> None:
    """A client that reads slowly is no alarm: its rows are on their way."""
    await fill(backend)

    async def handler(_: Any) -> StreamingResponse:
        rows = await uow.current_read_session().stream(SELECT)

        async def body() -> AsyncIterator[str]:
            async for row in rows.scalars():
                if row == 1:
                    await pass_by()
                yield f"{row},"

        return StreamingResponse(body())

    db = Database.from_url(backend.url, read_isolation=level)
    alarm, app = Alarm(), Starlette(routes=[Route("/", handler)])
    response = await alarm.request(app, db)
    await db.dispose()
    assert ROWS == len(response.chunks)
    assert [] == alarm.of(HeldIdle)


async def test_reads_hold_nothing(db: Database) -> None:
    """A read session has given its connection back after each call."""

    async def work() -> None:
        await uow.current_read_session().execute(shop.COUNT)
        await pass_by()

    alarm = Alarm()
    await alarm.request(endpoint(work), db)
    assert [] == alarm.of(HeldIdle)


@on("asyncmy", "asyncpg", "psycopg")
@pytest.mark.parametrize("past", [False, True])
async def test_statement_in_flight(
    db: Database, backend: ServerBackend, *, past: bool
) -> None:
    """A slow statement is no idleness, sent by the session or past it."""
    sleep = {"mariadb": "SELECT sleep(60)", "postgresql": "SELECT pg_sleep(60)"}
    sql = text(sleep[backend.name])

    async def work() -> None:
        session = uow.current_session()
        execute: Any = (await session.connection() if past else session).execute
        running = asyncio.create_task(execute(sql))
        await pass_by()
        assert [] == alarm.of(HeldIdle)
        running.cancel()
        await asyncio.wait([running])

    alarm = Alarm()
    await alarm.request(endpoint(work), db)
    assert [] == alarm.of(HeldIdle)


class Base(AsyncAttrs, DeclarativeBase):
    """Has attributes that can be awaited."""


class Product(Base):
    """An item, whose parent is loaded when it is asked for."""

    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    parent: Mapped[int | None] = mapped_column(deferred=True)


@on(*DRIVERS)
@pytest.mark.parametrize("past", ["attributes", "connection"])
async def test_statements_past_the_session(db: Database, past: str) -> None:
    """Attributes that are loaded, and statements on a connection, are work as well."""

    async def work() -> None:
        session = uow.current_session()
        await shop.insert(1)
        connection = await session.connection() if past == "connection" else None
        product = await session.get_one(Product, 1)
        until = time.perf_counter() + 3 * SECONDS
        while time.perf_counter() < until:
            if connection is not None:
                await connection.execute(text(shop.COUNT))
            else:
                session.expire(product, ["parent"])
                await product.awaitable_attrs.parent

    alarm = Alarm()
    response = await alarm.request(endpoint(work), db)
    assert response.error is None
    assert [] == alarm.of(HeldIdle)


async def test_invalidated(db: Database) -> None:
    """A connection that was thrown away is held no more."""

    async def work() -> None:
        await shop.insert(1)
        await (await uow.current_session().connection()).invalidate()
        await pass_by()

    alarm = Alarm()
    await alarm.request(endpoint(work), db)
    assert [] == alarm.of(HeldIdle)


async def test_hook_in_a_thread(db: Database) -> None:
    """A hook that is no coroutine function has a session that nobody looks after."""
    asked: list[uow.Session] = []

    def hook() -> None:
        asked.append(uow.current_session())

    async def work() -> None:
        uow.after_commit(hook)

    alarm = Alarm()
    await alarm.request(endpoint(work), db)
    assert 1 == len(asked)
    assert [] == alarm.of(HeldIdle)


async def test_switched_off(db: Database) -> None:
    """`held_idle=None` has nobody look."""
    alarm = Alarm()

    async def work() -> None:
        await shop.insert(1)
        await pass_by()

    await alarm.request(endpoint(work), db, held_idle=None)
    assert [] == alarm.of(HeldIdle)


async def test_what_ended_is_forgotten(db: Database) -> None:
    """A unit that has ended is not looked after; the timer is one for all."""
    alarm = Alarm()
    for number in range(3):
        await alarm.request(endpoint(functools.partial(shop.insert, number)), db)
    await pass_by()
    assert [] == alarm.of(HeldIdle)
    assert not watches()


async def test_wrong_option(db: Database) -> None:
    """It is seconds above 0."""
    with pytest.raises(ConfigurationError, match="held_idle must be seconds above 0"):
        UnitOfWorkMiddleware(endpoint(pass_by), db, held_idle=0)
