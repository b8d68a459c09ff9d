"""What goes wrong in every shop one day, here on demand."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool
from starlette.responses import JSONResponse
from starlette.routing import Route

from asgi_uow import current_read_session, current_session

from .orders import place_order

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from typing import NoReturn

    from sqlalchemy import URL
    from sqlalchemy.ext.asyncio import AsyncConnection
    from starlette.requests import Request


@asynccontextmanager
async def from_outside(url: URL) -> AsyncGenerator[AsyncConnection]:
    """Open a connection that no pool and no unit of work knows."""
    engine = create_async_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        yield connection


async def crash(request: Request) -> NoReturn:
    """Stumble after the INSERT."""
    placed = await place_order(await request.json())
    message = f"order {placed.id} was placed, but then"
    raise RuntimeError(message)


async def fail_commit(request: Request) -> JSONResponse:
    """Answer 201, although COMMIT is going to fail; the handler cannot know.

    The order is for a customer whom the deferred foreign key does not find. Where
    there are no deferred keys, the connection is killed just before the response.
    """
    wanted = await request.json()
    bind = current_session().get_bind()
    if bind.dialect.name in {"mysql", "mariadb"}:
        placed = await place_order(wanted)
        await _kill_connection(bind.engine.url)
    else:
        placed = await place_order(wanted | {"customer": "Nobody"})
    return JSONResponse({"order": placed.id}, 201)


async def _kill_connection(url: URL) -> None:
    mine = await current_session().scalar("SELECT CONNECTION_ID()")
    alive = text("SELECT COUNT(*) FROM information_schema.processlist WHERE id = :id")
    async with from_outside(url) as connection:
        await connection.execute(text(f"KILL {mine:d}"))
        while await connection.scalar(alive, {"id": mine}):
            pass


async def write_on_read_session(_: Request) -> JSONResponse:
    """Take the wrong session; it is the database that refuses."""
    await current_read_session().execute("DELETE FROM shop_demo_order")
    return JSONResponse({"orders": "all gone"})


routes = [
    Route("/crash", crash, methods=["POST"]),
    Route("/commit", fail_commit, methods=["POST"]),
    Route("/read-session", write_on_read_session, methods=["POST"]),
]
