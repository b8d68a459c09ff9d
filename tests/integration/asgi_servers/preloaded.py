"""An application that uses its database before its server forks, and in a thread."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from asgi_uow import Database, UnitOfWorkMiddleware, current_read_session, unit_of_work
from tests.support import shop

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

URL = os.environ["SITE_DATABASE_URL"]
db = Database.from_url(URL, pool_size=1, max_overflow=1, pool_timeout=30.0)


async def insert_aside(number: int) -> None:
    async with unit_of_work(db, independent=True):
        await shop.insert(number)
    async with unit_of_work(db, independent=True):
        await db.read.execute(shop.SELECT)


class Background:
    """A thread of this process with an event loop of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()


background: list[Background] = []


async def insert(request: Request) -> Response:
    """Insert one item in the other loop and one here; others do so at the same time."""
    if not background:
        background.append(Background())
    number = int(request.path_params["number"])
    aside = insert_aside(number + 1000)
    done = asyncio.run_coroutine_threadsafe(aside, background[0].loop)
    await current_read_session().execute(shop.SELECT)
    await asyncio.wrap_future(done)
    await shop.insert(number)
    return JSONResponse({"process": os.getpid(), "parent": os.getppid()})


asyncio.run(insert_aside(0))
routes = Starlette(routes=[Route("/{number:int}", insert)])
app = UnitOfWorkMiddleware(routes, db)
