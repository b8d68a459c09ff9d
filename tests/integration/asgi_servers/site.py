"""The application that ASGI servers serve in child processes of the tests.

The URL of its database comes from the environment. A handler that a test wants to
hold connects to a `Gate` of the test, and goes on when the gate opens.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.pool import QueuePool
from sqlalchemy.util import await_only
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute

import asgi_uow as uow
from asgi_uow import Database
from asgi_uow.errors import NoUnitOfWorkError
from tests.support import shop

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.websockets import WebSocket

GATE = "gate"

db = Database.from_url(os.environ["SITE_DATABASE_URL"])
told: dict[str, str] = {}
units: list[object] = []


async def pass_gate(port: int) -> None:
    """Tell a test that this point is reached, wait until it lets go."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        await reader.read()
    finally:
        writer.close()


@event.listens_for(db.engine.sync_engine, "commit")
def hold_commit(connection: Any) -> None:
    """Wait, between the decision and the COMMIT, if the handler has asked for it."""
    port = connection.info.pop(GATE, None)
    if port is not None:
        await_only(pass_gate(port))


async def tell(number: str, what: str) -> None:
    told[number] = what


async def insert(request: Request) -> None:
    """Insert an item, and do what the query asks for."""
    number = request.path_params["number"]
    query = request.query_params
    uow.after_commit(tell, str(number), "committed")
    uow.after_rollback(tell, str(number), "rolled back")
    await shop.insert(number)
    if "broken" in query:
        statement = "UPDATE items SET parent = 404 WHERE id = :number"
        await uow.current_session().execute(statement, number=number)
    if "hold" in query:
        await pass_gate(int(query["hold"]))
    if "hold_commit" in query:
        connection = await uow.current_session().connection()
        connection.info[GATE] = int(query["hold_commit"])


async def item(request: Request) -> Response:
    """Insert an item; say whether the unit was untouched, and nobody else's."""
    unit = uow.current_unit_of_work()
    is_new = unit.state.value == "new" and unit not in units
    units.append(unit)
    await insert(request)
    status = int(request.query_params.get("status", 200))
    return JSONResponse(is_new, status_code=status)


async def stream(request: Request) -> Response:
    """Insert an item and stream what a reader then sees, with the gate in between."""
    await insert(request)
    number = request.path_params["number"]
    port = int(request.query_params["port"])

    async def chunks() -> AsyncIterator[str]:
        yield "kept: "
        count = "SELECT count(*) FROM items WHERE id = :number"
        yield str(await uow.current_read_session().scalar(count, number=number))
        await pass_gate(port)
        yield "."

    return StreamingResponse(chunks(), media_type="text/plain")


async def feed(websocket: WebSocket) -> None:
    """Insert an item per message, in a unit of its own."""
    await websocket.accept()
    async for message in websocket.iter_text():
        try:
            uow.current_session()
        except NoUnitOfWorkError as error:
            async with db:
                await shop.insert(int(message))
            await websocket.send_text(type(error).__name__)


async def state(_: Request) -> Response:
    """Tell what cannot be seen from outside."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    in_use = 0
    for engine in (db.engine, db.read_engine):
        assert isinstance(engine.pool, QueuePool)
        in_use += engine.pool.checkedout()
    return JSONResponse(
        {
            "cancelling": sum(bool(task.cancelling()) for task in tasks),
            "checked_out": in_use,
            "told": told,
        }
    )


async def ready(_: Request) -> Response:
    return PlainTextResponse("ok")


app = Starlette(
    routes=[
        Route("/items/{number:int}", item),
        Route("/streams/{number:int}", stream),
        Route("/state", state),
        Route("/ready", ready),
        WebSocketRoute("/feed", feed),
    ]
)
app.add_middleware(uow.UnitOfWorkMiddleware, db)
