"""The contestants: small ASGI applications that answer the same request."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeAlias

from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from asgi_uow import Database, UnitOfWorkMiddleware
from asgi_uow.inspector import Inspector

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AsyncExitStack

    from sqlalchemy import TextClause
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
    from starlette.requests import Request

    from asgi_uow._asgi import ASGIApp, Message, Receive, Scope, Send

    Maker: TypeAlias = Callable[[str, AsyncExitStack], ASGIApp]
    """Makes an application on the database of a URL; the stack closes its engines."""

P = ParamSpec("P")
SELECT = text("SELECT name FROM thing WHERE id = 1")
INSERT = text("INSERT INTO note (content) VALUES ('something to keep')")


class NoOp:
    """A middleware that passes everything on."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def forward(message: Message) -> None:
            await send(message)

        await self.app(scope, receive, forward)


def handler(work: Callable[[Scope], Awaitable[object]]) -> ASGIApp:
    """Return an application that works, then answers."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001
        await work(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    return app


def unused_database() -> Database:
    return Database.from_url("sqlite:///never-opened.db")


def in_our_middleware(work: Callable[[Scope], Awaitable[object]]) -> ASGIApp:
    return UnitOfWorkMiddleware(handler(work), unused_database())


def on_starlette(
    middleware: Callable[Concatenate[ASGIApp, P], ASGIApp],
    *args: P.args,
    **kwargs: P.kwargs,
) -> ASGIApp:
    async def endpoint(request: Request) -> PlainTextResponse:  # noqa: ARG001
        return PlainTextResponse("done")

    app = Starlette(routes=[Route("/", endpoint)])
    app.add_middleware(middleware, *args, **kwargs)
    return app


def by_hand(
    statement: TextClause,
    url: str,
    stack: AsyncExitStack,
    *,
    sends_commit: bool = True,
    times: int = 1,
    **engine_options: Any,
) -> ASGIApp:
    """Make the code people write, on an engine with these options."""
    engine = engine_of(url, stack, **engine_options)
    if not sends_commit:
        engine.dialect.do_commit = _send_nothing  # type: ignore[method-assign]
    sessions = async_sessionmaker(engine, expire_on_commit=False)

    async def execute(scope: Scope) -> None:  # noqa: ARG001
        async with sessions.begin() as session:
            for _ in range(times):
                await session.execute(statement)

    return handler(execute)


def _send_nothing(dbapi_connection: object) -> None:
    pass


def ours(
    statement: TextClause,
    session: Callable[[], AsyncSession],
    url: str,
    stack: AsyncExitStack,
    *,
    times: int = 1,
    holds: bool = False,
    is_inspected: bool = False,
    **options: Any,
) -> ASGIApp:
    """Make the same with our middleware; one that `holds` keeps its connection."""
    database = Database.from_url(url)
    if is_inspected:
        inspector = Inspector(database, debug=True)
        stack.enter_context(nullcontext(inspector))  # it lives as long as that
    stack.push_async_callback(database.dispose)

    async def execute(scope: Scope) -> None:  # noqa: ARG001
        if holds:
            await session().connection()
        for _ in range(times):
            await session().execute(statement)

    return UnitOfWorkMiddleware(handler(execute), database, **options)


def engine_of(url: str, stack: AsyncExitStack, **options: Any) -> AsyncEngine:
    engine = create_async_engine(url, **options)
    stack.push_async_callback(engine.dispose)
    return engine
