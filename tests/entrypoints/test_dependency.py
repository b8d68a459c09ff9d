"""The session where a framework injects it: FastAPI's `Depends`."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Annotated, Any, assert_type

import pytest
from fastapi import Depends, FastAPI
from httpx import ASGITransport, AsyncClient
from sqlalchemy.ext.asyncio import AsyncSession

from asgi_uow import (
    Database,
    Session,
    UnitOfWorkMiddleware,
    current_read_session,
    current_session,
    read_session_dependency,
    session_dependency,
)
from asgi_uow.errors import NoUnitOfWorkError
from tests.support import shop

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from httpx import Response
    from sqlalchemy.ext.asyncio import AsyncEngine

    from tests.servers import SQLiteBackend

Writer = Annotated[AsyncSession, Depends(session_dependency)]
Reader = Annotated[Session, Depends(read_session_dependency)]
Uncached = Annotated[AsyncSession, Depends(session_dependency, use_cache=False)]


async def repository(session: Writer) -> AsyncSession:
    return session


Repository = Annotated[AsyncSession, Depends(repository)]


def place() -> tuple[int, asyncio.Task[Any] | None]:
    return threading.get_ident(), asyncio.current_task()


class WatchedDatabase(Database):
    """Notes in which thread and task its sessions ask for their engines."""

    places: list[tuple[int, asyncio.Task[Any] | None]]

    @property
    def engine(self) -> AsyncEngine:
        self.places.append(place())
        return super().engine

    @engine.setter
    def engine(self, engine: AsyncEngine) -> None:
        vars(Database.__mro__[1])["engine"].fset(self, engine)

    @property
    def read_engine(self) -> AsyncEngine:
        self.places.append(place())
        return super().read_engine


@pytest.fixture
async def db(sqlite: SQLiteBackend) -> AsyncIterator[WatchedDatabase]:
    await shop.create(sqlite)
    db = WatchedDatabase(None)
    db.places = []
    db.engine = Database.from_url(sqlite.url).engine
    async with db:  # what is asked for once
        assert db.write is not db.read
    db.places = []
    yield db
    await db.dispose()


@pytest.fixture
def app(db: Database) -> FastAPI:
    app = FastAPI()
    app.add_middleware(UnitOfWorkMiddleware, db)
    return app


async def get(app: FastAPI, path: str = "/") -> Response:
    """Send a request; the application runs in the caller's task."""
    transport = ASGITransport(app)
    async with AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.get(path)


async def test_it_runs_in_the_task_of_the_request(
    app: FastAPI, db: WatchedDatabase
) -> None:
    """Neither dependency needs a worker thread or a task of its own."""

    @app.get("/")
    async def show(_: Writer, __: Reader) -> None: ...

    await get(app)
    assert [place(), place()] == db.places


async def test_the_session_is_that_of_the_request(
    app: FastAPI, sqlite: SQLiteBackend
) -> None:
    """What is written on an injected session is kept with the request."""
    same: list[bool] = []

    @app.get("/", status_code=201)
    async def create(writer: Writer, reader: Reader) -> None:
        same.append(writer is current_session())
        same.append(reader is current_read_session())
        writer.add(shop.Item(id=1))

    assert 201 == (await get(app)).status_code
    assert [True, True] == same
    assert [1] == await shop.items(sqlite)


async def test_each_request_has_its_own(app: FastAPI) -> None:
    """Of two requests each is given a session of its own."""
    sessions: list[AsyncSession] = []

    @app.get("/")
    async def show(writer: Writer, reader: Reader) -> None:
        sessions.extend((writer, reader))

    await get(app)
    await get(app)
    assert 4 == len(set(sessions))


async def test_the_cache_of_dependencies(app: FastAPI, db: WatchedDatabase) -> None:
    """A session that several dependencies ask for is one, cached or not."""
    same: list[bool] = []

    @app.get("/")
    async def show(first: Repository, second: Writer, third: Uncached) -> None:
        same.append(first is second is third)

    await get(app)
    assert [True] == same
    assert 1 == len(db.places)


async def test_it_adds_no_parameter(app: FastAPI) -> None:
    """The schema shows the handler's own parameters only."""

    @app.get("/")
    async def show(_: Writer, __: Reader, page: int = 1) -> None: ...

    operation = (await get(app, "/openapi.json")).json()["paths"]["/"]["get"]
    assert ["page"] == [each["name"] for each in operation["parameters"]]
    assert "requestBody" not in operation


async def test_its_type(db: Database) -> None:
    """For type checkers it gives the `Session` that `current_session` gives."""
    async with db:
        assert_type(await session_dependency(), Session)
        assert_type(await read_session_dependency(), Session)


@pytest.mark.parametrize(
    ("dependency", "name"),
    [
        (session_dependency, "current_session"),
        (read_session_dependency, "current_read_session"),
    ],
)
async def test_without_a_unit(dependency: Any, name: str) -> None:
    """Without the middleware it says which function found no unit of work."""
    with pytest.raises(NoUnitOfWorkError, match=rf"^{name}\(\)"):
        await dependency()
