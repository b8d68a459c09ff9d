"""An application with the inspector: what it does is known, step by step."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from asgi_uow import (
    Database,
    UnitOfWorkMiddleware,
    after_commit,
    current_session,
    savepoint,
    set_rollback_only,
)
from asgi_uow.inspector import Inspector
from asgi_uow.observers import HeldIdle
from tests.support.asgi import respond

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from starlette.requests import Request

    from asgi_uow._asgi import Receive, Scope, Send
    from asgi_uow.observers import Event

CARD = "4111-1111-1111-1111"
ATTACK = "<script>document.title = location</script>"
SELECT = "SELECT card FROM items WHERE id = :id"


class Site:
    """A table of items, and handlers that work on it."""

    def __init__(self, url: str) -> None:
        self.db = Database.from_url(url)
        self.idle = asyncio.Event()
        options: Any = {"observers": [self.see], "held_idle": 0.02}
        self.app = Starlette(
            routes=[
                Route("/items", self.add, methods=["POST"]),
                Route("/report", self.report),
                Mount("/raw", attack),
                Mount("/uow", Inspector(self.db, debug=True)),
            ],
            middleware=[Middleware(UnitOfWorkMiddleware, self.db, **options)],
            lifespan=self.lifespan,
        )

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncGenerator[None]:
        async with self.db.engine.begin() as connection:
            create = "CREATE TABLE items (id INTEGER PRIMARY KEY, card VARCHAR(40))"
            await connection.exec_driver_sql(create)
        yield
        await self.db.dispose()

    def see(self, event: Event) -> None:
        if isinstance(event, HeldIdle):
            self.idle.set()

    async def add(self, request: Request) -> JSONResponse:
        """Write what nobody may see."""
        insert = "INSERT INTO items (card) VALUES (:card)"
        await current_session().execute(insert, card=request.query_params["card"])
        after_commit(send_mail)
        return JSONResponse({}, 201)

    async def report(self, _: Request) -> JSONResponse:
        """Ask often for the same, be idle, undo a part, and fail."""
        session = current_session()
        for number in range(12):
            await session.execute(SELECT, id=number)
        await self.idle.wait()
        async with savepoint() as part:
            await session.execute("DELETE FROM items")
            await part.rollback()
        set_rollback_only(f"a report of {ATTACK}")
        return JSONResponse({})


async def send_mail() -> None:
    """Do nothing: a bar in the picture."""


async def attack(scope: Scope, _: Receive, send: Send) -> None:
    """Have a path, and a statement, with HTML."""
    session = current_session()
    await session.execute(f"SELECT id AS `{ATTACK}` FROM items")
    await respond(send)
