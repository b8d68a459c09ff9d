"""The budget table of docs/read-and-write.md, measured."""

from __future__ import annotations

import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_uow import (
    Database,
    UnitOfWorkMiddleware,
    current_read_session,
    current_session,
)
from asgi_uow.errors import ReadOnlySessionError
from asgi_uow.observers import ConnectionReleased
from tests.servers import ServerBackend
from tests.support import ROOT, shop
from tests.support.asgi import BODY, START, endpoint, request, serve
from tests.support.databases import DRIVERS, SERVERS, checked_out, on
from tests.support.shop import Item

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from asgi_uow._asgi import Receive, Scope, Send
    from tests.servers import Backend

PAGE = ROOT / "docs" / "read-and-write.md"
HEAD = ["The request", "asyncmy", "asyncpg", "psycopg", "aiosqlite"]
SELECT = "SELECT id FROM items"


# What a request does


async def nothing() -> None:
    current_session()
    current_read_session()


async def select() -> None:
    await current_read_session().execute(SELECT)


async def get() -> None:
    assert await current_read_session().get(Item, 1)


async def select_twice() -> None:
    await select()
    await select()


async def stream() -> None:
    rows = await current_read_session().stream_scalars(SELECT)
    assert [1] == await rows.all()


async def insert() -> None:
    await current_session().execute("INSERT INTO items (id) VALUES (2)")


async def insert_and_select() -> None:
    await insert()
    await select()


async def insert_in_savepoint() -> None:
    async with current_session().begin_nested():
        await insert()


async def select_to_write() -> None:
    await current_session().execute(SELECT)


async def be_refused() -> None:
    with pytest.raises(ReadOnlySessionError):
        await current_read_session().execute("INSERT INTO items (id) VALUES (2)")


REQUESTS: dict[str, tuple[Callable[[], Awaitable[None]], int]] = {
    "uses no session": (nothing, 200),
    "one `SELECT`, read session": (select, 200),
    "`get()`, read session": (get, 200),
    "two `SELECT`, read session": (select_twice, 200),
    "`stream()`, read session": (stream, 200),
    "one `SELECT`, write session": (select_to_write, 200),
    "one `INSERT`": (insert, 200),
    "one `INSERT`, then a `SELECT` on the read session": (insert_and_select, 200),
    "one `INSERT` in a savepoint": (insert_in_savepoint, 200),
    "one `INSERT`, the response is a 404": (insert, 404),
    "one `INSERT` on the read session, refused": (be_refused, 200),
}


def documented(driver: str) -> dict[str, str]:
    """The rows of the table whose head is ours, and the column of a driver."""
    lines = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in re.findall(r"^\|.+\|$", PAGE.read_text("utf-8"), re.MULTILINE)
    ]
    start = lines.index(HEAD) + 2
    rows = lines[start : start + len(REQUESTS)]
    return {row[0]: row[HEAD.index(driver)] for row in rows}


def cell(trips: list[str]) -> str:
    """Name the trips by their first words, as the table does."""
    words = " ".join(trip.split(maxsplit=1)[0] for trip in trips)
    return f"{len(trips)} {words}".strip()


@asynccontextmanager
async def watched(backend: Backend) -> AsyncGenerator[tuple[Database, list[str]]]:
    """A database with one connection per pool, and what is sent to it.

    SQLite is no server: there it is what SQLite itself was told to execute.
    """
    if isinstance(backend, ServerBackend):
        async with backend.proxy() as proxy:
            url = backend.through(proxy.port)
            yield Database.from_url(url, pool_size=1, max_overflow=0), proxy.trips
    else:
        db = Database.from_url(backend.url, pool_size=1, max_overflow=0)
        statements: list[str] = []
        async with db:
            for session in (db.read, db.write):
                connection = await session.connection()
                raw: Any = (await connection.get_raw_connection()).driver_connection
                await raw.set_trace_callback(statements.append)
        yield db, statements


@on(*DRIVERS)
async def test_round_trips(backend: Backend) -> None:
    """Each request sends what the table says and nothing more."""
    await shop.create(backend)
    await backend.execute("INSERT INTO items (id) VALUES (1)")
    measured = {}
    for name, (handler, status) in REQUESTS.items():
        async with watched(backend) as (db, trips):
            app = UnitOfWorkMiddleware(endpoint(handler, status), db)
            for _ in range(2):  # the first connects and prepares
                await backend.execute("DELETE FROM items WHERE id > 1")
                trips.clear()
                response = await request(app)
                assert response.error is None
            measured[name] = cell(trips)
            await db.dispose()
    assert documented(backend.driver) == measured


@on(*SERVERS)
async def test_two_phase_reads(backend: ServerBackend) -> None:
    """Sessions that commit in two phases cost a read nothing."""
    async with backend.proxy() as proxy:
        engine = create_async_engine(backend.through(proxy.port))
        db = Database(engine, twophase=True)
        for _ in range(2):
            proxy.clear()
            async with db:
                await db.read.execute("SELECT 1")
        assert ["SELECT 1"] == proxy.trips
        await db.dispose()


# Who holds a connection, and until when


@pytest.mark.parametrize(
    ("handler", "before", "after", "released"),
    [
        (nothing, [0, 0], [0, 0], []),
        (select, [0, 0], [0, 0], ["read"]),
        (insert, [1, 0], [0, 0], ["write"]),
        (insert_and_select, [1, 0], [0, 0], ["write"]),
    ],
)
async def test_connections_held(
    db: Database,
    handler: Callable[[], Awaitable[None]],
    before: list[int],
    after: list[int],
    released: list[str],
) -> None:
    """A writer's connection is back before the start leaves, a reader's at once."""
    counts = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await handler()
        counts.append(checked_out(db))
        await send({"type": START, "status": 200, "headers": []})
        counts.append(checked_out(db))
        await send({"type": BODY, "body": b""})

    response = await serve(app, db)

    assert [before, after] == counts
    assert [0, 0] == checked_out(db)
    releases = response.events.of(ConnectionReleased)
    assert released == [each.access for each in releases]
