"""Rows that are still being read when the response has begun to leave."""

from __future__ import annotations

import asyncio
import functools
import itertools
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.exc import ResourceClosedError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from asgi_uow import (
    Database,
    Outcome,
    UnitOfWorkMiddleware,
    current_read_session,
    current_session,
    current_unit_of_work,
    set_rollback_only,
)
from asgi_uow.errors import (
    CommitFailedError,
    ConcurrentUseError,
    ReadOnlySessionError,
)
from tests.servers import eventually
from tests.support import shop
from tests.support.asgi import START, Client, Response, handle, serve
from tests.support.databases import DRIVERS, checked_out, on
from tests.support.streams import ROWS, SELECT, fill

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

    from sqlalchemy.ext.asyncio import AsyncResult

    from asgi_uow import Session
    from asgi_uow._asgi import ASGIApp, Message, Receive, Scope, Send
    from tests.servers import Backend, MariaDBBackend, ServerBackend
    from tests.servers.backend import SQLiteBackend

pytestmark = on(*DRIVERS)


@pytest.fixture
async def stocked(backend: Backend) -> Backend:
    """A shop with 300 items."""
    await fill(backend)
    return backend


# The connection of a stream, whatever ends it


async def generate(request: Request) -> AsyncGenerator[str]:
    rows = await current_read_session().stream_scalars(SELECT)
    async for number in rows:
        yield f"{number}\n"
        if request.url.path == "/broken":
            message = "in the middle of the rows"
            raise LookupError(message)


async def rows_as_text(request: Request) -> StreamingResponse:
    return StreamingResponse(generate(request))


ROUTES = [Route("/", rows_as_text), Route("/broken", rows_as_text)]


class Stalled(Client):
    """Stops reading after the first piece."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(app)
        self.has_piece = asyncio.Event()

    async def take(self, message: Message, /) -> None:
        if is_piece(message):
            self.has_piece.set()
            await asyncio.Event().wait()


class Old(Client):
    """Has `receive` say that the client is gone, as servers before spec 2.4 do."""

    spec_version = "2.0"


def is_piece(message: Message) -> bool:
    return bool(message.get("more_body"))


async def read_all(app: ASGIApp) -> Response:
    response = await Client(app).request()
    assert (200, None) == (response.status, response.error)
    return response


async def raise_inside(app: ASGIApp) -> Response:
    response = await Client(app).request("/broken")
    assert isinstance(response.error, LookupError)
    return response


async def cancel(app: ASGIApp) -> Response:
    client, response = Stalled(app), Response()
    task = asyncio.create_task(client.request(into=response))
    await client.has_piece.wait()
    task.cancel()
    await asyncio.wait((task,))
    assert task.cancelled()
    return response


async def announce(app: ASGIApp) -> Response:
    response = await Old(app).request(leave_after=is_piece)
    assert (200, None) == (response.status, response.error)
    return response


async def fail_to_send(app: ASGIApp) -> Response:
    response = await Client(app).request(leave_after=is_piece)
    assert isinstance(response.error, ClientDisconnect)
    return response


@pytest.mark.parametrize(
    ("end", "pieces"),
    [
        (read_all, ROWS),
        (raise_inside, 1),
        (cancel, 1),
        (announce, 1),
        (fail_to_send, 1),
    ],
)
async def test_connection_of_a_stream_comes_back(
    stocked: Backend, end: Callable[[ASGIApp], Awaitable[Response]], pieces: int
) -> None:
    """A generator that began after the start reads; its connection is then free."""
    db = Database.from_url(stocked.url, pool_size=1, max_overflow=0)
    app = UnitOfWorkMiddleware(Starlette(routes=ROUTES), db)

    assert pieces == len((await end(app)).chunks)

    assert [0, 0] == checked_out(db)
    await eventually(0, stocked.open_transactions)
    assert ROWS == len((await read_all(app)).chunks)
    assert [0, 0] == checked_out(db)
    await db.dispose()


@pytest.mark.parametrize("is_read", [True, False])
async def test_reads_go_on_after_an_error_beside_a_stream(
    stocked: Backend, is_read: bool
) -> None:
    """PostgreSQL ends the transaction of the cursor; the next read begins anew."""
    db = Database.from_url(stocked.url, pool_size=1, max_overflow=0)
    async with db:
        rows = await db.read.stream_scalars(SELECT)
        if is_read or stocked.name == "mariadb":
            assert ROWS == len(await rows.all())
        with pytest.raises(ReadOnlySessionError):
            await db.read.execute("DELETE FROM items")
        assert ROWS == await db.read.scalar("SELECT count(*) FROM items")
    assert [0, 0] == checked_out(db)
    await db.dispose()


@on("asyncmy", "asyncpg", "psycopg")
async def test_reads_go_on_after_an_error_among_the_rows(stocked: Backend) -> None:
    """The error is that of the stream alone; the next read does not meet it."""
    too_many = "SELECT other.id FROM items AS other WHERE other.id >= items.id - 200"
    db = Database.from_url(stocked.url, pool_size=1, max_overflow=0)
    async with db:
        rows = await db.read.stream_scalars(
            f"SELECT CASE WHEN id = 250 THEN ({too_many}) END FROM items ORDER BY id"
        )
        with pytest.raises(Exception, match=r"more than (one|1) row"):
            await rows.all()
        assert ROWS == await db.read.scalar("SELECT count(*) FROM items")
    assert [0, 0] == checked_out(db)
    await db.dispose()


# On the connection of the writer


SESSIONS = pytest.mark.parametrize("session", [current_session, current_read_session])


def streaming(
    session: Callable[[], Session], begin: Callable[[], object], status: int = 200
) -> ASGIApp:
    """Make an application that writes, then streams from the same transaction."""

    async def respond(_: Request) -> StreamingResponse:
        await shop.insert(ROWS)
        begin()
        rows = await session().stream_scalars(SELECT)
        return StreamingResponse((f"{row}\n" async for row in rows), status)

    return Starlette(routes=[Route("/", respond)])


@on("aiosqlite")
async def test_stream_beside_a_call_that_hangs(stocked: Backend) -> None:
    """The start of a response waits for `commit_timeout` whether a stream is read."""
    db = Database.from_url(stocked.url)
    go_on, has_begun = asyncio.Event(), asyncio.Event()
    streams: list[object] = []
    tasks: list[asyncio.Task[None]] = []

    async def hang(session: Session) -> None:
        async with session.own_lock:
            has_begun.set()
            await go_on.wait()

    async def handler() -> None:
        session = current_session()
        streams.append(await session.stream_scalars(SELECT))
        tasks.append(asyncio.create_task(hang(session)))
        await has_begun.wait()

    try:
        response = await asyncio.wait_for(handle(handler, db, commit_timeout=0.1), 5)
    finally:
        go_on.set()
    await tasks[0]

    assert 500 == response.status
    assert isinstance(response.error, CommitFailedError)
    assert isinstance(response.error.__cause__, TimeoutError)
    assert [0, 0] == checked_out(db)
    await db.dispose()


@SESSIONS
@pytest.mark.parametrize(
    "begin", [list, functools.partial(set_rollback_only, "a rehearsal")]
)
async def test_response_cannot_stream_from_the_transaction(
    stocked: Backend, session: Callable[[], Session], begin: Callable[[], object]
) -> None:
    """A success whose rows would end with the transaction is a 500 from the start."""
    db = Database.from_url(stocked.url)

    response = await serve(streaming(session, begin), db)

    assert (500, True) == (response.status, response.is_complete)
    assert isinstance(response.error, CommitFailedError)
    assert isinstance(response.error.__cause__, ConcurrentUseError)
    assert "current_read_session()" in str(response.error.__cause__)
    assert ROWS == len(await shop.items(stocked))
    assert [0, 0] == checked_out(db)
    await db.dispose()


async def test_error_that_streams_from_the_transaction_breaks_off(
    stocked: Backend,
) -> None:
    """A 404 leaves as it is: what is raised among the rows refers to them as well."""
    db = Database.from_url(stocked.url)

    response = await serve(streaming(current_session, list, 404), db)

    assert 404 == response.status
    assert isinstance(response.error, ResourceClosedError)
    assert [0, 0] == checked_out(db)
    await db.dispose()


async def leave_rows() -> None:
    rows = await current_session().stream(SELECT)
    assert await rows.fetchone()


async def leave_partitions() -> None:
    rows = await current_session().stream(SELECT)
    async for part in rows.partitions(2):  # pragma: no branch
        assert 2 == len(part)
        break


async def leave_a_generator() -> None:
    async def parts() -> AsyncGenerator[object]:
        rows = await current_session().stream(SELECT)
        try:
            async for part in rows.partitions(2):  # pragma: no branch
                yield part
        finally:
            await rows.close()

    async def outer() -> AsyncGenerator[object]:
        async for part in parts():  # pragma: no branch
            yield part

    async for _ in outer():  # pragma: no branch
        break


@pytest.mark.parametrize("leave", [leave_rows, leave_partitions, leave_a_generator])
async def test_stream_that_nobody_can_read_is_closed(
    stocked: Backend, leave: Callable[[], Awaitable[None]]
) -> None:
    """A handler may stop among the rows: they end with the transaction."""
    db = Database.from_url(stocked.url, pool_size=1, max_overflow=0)

    async def handler() -> None:
        await shop.insert(ROWS)
        await leave()

    response = await handle(handler, db)

    assert (200, None) == (response.status, response.error)
    assert ROWS + 1 == len(await shop.items(stocked))
    assert [0, 0] == checked_out(db)
    await db.dispose()


async def test_block_closes_its_streams(stocked: Backend) -> None:
    """No response depends on a block, so it may be left among the rows."""
    db = Database.from_url(stocked.url)
    async with db:
        await shop.insert(ROWS)
        rows = await db.write.stream(SELECT)
        assert await rows.fetchone()
    with pytest.raises(ResourceClosedError):
        await rows.all()
    assert ROWS + 1 == len(await shop.items(stocked))
    await db.dispose()


async def test_cancelled_while_a_stream_is_let_go_of(stocked: Backend) -> None:
    """A client that goes away at that moment has its work rolled back."""
    db = Database.from_url(stocked.url)
    response = Response()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        response.units.append(current_unit_of_work())
        await shop.insert(ROWS)
        rows = await current_session().stream(SELECT)
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().call_soon(task.cancel)
        await send({"type": START, "status": 200, "headers": []})
        await rows.all()  # pragma: no cover  # the start was refused

    with pytest.raises(asyncio.CancelledError):
        await serve(app, db, into=response)

    assert [] == response.types
    assert Outcome.ROLLED_BACK is response.unit.outcome
    assert ROWS == len(await shop.items(stocked))
    assert [0, 0] == checked_out(db)
    await db.dispose()


@on("asyncmy")
async def test_joined_stream_holds_off_the_writer(db: Database) -> None:
    """On MariaDB a write would cut the stream off: refused."""

    async def handler() -> None:
        for number in range(3):
            await shop.insert(number)
        stream = await current_read_session().stream("SELECT id FROM items")
        with pytest.raises(ConcurrentUseError, match="stream"):
            await shop.insert(4)
        assert 3 == len(await stream.all())

    assert 200 == (await handle(handler, db)).status


async def test_streams_of_every_shape(db: Database) -> None:
    """Partitions and mappings take turns as plain streams do."""

    async def handler() -> None:
        for number in range(5):
            await shop.insert(number)
        stream = await current_session().stream(SELECT)
        parts = [len(part) async for part in stream.partitions(2)]
        assert [2, 2, 1] == parts
        stream = await current_session().stream(SELECT)
        rows = await stream.mappings().fetchmany(2)
        assert [{"id": 0}, {"id": 1}] == [dict(row) for row in rows]
        await stream.close()
        with pytest.raises(TypeError, match="not both"):
            await current_session().execute("SELECT :a", {"a": 1}, a=2)

    assert 200 == (await handle(handler, db)).status


# Pieces


GATES = {
    "asyncmy": (
        "SELECT GET_LOCK('gate', 0)",
        "SELECT RELEASE_LOCK('gate')",
        (
            "SELECT IF(seq = 900, GET_LOCK('gate', 60), seq), REPEAT('x', 1000)"
            " FROM seq_1_to_1000"
        ),
    ),
    "asyncpg": (
        "SELECT pg_advisory_lock(1)",
        "SELECT pg_advisory_unlock(1)",
        (
            "SELECT CASE WHEN i = 900 THEN CAST(pg_advisory_lock(1) AS text) END"
            " FROM generate_series(1, 1000) AS i"
        ),
    ),
}
GATES["psycopg"] = GATES["asyncpg"]

SLOW = {
    "asyncmy": GATES["asyncmy"][2].replace("GET_LOCK('gate', 60)", "SLEEP(60)"),
    "asyncpg": GATES["asyncpg"][2].replace("pg_advisory_lock(1)", "pg_sleep(60)"),
}
SLOW["psycopg"] = SLOW["asyncpg"]


@on(*GATES)
async def test_first_rows_before_the_last(backend: ServerBackend) -> None:
    """The first rows are there while the server cannot go on to the last."""
    close, open_, select = GATES[backend.driver]
    db = Database.from_url(backend.url)
    keeper = Database.from_url(backend.url)
    async with keeper, db:
        await keeper.write.execute(close)
        rows = await db.read.stream(select)
        assert 100 == len(await rows.fetchmany(100))
        await keeper.write.execute(open_)
        assert 900 == len(await rows.all())
    await keeper.dispose()
    await db.dispose()


async def rest_of(rows: AsyncResult[Any]) -> asyncio.Task[Sequence[Any]]:
    """A task that is waiting for the server to go on with the rows."""
    begun = asyncio.Event()

    async def read() -> Sequence[Any]:
        begun.set()
        return await rows.all()

    task = asyncio.create_task(read())
    await begun.wait()
    return task


@on(*GATES)
async def test_reads_go_on_after_a_cancellation_among_the_rows(
    backend: ServerBackend,
) -> None:
    """A cancelled fetch ends its stream; the next read has another connection."""
    close, _, select = GATES[backend.driver]
    db = Database.from_url(backend.url)
    keeper = Database.from_url(backend.url)
    async with keeper, db:
        await keeper.write.execute(close)
        rows = await db.read.stream(select)
        assert 100 == len(await rows.fetchmany(100))
        rest = await rest_of(rows)
        rest.cancel()
        await asyncio.wait((rest,))
        assert rest.cancelled()
        assert 1 == await db.read.scalar("SELECT 1")
        with pytest.raises(ResourceClosedError):
            await rows.fetchone()
    assert [0, 0] == checked_out(db)
    await keeper.dispose()
    await db.dispose()


@on(*GATES)
async def test_connection_lost_among_the_rows_is_answered_503(
    backend: ServerBackend,
) -> None:
    """As one that is lost under any other statement."""
    db = Database.from_url(backend.url)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        rows = await db.read.stream(SLOW[backend.driver])
        rest = await rest_of(rows)
        await backend.kill_connections()
        await rest

    response = await serve(app, db)

    assert 503 == response.status
    assert [0, 0] == checked_out(db)
    await db.dispose()


@on("asyncpg", "psycopg")
async def test_postgresql_sends_what_is_read(backend: ServerBackend) -> None:
    """PostgreSQL sends a piece when asked, so nothing piles up in this process."""
    async with backend.proxy() as proxy:
        db = Database.from_url(backend.through(proxy.port))
        async with db:
            rows = await db.read.stream_scalars("SELECT generate_series(1, 5000)")
            assert 1 == await anext(rows)
            asked = [len(proxy.trips)]
            async for parts in rows.partitions(1000):
                assert parts
                asked.append(len(proxy.trips))
        await db.dispose()
    assert all(before < after for before, after in itertools.pairwise(asked))


async def test_sqlite_computes_what_is_read(sqlite: SQLiteBackend) -> None:
    """SQLite computes a row when it is about to be read."""
    computed = itertools.count(1)
    db = Database.from_url(sqlite.url)
    async with db:
        connection = await (await db.read.connection()).get_raw_connection()
        raw = connection.driver_connection
        assert raw is not None
        await raw.create_function("compute", 0, lambda: next(computed))
        rows = await db.read.stream_scalars(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n"
            " LIMIT 5000) SELECT compute() FROM n"
        )
        assert 1 == await anext(rows)
        assert next(computed) < 100
    await db.dispose()


async def test_mariadb_sends_it_all(mariadb: MariaDBBackend) -> None:
    """MariaDB does not wait for the reader: asyncmy keeps what comes too early."""
    db = Database.from_url(mariadb.url)

    async def running() -> int:
        rows = await mariadb.fetch(
            "SELECT id FROM information_schema.processlist"
            " WHERE db = :name AND user = 'app' AND command = 'Query'",
            name=mariadb.database,
        )
        return len(rows)

    async with db:
        rows = await db.read.stream("SELECT REPEAT('x', 1000) FROM seq_1_to_20000")
        assert await rows.fetchone()
        await eventually(0, running, within=30)
        assert 19_999 == len(await rows.all())
    await db.dispose()
