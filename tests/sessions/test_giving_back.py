"""P14: a read session holds a connection while it reads, and no longer."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import ForeignKey, event, select, text
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncAttrs
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    mapped_column,
    relationship,
    selectinload,
)
from sqlalchemy.util import await_only
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.responses import FileResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

import asgi_uow as uow
from asgi_uow import Database, UnitOfWorkMiddleware
from asgi_uow.observers import ConnectionReleased
from tests.servers import ServerBackend, eventually
from tests.support import shop
from tests.support.asgi import BODY, Client, handle, request
from tests.support.databases import (
    DRIVERS,
    SERVER_DRIVERS,
    behind_proxy,
    checked_out,
    memory_database,
    on,
    shop_database,
)
from tests.support.gate import gate_at
from tests.support.writes import driver_connection

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from pathlib import Path

    from sqlalchemy.orm import Session as SyncSession
    from starlette.requests import Request
    from starlette.responses import Response

    from asgi_uow._asgi import ASGIApp, Message
    from tests.servers import Backend

pytestmark = on(*DRIVERS)


class Base(AsyncAttrs, DeclarativeBase):
    """Mapped to the tables of these tests."""


class Author(Base):
    """Has books, which are loaded when somebody asks for them."""

    __tablename__ = "author"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    books: Mapped[list[Book]] = relationship(order_by="Book.id")


class Book(Base):
    """A book."""

    __tablename__ = "book"
    id: Mapped[int] = mapped_column(primary_key=True)
    author_id: Mapped[int] = mapped_column(ForeignKey("author.id"))


@pytest.fixture
async def library(backend: Backend, db: Database) -> Database:
    """Two authors, of whom the first has written books 1 to 3."""
    await backend.execute(
        "CREATE TABLE author (id INTEGER PRIMARY KEY, name VARCHAR(20))",
        "CREATE TABLE book (id INTEGER PRIMARY KEY, author_id INTEGER)",
        "INSERT INTO author VALUES (1, 'Ann'), (2, 'Bob')",
        "INSERT INTO book VALUES (1, 1), (2, 1), (3, 1)",
    )
    return db


NAMES = "SELECT name FROM author ORDER BY id"
BOOKS = "SELECT id FROM book ORDER BY id"


# Between two calls nothing is held


async def fetch_later(read: uow.Session) -> object:
    """Read one row of a result, execute something else, read the others."""
    result = await read.execute(BOOKS)
    first = result.fetchone()
    assert 2 == len((await read.execute(NAMES)).all())
    return [first, *result]


async def refresh(read: uow.Session) -> object:
    author = await read.get_one(Author, 1)
    await read.refresh(author, ["name", "books"])
    return [author.name, len(author.books), author in read]


async def load_lazily(read: uow.Session) -> object:
    author = await read.get_one(Author, 1)
    return [book.id for book in await author.awaitable_attrs.books]


async def load_in_advance(read: uow.Session) -> object:
    query = select(Author).options(selectinload(Author.books)).order_by(Author.id)
    authors = (await read.scalars(query)).all()
    return [len(author.books) for author in authors]


async def merge(read: uow.Session) -> object:
    return (await read.merge(Author(id=1))).name


async def run_sync(read: uow.Session) -> object:
    def work(session: SyncSession) -> object:
        authors = session.scalars(select(Author).order_by(Author.id))
        # The rows of the first are read while others are executed.
        return [[book.id for book in author.books] for author in authors]

    return await read.run_sync(work)


async def stream(read: uow.Session) -> object:
    return [number async for number in await read.stream_scalars(BOOKS)]


async def leave_stream(read: uow.Session) -> object:
    rows = await read.stream(BOOKS)
    first = await rows.fetchone()
    await rows.close()
    return first


async def ask_in_tasks(read: uow.Session) -> object:
    return await asyncio.gather(*(read.scalar(f"SELECT {n}") for n in range(5)))


async def load_lazily_in_tasks(read: uow.Session) -> object:
    """Load attributes, which does not wait for the call in flight, beside a call."""
    authors = (await read.scalars(select(Author).order_by(Author.id))).all()
    await authors[0].awaitable_attrs.books
    loading = authors[1].awaitable_attrs.books
    return await asyncio.gather(loading, read.scalar("SELECT 7"))


async def misspell(read: uow.Session) -> object:
    with pytest.raises(DBAPIError) as raised:
        await read.execute("SELECT nothing FROM nowhere")
    return getattr(raised.value, "__notes__", [])


async def misspell_attribute(read: uow.Session) -> object:
    """Fail to load an attribute, which is no call of the session."""
    author = await read.get_one(Author, 1)
    await read.run_sync(lambda session: session.expire(author))
    event.listen(read.sync_session, "do_orm_execute", misspelt)
    with pytest.raises(DBAPIError):
        await author.awaitable_attrs.name
    event.remove(read.sync_session, "do_orm_execute", misspelt)
    return []


def misspelt(state: Any) -> None:
    state.statement = state.statement.where(text("nothing = 1"))


async def stream_wrongly(read: uow.Session) -> object:
    with pytest.raises((DBAPIError, InvalidRequestError)):
        await read.execute(BOOKS, execution_options={"stream_results": True})
    return []


async def fail_at_the_end(read: uow.Session) -> object:
    """A listener that fails when the call is over: SQLAlchemy forgets to close."""
    target = uow.current_unit_of_work().databases[0].read_engine.sync_engine
    event.listen(target, "rollback", divide_by_zero)
    with pytest.raises(ZeroDivisionError):
        await read.scalar("SELECT 1")
    event.remove(target, "rollback", divide_by_zero)
    return await read.scalar("SELECT 2")


def divide_by_zero(_: object) -> None:
    raise ZeroDivisionError


CALLS: dict[Callable[[uow.Session], Awaitable[object]], object] = {
    fetch_later: [(1,), (2,), (3,)],
    refresh: ["Ann", 3, True],
    load_lazily: [1, 2, 3],
    load_in_advance: [3, 0],
    merge: "Ann",
    run_sync: [[1, 2, 3], []],
    stream: [1, 2, 3],
    leave_stream: (1,),
    ask_in_tasks: [0, 1, 2, 3, 4],
    load_lazily_in_tasks: [[], 7],
    misspell: [],
    misspell_attribute: [],
    stream_wrongly: [],
    fail_at_the_end: 2,
}


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
async def test_between_calls(
    library: Database, call: Callable[[uow.Session], Awaitable[object]]
) -> None:
    """A read gives its connection back, whatever kind it is and however it ends."""
    async with library:
        for _ in range(2):
            assert CALLS[call] == await call(library.read)
            assert [0, 0] == checked_out(library)


async def test_objects_stay(library: Database, backend: Backend) -> None:
    """Objects are the same ones in the next call, loaded and attached."""
    async with library:
        author = await library.read.get_one(Author, 1)
        await backend.execute("UPDATE author SET name = 'Zoe'")
        assert author is await library.read.get(Author, 1)
        assert "Ann" == author.name
        assert author in library.read
        await library.read.refresh(author)
        assert "Zoe" == author.name


@on(*SERVER_DRIVERS)
async def test_round_trips(backend: ServerBackend) -> None:
    """Three reads are three round trips; one that fails costs no ROLLBACK."""
    reads: list[str] = []
    async with behind_proxy(backend) as (db, proxy):
        for _ in range(2):  # the first connects and prepares
            proxy.clear()
            async with db:
                for number in range(3):
                    await db.read.scalar(f"SELECT {number}")
                reads = proxy.trips[:]
                with pytest.raises(DBAPIError):
                    await db.read.scalar("SELECT nothing FROM nowhere")
        assert [f"SELECT {number}" for number in range(3)] == reads
        assert not [trip for trip in proxy.trips if "ROLLBACK" in trip]


async def test_told_once(db: Database) -> None:
    """Observers are told of a read session's connections once, when it is closed."""

    async def handler() -> None:
        for _ in range(3):
            await uow.current_read_session().execute("SELECT 1")

    response = await handle(handler, db)
    released = response.events.only(ConnectionReleased)
    assert "read" == released.access
    assert released.seconds > 0


# What holds a connection, and for how long


async def test_an_open_stream(library: Database) -> None:
    """A stream holds it until its last row; other reads may come in between."""
    async with library:
        rows = await library.read.stream_scalars(BOOKS)
        assert [0, 1] == checked_out(library)
        assert 1 == await anext(rows)
        assert [0, 1] == checked_out(library)
        assert [2, 3] == [number async for number in rows]
        assert [0, 0] == checked_out(library)


@on("aiosqlite", "asyncpg", "psycopg")
async def test_an_open_stream_beside_reads(library: Database) -> None:
    """Reads beside a stream do not take its connection away."""
    async with library:
        rows = await library.read.stream_scalars(BOOKS)
        assert 1 == await anext(rows)
        assert "Ann" == await library.read.scalar(NAMES)
        assert [0, 1] == checked_out(library)
        assert [2, 3] == await rows.all()
        assert [0, 0] == checked_out(library)


@on("aiosqlite", "asyncmy")
async def test_pieces(library: Database) -> None:
    """Rows that a synchronous function has read in pieces hold it no longer."""

    def work(session: SyncSession) -> object:
        rows = session.scalars(text(BOOKS), execution_options={"yield_per": 1})
        first = next(rows)
        return [first, checked_out(library), *rows]

    async with library:
        for _ in range(2):
            found = await library.read.run_sync(work)
            assert [1, [0, 1], 2, 3] == found
            assert [0, 0] == checked_out(library)


@on(*SERVER_DRIVERS, pooler="transaction")
async def test_pieces_in_tasks(library: Database) -> None:
    """Nor do other calls lose theirs where several tasks do so at once."""

    def work(session: SyncSession) -> object:
        options = {"yield_per": 2}
        return list(session.scalars(text(BOOKS), execution_options=options))

    async with library:
        for _ in range(5):
            calls = [library.read.run_sync(work) for _ in range(3)]
            others = [library.read.scalar(f"SELECT {number}") for number in range(3)]
            mixed = [call for pair in zip(calls, others, strict=True) for call in pair]
            found = await asyncio.gather(*mixed)
            assert [[1, 2, 3], 0, [1, 2, 3], 1, [1, 2, 3], 2] == found
            assert [0, 0] == checked_out(library)


@on("aiosqlite")
async def test_pieces_beside_reads(library: Database) -> None:
    """Neither from `yield_per` in a synchronous function."""

    def work(session: SyncSession) -> list[object]:
        rows = session.scalars(text(BOOKS), execution_options={"yield_per": 1})
        return [(number, session.scalar(text(NAMES))) for number in rows]

    async with library:
        found = await library.read.run_sync(work)
        assert [(1, "Ann"), (2, "Ann"), (3, "Ann")] == found
        assert 7 == await library.read.scalar("SELECT 7")
        assert [0, 0] == checked_out(library)


async def test_connection_that_somebody_was_given(db: Database) -> None:
    """`session.connection()` holds it until the unit ends, and reads use it."""
    async with db:
        connection = await db.read.connection()
        await db.read.scalar("SELECT 1")
        assert 1 == await connection.scalar(text("SELECT 1"))
        assert [0, 1] == checked_out(db)
        assert connection is await db.read.connection()
    assert [0, 0] == checked_out(db)


async def test_connection_of_the_writer(db: Database) -> None:
    """To be given the writer's connection holds none of the readers' later on."""
    counts: list[list[int]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await shop.insert(1)
        await uow.current_read_session().connection()
        counts.append(checked_out(db))
        await PlainTextResponse("ok")(scope, receive, send)
        await uow.current_read_session().scalar(shop.COUNT)
        counts.append(checked_out(db))

    response = await request(UnitOfWorkMiddleware(app, db))
    assert (200, None) == (response.status, response.error)
    assert [[1, 0], [0, 0]] == counts


async def test_a_savepoint_of_the_synchronous_session(db: Database) -> None:
    """A savepoint that code opened past the session holds it until it is released."""

    def work(session: SyncSession) -> list[object]:
        session.scalar(text("SELECT 1"))
        with session.begin_nested():
            session.scalar(text("SELECT 2"))
            inside = checked_out(db)
        session.scalar(text("SELECT 3"))
        return [inside, checked_out(db)]

    async with db:
        if db.engine.dialect.name == "sqlite":
            assert [[0, 1], [0, 0]] == await db.read.run_sync(work)


@on("aiosqlite", "asyncmy", "asyncpg", "psycopg", read_isolation="REPEATABLE READ")
async def test_a_snapshot(db: Database) -> None:
    """`read_isolation` holds it until the unit ends."""
    async with db:
        await db.read.scalar("SELECT 1")
        assert [0, 1] == checked_out(db)
    assert [0, 0] == checked_out(db)


SET = {
    "sqlite": ("PRAGMA cache_size = -4321", "PRAGMA cache_size", -4321),
    "mariadb": ("SET @number = 7", "SELECT @number", 7),
    "postgresql": ("SET application_name = 'x'", "SHOW application_name", "x"),
}


async def test_a_setting(db: Database, backend: Backend) -> None:
    """A setting is for the later reads of its unit, and for no other unit."""
    change, ask, value = SET[backend.name]
    async with db:
        await db.read.execute(change)
        assert value == await db.read.scalar(ask)
        assert [0, 1] == checked_out(db)
    assert [0, 0] == checked_out(db)
    async with db:
        assert value != await db.read.scalar(ask)


KEPT: dict[str, list[tuple[str, str, object]]] = {
    "mariadb": [
        ("SELECT SQL_CALC_FOUND_ROWS 1 LIMIT 0", "SELECT FOUND_ROWS()", 1),
        ("SELECT @five := 5", "SELECT @five", 5),
        ("SELECT 6 INTO @six", "SELECT @six", 6),
        ("SELECT GET_LOCK('k', 0)", "SELECT RELEASE_LOCK('k')", 1),
        ("LOCK TABLES items READ", "SELECT count(*) FROM items", 0),
    ],
    "postgresql": [
        ("SELECT pg_advisory_lock(7)", "SELECT pg_advisory_unlock(7)", True),
        ("SELECT pg_try_advisory_lock(7)", "SELECT pg_advisory_unlock(7)", True),
        ("PREPARE seven AS SELECT 7", "EXECUTE seven", 7),
    ],
}


@on(*SERVER_DRIVERS)
async def test_what_a_connection_keeps(db: Database, backend: Backend) -> None:
    """A lock, a variable, a count of rows: its unit's next read finds it, no other."""
    for first, then, value in KEPT[backend.name]:
        async with db:
            await db.read.execute(first)
            assert [0, 1] == checked_out(db), first
            assert value == await db.read.scalar(then)
        assert [0, 0] == checked_out(db)


@on("asyncmy")
async def test_a_lock_of_tables(db: Database, backend: Backend) -> None:
    """It ends with its unit: others can write then."""
    async with db:
        await db.read.execute("LOCK TABLES items READ")
    async with asyncio.timeout(10):
        await backend.execute("INSERT INTO items (id) VALUES (1)")
    assert [1] == await shop.items(backend)


PLAIN_WORDS = {
    "sqlite": ["SELECT 'reset' AS it", "SELECT call.it FROM (SELECT 1 AS it) AS call"],
    "mariadb": ["SELECT 'reset' AS `call`", "WITH a AS (SELECT 'set') SELECT * FROM a"],
    "postgresql": ["SELECT call.* FROM (SELECT 1) AS call", "VALUES ('call', 'set')"],
}


async def test_words_in_a_query(db: Database, backend: Backend) -> None:
    """A name or a text that looks like a setting costs no connection."""
    async with db:
        before = await driver_connection(db.read)
    for statement in PLAIN_WORDS[backend.name]:
        async with db:
            await db.read.execute(statement)
            assert [0, 0] == checked_out(db), statement
        async with db:
            assert before is await driver_connection(db.read), statement


async def test_the_writers_transaction(db: Database) -> None:
    """Once the unit has written, reads use the writer's connection till the end."""
    async with db:
        await db.read.scalar(shop.COUNT)
        await shop.insert(1)
        assert 1 == await db.read.scalar(shop.COUNT)
        rows = await db.read.stream_scalars(shop.COUNT)
        assert [1] == await rows.all()
        assert [1, 0] == checked_out(db)
        assert 1 == await db.read.scalar(shop.COUNT)
    assert [0, 0] == checked_out(db)


@on("aiosqlite")
async def test_in_memory(backend: Backend) -> None:
    """In memory a read after the commit lets the one connection go."""
    async with memory_database() as db:

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await shop.insert(1, db)
            await PlainTextResponse("ok")(scope, receive, send)
            assert 1 == await uow.current_read_session(db).scalar(shop.COUNT)
            async with uow.unit_of_work(db, independent=True):
                await shop.insert(2, db)

        response = await request(UnitOfWorkMiddleware(app, db))
        assert (200, None) == (response.status, response.error)
        async with db:
            assert 2 == await db.read.scalar(shop.COUNT)


@on("aiosqlite")
async def test_a_read_that_fails_in_memory(backend: Backend) -> None:
    """Nor does one that failed in a synchronous function hold it there."""

    def fail(session: SyncSession) -> None:
        with pytest.raises(DBAPIError):
            session.scalar(text("SELECT nothing FROM nowhere"))

    async with memory_database() as db:

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await PlainTextResponse("ok")(scope, receive, send)
            await uow.current_read_session(db).run_sync(fail)
            async with uow.unit_of_work(db, independent=True):
                await shop.insert(1, db)

        response = await request(UnitOfWorkMiddleware(app, db))
        assert (200, None) == (response.status, response.error)


@on("asyncpg", "psycopg")
async def test_cancelled_while_an_attribute_is_loaded(backend: Backend) -> None:
    """It is back when the unit has ended."""
    async with gate_at(backend) as (db, gate):

        async def read() -> None:
            async with db:
                session = db.read.sync_session
                await asyncio.gather(uncalled(session, gate.select))

        task = asyncio.create_task(read())
        await gate.reached()
        task.cancel()
        await gate.open()
        await asyncio.wait([task])
        assert task.cancelled()
        await eventually([0, 0], lambda: counted(db))


async def test_attributes_that_wait_for_a_connection(library: Database) -> None:
    """Tasks that load attributes take turns, also while one of them connects."""
    connecting, go_on = asyncio.Queue[None](), asyncio.Event()

    def wait(*_: object) -> None:
        connecting.put_nowait(None)
        await_only(go_on.wait())

    async with library:
        authors = (await library.read.scalars(select(Author))).all()
        event.listen(library.read_engine.sync_engine, "checkout", wait)
        loading = [asyncio.create_task(count_books(author)) for author in authors]
        reading = asyncio.create_task(library.read.scalar("SELECT 7"))
        await connecting.get()
        go_on.set()
        assert [3, 0, 7] == await asyncio.gather(*loading, reading)
        assert [0, 0] == checked_out(library)


async def count_books(author: Author) -> int:
    return len(await author.awaitable_attrs.books)


@on(*SERVER_DRIVERS)
async def test_cancelled_beside_others(backend: Backend) -> None:
    """One of several tasks that load attributes can be cancelled; the others go on."""
    async with gate_at(backend) as (db, gate):
        async with db:
            session = db.read.sync_session
            task = asyncio.create_task(uncalled(session, gate.select))
            await gate.reached()
            others = [
                asyncio.create_task(uncalled(session, "SELECT 1")),
                asyncio.create_task(db.read.scalar("SELECT 7")),
            ]
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
            assert [None, 7] == await asyncio.gather(*others)
            assert [0, 0] == checked_out(db)
        await gate.open()


async def uncalled(session: SyncSession, statement: str) -> None:
    """Execute as an attribute does that is loaded: past the calls of the session."""

    class Loader(AsyncAttrs):
        @property
        def value(self) -> object:
            return session.scalar(text(statement))

    await Loader().awaitable_attrs.value


async def counted(db: Database) -> list[int]:
    return checked_out(db)


# Many who read once, and stay


SLOW = ["/events"] * 200 + ["/download"] * 50


class Slow(Client):
    """Takes the first piece of a body, says so, and waits with the others."""

    def __init__(
        self, app: ASGIApp, waiting: asyncio.Queue[None], go_on: asyncio.Event
    ) -> None:
        super().__init__(app)
        self.waiting, self.go_on = waiting, go_on

    async def take(self, message: Message, /) -> None:
        if message["type"] == BODY and not self.go_on.is_set():
            self.waiting.put_nowait(None)
            await self.go_on.wait()


def slow_site(go_on: asyncio.Event, waiting: asyncio.Queue[None], file: Path) -> Any:
    """An application of which each endpoint reads, and then takes its time."""

    async def read() -> str:
        return str(await uow.current_read_session().scalar(shop.COUNT))

    async def events(_: Request) -> Response:
        async def generate() -> AsyncGenerator[str]:
            yield await read()
            await go_on.wait()
            yield await read()

        return StreamingResponse(generate(), media_type="text/event-stream")

    async def download(_: Request) -> Response:
        await read()
        return FileResponse(file)

    async def wait() -> None:
        await read()
        waiting.put_nowait(None)
        await go_on.wait()
        await read()

    async def job(_: Request) -> Response:
        return PlainTextResponse(await read(), background=BackgroundTask(wait))

    async def call(_: Request) -> Response:
        await wait()
        await shop.insert(1)
        return PlainTextResponse(await read())

    async def count(_: Request) -> Response:
        return PlainTextResponse(await read())

    endpoints = (events, download, job, call, count)
    return Starlette(routes=[Route(f"/{each.__name__}", each) for each in endpoints])


async def test_idle_streams_stop_no_read(backend: Backend, tmp_path: Path) -> None:
    """200 event streams, 50 slow downloads and others on 2 connections hold none.

    The others are a background task, a call to another service before a write, and
    a block that waits for messages as a websocket does.
    """
    file = tmp_path / "file"
    file.write_bytes(b"x" * 200_000)
    options: dict[str, Any] = {"pool_size": 2, "max_overflow": 0, "pool_timeout": 30}
    async with shop_database(backend, **options) as db:
        waiting, go_on = asyncio.Queue[None](), asyncio.Event()
        app = UnitOfWorkMiddleware(slow_site(go_on, waiting, file), db)
        client, slow = Client(app), Slow(app, waiting, go_on)

        async def socket() -> None:
            async with db:
                await db.read.scalar(shop.COUNT)
                waiting.put_nowait(None)
                await go_on.wait()
                await db.read.scalar(shop.COUNT)

        asked = [slow.request(path) for path in SLOW]
        asked += [client.request("/job"), client.request("/call")]
        requests = [asyncio.create_task(each) for each in asked]
        block = asyncio.create_task(socket())
        async with asyncio.timeout(60):  # otherwise a failed test would wait for ever
            for _ in range(len(asked) + 1):
                await waiting.get()
        assert [0, 0] == checked_out(db)

        found = [(await client.request("/count")).chunks for _ in range(20)]
        assert [["0"]] * 20 == found

        go_on.set()
        responses = await asyncio.gather(*requests)
        await block
        assert {None} == {response.error for response in responses}
        assert {200} == {response.status for response in responses}
        assert [["1"]] == [responses[-1].chunks]
        assert [0, 0] == checked_out(db)
        assert [1] == await shop.items(backend)
