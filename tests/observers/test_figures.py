"""What `UnitFinished` says of statements, waits, hooks, and whose request it was."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from litestar import Litestar, get
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

import asgi_uow as uow
from asgi_uow import Database, Retry, UnitOfWorkMiddleware, unit_of_work
from asgi_uow._unit import options
from asgi_uow.observers import CommitFailed, LoggingObserver, UnitClosed, UnitFinished
from tests.support import shop
from tests.support.asgi import Client, Response, endpoint, handle, http_scope, respond
from tests.support.conflicts import conflict, conflicting_shop
from tests.support.databases import DRIVERS, memory_database, on, shop_database
from tests.support.keys import Shop, create_table
from tests.support.observer import Events

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.requests import Request

    from asgi_uow._asgi import ASGIApp, Receive, Scope, Send
    from asgi_uow.observers import Event, Usage
    from tests.servers import Backend

pytestmark = on("aiosqlite")

NAP = 0.2  # seconds that a database takes over a statement
MORE = 0.15  # seconds that a loaded machine may add
SQL = {
    "sqlite": "SELECT nap({})",
    "mariadb": "SELECT sleep({})",
    "postgresql": "SELECT pg_sleep({})",
}


TEXT = "SELECT order.user \nFROM order \nWHERE order.user = ?"


def nap(backend: Backend, seconds: float = NAP) -> str:
    """Give a statement that the database takes some time over."""
    return SQL[backend.name].format(seconds)


def teach_to_nap(db: Database) -> None:
    """Have SQLite know how to."""
    for each in {db.engine, *db.readers} if db.engine.dialect.name == "sqlite" else ():
        event.listen(each.sync_engine, "connect", _teach)


def _teach(dbapi: Any, _: object) -> None:
    dbapi.create_function("nap", 1, time.sleep)


def usages(response: Response) -> dict[str, Usage]:
    """Give what one unit did, by access."""
    return {each.access: each for each in response.events.only(UnitFinished).usage}


def is_about(seconds: float, expected: float) -> bool:
    return 0.9 * expected <= seconds < expected + MORE


# Statements


@on(*DRIVERS)
async def test_statements_are_counted(db: Database) -> None:
    """Those of reads and writes, failed ones and savepoints; BEGIN and COMMIT are none.

    What is read once the unit has written is in the writer's transaction, and its.
    """

    async def work() -> None:
        read, session = uow.current_read_session(), uow.current_session()
        await read.execute(shop.COUNT)
        await shop.insert(1)
        await session.execute("INSERT INTO items (id) VALUES (:id)", [{"id": 2}])
        with pytest.raises(DBAPIError):
            async with session.begin_nested():
                await shop.insert(1)
        await read.execute(shop.COUNT)

    response = await handle(work, db)
    assert {1: "read", 6: "write"} == {
        each.statements.count: each.access for each in usages(response).values()
    }
    ended = response.events.only(UnitFinished)
    assert 7 == ended.statements.count
    assert 0 < ended.statements.slowest < ended.statements.seconds < ended.seconds
    assert {db.name} == {each.database for each in ended.usage}


async def test_what_is_not_the_users_is_not_counted(backend: Backend) -> None:
    """`on_begin` and keys have statements of their own, and resolving has one."""
    await create_table(backend)

    async def prepare(session: Any) -> None:
        await session.execute("SELECT 1")

    options: Any = {"on_begin": prepare, "resolve_unknown": True}
    async with shop_database(backend, **options) as db:
        shelf = Shop(db)
        first = await shelf.post()
        assert 201 == first.status
        repeated = await shelf.post()
        assert 201 == repeated.status
    ends = shelf.events.of(UnitFinished)
    assert [(1, False), (0, True)] == [
        (each.statements.count, each.replayed) for each in ends
    ]


async def test_a_unit_around_and_a_hook_count_for_themselves(
    db: Database, tmp_path: Any
) -> None:
    """Each unit has its own statements; a database of its own is named."""
    other = Database.from_url(f"sqlite:///{tmp_path}/other.db")

    async def work() -> None:
        await shop.insert(1)
        async with unit_of_work(other) as inner:
            await inner.session().execute("SELECT 1")
            await inner.session().execute("SELECT 2")
        uow.after_commit(shop.insert, 2)

    response = await handle(work, db)
    await other.dispose()
    ends = response.events.of(UnitFinished)
    found = [(each.databases, each.statements.count) for each in ends]
    assert [((other.name,), 2), ((db.name,), 1), ((db.name,), 1)] == found
    assert {("GET", "/")} == {(each.method, each.path) for each in ends}


@on(*DRIVERS)
async def test_flushed_objects(db: Database, inspected: Events) -> None:
    """What the ORM sends by itself is counted, and its wait for a connection."""

    async def work() -> None:
        uow.current_session().add(shop.Item(id=1))

    await handle(work, db, observers=())
    assert ["connection", "INSERT", "commit"] == kinds(inspected.only(UnitClosed))
    assert 1 == inspected.only(UnitFinished).statements.count
    assert 0 < inspected.only(UnitFinished).waited


async def test_quoted_names(db: Database, inspected: Events) -> None:
    """A name that SQLAlchemy has to quote leaves its statement to read."""
    order = sa.table("order", sa.column("user"))

    async def work() -> None:
        await uow.current_session().execute('CREATE TABLE "order" ("user" TEXT)')
        await uow.current_session().execute(sa.select(order).where(order.c.user == "x"))

    await handle(work, db, observers=(), status=404)
    texts = [each.text for each in inspected.only(UnitClosed).timeline]
    assert ["", "CREATE TABLE", TEXT, ""] == texts


@on(*DRIVERS)
async def test_known_seconds(db: Database, backend: Backend) -> None:
    """Two statements of known length, a wait for something else, a hook: all told."""
    teach_to_nap(db)

    async def work() -> None:
        session = uow.current_session()
        await shop.insert(1)
        await uow.current_read_session().execute(nap(backend))
        await session.execute(nap(backend, 2 * NAP))
        await asyncio.wait_for(asyncio.Event().wait(), 2 * NAP)

    async def patient() -> None:
        with pytest.raises(TimeoutError):
            await work()
        uow.after_commit(asyncio.sleep, NAP)
        uow.before_commit(asyncio.sleep, 0)

    response = await handle(patient, db)
    ended = response.events.only(UnitFinished)
    assert 3 == ended.statements.count
    assert is_about(ended.statements.seconds, 3 * NAP)
    assert is_about(ended.statements.slowest, 2 * NAP)
    assert is_about(ended.idle, 2 * NAP)
    assert is_about(ended.held, 5 * NAP)
    assert is_about(ended.hook_seconds, NAP)
    assert 2 == ended.hooks
    assert ended.waited < MORE


@on(*DRIVERS)
async def test_seconds_past_the_session(db: Database, backend: Backend) -> None:
    """What a connection executes by itself is no idleness; what is in between, is."""
    teach_to_nap(db)

    async def work() -> None:
        connection = await uow.current_session().connection()
        for _ in range(2):
            await connection.execute(text(nap(backend)))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.Event().wait(), NAP)

    ended = (await handle(work, db)).events.only(UnitFinished)
    assert 2 == ended.statements.count
    assert is_about(ended.idle, 2 * NAP)
    assert is_about(ended.held, 4 * NAP)


async def test_hooks_before_the_commit_alone(db: Database) -> None:
    """They count, whether or not other hooks are left to run."""

    async def work() -> None:
        uow.before_commit(shop.insert, 1)
        uow.before_commit(asyncio.sleep, 0)

    assert 2 == (await handle(work, db)).events.only(UnitFinished).hooks


@on(*DRIVERS)
async def test_waits_for_a_connection(backend: Backend) -> None:
    """A request that waits for the pool's only connection says for how long."""
    async with shop_database(backend, pool_size=1, max_overflow=0) as db:
        teach_to_nap(db)
        is_held = asyncio.Event()

        async def hold() -> None:
            async with db:
                await shop.insert(1, db)
                is_held.set()
                await db.write.execute(nap(backend))

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(hold())
            await is_held.wait()
            async with unit_of_work(db, independent=True):
                began = time.perf_counter()
                response = await handle(lambda: shop.insert(2), db)
                seconds = time.perf_counter() - began
    ended = response.events.only(UnitFinished)
    assert 0.9 * NAP <= ended.waited
    assert ended.waited + ended.held <= seconds, "the wait is not held time, too"


async def test_waits_in_vain(backend: Backend) -> None:
    """The wait that ended with the pool's timeout is told, too."""
    async with shop_database(
        backend, pool_size=1, max_overflow=0, pool_timeout=NAP
    ) as db:
        async with db.engine.connect():
            response = await handle(lambda: shop.insert(1), db)
        assert isinstance(response.error, PoolTimeoutError)
    [usage] = response.events.only(UnitFinished).usage
    assert is_about(usage.waited, NAP)
    assert (0, 0.0) == (usage.statements.count, usage.held)


async def test_parallel_reads_are_one_usage(db: Database) -> None:
    """Read sessions of several tasks are told together."""

    async def read() -> None:
        async with uow.parallel_read() as session:
            await session.execute(shop.COUNT)

    async def work() -> None:
        await asyncio.gather(read(), read())

    found = usages(await handle(work, db))
    assert 2 == found["read"].statements.count


async def test_attempts(backend: Backend) -> None:
    """What is told of a request that was replayed says which attempt it is about."""
    events = Events()

    async def work() -> None:
        if uow.current_unit_of_work().attempt == 1:
            await conflict(backend)
        await uow.current_session().execute("SELECT 1")

    async with conflicting_shop(backend) as db:
        retry = Retry(methods=("GET",), backoff=0)
        app = UnitOfWorkMiddleware(endpoint(work), db, retry=retry, observers=[events])
        assert 200 == (await Client(app).request()).status
    assert [1, 2] == [each.attempt for each in events.of(UnitFinished)]


# Nobody asks


async def test_nothing_is_noted_where_nobody_asks(
    db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """With the default observer no session has a record; at DEBUG, it has."""
    found: list[Any] = []

    async def work() -> None:
        await shop.insert(1)
        sync: Any = uow.current_session().sync_session
        found.append(sync.record)

    await handle(work, db, status=404, observers=[LoggingObserver()])
    with caplog.at_level("DEBUG", "asgi_uow"):
        await handle(work, db, status=404, observers=[LoggingObserver()])
    assert found[0] is None
    assert found[1].statements.count == 1


# The request


async def answer(_: Request) -> PlainTextResponse:
    await shop.insert(1)
    return PlainTextResponse("no", 409)


def starlette() -> ASGIApp:
    route = Route("/items/{item_id}", answer)
    return Starlette(routes=[Mount("/shop", routes=[route]), Mount("/raw", raw)])


def fastapi() -> ASGIApp:
    app = FastAPI()
    inner = FastAPI()

    async def handler() -> None:
        await shop.insert(1)

    inner.add_api_route("/items/{item_id}", handler)
    app.mount("/shop", inner)
    return app


def litestar() -> ASGIApp:
    @get("/shop/items/{item_id:str}")
    async def handler() -> None:
        await shop.insert(1)

    return Litestar([handler])


async def raw(_: Scope, __: Receive, send: Send) -> None:
    await shop.insert(1)
    await respond(send, 409)


@pytest.mark.parametrize(
    ("make", "asked", "told"),
    [
        (starlette, "/shop/items/7", "/shop/items/{item_id}"),
        (starlette, "/raw/items/7", "/raw/items/7"),
        (fastapi, "/shop/items/7", "/shop/items/{item_id}"),
        (litestar, "/shop/items/7", "/shop/items/{item_id}"),
        (lambda: raw, "/shop/items/7", "/shop/items/7"),
    ],
)
@pytest.mark.parametrize("root", ["", "/proxy"])
async def test_path(db: Database, make: Any, asked: str, told: str, root: str) -> None:
    """The path is the route's template where the framework tells it, without a query.

    A prefix that a proxy takes away is no part of it.
    """
    events = Events()
    app = UnitOfWorkMiddleware(make(), db, observers=[events])
    query = b"token=secret"
    await Client(app).request(root + asked, root_path=root, query_string=query)
    ended = events.only(UnitFinished)
    assert "GET" == ended.method
    assert (ended.path or "").removeprefix(root) == told


async def test_outside_of_requests(
    db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """A block has no request; its log line says so."""
    with caplog.at_level("DEBUG", "asgi_uow"):
        async with db:
            await shop.insert(1)
    assert "(outside of requests, cause" in caplog.text


async def test_the_line_of_a_failed_unit(
    db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """One record names request, outcome, cause and code; the path cannot end a line."""
    app = UnitOfWorkMiddleware(endpoint(shop.insert_orphan), db)
    await Client(app).request("/a\nERROR forged")
    [record] = [each for each in caplog.records if each.name == "asgi_uow"]
    about = "GET '/a\\nERROR forged', rolled back, cause commit_failed, driver code "
    expected = f"unit of work not kept: {about}SQLITE_CONSTRAINT_FOREIGNKEY"
    assert expected == record.getMessage()
    assert 'File "' not in str(record.exc_text)


async def test_no_line_is_forged(
    db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither can a method, or the reason that somebody was given."""
    caplog.set_level("DEBUG", "asgi_uow")

    async def work() -> None:
        uow.set_rollback_only("no\nERROR forged")
        uow.current_session()

    app = UnitOfWorkMiddleware(endpoint(work), db)
    await Client(app).request(method="GET\nERROR forged")
    [record] = [each for each in caplog.records if each.name == "asgi_uow"]
    assert r"('GET\nERROR forged' /, cause: explicit, " in record.getMessage()
    assert r"reason: 'no\nERROR forged'," in record.getMessage()


async def test_a_failed_commit_names_the_request(db: Database) -> None:
    """So does the event for error trackers."""
    failed = (await handle(shop.insert_orphan, db)).events.only(CommitFailed)
    assert ("GET", "/") == (failed.method, failed.path)


# Server-Timing


def timings(response: Response) -> dict[str, float]:
    parts = response.headers["server-timing"].split(", ")
    pairs = (part.split(";dur=") for part in parts)
    return {name: float(milliseconds) / 1000 for name, milliseconds in pairs}


async def test_server_timing(db: Database, backend: Backend) -> None:
    """The header says in milliseconds what pool, database, COMMIT and hooks took."""
    teach_to_nap(db)

    async def work() -> None:
        await uow.current_session().execute(nap(backend))
        uow.after_commit(asyncio.sleep, NAP)

    response = await handle(work, db, observers=(), server_timing=True)
    found = timings(response)
    assert ["pool", "db", "commit", "hooks"] == [*found]
    assert is_about(found["db"], NAP)
    assert is_about(found["hooks"], NAP)
    assert 0 < found["commit"] < MORE


async def test_no_server_timing(db: Database) -> None:
    """There is none unless asked for, nor for a request that touches nothing."""

    async def work() -> None:
        pass

    asked = await handle(work, db, server_timing=True)
    not_asked = await handle(lambda: shop.insert(1), db)
    assert "server-timing" not in {**asked.headers, **not_asked.headers}


# Whose request it was, to whoever asks after COMMIT


class Routed:
    """What a framework may leave in the scope."""

    path = "/items"
    endpoint = None


@pytest.mark.parametrize(
    ("put", "left_out", "told"),
    [
        ({"route": Routed(), "root_path": None}, (), ("GET", "/items")),
        ({"route": Routed(), "app_root_path": None}, (), ("GET", "/items")),
        ({"route": "/items", "path_template": None}, (), ("GET", "/")),
        ({"path_template": 7}, (), ("GET", "7")),
        ({}, ("path", "method"), (None, None)),
    ],
)
async def test_odd_scopes(
    db: Database, put: dict[str, Any], left_out: tuple[str, ...], told: object
) -> None:
    """Whatever is in a scope, what was committed is answered, and its hooks run."""
    called: list[str] = []

    async def work() -> None:
        await shop.insert(1)
        uow.after_commit(called.append, "hook")

    scope = {k: v for k, v in http_scope(**put).items() if k not in left_out}
    events = Events()
    app = UnitOfWorkMiddleware(endpoint(work), db, observers=[events])
    response = await Client(app).request(scope=scope)
    ended = events.only(UnitFinished)
    assert (200, ["hook"]) == (response.status, called)
    assert told == (ended.method, ended.path)


# What an inspector is told


class Inspecting:
    """Is told of all units of a database, as an inspector is."""

    def __init__(self, db: Database) -> None:
        self.events = Events()
        options.inspect([db], self.observe)

    def observe(self, event: Event) -> None:
        self.events(event)


@pytest.fixture
def inspected(db: Database) -> Iterator[Events]:
    inspecting = Inspecting(db)
    yield inspecting.events
    del inspecting  # until now somebody has to keep it


def kinds(closed: UnitClosed) -> list[str]:
    return [each.text.partition(" ")[0] or each.kind for each in closed.timeline]


@on(*DRIVERS)
async def test_timeline(db: Database, inspected: Events) -> None:
    """Every step comes in order, and the response leaves after COMMIT."""

    async def work() -> None:
        async with uow.current_session().begin_nested():
            await shop.insert(1)

    response = await handle(work, db, observers=())
    closed = inspected.only(UnitClosed)
    expected = ["connection", "SAVEPOINT", "INSERT", "RELEASE", "commit"]
    assert expected == kinds(closed)
    assert "SECRET" not in str(closed)
    ends = [each.start + each.seconds for each in closed.timeline]
    assert sorted(ends) == ends
    assert closed.response is not None
    assert ends[-1] <= closed.response[0] <= closed.response[1]
    assert response.status == closed.status
    assert {("write", db.name, False)} == {
        (each.access, each.database, each.failed) for each in closed.timeline
    }


async def test_timeline_of_a_rollback(db: Database, inspected: Events) -> None:
    """A statement that fails is marked; literals are no part of the text."""

    async def work() -> None:
        await uow.current_session().execute("SELECT 'SECRET' FROM nowhere")

    await handle(work, db, observers=())
    closed = inspected.only(UnitClosed)
    assert ["connection", "SELECT", "rollback"] == kinds(closed)
    assert [False, True, False] == [each.failed for each in closed.timeline]
    assert (None, None) == (closed.status, closed.response)
    assert "SECRET" not in str(inspected)


async def test_timeline_of_a_block(db: Database, inspected: Events) -> None:
    """A block has no response; reads that go on after the outcome are in it."""
    async with db:
        await shop.insert(1)
    async with db as unit:
        await unit.read_session().execute(shop.COUNT)
    closed = inspected.of(UnitClosed)
    assert [["connection", "INSERT", "commit"], ["connection", "SELECT"]] == [
        kinds(each) for each in closed
    ]
    assert [(None, None)] * 2 == [(each.status, each.response) for each in closed]


async def test_units_of_other_databases_are_not_recorded(
    db: Database, inspected: Events
) -> None:
    """Who inspects one database costs the units of another nothing."""
    async with memory_database() as other:
        response = await handle(lambda: shop.insert(1, other), other, observers=())
    assert response.unit.shared is not None
    assert response.unit.shared.recorder is None
    assert [] == inspected


async def test_several_inspectors(db: Database, inspected: Events) -> None:
    """Each is told, of hooks' units too; one that is gone is not asked."""
    second = Inspecting(db)
    Inspecting(db)
    assert 2 == len(options.inspected[db])

    async def work() -> None:
        uow.after_commit(shop.insert, 1)

    await handle(work, db, observers=())
    assert inspected == second.events
    assert [2, 2] == [
        each.kinds.count("UnitClosed") for each in (inspected, second.events)
    ]


async def test_inspectors_of_a_unit_inside_another(
    db: Database, inspected: Events
) -> None:
    """One is told of the units of its own databases, whatever unit is around them."""

    async def work() -> None:
        await shop.insert(1)
        async with other:
            await shop.insert(1, other)
        async with third:
            await shop.insert(1, third)

    async with memory_database() as other, memory_database() as third:
        second = Inspecting(other)
        response = await handle(work, db, observers=())
    assert response.error is None
    ends = (each.only(UnitFinished) for each in (inspected, second.events))
    assert [(db.name,), (other.name,)] == [each.databases for each in ends]


async def test_no_inspector_is_left(db: Database) -> None:
    """A database whose last inspector is gone is as it was."""
    inspecting = Inspecting(db)
    assert [db] == [*options.inspected]
    del inspecting
    assert not options.inspected
