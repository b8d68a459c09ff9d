"""An application under uvicorn: `python -m benchmarks.served CONTESTANT URL PORT`."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any, TypeAlias

import uvicorn
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from asgi_uow import (
    Database,
    UnitOfWorkMiddleware,
    current_read_session,
    current_session,
)

from .apps import INSERT, SELECT

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sqlalchemy import TextClause
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
    from starlette.requests import Request

    Executor: TypeAlias = Callable[[Request, TextClause], Awaitable[object]]

POOL: dict[str, Any] = {"pool_size": 20, "max_overflow": 0}


def by_hand(url: str) -> Starlette:
    sessions = _sessions(_engine(url))

    async def execute(request: Request, statement: TextClause) -> None:  # noqa: ARG001
        async with sessions.begin() as session:
            await session.execute(statement)

    return _site(execute)


def ours(url: str) -> Starlette:
    async def execute(request: Request, statement: TextClause) -> object:  # noqa: ARG001
        session = current_session() if statement is INSERT else current_read_session()
        return await session.execute(statement)

    app = _site(execute)
    app.add_middleware(UnitOfWorkMiddleware, Database.from_url(url, **POOL))
    return app


def context_async(url: str) -> Starlette:
    peer: Any = importlib.import_module("context_async_sqlalchemy")
    database = peer.DBConnect(_engine, _sessions, host=url)

    async def execute(request: Request, statement: TextClause) -> object:  # noqa: ARG001
        session = await peer.db_session(database)
        return await session.execute(statement)

    app = _site(execute)
    app.add_middleware(peer.ASGIHTTPDBSessionMiddleware)
    return app


def advanced_alchemy(url: str) -> Starlette:
    peer: Any = importlib.import_module("advanced_alchemy.extensions.starlette")
    config = peer.SQLAlchemyAsyncConfig(
        engine_instance=_engine(url), commit_mode="autocommit"
    )

    async def execute(request: Request, statement: TextClause) -> object:
        session = alchemy.get_async_session(request)
        return await session.execute(statement)

    app = _site(execute)
    alchemy = peer.AdvancedAlchemy(config, app)
    return app


CONTESTANTS: dict[str, Callable[[str], Starlette]] = {
    "sqlalchemy": by_hand,
    "asgi_uow": ours,
    "context_async_sqlalchemy": context_async,
    "advanced_alchemy": advanced_alchemy,
}
"""By the package they need."""


def _engine(url: str) -> AsyncEngine:
    return create_async_engine(url, **POOL)


def _sessions(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    return async_sessionmaker(engine, expire_on_commit=False)


def _site(execute: Executor) -> Starlette:
    async def insert(request: Request) -> PlainTextResponse:
        await execute(request, INSERT)
        return PlainTextResponse("done")

    async def select(request: Request) -> PlainTextResponse:
        await execute(request, SELECT)
        return PlainTextResponse("done")

    return Starlette(routes=[Route("/insert", insert), Route("/select", select)])


if __name__ == "__main__":
    contestant, url, port = sys.argv[1:]
    uvicorn.run(
        CONTESTANTS[contestant](url),
        port=int(port),
        loop="uvloop",
        http="httptools",
        lifespan="off",
        log_level="warning",
        access_log=False,
    )
