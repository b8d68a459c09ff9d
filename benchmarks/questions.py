"""One function per question; every contestant is an ASGI application."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from asgi_uow import (
    Database,
    UnitOfWorkMiddleware,
    after_commit,
    current_read_session,
    current_session,
)

from .measure import compare

if TYPE_CHECKING:
    from sqlalchemy import TextClause
    from sqlalchemy.ext.asyncio import AsyncEngine

    from asgi_uow._asgi import ASGIApp, Message, Receive, Scope, Send

    from .measure import Contestant, Result

SELECT = text("SELECT name FROM thing WHERE id = 1")
INSERT = text("INSERT INTO note (content) VALUES ('something to keep')")
HOOKS = 10


async def request_without_database() -> list[Result]:
    """Compare with a middleware that does nothing, around a handler that answers."""

    async def handler(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001
        await _answer(send)

    database = Database.from_url("sqlite:///never-opened.db")
    return await compare(
        "a request without database",
        {
            "no-op middleware": _requests(_no_op(handler)),
            "asgi-uow": _requests(UnitOfWorkMiddleware(handler, database)),
        },
        calls=100,
    )


async def empty_hook() -> list[Result]:
    """Compare registering and running an empty hook with a bare awaited call.

    In a request of 10; each bears a tenth of what that costs without them.
    """

    async def empty() -> None:
        pass

    def empty_sync() -> None:
        pass

    async def awaits(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001
        for _ in range(HOOKS):
            await empty()
        await _answer(send)

    async def registers(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001
        for _ in range(HOOKS):
            after_commit(empty)
        await _answer(send)

    async def registers_sync(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001
        for _ in range(HOOKS):
            after_commit(empty_sync)
        await _answer(send)

    database = Database.from_url("sqlite:///never-opened.db")
    handlers = {
        "awaited call": awaits,
        "async hook": registers,
        "hook in a thread": registers_sync,
    }
    return await compare(
        f"an empty hook, one of {HOOKS}",
        {
            name: _requests(UnitOfWorkMiddleware(handler, database))
            for name, handler in handlers.items()
        },
        calls=20,
        parts=HOOKS,
    )


async def one_select(name: str, url: str) -> list[Result]:
    """Compare a SELECT on the read session with `sessionmaker.begin()`."""

    async def handler(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001
        await current_read_session().execute(SELECT)
        await _answer(send)

    return await _against_own_code(f"one SELECT on {name}", url, handler, SELECT)


async def one_insert(name: str, url: str) -> list[Result]:
    """Compare an INSERT on the write session with `sessionmaker.begin()`."""

    async def handler(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001
        await current_session().execute(INSERT)
        await _answer(send)

    return await _against_own_code(f"one INSERT on {name}", url, handler, INSERT)


async def _against_own_code(
    question: str,
    url: str,
    handler: ASGIApp,
    statement: TextClause,
) -> list[Result]:
    """Let all of them work on one database; a SQLite file is in WAL mode for all."""
    plain, pinging = (
        create_async_engine(url, pool_pre_ping=ping) for ping in (False, True)
    )
    database = Database.from_url(url)
    try:
        return await compare(
            question,
            {
                "sessionmaker.begin()": _requests(_own_code(plain, statement)),
                "with pool_pre_ping": _requests(_own_code(pinging, statement)),
                "asgi-uow": _requests(UnitOfWorkMiddleware(handler, database)),
            },
            calls=5,
        )
    finally:
        for each in (plain, pinging, database):
            await each.dispose()


def _own_code(engine: AsyncEngine, statement: TextClause) -> ASGIApp:
    sessions = async_sessionmaker(engine, expire_on_commit=False)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001
        async with sessions.begin() as session:
            await session.execute(statement)
        await _answer(send)

    return app


def _no_op(app: ASGIApp) -> ASGIApp:
    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        async def forward(message: Message) -> None:
            await send(message)

        await app(scope, receive, forward)

    return middleware


def _requests(app: ASGIApp) -> Contestant:
    async def request() -> None:
        await app({"type": "http"}, _receive, _send)

    return request


async def _answer(send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"done"})


async def _receive() -> Message:
    return {"type": "http.request", "body": b""}


async def _send(message: Message) -> None:
    pass
