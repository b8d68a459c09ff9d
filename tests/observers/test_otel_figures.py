"""What OpenTelemetry's SDK is really given: figures of units, and of pools."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from anyio import to_thread
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

import asgi_uow as uow
from asgi_uow import Database, Idempotency, UnitOfWorkMiddleware
from asgi_uow.observers import Event, HeldIdle, UnitFinished, UnitStarted
from asgi_uow.otel import OpenTelemetryObserver
from tests.servers.backend import eventually
from tests.support.asgi import BODY, START, Client, endpoint, handle, respond, serve
from tests.support.conflicts import conflict, conflicting_shop
from tests.support.databases import DATABASES, on, shop_database
from tests.support.keys import create_table
from tests.support.observer import Events
from tests.support.private import derive_engine
from tests.support.shop import insert
from tests.support.telemetry import CONNECTION, Telemetry, pool_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.util.types import AttributeValue

    from asgi_uow._asgi import Receive, Scope, Send
    from tests.servers import Backend, PostgreSQLBackend, SQLiteBackend

pytestmark = on("aiosqlite")

WAIT = f"{CONNECTION}wait_time"
IDLE = "asgi_uow.connection.idle"
SECRET = "hunter2-of-ann"


async def insert_one() -> None:
    await insert(1)


def attributes(telemetry: Telemetry) -> list[dict[str, AttributeValue]]:
    """Give those of the spans of units, by the time of their start."""
    spans = [each for each in telemetry.spans if each.name == "unit of work"]
    return [dict(each.attributes or {}) for each in spans]


# What a unit did


@on(*DATABASES)
async def test_figures(db: Database, telemetry: Telemetry) -> None:
    """A unit's span has the figures that its event has."""
    events = Events()

    async def work() -> None:
        await uow.current_session().execute("SELECT 1")
        await insert(1)
        uow.before_commit(insert, 2)
        uow.after_commit(asyncio.sleep, 0)

    await handle(work, db, observers=[telemetry.observer, events])
    [span] = attributes(telemetry)
    told = events.only(UnitFinished)
    expected = {
        "http.request.method": "GET",
        "asgi_uow.path": "/",
        "asgi_uow.statement.count": 3,
        "asgi_uow.statement.seconds": told.statements.seconds,
        "asgi_uow.statement.slowest": told.statements.slowest,
        "asgi_uow.connection.waited": told.waited,
        "asgi_uow.connection.held": told.held,
        "asgi_uow.connection.idle": told.idle,
        "asgi_uow.hook.count": 2,
        "asgi_uow.hook.seconds": told.hook_seconds,
    }
    database = {name for name in span if name.startswith(("db.", "server."))}
    rest = {"asgi_uow.outcome", "asgi_uow.databases", *database}
    assert expected == {name: span[name] for name in span.keys() - rest}
    assert 0 < told.statements.slowest < told.statements.seconds < told.held
    assert 0 < told.waited
    assert 0 < told.hook_seconds


async def test_template_and_unknown_method(db: Database, telemetry: Telemetry) -> None:
    """The path is the template if the framework tells it; a method may be any word."""
    app = UnitOfWorkMiddleware(endpoint(insert_one), db, observers=[telemetry.observer])
    scope: Any = {"method": "PURGE", "path_template": "/items/{id}"}
    await Client(app).request("/items/5", **scope)
    [span] = attributes(telemetry)
    assert "/items/{id}" == span["asgi_uow.path"]
    assert "_OTHER" == span["http.request.method"]
    assert "PURGE" == span["http.request.method_original"]


def test_outside_of_requests(telemetry: Telemetry) -> None:
    """A unit that is for no request has neither path nor method."""
    unit = Telemetry()  # any object
    telemetry.observer(UnitStarted(unit=unit))
    ended = uow.Outcome.COMMITTED, None, None, (), 0.0
    telemetry.observer(UnitFinished(*ended, unit=unit))
    [span] = attributes(telemetry)
    assert [] == [name for name in span if "http." in name or "path" in name]


async def test_attempt(backend: Backend, telemetry: Telemetry) -> None:
    """Of a request that was done again the later attempts are numbered."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if uow.current_unit_of_work().attempt == 1:
            await conflict(backend)
        await insert(1)
        await respond(send)

    async with conflicting_shop(backend) as db:
        retry, observers = uow.Retry(backoff=0), [telemetry.observer]
        middleware = UnitOfWorkMiddleware(app, db, retry=retry, observers=observers)
        response = await Client(middleware).request()
    assert 200 == response.status
    numbers = [each.get("asgi_uow.attempt") for each in attributes(telemetry)]
    assert [None, 2] == numbers


async def test_replayed(db: Database, backend: Backend, telemetry: Telemetry) -> None:
    """A request whose key was used before says so."""
    await create_table(backend)
    app, keys, observers = endpoint(insert_one), Idempotency(), [telemetry.observer]
    client = Client(
        UnitOfWorkMiddleware(app, db, idempotency=keys, observers=observers)
    )
    headers = [(b"idempotency-key", b"key")]
    for _ in range(2):
        response = await client.request(method="POST", headers=headers)
        assert 200 == response.status
    replayed = [each.get("asgi_uow.replayed") for each in attributes(telemetry)]
    assert [None, True] == replayed


# Connections that are held idle


class Told(Events):
    """Keeps what it is told, and lets go on who waits for a `HeldIdle`."""

    def __init__(self) -> None:
        self._held = asyncio.Event()

    def __call__(self, event: Event, /) -> None:
        self.append(event)
        if isinstance(event, HeldIdle):
            self._held.set()

    async def wait(self) -> None:
        await self._held.wait()


async def test_held_idle(db: Database, telemetry: Telemetry) -> None:
    """It is an event of the unit's span, with the place and the seconds."""
    told = Told()

    async def work() -> None:
        await insert(1)
        await told.wait()

    await handle(work, db, observers=[telemetry.observer, told], held_idle=0.01)
    held = told.only(HeldIdle)
    span = telemetry.span("unit of work")
    [event] = span.events
    assert ("asgi_uow.connection.held_idle", held.at) == (event.name, event.timestamp)
    expected = {
        "asgi_uow.connection.idle": held.seconds,
        "asgi_uow.connection.place": held.place,
        "asgi_uow.databases": (db.name,),
    }
    assert expected.items() <= dict(event.attributes or {}).items()
    assert 0.01 <= held.seconds <= float(str((span.attributes or {})[IDLE]))


@on("aiosqlite", read_isolation="REPEATABLE READ")
async def test_held_idle_after_the_outcome(
    db: Database, telemetry: Telemetry, caplog: pytest.LogCaptureFixture
) -> None:
    """A span that has ended is left as it is, and nothing is complained of."""
    told = Told()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await uow.current_read_session().execute("SELECT 1")
        await send({"type": START, "status": 200, "headers": []})
        await told.wait()
        await send({"type": BODY, "body": b"rows"})

    await serve(app, db, observers=[telemetry.observer, told], held_idle=0.01)
    assert told.only(UnitFinished).at < told.only(HeldIdle).at
    assert () == telemetry.span("unit of work").events
    assert [] == caplog.records


# The wait for a connection


@on(*DATABASES)
async def test_wait_time(db: Database, telemetry: Telemetry) -> None:
    """A write session that had a connection waited for it once; reads do not count."""

    async def work() -> None:
        await uow.current_read_session().execute("SELECT 1")
        await insert(1)
        await insert(2)

    await telemetry.handle(work, db)
    about = {f"{CONNECTION}pool.name": pool_name(db.name), "asgi_uow.access": "write"}
    assert [(about, 1)] == telemetry.metrics[WAIT]


@on("aiosqlite", pool_size=1, max_overflow=0, pool_timeout=0.01)
async def test_wait_in_vain(db: Database, telemetry: Telemetry) -> None:
    """One that got no connection says nothing of how long it takes to get one."""

    async def work() -> None:
        await insert(1)
        assert 503 == (await telemetry.handle(insert_one, db)).status

    assert 200 == (await handle(work, db)).status
    assert WAIT not in telemetry.metrics
    [span] = attributes(telemetry)
    assert (0, 0.0) == (span["asgi_uow.statement.count"], span[IDLE])
    assert 0.01 <= float(str(span["asgi_uow.connection.waited"]))


# Pools


def gauges(idle: int, used: int, waiting: int = 0, most: int = 1) -> dict[str, float]:
    """What is to be seen of a pool without overflow."""
    counts = {"idle": idle, "used": used, "pending_requests": waiting}
    return {**counts, "idle.max": most, "max": most}


@on(*DATABASES, pool_size=1, max_overflow=0)
async def test_pool(db: Database, telemetry: Telemetry) -> None:
    """While a connection is held, while one waits for it, and when both are over."""
    held, over = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        await insert(1)
        held.set()
        await over.wait()

    async def waiting() -> float:
        return telemetry.pool(db.name)["pending_requests"]

    assert gauges(0, 0) == telemetry.pool(db.name)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(handle(hold, db))
        await held.wait()
        assert gauges(0, 1) == telemetry.pool(db.name)
        tasks.create_task(handle(lambda: insert(2), db))
        await eventually(1.0, waiting)
        assert gauges(0, 1, waiting=1) == telemetry.pool(db.name)
        over.set()
    assert gauges(1, 0) == telemetry.pool(db.name)
    await db.dispose()
    assert {} == telemetry.pool(db.name)


@on(*DATABASES, pool_size=1, max_overflow=0)
async def test_pool_of_reads(db: Database, telemetry: Telemetry) -> None:
    """The read engine has a pool of its own, and a name for it."""

    async def work() -> None:
        rows = await uow.current_read_session().stream("SELECT 1")
        assert gauges(0, 1) == telemetry.pool(db.name, "read")
        await rows.close()
        assert gauges(1, 0) == telemetry.pool(db.name, "read")

    assert 200 == (await handle(work, db)).status
    assert 0 == telemetry.pool(db.name)["idle"]


@pytest.mark.parametrize(
    ("size", "overflow", "expected"),
    [
        (2, 3, {"idle.max": 2, "max": 5}),
        (2, -1, {"idle.max": 2}),
        (0, 0, {}),
    ],
)
async def test_limits(
    backend: Backend,
    telemetry: Telemetry,
    size: int,
    overflow: int,
    expected: Mapping[str, float],
) -> None:
    """What has no limit is left out."""
    limits: Any = {"pool_size": size, "max_overflow": overflow}
    async with shop_database(backend, **limits) as db:
        await handle(insert_one, db)
        pool = telemetry.pool(db.name)
    assert {"idle": 1, "used": 0, "pending_requests": 0, **expected} == pool


async def test_names(postgresql: PostgreSQLBackend, telemetry: Telemetry) -> None:
    """A pool is named after its server, with no user and no password."""
    url = postgresql.url.replace("postgres@", f"postgres:{SECRET}@")
    async with shop_database(postgresql, url, read_urls=[url]) as db:

        async def work() -> None:
            await uow.current_read_session().execute("SELECT 1")
            await insert(1)

        await handle(work, db)
        name = pool_name(url)
        points = telemetry.metrics[f"{CONNECTION}max"]
    names = [str(about[f"{CONNECTION}pool.name"]) for about, _ in points]
    assert sorted([name, f"{name} read"]) == sorted(
        each for each in names if each.startswith(name)
    )
    assert SECRET not in str(points)


@on("aiosqlite", pool_size=1, max_overflow=0)
async def test_loops(db: Database, telemetry: Telemetry) -> None:
    """The pools of several loops are added up; that of a closed loop is no more."""
    seen: list[dict[str, float]] = []

    async def work() -> None:
        await handle(lambda: insert(2), db)
        seen.append(telemetry.pool(db.name))

    await handle(insert_one, db)
    await to_thread.run_sync(lambda: asyncio.run(work()))
    assert [gauges(2, 0, most=2)] == seen
    assert gauges(1, 0) == telemetry.pool(db.name)


async def test_in_memory(telemetry: Telemetry) -> None:
    """An in-memory database has its one connection whatever becomes of the loop."""
    db = Database.from_url("sqlite+aiosqlite:///:memory:")
    await to_thread.run_sync(lambda: asyncio.run(read_in_memory(db)))
    assert gauges(1, 0) == telemetry.pool(db.name)
    async with db:
        await db.write.execute("SELECT 1")
        assert gauges(0, 1) == telemetry.pool(db.name)
    await db.dispose()
    assert {} == telemetry.pool(db.name)


async def read_in_memory(db: Database) -> None:
    async with db:
        await db.read.execute("SELECT 1")


@on("aiosqlite", poolclass=NullPool)
async def test_no_counts(db: Database, telemetry: Telemetry) -> None:
    """A pool that counts nothing is left out; its waits and uses are told."""
    await telemetry.handle(insert_one, db)
    assert {} == telemetry.pool(db.name)
    assert {f"{CONNECTION}use_time", WAIT} <= telemetry.metrics.keys()


@on("aiosqlite", pool_size=1, max_overflow=0)
async def test_closed_under_a_connection(db: Database, telemetry: Telemetry) -> None:
    """What comes back to a pool that was closed meanwhile is no less than none."""

    async def work() -> None:
        await insert(1)
        db.engine.sync_engine.pool.dispose()

    assert 200 == (await handle(work, db)).status
    assert 0 == telemetry.pool(db.name)["used"]


@on("asyncpg", pool_size=1, max_overflow=0)
async def test_connections_beside(db: Database, telemetry: Telemetry) -> None:
    """What is connected beside the pools, to stop a statement, is in none of them."""
    aside = derive_engine(db.engine)
    async with aside.connect():
        assert gauges(0, 0) == telemetry.pool(db.name)
    await aside.dispose()


async def test_two_observers(
    backend: Backend, telemetry: Telemetry, caplog: pytest.LogCaptureFixture
) -> None:
    """Two applications with an observer each count a pool once."""
    OpenTelemetryObserver(telemetry.traces, telemetry.meters)
    async with shop_database(backend, pool_size=1, max_overflow=0) as db:
        await handle(insert_one, db)
        assert gauges(1, 0) == telemetry.pool(db.name)
    assert [] == caplog.records


# The thread of an exporter


async def test_looking_makes_nothing(
    sqlite: SQLiteBackend, telemetry: Telemetry
) -> None:
    """What only the loop of a pool may make is not made by who looks at it."""
    engine = create_async_engine(sqlite.url, pool_size=1, max_overflow=0)
    Database(engine)
    before = vars(engine.pool._pool).copy()  # type: ignore[attr-defined]
    assert gauges(0, 0) == telemetry.pool(sqlite.url)
    assert before == vars(engine.pool._pool)  # type: ignore[attr-defined]


async def test_keeps_no_engine(sqlite: SQLiteBackend, telemetry: Telemetry) -> None:
    """An engine that nobody uses any more is gone, and its pool with it."""
    db = Database.from_url(sqlite.url)
    async with db:
        await db.write.execute("SELECT 1")
    engine = weakref.ref(db.engine.sync_engine)
    assert {} != telemetry.pool(sqlite.url)
    await db.dispose()
    del db

    async def is_gone() -> bool:
        gc.collect()
        return engine() is None

    await eventually(expected=True, probe=is_gone)


async def test_looking_meanwhile(
    sqlite: SQLiteBackend, telemetry: Telemetry, caplog: pytest.LogCaptureFixture
) -> None:
    """A thread looks while loops come and go, and engines are made and forgotten."""
    over = threading.Event()
    looks = 0

    def look() -> None:
        nonlocal looks
        while not over.is_set():
            _ = telemetry.metrics
            looks += 1

    def make() -> None:
        while not over.is_set():
            Database.from_url(sqlite.url)

    def come_and_go() -> None:
        for _ in range(20):
            asyncio.run(use())

    async def use() -> None:
        async with db:
            await db.read.execute("SELECT 1")

    db = Database.from_url(sqlite.url)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        others = [
            asyncio.create_task(to_thread.run_sync(each)) for each in (look, make)
        ]
        await asyncio.gather(*(to_thread.run_sync(come_and_go) for _ in range(3)))
    finally:
        over.set()
        sys.setswitchinterval(interval)
    await asyncio.gather(*others)
    assert looks
    assert [] == caplog.records
