"""P11: several tasks of a request on one session take turns, or are refused."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import os
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from litestar import Litestar, get
from litestar.di import NamedDependency, Provide
from quart import Quart
from sqlalchemy import exc as sa_exc
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncAttrs
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    foreign,
    mapped_column,
    relationship,
    remote,
    selectinload,
)
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import StreamingResponse
from starlette.routing import Route

import asgi_uow as uow
from asgi_uow import Database
from asgi_uow.errors import ConcurrentUseError, DoomedError, UnitOfWorkClosedError
from tests.servers import eventually
from tests.support import shop
from tests.support.asgi import BODY, Client, Handler, handle, respond, serve
from tests.support.databases import (
    DRIVERS,
    SERVERS,
    behind_proxy,
    checked_out,
    on,
    shop_database,
)
from tests.support.private import State

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from starlette.middleware.base import RequestResponseEndpoint
    from starlette.requests import Request
    from starlette.responses import Response

    from asgi_uow import Session
    from asgi_uow._asgi import Message, Receive, Scope, Send
    from tests.servers import Backend, ServerBackend

RUNS = min(100, int(os.environ.get("ASGI_UOW_RUNS", "10")))
"""Of every test; the soak environment runs all 100."""

SECONDS = 10.0
"""For one request of a few milliseconds: whatever takes longer hangs."""

TEN = range(10)
THOUSAND = range(1, 1001)

Given = NamedDependency[int]


@pytest.fixture(autouse=True)
def _nothing_lost(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No connection is left to the garbage collector."""
    yield
    gc.collect()
    assert [] == [
        record.getMessage()
        for record in caplog.get_records("call")
        if record.name.startswith("sqlalchemy") and record.levelno > logging.INFO
    ]


@pytest.fixture
async def numbers(backend: Backend) -> AsyncIterator[Database]:
    """A database with a thousand rows."""
    async with shop_database(backend) as db:
        values = ", ".join(f"({number})" for number in THOUSAND)
        await backend.execute(f"INSERT INTO items (id) VALUES {values}")
        yield db


async def many_times(db: Database, one: Callable[[int], Awaitable[None]]) -> None:
    """Do `one` again and again; each has its time, and leaves nothing behind."""
    for run in range(RUNS):
        async with asyncio.timeout(SECONDS):
            await one(run)
        assert [0, 0] == checked_out(db)


async def succeed(handler: Handler, db: Database) -> None:
    """Send a request that is answered with a success."""
    response = await handle(handler, db)
    assert response.error is None
    assert 200 == response.status


async def count() -> int:
    found: int = await uow.current_session().scalar("SELECT count(*) FROM items")
    return found


# Tasks of one request


async def test_gather(db: Database, backend: Backend) -> None:
    """Ten statements at once on one session, the first of which connects."""

    async def one(run: int) -> None:
        async def handler() -> None:
            await asyncio.gather(*(shop.insert(10 * run + i) for i in TEN))

        await succeed(handler, db)

    await many_times(db, one)
    assert list(range(10 * RUNS)) == await shop.items(backend)


async def test_gather_on_the_read_session(db: Database) -> None:
    """Ten reads at once have one session, one connection and the right answers."""

    async def one(run: int) -> None:
        sessions = set()

        async def read(number: int) -> int:
            session = uow.current_read_session()
            sessions.add(session)
            answer = await session.scalar(f"SELECT {number}")
            assert checked_out(db) in ([0, 0], [0, 1])
            return int(answer)

        async def handler() -> None:
            assert [*TEN] == await asyncio.gather(*map(read, TEN))

        await succeed(handler, db)
        assert 1 == len(sessions)

    await many_times(db, one)


async def test_reads_that_move_to_the_writer(db: Database, backend: Backend) -> None:
    """Reads and writes at once: reads go to the writer's transaction meanwhile."""

    async def one(run: int) -> None:
        async def read() -> object:
            return await uow.current_read_session().scalar("SELECT count(*) FROM items")

        async def write(number: int) -> object:
            await shop.insert(10 * run + number)
            return await read()

        async def handler() -> None:
            calls = (write(i) if i % 2 else read() for i in TEN)
            answers = await asyncio.gather(*calls)
            assert set(answers) <= {5 * run + i for i in range(6)}
            assert 5 * run + 5 == await read()

        await succeed(handler, db)

    await many_times(db, one)
    assert 5 * RUNS == len(await shop.items(backend))


async def test_task_group(db: Database, backend: Backend) -> None:
    """Ten children of a TaskGroup write and read what they wrote."""

    async def one(run: int) -> None:
        async def child(number: int) -> None:
            await shop.insert(number)
            found = await uow.current_session().scalar(
                "SELECT id FROM items WHERE id = :id", id=number
            )
            assert number == found

        async def handler() -> None:
            async with asyncio.TaskGroup() as group:
                for i in TEN:
                    group.create_task(child(10 * run + i))

        await succeed(handler, db)

    await many_times(db, one)
    assert list(range(10 * RUNS)) == await shop.items(backend)


async def test_gather_in_which_one_fails(db: Database, backend: Backend) -> None:
    """The failure leaves the request; the others finish or hear why they cannot."""

    async def one(run: int) -> None:
        tasks: list[asyncio.Task[None]] = []

        async def handler() -> None:
            numbers = [1, 2, 3, 4, 4, 5, 6, 7, 8, 9]
            tasks.extend(asyncio.create_task(shop.insert(each)) for each in numbers)
            await asyncio.gather(*tasks)

        response = await handle(handler, db)
        assert isinstance(response.error, sa_exc.IntegrityError)
        assert [] == response.messages
        await asyncio.wait(tasks)
        errors = [task.exception() for task in tasks]
        assert [None] * 4 == errors[:4]
        assert errors[4] is response.error
        for error in errors[5:]:
            # PostgreSQL refuses what comes between the failure and the rollback.
            assert isinstance(error, UnitOfWorkClosedError | sa_exc.DBAPIError | None)

    await many_times(db, one)
    assert [] == await shop.items(backend)
    assert 0 == await backend.open_transactions()


async def test_task_that_outlives_the_request(db: Database, backend: Backend) -> None:
    """It may be in the middle of a statement at the end, and is then refused."""

    async def one(run: int) -> None:
        written: list[int] = []
        busy = asyncio.Event()

        async def write() -> None:
            while True:
                number = 100 * run + len(written)
                await shop.insert(number)
                written.append(number)
                busy.set()

        async def read() -> None:
            while True:
                await uow.current_read_session().scalar("SELECT count(*) FROM items")

        tasks: list[asyncio.Task[None]] = []

        async def handler() -> None:
            tasks.extend(map(asyncio.create_task, (write(), read())))
            await busy.wait()

        await succeed(handler, db)
        for task in tasks:
            with pytest.raises(UnitOfWorkClosedError, match="async with db:"):
                await task
        kept.extend(written)

    kept: list[int] = []
    await many_times(db, one)
    assert kept == await shop.items(backend)


# The end and a statement in flight


@on(*SERVERS)
@pytest.mark.parametrize("status", [200, 404])
async def test_end_waits_for_the_statement_in_flight(
    backend: ServerBackend, status: int
) -> None:
    """COMMIT, or ROLLBACK, comes after the answer to another task's statement."""
    units: list[uow.UnitOfWork] = []
    inserts: list[asyncio.Task[None]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        units.append(uow.current_unit_of_work())
        await uow.current_session().execute("SELECT 1")
        inserts.append(asyncio.create_task(shop.insert(1)))
        await hold.answered.wait()
        await respond(send, status)

    async def state() -> State:
        return units[0].state

    async with behind_proxy(backend) as (db, proxy):
        hold = proxy.hold_answer(lambda trip: trip.startswith("INSERT"))
        task = asyncio.create_task(serve(app, db))
        ending = State.COMMITTING if status == 200 else State.ROLLING_BACK
        async with asyncio.timeout(SECONDS):
            await hold.answered.wait()
            await eventually(ending, state)
        assert proxy.trips[-1].startswith("INSERT")
        hold.release()
        async with asyncio.timeout(SECONDS):
            response = await task
        await inserts[0]
        assert status == response.status
        assert ("COMMIT" if status == 200 else "ROLLBACK") == proxy.trips[-1]
        assert ([1] if status == 200 else []) == await shop.items(backend)
        assert [0, 0] == checked_out(db)


@on(*SERVERS)
async def test_statement_in_flight_that_fails(backend: ServerBackend) -> None:
    """P2: it is not too late for an error to doom the unit when the end waits."""
    fired: list[str] = []
    units: list[uow.UnitOfWork] = []
    inserts: list[asyncio.Task[None]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        units.append(uow.current_unit_of_work())
        uow.after_commit(fired.append, "commit")
        uow.after_rollback(fired.append, "rollback")
        await shop.insert(2)
        inserts.append(asyncio.create_task(shop.insert(1)))
        await hold.answered.wait()
        await respond(send)

    async def state() -> State:
        return units[0].state

    async with backend.proxy() as proxy, shop_database(backend):
        await backend.execute("INSERT INTO items (id) VALUES (1)")
        db = Database.from_url(backend.through(proxy.port))
        seen: list[str] = []

        def second_insert(trip: str) -> bool:
            seen.extend([trip] * trip.startswith("INSERT"))
            return len(seen) == 2

        hold = proxy.hold_answer(second_insert)
        task = asyncio.create_task(serve(app, db))
        async with asyncio.timeout(SECONDS):
            await hold.answered.wait()
            await eventually(State.COMMITTING, state)
        hold.release()
        async with asyncio.timeout(SECONDS):
            response = await task
        with pytest.raises(sa_exc.IntegrityError):
            await inserts[0]
        kept = await shop.items(backend)
        if backend.name == "postgresql":
            assert 500 == response.status
            assert isinstance(response.error, DoomedError)
            assert uow.Outcome.ROLLED_BACK is units[0].outcome
            assert ["rollback"] == fired
            assert [1] == kept
        else:
            assert response.error is None
            assert 200 == response.status
            assert ["commit"] == fired
            assert [1, 2] == kept


# Streams


@on(*DRIVERS)
async def test_statement_beside_a_stream(numbers: Database, backend: Backend) -> None:
    """MariaDB can do nothing beside a stream and says so; the others can."""
    alone = backend.name == "mariadb"

    async def handler() -> None:
        await shop.insert(1001)
        session = uow.current_session()
        stream = await session.stream_scalars("SELECT id FROM items ORDER BY id")
        assert 1 == await anext(stream)
        if alone:
            for use in (shop.insert(0), count(), session.flush()):
                with pytest.raises(ConcurrentUseError, match="close"):
                    await use
        else:
            await shop.insert(0)
        assert [*range(2, 1002)] == [each async for each in stream]
        assert 1001 + (not alone) == await count()

    await succeed(handler, numbers)

    assert 1001 + (not alone) == len(await shop.items(backend))
    assert [0, 0] == checked_out(numbers)


class Base(AsyncAttrs, DeclarativeBase):
    """Mapped to the shop."""


class Item(Base):
    """An item that is its own twin, which has to be loaded."""

    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    twins: Mapped[list[Item]] = relationship(
        primaryjoin=lambda: Item.id == remote(foreign(Item.id)), viewonly=True
    )


@on(*DRIVERS)
@pytest.mark.parametrize("name", ["read", "write"])
async def test_loading_beside_a_stream(
    numbers: Database, backend: Backend, name: str
) -> None:
    """What the ORM loads by itself comes in between as well, and costs no rows."""
    items = select(Item).order_by(Item.id).execution_options(yield_per=10)
    async with numbers:
        session: Session = getattr(numbers, name)
        stream = await session.stream_scalars(items)
        item = await anext(stream)
        if backend.name == "mariadb":
            with pytest.raises(ConcurrentUseError, match="close"):
                await item.awaitable_attrs.twins
        else:
            assert [item] == await item.awaitable_attrs.twins
        assert 999 == len([each async for each in stream])

        stream = await session.stream_scalars(items.options(selectinload(Item.twins)))
        if backend.name == "mariadb":
            with pytest.raises(ConcurrentUseError, match="close"):
                await anext(stream)
            await stream.close()
        else:
            assert 1000 == len([each.twins[0] async for each in stream])
        assert 1000 == await session.scalar("SELECT count(*) FROM items")
    assert [0, 0] == checked_out(numbers)


@on(*DRIVERS)
async def test_streams_read_by_several_tasks(numbers: Database) -> None:
    """Right rows, or a clear error where only one stream can be open."""
    rows = [*range(1, 101)]

    async def one(run: int) -> None:
        async def read() -> list[int]:
            stream = await uow.current_read_session().stream_scalars(
                "SELECT id FROM items WHERE id <= 100 ORDER BY id"
            )
            return [each async for each in stream]

        async def handler() -> None:
            reads = (read() for _ in range(3))
            answers = await asyncio.gather(*reads, return_exceptions=True)
            for each in answers:
                assert isinstance(each, ConcurrentUseError) or each == rows
            assert rows in answers

        await succeed(handler, numbers)

    await many_times(numbers, one)


@on(*DRIVERS)
@pytest.mark.parametrize("write", [False, True])
async def test_stream_nobody_reads_to_its_end(
    numbers: Database, backend: Backend, write: bool
) -> None:
    """What is left open when the response starts, or ends, poisons no connection."""

    async def one(run: int) -> None:
        async def handler() -> None:
            if write:
                await shop.insert(2000 + run)
            session = uow.current_session() if write else uow.current_read_session()
            stream = await session.stream("SELECT id FROM items")
            assert await stream.fetchone()

        await succeed(handler, numbers)

    await many_times(numbers, one)
    assert 1000 + RUNS * write == len(await shop.items(backend))
    assert 0 == await backend.open_transactions()


# Frameworks


class Old(Client):
    """A server of a spec with which Starlette listens for the client's end."""

    spec_version = "2.3"


class PassOn(BaseHTTPMiddleware):
    """Starlette's middleware base, which runs the application in another task."""

    async def dispatch(
        self, request: Request, call_next: RequestResponseEndpoint
    ) -> Response:
        return await call_next(request)


@pytest.mark.parametrize("around", [False, True])
async def test_base_http_middleware(
    db: Database, backend: Backend, around: bool
) -> None:
    """A stream begins before, beside or after the commit; nothing is lost.

    Inside of us BaseHTTPMiddleware runs the generator before the response starts:
    what it writes then is committed, what it writes later is refused.
    """
    kept: list[int] = []

    async def rows(run: int) -> AsyncIterator[str]:
        for i in range(3):
            try:
                await shop.insert(10 * run + i + 1)
            except UnitOfWorkClosedError:
                yield "refused "
            else:
                kept.append(10 * run + i + 1)
                yield "written "
            found = await uow.current_read_session().scalar(
                "SELECT count(*) FROM items"
            )
            yield f"{found >= len(kept)} "

    async def one(run: int) -> None:
        async def handler(_: Request) -> StreamingResponse:
            kept.append(10 * run)
            await shop.insert(10 * run)
            return StreamingResponse(rows(run))

        ours = Middleware(uow.UnitOfWorkMiddleware, db)
        theirs = Middleware(PassOn)
        app = Starlette(
            routes=[Route("/", handler)],
            middleware=[theirs, ours] if around else [ours, theirs],
        )
        response = await Old(app).request()
        assert (200, None) == (response.status, response.error)
        assert response.is_complete
        assert ["True "] * 3 == response.chunks[1::2]

    await many_times(db, one)
    assert kept == await shop.items(backend)


async def test_litestar_dependencies(db: Database, backend: Backend) -> None:
    """Dependencies that Litestar resolves side by side share the session."""
    numbers = iter(range(4 * RUNS))

    def writer() -> Provide:
        async def write() -> int:
            number = next(numbers)
            await shop.insert(number)
            return number

        return Provide(write)

    async def read() -> int:
        return int(await uow.current_read_session().scalar("SELECT 7"))

    @get("/")
    async def handler(a: Given, b: Given, c: Given, d: Given, e: Given) -> str:
        assert e == 7
        for number in (a, b, c, d):
            assert number == await uow.current_session().scalar(
                "SELECT id FROM items WHERE id = :id", id=number
            )
        return "ok"

    writers = {name: writer() for name in "abcd"}
    dependencies = {**writers, "e": Provide(read)}
    litestar = Litestar([handler], dependencies=dependencies, logging_config=None)
    app = uow.UnitOfWorkMiddleware(litestar, db)

    async def one(run: int) -> None:
        response = await Old(app).request()
        assert (200, None) == (response.status, response.error)

    await many_times(db, one)
    assert [*range(4 * RUNS)] == await shop.items(backend)


async def test_quart_background_task(db: Database, backend: Backend) -> None:
    """It starts beside the handler; what it wrote is kept, then it hears of the end."""
    kept: list[int] = []
    refused: list[int] = []
    quart = Quart(__name__)

    async def background(run: int) -> None:
        with suppress(UnitOfWorkClosedError):
            numbers = itertools.count(1000 * run + 1)
            while True:
                number = next(numbers)
                # Whether one gets in before the decision is the machine's to say.
                kept.extend(number for _ in await asyncio.gather(shop.insert(number)))
        refused.append(run)

    def is_end(message: Message) -> bool:
        return message["type"] == BODY and not message["more_body"]

    @quart.get("/<int:run>")
    async def handler(run: int) -> str:
        quart.add_background_task(background, run)
        await shop.insert(1000 * run)
        kept.append(1000 * run)
        return "ok"

    client = Old(uow.UnitOfWorkMiddleware(quart, db))

    async def one(run: int) -> None:
        response = await client.request(f"/{run}", leave_after=is_end)
        assert (200, None) == (response.status, response.error)
        await asyncio.gather(*quart.background_tasks)

    await many_times(db, one)
    assert sorted(kept) == await shop.items(backend)
    assert [*range(RUNS)] == refused
