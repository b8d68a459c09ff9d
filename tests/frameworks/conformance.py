"""The facts, each stated once. What a framework calls things is its adapter's."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import itertools
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import httpx
import pytest
from sqlalchemy.pool import QueuePool

from asgi_uow import (
    Database,
    UnitOfWorkMiddleware,
    after_commit,
    current_read_session,
    current_session,
    current_unit_of_work,
    unit_of_work,
)
from asgi_uow.errors import (
    CommitFailedError,
    NoUnitOfWorkError,
    UnitOfWorkClosedError,
)
from asgi_uow.observers import CommitFailed, UnitFinished
from tests.frameworks.driver import BODY, Server
from tests.servers import MariaDBBackend

if TYPE_CHECKING:
    from collections.abc import (
        AsyncGenerator,
        AsyncIterator,
        Awaitable,
        Callable,
        Mapping,
    )

    from sqlalchemy.ext.asyncio import AsyncEngine

    from asgi_uow import Session, UnitOfWork
    from asgi_uow._asgi import ASGIApp, Message
    from asgi_uow.observers import Event
    from tests.frameworks.driver import Exchange
    from tests.servers import Backend

    Handler: TypeAlias = Callable[[], Awaitable["Reply"]]
    SyncHandler: TypeAlias = Callable[[], "Reply"]
    OnMessage: TypeAlias = Callable[[str], Awaitable[str]]
    Fact: TypeAlias = Callable[["Case"], Awaitable[None]]

NONE: Mapping[str, Any] = {}


# What an adapter has to bring


@dataclasses.dataclass(frozen=True)
class Reply:
    """A response: a text or, if given, chunks; `background` runs once it is sent."""

    text: str = ""
    status: int = 200
    headers: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    chunks: AsyncIterator[str] | None = None
    background: Callable[[], Awaitable[None]] | None = None


@dataclasses.dataclass(frozen=True)
class Site:
    """What an application serves, by path; handlers of GET take no argument."""

    routes: Mapping[str, Handler] = dataclasses.field(default_factory=lambda: NONE)
    sync_routes: Mapping[str, SyncHandler] = dataclasses.field(
        default_factory=lambda: NONE
    )
    websockets: Mapping[str, OnMessage] = dataclasses.field(
        default_factory=lambda: NONE
    )
    """Each is called with every message and returns the answer to it."""


class Adapter(Protocol):
    """A framework."""

    # Whether it answers an exception out of `send` with a response of its own.
    @property
    def answers_failures(self) -> bool: ...

    # The middleware as the framework mounts it; without databases there is none.
    def application(
        self, site: Site, *databases: Database, **options: Any
    ) -> ASGIApp: ...

    # The exception that a handler raises for an error response.
    def abort(self, status: int) -> Exception: ...


# What the facts have in common


@dataclasses.dataclass(frozen=True)
class Case:
    """A framework and a database with an empty table `note`."""

    framework: Adapter
    backend: Backend
    db: Database
    events: list[Event] = dataclasses.field(default_factory=list[Any])

    @classmethod
    @asynccontextmanager
    async def prepare(
        cls, framework: Adapter, backend: Backend
    ) -> AsyncGenerator[Case, None]:
        references = "REFERENCES author (id)"
        if not isinstance(backend, MariaDBBackend):
            references += " DEFERRABLE INITIALLY DEFERRED"
        await backend.execute(
            "CREATE TABLE author (id INTEGER PRIMARY KEY)",
            f"CREATE TABLE book (author_id INTEGER {references})",
            "CREATE TABLE note (id INTEGER PRIMARY KEY)",
        )
        db = Database.from_url(backend.url)
        try:
            yield cls(framework, backend, db)
        finally:
            await db.dispose()

    def app(self, site: Site) -> ASGIApp:
        return self.framework.application(
            site, self.db, observers=(self.events.append,)
        )

    @asynccontextmanager
    async def serve(
        self,
        routes: Mapping[str, Handler] = NONE,
        *,
        sync_routes: Mapping[str, SyncHandler] = NONE,
        websockets: Mapping[str, OnMessage] = NONE,
    ) -> AsyncGenerator[Server, None]:
        """Run the application; in the end every connection is back (P7)."""
        async with self.run(self.app(Site(routes, sync_routes, websockets))) as server:
            yield server

    @asynccontextmanager
    async def run(self, app: ASGIApp) -> AsyncGenerator[Server, None]:
        server = Server(app, self.kept)
        async with server.lifespan():
            yield server
            assert 0 == in_use(self.db.engine)
            assert 0 == in_use(self.db.read_engine)
            assert 0 == await self.backend.open_transactions()

    async def kept(self) -> list[object]:
        """Tell which notes the database has, seen through a fresh connection."""
        return [id_ for [id_] in await self.backend.fetch("SELECT id FROM note")]

    async def write_and_break_commit(self) -> None:
        """Write, then have COMMIT fail: a promise unkept, or the connection dead."""
        await write(1)
        if isinstance(self.backend, MariaDBBackend):
            await self.backend.kill_connections()
        else:
            await current_session().execute("INSERT INTO book VALUES (99)")

    async def check_failed(self, exchange: Exchange) -> None:
        """The client has one error response, everybody knows, nothing is kept."""
        lost = isinstance(self.backend, MariaDBBackend)
        expected = 503 if lost and not self.framework.answers_failures else 500
        assert expected == exchange.status
        assert (expected == 503) == ("retry-after" in exchange.headers)
        assert exchange.is_complete
        assert exchange.headers["content-type"]
        assert [[]] == exchange.seen_at_start
        assert [] == await self.kept()
        raised = isinstance(exchange.error, CommitFailedError)
        assert self.framework.answers_failures != raised
        assert [CommitFailed, UnitFinished] == [type(event) for event in self.events]


async def write(note: int) -> None:
    await current_session().execute("INSERT INTO note VALUES (:id)", id=note)


async def count() -> str:
    return str(await current_read_session().scalar("SELECT count(*) FROM note"))


def in_use(engine: AsyncEngine) -> int:
    assert isinstance(engine.pool, QueuePool)
    return engine.pool.checkedout()


def open_in(engine: AsyncEngine) -> int:
    assert isinstance(engine.pool, QueuePool)
    return engine.pool.checkedin() + engine.pool.checkedout()


# The facts

FACTS: list[Fact] = []


def fact(function: Fact) -> Fact:
    FACTS.append(function)
    return function


@fact
async def p1_p4_committed_before_the_start(case: Case) -> None:
    """The row is committed when the start of the response reaches the server."""

    async def create() -> Reply:
        await write(1)
        return Reply("created", 201)

    async with case.serve({"/": create}) as server:
        exchange = await server.request()
    assert 201 == exchange.status
    assert ["created"] == exchange.chunks
    assert [[1]] == exchange.seen_at_start


@fact
async def p2_failed_commit(case: Case) -> None:
    """A failed COMMIT is one error response; no hook and no background task runs."""
    ran: list[str] = []
    done = asyncio.Event()

    async def in_background() -> None:
        ran.append("background")
        done.set()

    def creates(work: Callable[[], Awaitable[None]]) -> Handler:
        async def create() -> Reply:
            after_commit(ran.append, "hook")
            await work()
            return Reply("created", 201, background=in_background)

        return create

    routes = {
        "/broken": creates(case.write_and_break_commit),
        "/whole": creates(lambda: write(1)),
    }
    async with case.serve(routes) as server:
        await case.check_failed(await server.request("/broken"))
        assert [] == ran
        await server.request("/whole")
        await asyncio.wait_for(done.wait(), timeout=5)
    assert ["hook", "background"] == ran


@fact
async def p2_failed_commit_before_a_stream(case: Case) -> None:
    """After a failed COMMIT no step of the response's generator runs."""
    ran: list[str] = []

    async def chunks() -> AsyncIterator[str]:
        ran.append("generator")
        yield "created"

    def creates(work: Callable[[], Awaitable[None]]) -> Handler:
        async def create() -> Reply:
            await work()
            return Reply(chunks=chunks())

        return create

    routes = {
        "/broken": creates(case.write_and_break_commit),
        "/whole": creates(lambda: write(1)),
    }
    async with case.serve(routes) as server:
        await case.check_failed(await server.request("/broken"))
        assert [] == ran
        await server.request("/whole")
    assert ["generator"] == ran


@fact
async def error_response(case: Case) -> None:
    """A 404, returned or raised, keeps nothing and reaches the client unchanged."""

    def site(work: Callable[[], Awaitable[None]]) -> Site:
        async def returned() -> Reply:
            await work()
            return Reply("no such note", 404, {"x-reason": "deleted"})

        async def raised() -> Reply:
            await work()
            raise case.framework.abort(404)

        return Site({"/returned": returned, "/raised": raised})

    async def nothing() -> None:
        pass

    async def responses(app: ASGIApp) -> list[Exchange]:
        async with case.run(app) as server:
            return [await server.request(path) for path in ("/returned", "/raised")]

    expected = await responses(case.framework.application(site(nothing)))
    actual = await responses(case.app(site(lambda: write(1))))
    assert [404, 404] == [exchange.status for exchange in actual]
    assert [each.messages for each in expected] == [each.messages for each in actual]
    assert [[[]], [[]]] == [exchange.seen_at_start for exchange in actual]
    assert [] == await case.kept()


@fact
async def unhandled_exception(case: Case) -> None:
    """An unhandled exception is a 500 and keeps nothing."""

    async def create() -> Reply:
        await write(1)
        message = "a bug"
        raise ZeroDivisionError(message)

    async with case.serve({"/": create}) as server:
        exchange = await server.request()
    assert 500 == exchange.status
    assert exchange.is_complete
    assert [[]] == exchange.seen_at_start
    assert [] == await case.kept()


@fact
async def redirect(case: Case) -> None:
    """A redirect after a form commits."""

    async def create() -> Reply:
        await write(1)
        return Reply(status=303, headers={"location": "/notes"})

    async with case.serve({"/": create}) as server:
        exchange = await server.request()
    assert 303 == exchange.status
    assert "/notes" == exchange.headers["location"]
    assert [[1]] == exchange.seen_at_start


@fact
async def p7_p8_stream(case: Case) -> None:
    """The read session serves a generator; the write session is gone and refuses."""

    async def chunks(session: Session) -> AsyncIterator[str]:
        yield f"{in_use(case.db.engine)} connections in use"
        yield f"{await count()} notes"
        with pytest.raises(UnitOfWorkClosedError, match="async with db:"):
            await session.execute("INSERT INTO note VALUES (2)")
        with pytest.raises(UnitOfWorkClosedError, match="async with db:"):
            current_session()
        yield "refused"

    async def create() -> Reply:
        await write(1)
        return Reply(chunks=chunks(current_session()))

    async with case.serve({"/": create}) as server:
        exchange = await server.request()
    assert 200 == exchange.status
    assert [[1]] == exchange.seen_at_start
    assert ["0 connections in use", "1 notes", "refused"] == exchange.chunks
    assert exchange.is_complete
    assert [1] == await case.kept()


@fact
async def p4_exception_after_the_start(case: Case) -> None:
    """An exception in the middle of a response leaves the commit standing."""

    async def chunks() -> AsyncIterator[str]:
        yield "one"
        message = "a bug"
        raise ZeroDivisionError(message)

    async def create() -> Reply:
        await write(1)
        return Reply(chunks=chunks())

    async with case.serve({"/": create}) as server:
        exchange = await server.request()
    assert 200 == exchange.status
    assert ["one"] == exchange.chunks
    assert not exchange.is_complete
    assert [1] == await case.kept()


@fact
async def p7_p10_client_goes_away(case: Case) -> None:
    """A client that leaves in the middle undoes nothing and leaves nothing open."""
    notes = itertools.count(1)

    async def chunks() -> AsyncIterator[str]:
        yield "one"
        yield await count()

    async def create() -> Reply:
        await write(next(notes))
        return Reply(chunks=chunks())

    def is_first_chunk(message: Message) -> bool:
        return bool(message["type"] == BODY and message["body"] == b"one")

    async with case.serve({"/": create}) as server:
        while_connecting = await server.request(leave_after=is_first_chunk)
        to_the_end = await server.request()
        while_reading = await server.request(leave_after=is_first_chunk)
    assert ["one", "2"] == to_the_end.chunks
    for exchange in (while_connecting, while_reading):
        assert ["one"] == exchange.chunks
        assert exchange.error is None
    assert [1, 2, 3] == await case.kept()
    gc.collect()  # a connection that nobody closed warns now


@fact
async def p9_background_task(case: Case) -> None:
    """A background task has no part in the request's unit; it opens its own."""
    done = asyncio.Event()

    async def in_background() -> None:
        with pytest.raises(UnitOfWorkClosedError, match="async with db:"):
            current_session()
        async with case.db:
            await write(2)
        done.set()

    async def create() -> Reply:
        await write(1)
        return Reply("created", background=in_background)

    async with case.serve({"/": create}) as server:
        exchange = await server.request()
        await asyncio.wait_for(done.wait(), timeout=5)
    assert [[1]] == exchange.seen_at_start
    assert [1, 2] == await case.kept()


@fact
async def p9_concurrent_requests(case: Case) -> None:
    """Of two requests at once each has a session and a fate of its own."""
    sessions: list[Session] = []
    both = asyncio.Barrier(2)

    def writes(note: int, status: int) -> Handler:
        async def create() -> Reply:
            sessions.append(current_session())
            await both.wait()
            await write(note)
            return Reply(status=status)

        return create

    routes = {"/1": writes(1, 201), "/2": writes(2, 409)}
    async with case.serve(routes) as server:
        exchanges = await asyncio.gather(*map(server.request, routes))
    assert [201, 409] == [exchange.status for exchange in exchanges]
    assert sessions[0] is not sessions[1]
    assert [1] == await case.kept()


@fact
async def p9_nested_request(case: Case) -> None:
    """A request made in-process by a handler has a unit and a fate of its own."""
    units: list[UnitOfWork] = []

    async def inner() -> Reply:
        units.append(current_unit_of_work())
        await write(1)
        return Reply("inner", 201)

    async def outer() -> Reply:
        units.append(current_unit_of_work())
        transport = httpx.ASGITransport(server.app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://server"
        ) as client:
            response = await client.get("/inner")
        units.append(current_unit_of_work())
        await write(2)
        return Reply(response.text, 404)

    async with case.serve({"/inner": inner, "/outer": outer}) as server:
        exchange = await server.request("/outer")
    assert 404 == exchange.status
    assert ["inner"] == exchange.chunks
    assert [1] == await case.kept()
    before, nested, after = units
    assert before is after
    assert before is not nested


@fact
async def p12_untouched(case: Case) -> None:
    """A request that does not touch the database opens no connection."""

    async def health() -> Reply:
        return Reply("fine")

    async with case.serve({"/": health}) as server:
        exchange = await server.request()
        assert 0 == open_in(case.db.engine)
        assert 0 == open_in(case.db.read_engine)
    assert 200 == exchange.status
    assert [] == case.events


@fact
async def mounted_twice(case: Case) -> None:
    """Inside another middleware for the same database this one passes through."""
    ran: list[str] = []

    async def create() -> Reply:
        after_commit(ran.append, "hook")
        await write(1)
        return Reply("created", 201)

    app = UnitOfWorkMiddleware(
        case.app(Site({"/": create})), case.db, observers=(case.events.append,)
    )
    async with case.run(app) as server:
        exchange = await server.request()
    assert 201 == exchange.status
    assert [[1]] == exchange.seen_at_start
    assert ["hook"] == ran
    assert [UnitFinished] == [type(event) for event in case.events]


@fact
async def sync_handler(case: Case) -> None:
    """A handler that is not async registers hooks like any other."""
    ran: list[str] = []

    def create() -> Reply:
        after_commit(ran.append, "hook")
        return Reply("created", 201)

    async with case.serve(sync_routes={"/": create}) as server:
        exchange = await server.request()
    assert 201 == exchange.status
    assert ["hook"] == ran


@fact
async def websocket(case: Case) -> None:
    """A websocket has no unit, whatever context it starts in; a message has one."""

    async def on_message(text: str) -> str:
        with pytest.raises(NoUnitOfWorkError, match="async with db:"):
            current_unit_of_work()
        async with case.db:
            await write(int(text))
            return await count()

    async with (
        case.serve(websockets={"/ws": on_message}) as server,
        unit_of_work(case.db),
    ):
        answers = await server.websocket(["1", "2"])
    assert ["1", "2"] == answers
    assert [1, 2] == await case.kept()


@fact
async def shutdown(case: Case) -> None:
    """The engines that `from_url` made are closed when the application shuts down."""

    async def create() -> Reply:
        await write(1)
        return Reply(chunks=chunks())

    async def chunks() -> AsyncIterator[str]:
        yield await count()

    async with case.serve({"/": create}) as server:
        exchange = await server.request()
        assert 1 == open_in(case.db.engine)
        assert 1 == open_in(case.db.read_engine)
    assert ["1"] == exchange.chunks
    assert 0 == open_in(case.db.engine)
    assert 0 == open_in(case.db.read_engine)
