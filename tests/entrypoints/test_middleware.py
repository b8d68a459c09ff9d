"""The ASGI shell, beyond the promises."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

import asgi_uow as uow
from asgi_uow import Database
from asgi_uow.errors import CommitFailedError, NoUnitOfWorkError, UnitOfWorkClosedError
from tests.support import shop
from tests.support.asgi import (
    BODY,
    START,
    endpoint,
    handle,
    http_scope,
    no_body,
    request,
    respond,
    serve,
)
from tests.support.databases import DRIVERS, on

if TYPE_CHECKING:
    from asgi_uow._asgi import Message, Receive, Scope, Send
    from tests.servers.backend import Backend, MariaDBBackend

pytestmark = on("aiosqlite")


async def nothing() -> None:
    """Handle a request without touching anything."""


# Mounting


def test_needs_a_database() -> None:
    """The middleware without a database says what is missing."""
    with pytest.raises(TypeError, match="needs a Database, not NoneType"):
        uow.UnitOfWorkMiddleware(endpoint(nothing))


def test_async_rule() -> None:
    """A rule that would have to be awaited is refused before the first request."""

    async def rule(status: int, headers: object) -> bool:
        return bool(status and headers)  # pragma: no cover  # nobody asks it

    with pytest.raises(TypeError, match="cannot be async"):
        uow.UnitOfWorkMiddleware(
            endpoint(nothing),
            Database(None),
            commit_when=rule,  # type: ignore[arg-type]
        )


async def test_mounted_twice_passes_through(db: Database, backend: Backend) -> None:
    """The inner of two middlewares for the same database leaves it to the outer."""
    units: list[uow.UnitOfWork] = []

    async def handler() -> None:
        units.append(uow.current_unit_of_work())
        await shop.insert(1)

    inner = uow.UnitOfWorkMiddleware(endpoint(handler), db)

    async def between(scope: Scope, receive: Receive, send: Send) -> None:
        units.append(uow.current_unit_of_work())
        await inner(scope, receive, send)

    await serve(between, db)

    assert units[0] is units[1]
    assert [1] == await shop.items(backend)


async def test_inner_middleware_with_another_database(
    db: Database, backend: Backend, other: Database, mariadb: MariaDBBackend
) -> None:
    """An inner middleware for another database has a unit of its own.

    Sessions of the outer database are still reached through it.
    """

    async def handler() -> None:
        assert uow.current_unit_of_work().databases == (other,)
        await shop.insert(1)
        await shop.insert(2, db)

    inner = uow.UnitOfWorkMiddleware(endpoint(handler), other)
    scope = http_scope()

    response = await request(uow.UnitOfWorkMiddleware(inner, db), scope=scope)

    assert 200 == response.status
    assert [1] == await shop.items(mariadb)
    assert [2] == await shop.items(backend)
    assert scope["asgi_uow.unit"] is None


@on("asyncmy")
async def test_nested_request_with_its_own_scope_is_its_own_unit(
    db: Database, backend: Backend
) -> None:
    """A request made in process, inside a handler, has an outcome of its own."""

    async def outer() -> None:
        await handle(lambda: shop.insert(1), db)
        await shop.insert(2)

    await handle(outer, db, status=500)

    assert [1] == await shop.items(backend)


async def test_copied_scope_after_the_decision_is_a_new_unit(
    db: Database, backend: Backend
) -> None:
    """A scope used again once its unit is decided does not get that unit."""
    inner = uow.UnitOfWorkMiddleware(endpoint(lambda: shop.insert(2)), db)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await shop.insert(1)
        await respond(send)
        await request(inner, scope=dict(scope))

    await serve(app, db)

    assert [1, 2] == await shop.items(backend)


async def test_websocket_has_no_unit(db: Database, backend: Backend) -> None:
    """A websocket handler has no unit, also in a leaked context, and opens its own."""
    refused: list[str] = []

    async def websocket(scope: Scope, receive: Receive, send: Send) -> None:
        with pytest.raises(NoUnitOfWorkError, match="once per message") as caught:
            uow.current_session()
        refused.append(str(caught.value))
        async with db:
            await shop.insert(1)

    app = uow.UnitOfWorkMiddleware(websocket, db)

    await handle(lambda: app({"type": "websocket"}, no_body, _forget), db)

    assert 1 == len(refused)
    assert [1] == await shop.items(backend)


async def _forget(message: Message) -> None:
    """Drop a message."""


@on("asyncmy")
@pytest.mark.parametrize("outcome", ["complete", "failed"])
async def test_engines_are_closed_after_the_lifespan(
    db: Database, outcome: str
) -> None:
    """Engines made by from_url are disposed of before the server hears of the end."""
    counts: list[int] = []

    async def lifespan(scope: Scope, receive: Receive, send: Send) -> None:
        with pytest.raises(NoUnitOfWorkError):
            uow.current_session()
        await send({"type": "lifespan.startup.complete"})
        async with db:
            await shop.insert(1)
        await send({"type": f"lifespan.shutdown.{outcome}"})

    async def server(message: Message) -> None:
        counts.append(db.engine.sync_engine.pool.checkedin())  # type: ignore[attr-defined]

    app = uow.UnitOfWorkMiddleware(lifespan, db)
    await app({"type": "lifespan"}, no_body, server)

    assert [0, 0] == counts


async def test_engines_of_the_user_are_left_open(db: Database) -> None:
    """An engine that was passed in is closed by whoever made it."""
    mine = Database(db.engine)

    async def lifespan(scope: Scope, receive: Receive, send: Send) -> None:
        async with mine:
            await shop.insert(1)
            await mine.read.execute("SELECT 1")
        await send({"type": "lifespan.shutdown.complete"})

    await uow.UnitOfWorkMiddleware(lifespan, mine)(
        {"type": "lifespan"}, no_body, _forget
    )

    assert 1 == db.engine.sync_engine.pool.checkedin()  # type: ignore[attr-defined]
    assert 0 == mine.read_engine.sync_engine.pool.checkedin()  # type: ignore[attr-defined]


async def test_other_messages_pass_untouched(db: Database) -> None:
    """Hints before the start, trailers after it: nothing else is looked at."""
    sent = [
        {"type": "http.response.debug", "info": {}},
        {"type": "http.response.early_hint", "links": [b"</a.css>"]},
        {"type": START, "status": 200, "headers": [], "trailers": True},
        {"type": "http.response.pathsend", "path": "/tmp/file"},
        {"type": "http.response.trailers", "headers": []},
    ]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in sent:
            await send(message)

    response = await serve(app, db)

    assert sent == response.messages


# commit_when


async def test_the_request_is_left_to_the_application(db: Database) -> None:
    """Whoever calls `receive` fails the test, so no test passes where we do."""

    async def reading(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()

    with pytest.raises(pytest.fail.Exception, match="only an application may"):
        await serve(reading, db)


async def test_broken_commit_when_is_a_failure(db: Database, backend: Backend) -> None:
    """A commit_when that raises keeps nothing and answers an error."""

    def commit_when(status: int, headers: object) -> bool:
        raise ZeroDivisionError

    response = await handle(lambda: shop.insert(1), db, commit_when=commit_when)

    assert 500 == response.status
    assert isinstance(response.error, CommitFailedError)
    assert isinstance(response.error.__cause__, ZeroDivisionError)
    assert [] == await shop.items(backend)


async def test_commit_when_sees_status_and_headers(
    db: Database, backend: Backend
) -> None:
    """commit_when decides by what the response says; the response stays."""
    seen: list[object] = []

    def commit_when(status: int, headers: list[tuple[bytes, bytes]]) -> bool:
        seen.append((status, headers))
        return False

    response = await handle(lambda: shop.insert(1), db, commit_when=commit_when)

    assert [(200, [])] == seen
    assert 200 == response.status
    assert [] == await shop.items(backend)


# Starts, and when they come


async def test_no_hook_can_be_registered_after_the_decision(db: Database) -> None:
    """Registering after the start is refused: the hook would never run."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send)
        with pytest.raises(UnitOfWorkClosedError):
            uow.after_commit(print)

    response = await serve(app, db)

    assert response.error is None


async def test_after_response_runs_when_the_app_has_returned(db: Database) -> None:
    """after_response comes after the body and after the app's own last word."""
    order: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        uow.after_response(order.append, "after_response")
        uow.after_commit(order.append, "after_commit")
        await respond(send)
        order.append("app returns")

    await serve(app, db)

    assert ["after_commit", "app returns", "after_response"] == order


async def test_second_start_while_the_first_is_decided(
    db: Database, backend: Backend
) -> None:
    """It waits for the decision, and shares its fate."""
    deciding, go_on = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        deciding.set()
        await go_on.wait()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await shop.insert_orphan()
        uow.before_commit(hold)
        first = asyncio.create_task(respond(send, 201))
        await deciding.wait()
        others = [asyncio.create_task(respond(send, 200)) for _ in range(2)]
        await asyncio.wait(others, timeout=0.01)
        go_on.set()
        for task in (first, *others):
            with pytest.raises(CommitFailedError):
                await task

    response = await serve(app, db)

    assert 500 == response.status
    assert [START, BODY] == response.types
    assert [] == await shop.items(backend)


async def test_application_that_ends_while_its_response_is_decided(
    db: Database, backend: Backend
) -> None:
    """The unit is ended once, by the response that another task is sending."""
    deciding, go_on = asyncio.Event(), asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def hold() -> None:
        deciding.set()
        await go_on.wait()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await shop.insert(1)
        uow.before_commit(hold)
        tasks.append(asyncio.create_task(respond(send, 201)))
        await deciding.wait()
        asyncio.get_running_loop().call_soon(go_on.set)

    response = await serve(app, db)
    await tasks[0]

    assert 201 == response.status
    assert [1] == await shop.items(backend)


@on(*DRIVERS)
@pytest.mark.parametrize("raises", [True, False])
async def test_start_after_the_application_has_returned(
    db: Database, backend: Backend, raises: bool
) -> None:
    """A task that answers for an application that is gone cannot claim a success."""
    tasks: list[asyncio.Task[None]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await shop.insert(1)
        tasks.append(asyncio.create_task(respond(send)))
        if raises:
            raise LookupError

    response = await serve(app, db)

    with pytest.raises(UnitOfWorkClosedError, match="sending a response"):
        await tasks[0]
    assert [] == response.types
    assert [] == await shop.items(backend)


async def test_error_after_the_application_has_returned(db: Database) -> None:
    """What claims no success passes."""
    tasks: list[asyncio.Task[None]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await shop.insert(1)
        tasks.append(asyncio.create_task(respond(send, 500)))

    response = await serve(app, db)
    await tasks[0]

    assert [START, BODY] == response.types
