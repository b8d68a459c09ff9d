"""The contestants: small ASGI applications that answer the same request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Concatenate, ParamSpec

from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from asgi_uow import (
    Database,
    UnitOfWorkMiddleware,
    after_commit,
    current_read_session,
    current_session,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AsyncExitStack

    from sqlalchemy import TextClause
    from starlette.requests import Request

    from asgi_uow._asgi import ASGIApp, Message, Receive, Scope, Send

P = ParamSpec("P")
SELECT = text("SELECT name FROM thing WHERE id = 1")
INSERT = text("INSERT INTO note (content) VALUES ('something to keep')")
HOOKS = 10


class NoOp:
    """A middleware that passes everything on."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def forward(message: Message) -> None:
            await send(message)

        await self.app(scope, receive, forward)


async def answer(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"done"})


def ours(app: ASGIApp) -> UnitOfWorkMiddleware:
    return UnitOfWorkMiddleware(app, unused())


def unused() -> Database:
    return Database.from_url("sqlite:///never-opened.db")


def starlette(
    middleware: Callable[Concatenate[ASGIApp, P], ASGIApp],
    *args: P.args,
    **kwargs: P.kwargs,
) -> Starlette:
    """Return an application with one route and one middleware."""

    async def endpoint(request: Request) -> PlainTextResponse:  # noqa: ARG001
        return PlainTextResponse("done")

    app = Starlette(routes=[Route("/", endpoint)])
    app.add_middleware(middleware, *args, **kwargs)
    return app


def our_select(url: str, stack: AsyncExitStack) -> ASGIApp:
    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        await current_read_session().execute(SELECT)
        await answer(scope, receive, send)

    return UnitOfWorkMiddleware(handler, _database(url, stack))


def our_insert(url: str, stack: AsyncExitStack) -> ASGIApp:
    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        await current_session().execute(INSERT)
        await answer(scope, receive, send)

    return UnitOfWorkMiddleware(handler, _database(url, stack))


def _database(url: str, stack: AsyncExitStack) -> Database:
    database = Database.from_url(url)
    stack.push_async_callback(database.dispose)
    return database


def by_hand(
    statement: TextClause,
    *,
    sends_commit: bool = True,
    **engine_options: object,
) -> Callable[[str, AsyncExitStack], ASGIApp]:
    """Return what makes the code people write, on an engine with these options."""

    def make(url: str, stack: AsyncExitStack) -> ASGIApp:
        engine = create_async_engine(url, **engine_options)
        stack.push_async_callback(engine.dispose)
        if not sends_commit:
            engine.dialect.do_commit = _send_nothing  # type: ignore[method-assign, assignment]
        sessions = async_sessionmaker(engine, expire_on_commit=False)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            async with sessions.begin() as session:
                await session.execute(statement)
            await answer(scope, receive, send)

        return app

    return make


def _send_nothing(connection: object) -> None:
    pass


async def empty() -> None:
    pass


def empty_sync() -> None:
    pass


async def awaits(scope: Scope, receive: Receive, send: Send) -> None:
    for _ in range(HOOKS):
        await empty()
    await answer(scope, receive, send)


async def registers(scope: Scope, receive: Receive, send: Send) -> None:
    for _ in range(HOOKS):
        after_commit(empty)
    await answer(scope, receive, send)


async def registers_sync(scope: Scope, receive: Receive, send: Send) -> None:
    for _ in range(HOOKS):
        after_commit(empty_sync)
    await answer(scope, receive, send)
