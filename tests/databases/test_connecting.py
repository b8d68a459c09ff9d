"""Connecting: what fails there, and what clients and operators are told of it.

SQLAlchemy 2.0 passes on what asyncpg raises, 2.1 wraps it.
"""

from __future__ import annotations

import asyncio
import socket
import traceback
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from sqlalchemy import URL, event, make_url
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_uow import CausalReads, Database, Outcome, current_read_session
from asgi_uow import current_session as writer
from asgi_uow.errors import OutcomeUnknownError
from asgi_uow.observers import ReaderFailed
from tests.servers import eventually
from tests.servers.process import HOST, free_port
from tests.support import shop
from tests.support.asgi import Response, handle
from tests.support.databases import (
    SERVER_DRIVERS,
    SERVERS,
    checked_out,
    is_commit,
    login,
    on,
    shop_database,
)
from tests.support.private import READ_FROM_WRITER, code_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from tests.servers import Backend, ServerBackend

pytestmark = on(*SERVER_DRIVERS)

CAUSAL = CausalReads("a secret of the tests, long enough")


async def insert_1() -> None:
    await shop.insert(1)


async def ask(url: str | URL | Database, **options: Any) -> Response:
    """Send one request that wants to write to a database."""
    db = url if isinstance(url, Database) else Database.from_url(url, **options)
    try:
        return await handle(insert_1, db)
    finally:
        await db.dispose()


def told(response: Response) -> str:
    """Give what a server logs of the exception that left the application."""
    assert response.error is not None
    return "".join(traceback.format_exception(response.error))


@asynccontextmanager
async def limited(
    backend: ServerBackend, limit: int = 1, **options: Any
) -> AsyncGenerator[Database]:
    """An empty shop, for a user who may have so many connections."""
    await shop.create(backend)
    async with login(backend, limit) as url:
        db = Database.from_url(url, **options)
        yield db
        await db.dispose()


# What the client is told


@pytest.mark.parametrize(
    "wrong", [{"password": "no"}, {"username": "nobody"}, {"database": "nothing"}]
)
async def test_configuration_error_is_no_outage(
    backend: ServerBackend, wrong: dict[str, Any]
) -> None:
    """Nobody is asked to try again because of a wrong password, user or database."""
    async with login(backend) as url:
        response = await ask(url.set(**wrong))

    assert [] == response.types  # the server's own 500
    assert response.error is not None


async def test_file_that_cannot_be_opened(tmp_path: Path) -> None:
    """Nor because of a folder that is missing."""
    response = await ask(f"sqlite:///{tmp_path}/missing/app.db")

    assert [] == response.types
    assert "SQLITE_CANTOPEN" == code_of(response.error)


async def test_password_that_is_missing(backend: ServerBackend) -> None:
    """Nor because of none."""
    async with login(backend) as url:
        response = await ask(url._replace(password=None))

    assert [] == response.types
    assert response.error is not None


async def test_server_that_is_full_is_an_outage(backend: ServerBackend) -> None:
    """A user who has too many connections may have one a moment later."""
    async with limited(backend) as db, db.engine.connect():
        response = await ask(db.engine.url)

    assert 503 == response.status
    assert "1" == response.headers["retry-after"]


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("Passwort-Authentifizierung für Benutzer »ann« fehlgeschlagen", None),
        ("la base de données « shop » n'existe pas", None),
        ('ロール"ann"は存在しません', None),
        ("no such database: shop", None),
        ("SASL authentication failed", None),
        ('too many connections for role "ann"', 503),
        ("le système de bases de données se lance", 503),
        ("the database system is starting up", 503),
    ],
)
async def test_words_of_a_server(words: str, status: int | None) -> None:
    """psycopg has no code for them, and they are in the language of the server."""

    async def refuse(reader: asyncio.StreamReader, stream: Any) -> None:
        await reader.read(1000)
        fields = b"SFATAL\0VFATAL\0C00000\0M" + words.encode() + b"\0\0"
        stream.write(b"E" + (len(fields) + 4).to_bytes(4) + fields)
        stream.close()

    query = "sslmode=disable&gssencmode=disable"
    async with await asyncio.start_server(refuse, HOST, 0) as server:
        port = server.sockets[0].getsockname()[1]
        response = await ask(f"postgresql+psycopg://ann@{HOST}:{port}/shop?{query}")

    assert status == (response.status if response.types else None)
    assert words in str(response.error)


async def test_option_that_psycopg_does_not_know() -> None:
    """A mistake in the options is no outage either."""
    url = f"postgresql+psycopg://ann@{HOST}/shop"
    engine = create_async_engine(url, connect_args={"nonsense": 1})
    response = await ask(Database(engine))

    assert [] == response.types
    assert response.error is not None


@pytest.mark.parametrize("own", [None, 3])
async def test_limit_of_connecting(backend: ServerBackend, own: int | None) -> None:
    """Connecting has 10 seconds, unless the engine says otherwise."""
    name = "timeout" if backend.driver == "asyncpg" else "connect_timeout"
    given: list[object] = []

    def note(_: object, __: object, ___: object, options: dict[str, object]) -> None:
        given.append(options[name])

    db = Database.from_url(backend.url, connect_args={name: own} if own else {})
    event.listen(db.engine.sync_engine, "do_connect", note)
    async with db:
        await db.read.execute("SELECT 1")
        await db.write.execute("SELECT 1")
    await db.dispose()

    assert [own or 10] * 2 == given


async def test_silent_server_is_an_outage(backend: ServerBackend) -> None:
    """A server that accepts and says nothing is waited for as long as that."""
    short = {} if backend.driver != "asyncpg" else {"connect_args": {"timeout": 1}}
    with socket.create_server((HOST, 0)) as silent:
        url = make_url(backend.through(silent.getsockname()[1]))
        if not short:
            url = url.update_query_dict({"connect_timeout": "1"})
        async with asyncio.timeout(8):
            response = await ask(url, **short)

    assert 503 == response.status
    assert "1" == response.headers["retry-after"]


# What the operator is told


@on("aiosqlite", *SERVER_DRIVERS)
async def test_error_names_the_database(backend: Backend) -> None:
    """Who cannot connect is told where to, once and without the password."""
    url = make_url("sqlite:////nowhere/at/all.db")
    if backend.name != "sqlite":
        url = make_url(backend.url).set(port=free_port(), password="s3cret")

    response = await ask(url)

    server = f"{url.host or ''}:{url.port or ''}".strip(":")
    assert 1 == told(response).count("while connecting to ")
    assert f"{server}/{url.database}" in told(response).partition("connecting to ")[2]
    assert "s3cret" not in told(response)


@on("asyncpg")
async def test_error_without_a_word_names_the_database(backend: ServerBackend) -> None:
    """A time limit in the driver has no message of its own."""
    with socket.create_server((HOST, 0)) as silent:
        url = backend.through(silent.getsockname()[1])
        response = await ask(url, connect_args={"timeout": 0.1})

    assert 503 == response.status
    assert told(response).endswith(f"TimeoutError\nwhile connecting to {url}\n")


async def test_error_of_a_stream_names_the_database_once(
    backend: ServerBackend,
) -> None:
    """A call that makes others tells it once; the server that is read is named."""
    db = Database.from_url(backend.through(free_port()))

    async def handler() -> None:
        await current_read_session().stream_scalars("SELECT 1")

    response = await handle(handler, db)
    await db.dispose()

    assert 1 == told(response).count(f"while connecting to {db.name}")


async def test_error_of_a_statement_does_not(backend: Backend) -> None:
    """What fails on a connection has no such note."""
    async with shop_database(backend) as db:
        response = await handle(lambda: writer().execute("SELECT nothing"), db)

    assert "while connecting to" not in told(response)


async def test_error_of_a_file_does_not(backend: Backend, tmp_path: Path) -> None:
    """Nor has what is not of the database."""

    def read(_: object) -> None:
        (tmp_path / "missing").read_text()

    async with shop_database(backend) as db:
        response = await handle(lambda: writer().run_sync(read), db)

    assert isinstance(response.error, FileNotFoundError)
    assert "while connecting to" not in told(response)


# What goes on all the same


async def test_check_raises_nothing(backend: ServerBackend) -> None:
    """A server that takes no more connections is reported, with its code."""
    async with limited(backend) as db, db.engine.connect():
        report = await db.check(timeout=30)

    assert not report.ok
    assert report.writer.error is not None
    code = {"asyncmy": "1226", "asyncpg": "53300", "psycopg": "08000"}
    assert report.writer.error.endswith(code[backend.driver])


async def test_check_of_an_option_that_cannot_work(backend: ServerBackend) -> None:
    """So is one that the driver refuses to connect to at all."""
    engine = create_async_engine(backend.url, connect_args={"nonsense": 1})
    db = Database(engine)
    report = await db.check(timeout=30)
    await db.dispose()

    assert report.writer.error in {"TypeError", "ProgrammingError"}


async def test_reader_that_is_full(backend: ServerBackend) -> None:
    """A replica that takes no more connections is done without."""
    async with login(backend, 1) as url:
        full = create_async_engine(url)
        async with (
            full.connect(),
            shop_database(backend, read_urls=[url]) as db,
        ):
            response = await handle(read, db)
        await full.dispose()

    assert 200 == response.status
    assert 1 == len(response.events.of(ReaderFailed))


async def read() -> None:
    await current_read_session().execute(shop.SELECT)


async def test_position_that_cannot_be_asked(backend: ServerBackend) -> None:
    """What was committed is a success; its client reads from the writer."""
    async with limited(backend, read_urls=[backend.url]) as db:
        response = await handle(insert_1, db, causal_reads=CAUSAL, hooks=True)

        assert 200 == response.status
        assert ["commit"] == response.hooks
        positions = CAUSAL.positions([(b"cookie", response.cookie)])
        assert dict.fromkeys(CAUSAL.names(db), READ_FROM_WRITER) == positions
        assert [1] == await shop.items(backend)


@on("asyncpg", "psycopg")
async def test_outcome_that_cannot_be_asked(backend: ServerBackend) -> None:
    """A COMMIT without an answer stays in doubt if the server lets nobody in."""
    await shop.create(backend)
    async with login(backend) as url, backend.proxy() as proxy:
        proxy.cut_after(is_commit)
        db = Database.from_url(url.set(port=proxy.port), resolve_unknown=True)

        async def handler() -> None:
            await shop.insert(1)
            await backend.execute(f"ALTER ROLE {url.username} CONNECTION LIMIT 0")

        response = await handle(handler, db, hooks=True, commit_timeout=0.5)

        assert 500 == response.status
        assert isinstance(response.error, OutcomeUnknownError)
        assert Outcome.UNKNOWN is response.unit.outcome
        assert [] == response.hooks
        assert [1] == await shop.items(backend)
        assert [0, 0] == checked_out(db)
        await db.dispose()


@on(*SERVERS)
@pytest.mark.parametrize("natively", [True, False])
async def test_statement_that_cannot_be_stopped(
    backend: ServerBackend, *, natively: bool
) -> None:
    """A cancellation is delivered also if nobody can stop its statement."""
    async with limited(backend) as db:
        scope = anyio.CancelScope()

        async def wait() -> None:
            with scope:
                await writer().execute(backend.slow)

        async def handler() -> None:
            task = asyncio.create_task(wait())
            await eventually(1, lambda: backend.running(backend.slow))
            (task if natively else scope).cancel()
            await asyncio.wait((task,))
            assert natively == task.cancelled()
            assert scope.cancelled_caught != natively

        response = await handle(handler, db)

        assert not isinstance(response.error, AssertionError)
        assert [0, 0] == checked_out(db)
