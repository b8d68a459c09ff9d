"""`asgi_uow.sanic.setup`: its arguments, and the servers it refuses."""

from __future__ import annotations

import asyncio
import itertools
import ssl
from contextlib import asynccontextmanager
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from sanic import Request, Sanic, text
from sanic.exceptions import ServiceUnavailable

import asgi_uow as uow
from asgi_uow import Database
from asgi_uow.errors import CommitFailedError, ConfigurationError, UnitOfWorkFailedError
from asgi_uow.observers import UnitFinished
from asgi_uow.sanic import setup
from tests.servers.process import HOST, free_port
from tests.support import shop
from tests.support.databases import checked_out, on, shop_database
from tests.support.observer import Events

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from sanic import HTTPResponse

    from tests.servers import Backend, PostgreSQLBackend

pytestmark = on("aiosqlite")

KEYWORD_ONLY = Parameter.KEYWORD_ONLY
NUMBERS = itertools.count()  # names have to differ


@pytest.fixture(autouse=True)
def several_applications(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one process start several applications, one after the other."""
    monkeypatch.setattr(Sanic, "test_mode", True)


@pytest.fixture
def app() -> Sanic[Any, Any]:
    return Sanic(f"setup-{next(NUMBERS)}", configure_logging=False)


@asynccontextmanager
async def serving(app: Sanic[Any, Any]) -> AsyncGenerator[httpx.AsyncClient]:
    """Run Sanic's own server in this process."""
    port = free_port()
    server: Any = await app.create_server(HOST, port, return_asyncio_server=True)
    await server.startup()
    await server.before_start()
    try:
        async with httpx.AsyncClient(base_url=f"http://{HOST}:{port}") as client:
            yield client
    finally:
        await server.close()
        await server.after_stop()


async def insert(_: Request[Any, Any]) -> HTTPResponse:
    await shop.insert(1)
    return text("ok", headers={"X-Mine": "yes"})


async def test_several_databases(
    db: Database, backend: Backend, postgresql: PostgreSQLBackend, app: Sanic[Any, Any]
) -> None:
    """One unit serves all; the first is the default and is what `setup` gives."""
    async with shop_database(postgresql) as other:

        async def handler(request: Request[Any, Any]) -> HTTPResponse:
            assert (db, other) == uow.current_unit_of_work().databases
            await uow.current_session(other).execute(
                "INSERT INTO items (id) VALUES (2)"
            )
            return await insert(request)

        app.add_route(handler, "/")
        assert db is setup(app, db, other)
        async with serving(app) as client:
            assert 200 == (await client.get("/")).status_code

        assert [[1], [2]] == [await shop.items(each) for each in (backend, postgresql)]
        assert [0] * 4 == checked_out(db, other)
        assert not hasattr(app.ctx, "db")


async def test_options(db: Database, backend: Backend, app: Sanic[Any, Any]) -> None:
    """`commit_when` sees the response as the middleware's does; observers are told."""
    seen: list[object] = []
    events = Events()

    def commit_when(status: int, headers: list[tuple[bytes, bytes]]) -> bool:
        seen.append((status, sorted(headers)))
        return False

    async def handler(request: Request[Any, Any]) -> HTTPResponse:
        settings = uow.current_unit_of_work().options
        seen.append((settings.commit_timeout, settings.hook_timeout))
        return await insert(request)

    app.add_route(handler, "/")
    setup(
        app,
        db,
        commit_when=commit_when,
        observers=[events],
        commit_timeout=1.0,
        hook_timeout=2.0,
    )
    async with serving(app) as client:
        assert 200 == (await client.get("/")).status_code

    type_ = (b"content-type", b"text/plain; charset=utf-8")
    assert [(1.0, 2.0), (200, [type_, (b"x-mine", b"yes")])] == seen
    assert [UnitFinished] == list(map(type, events.results))
    assert [] == await shop.items(backend)


async def test_what_is_told_of_a_request(db: Database, app: Sanic[Any, Any]) -> None:
    """Events name the method and the route, and the header says what took how long."""
    events = Events()

    async def handler(request: Request[Any, Any], number: int) -> HTTPResponse:
        assert number == 7
        return await insert(request)

    app.add_route(handler, "/items/<number:int>")
    setup(app, db, observers=[events], server_timing=True, held_idle=None)
    async with serving(app) as client:
        response = await client.get("/items/7?token=secret")
    told = events.only(UnitFinished)
    assert ("GET", "/items/<number:int>") == (told.method, told.path)
    assert 1 == told.statements.count
    assert response.headers["server-timing"].startswith("pool;dur=")


def test_options_are_those_of_the_middleware() -> None:
    """Only who answers a failure is Sanic's to say."""
    options, others = (
        {name for name, each in found.parameters.items() if each.kind is KEYWORD_ONLY}
        for found in (signature(uow.UnitOfWorkMiddleware), signature(setup))
    )
    assert {"error_app"} == options ^ others


@pytest.mark.parametrize("streams", [True, False])
async def test_causal_reads(
    streams: bool, postgresql: PostgreSQLBackend, app: Sanic[Any, Any]
) -> None:
    """A client that wrote gets a token beside other cookies, and brings it back."""
    brought: list[bool] = []

    async def write(request: Request[Any, Any]) -> HTTPResponse | None:
        await shop.insert(len(brought))
        response: Any = text("ok")
        response.add_cookie("mine", "1", secure=False)
        if streams:
            response = await request.respond(response)
            await response.send(end_stream=True)
        return None if streams else response

    async def read(_: Request[Any, Any]) -> HTTPResponse:
        brought.append(bool(uow.current_unit_of_work().must_see.positions))
        return text("ok")

    app.add_route(write, "/", methods=["POST"])
    app.add_route(read, "/")
    async with shop_database(postgresql, read_urls=[postgresql.url]) as db:
        setup(app, db, causal_reads=uow.CausalReads("a secret of many bytes"))
        async with serving(app) as client:
            await client.get("/")
            assert [] == list(client.cookies)
            by_http = await client.post("/")
            assert ["asgi_uow", "mine"] == sorted(client.cookies)
            assert "Secure" not in by_http.headers["set-cookie"]
            await client.get("/", headers={b"x": b"\xff"})
            request = b"GET / HTTP/1.1\r\n\xff: 1\r\nconnection: close\r\n\r\n"
            url = client.base_url
            reader, writer = await asyncio.open_connection(url.host, url.port)
            writer.write(request)
            assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
            writer.close()
            await writer.wait_closed()
            app.config.SERVER_NAME = "https://shop"
            by_https = await client.post("/")
            assert "; Secure" in by_https.headers["set-cookie"]

    assert [False, True, False] == brought


async def test_failure_is_logged(
    db: Database,
    backend: Backend,
    app: Sanic[Any, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What Sanic logs of an exception that it answers itself, it logs of a failure."""

    async def broken(_: Request[Any, Any]) -> HTTPResponse:
        await shop.insert_then_break_commit(backend, 1)
        return text("ok")

    app.add_route(broken, "/")
    setup(app, db, observers=())
    async with serving(app) as client:
        await client.get("/")

    errors = [each.exc_info for each in caplog.records if each.name == "sanic.error"]
    assert [CommitFailedError] == [found and found[0] for found in errors]


async def test_handler_for_everything(
    db: Database, backend: Backend, app: Sanic[Any, Any]
) -> None:
    """An application with an exception handler for everything answers by itself."""

    async def broken(_: Request[Any, Any]) -> HTTPResponse:
        await shop.insert_then_break_commit(backend, 1)
        return text("ok")

    async def everything(_: Request[Any, Any], error: Exception) -> HTTPResponse:
        is_ours = isinstance(error, UnitOfWorkFailedError)
        return text("mine", status=500 + is_ours)

    app.exception(Exception)(everything)
    app.add_route(broken, "/")
    setup(app, db)
    async with serving(app) as client:
        response = await client.get("/")

    assert (501, "mine") == (response.status_code, response.text)
    assert [] == await shop.items(backend)


async def test_success_after_a_cancellation(
    db: Database, backend: Backend, app: Sanic[Any, Any]
) -> None:
    """A handler that answers Sanic's timeout with a success claims what is not so."""
    app.config.RESPONSE_TIMEOUT = 0.1

    async def hang(_: Request[Any, Any]) -> None:
        await shop.insert(1)
        await asyncio.Event().wait()

    async def claim_success(_: Request[Any, Any], __: Exception) -> HTTPResponse:
        return text("ok")

    app.exception(ServiceUnavailable)(claim_success)
    app.add_route(hang, "/")
    setup(app, db)
    async with serving(app) as client:
        response = await client.get("/")

    assert 500 == response.status_code
    assert [] == await shop.items(backend)


async def test_two_tasks_send_first(
    db: Database, backend: Backend, app: Sanic[Any, Any]
) -> None:
    """Of two sends while COMMIT is under way one writes the headers, as in Sanic."""

    async def stream(request: Request[Any, Any]) -> None:
        await shop.insert(1)
        response: Any = await request.respond(content_type="text/plain")
        await asyncio.gather(response.send("one "), response.send("two"))
        await response.eof()

    app.add_route(stream, "/")
    setup(app, db)
    async with serving(app) as client:
        response = await client.get("/")

    assert (200, "one two") == (response.status_code, response.text)
    assert [1] == await shop.items(backend)


def test_database_from_the_configuration(app: Sanic[Any, Any]) -> None:
    """Without a database `DATABASE_*` of `app.config` makes one, `app.ctx.db` too."""
    app.update_config({"DATABASE_URL": "sqlite:///a.db", "DATABASE_POOL_SIZE": "3"})

    db = setup(app)

    assert db is app.ctx.db
    pool: Any = db.engine.sync_engine.pool
    assert 3 == pool.size()


def test_no_configuration(app: Sanic[Any, Any]) -> None:
    """Neither a database nor a configuration: the error names the key."""
    with pytest.raises(ConfigurationError, match="DATABASE_URL is missing"):
        setup(app)


async def test_twice(db: Database, app: Sanic[Any, Any]) -> None:
    """A second call for one application is refused."""
    setup(app, db)
    with pytest.raises(ConfigurationError, match="all databases at once"):
        setup(app, db)


@pytest.mark.parametrize("option", ["retry", "idempotency"])
async def test_what_needs_an_asgi_server(
    db: Database, app: Sanic[Any, Any], option: str
) -> None:
    """Its own server reads a request once: they are refused, not ignored."""
    given = {"retry": uow.Retry(), "idempotency": uow.Idempotency()}[option]
    options: dict[str, Any] = {option: given}
    with pytest.raises(ConfigurationError, match="need an ASGI server"):
        setup(app, db, **options)


async def test_asgi_server(db: Database, app: Sanic[Any, Any]) -> None:
    """Under an ASGI server the start-up fails and names the middleware."""
    app.add_route(insert, "/")
    setup(app, db)
    to_app: asyncio.Queue[object] = asyncio.Queue()
    from_app: asyncio.Queue[Any] = asyncio.Queue()
    for phase in ("startup", "shutdown"):
        to_app.put_nowait({"type": f"lifespan.{phase}"})

    await app({"type": "lifespan"}, to_app.get, from_app.put)

    failed = from_app.get_nowait()
    assert "lifespan.startup.failed" == failed["type"]
    assert "run UnitOfWorkMiddleware(app, db)" in failed["message"]


async def test_http_3(db: Database, app: Sanic[Any, Any]) -> None:
    """HTTP/3 is refused at the start."""
    setup(app, db)
    app.prepare(version=3, ssl=ssl.create_default_context(), single_process=True)

    with pytest.raises(ConfigurationError, match="experimental"):
        await app.ctx.asgi_uow.start(app)
