"""A framework on a database: what the facts have in common."""

from __future__ import annotations

import dataclasses
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from sqlalchemy.pool import QueuePool

from asgi_uow import Database, current_read_session, current_session
from asgi_uow.errors import CommitFailedError
from asgi_uow.observers import CommitFailed, UnitFinished
from tests.integration.frameworks.driver import Server
from tests.integration.frameworks.site import NONE, Site
from tests.servers import MariaDBBackend, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping

    from sqlalchemy.ext.asyncio import AsyncEngine

    from asgi_uow._asgi import ASGIApp
    from asgi_uow.observers import Event
    from tests.integration.frameworks.site import Adapter, Handler, Reply
    from tests.servers import Backend
    from tests.support.asgi import Response

    Check: TypeAlias = Callable[["Case"], Awaitable[None]]

# When asyncpg asks for TLS and is cancelled, a future of its own is left with an error
# that nobody retrieves, and asyncio reports it.
CONNECT_ARGS = {"asyncpg": {"ssl": False}}


@dataclasses.dataclass(frozen=True)
class Fact:
    """What has to be so; `of_database`: on each of them, one is not enough."""

    check: Check
    of_database: bool

    @property
    def name(self) -> str:
        return self.check.__name__

    @property
    def sentence(self) -> str:
        assert self.check.__doc__ is not None
        return self.check.__doc__

    async def hold(self, framework: Adapter, backend: Backend) -> None:
        """Raise unless it is so."""
        async with Case.prepare(framework, backend) as case:
            await self.check(case)


FACTS: list[Fact] = []


def fact(check: Check) -> Check:
    """State a fact about what frameworks do."""
    FACTS.append(Fact(check, of_database=False))
    return check


def database_fact(check: Check) -> Check:
    """State a fact about what databases do."""
    FACTS.append(Fact(check, of_database=True))
    return check


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
        connect_args = CONNECT_ARGS.get(backend.driver, {})
        db = Database.from_url(backend.url, connect_args=connect_args)
        try:
            yield cls(framework, backend, db)
        finally:
            await db.dispose()

    def app(self, site: Site, **options: Any) -> ASGIApp:
        return self.framework.application(
            site, self.db, observers=(self.events.append,), **options
        )

    @asynccontextmanager
    async def serve(
        self, routes: Mapping[str, Handler] = NONE, **others: Any
    ) -> AsyncGenerator[Server, None]:
        """Run an application with these routes and other parts of a site."""
        async with self.run(self.app(Site(routes, **others))) as server:
            yield server

    @asynccontextmanager
    async def run(self, app: ASGIApp) -> AsyncGenerator[Server, None]:
        """Run the application; in the end every connection is back (P7)."""
        server = Server(app, self.kept)
        has_lifespan = self.framework.has_lifespan
        async with server.lifespan() if has_lifespan else server.no_lifespan():
            yield server
            assert 0 == in_use(self.db.engine)
            assert 0 == in_use(self.db.read_engine)
            # SQLite: a lock was seen once that was gone a moment later.
            within = 5.0 if self.backend.name == "sqlite" else 0.0
            await eventually(0, self.backend.open_transactions, within=within)

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

    async def check_failed(self, exchange: Response) -> None:
        """The client has one error response, everybody knows, nothing is kept."""
        lost = isinstance(self.backend, MariaDBBackend)
        expected = 503 if lost and not self.framework.answers_failures else 500
        assert expected == exchange.status
        assert (expected == 503) == ("retry-after" in exchange.headers)
        assert exchange.is_complete
        assert exchange.headers["content-type"]
        await self.check_rolled_back(exchange)

    async def check_rolled_back(self, exchange: Response) -> None:
        """Everybody knows that the commit failed, nothing is kept."""
        assert [[]] == exchange.seen
        assert [] == await self.kept()
        raised = CommitFailedError in [type(each) for each in causes(exchange.error)]
        assert self.framework.answers_failures != raised
        assert [CommitFailed, UnitFinished] == self.ends()

    def ends(self) -> list[type]:
        """Tell how units ended, without how they came to that."""
        kinds = [type(event) for event in self.events]
        return [kind for kind in kinds if kind in {CommitFailed, UnitFinished}]


def causes(error: BaseException | None) -> list[BaseException]:
    """List an exception, what it was raised from, and so on."""
    return [] if error is None else [error, *causes(error.__cause__)]


def creating(
    work: Callable[[], Awaitable[object]], reply: Callable[[], Reply]
) -> Handler:
    """Make a handler that does some work and then answers."""

    async def create() -> Reply:
        await work()
        return reply()

    return create


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
