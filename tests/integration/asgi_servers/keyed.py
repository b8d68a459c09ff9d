"""An application that works once for each key, which workers of the tests serve.

A handler that a test wants to hold, before or after its COMMIT, connects to a `Gate`
of the test. `SITE_DATABASE_URL` has one or more addresses.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

import asgi_uow as uow
from asgi_uow import Database, Idempotency, Retry, UnitOfWorkMiddleware

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

URLS = os.environ["SITE_DATABASE_URL"].split()
ATTEMPTS = int(os.environ["SITE_ATTEMPTS"])
INSERT = "INSERT INTO works VALUES (:token, :name)"

db = Database.from_url(URLS, pool_size=30)


async def pass_gate(port: int) -> None:
    """Tell a test that this point is reached, wait until it lets go."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await reader.read()
    writer.close()


async def work(request: Request) -> Response:
    """Leave a row with a token of this run; the response has the token, too."""
    name, token = (await request.json())["name"], secrets.token_hex(8)
    await uow.current_session().execute(INSERT, token=token, name=name)
    hold = request.headers.get("x-hold")
    if hold and uow.current_unit_of_work().attempt == 1:
        moment, port = hold.split()
        register = {"before": uow.before_commit, "after": uow.after_commit}[moment]
        register(pass_gate, int(port))
    return JSONResponse({"name": name, "token": token, "process": os.getpid()}, 201)


async def ready(_: Request) -> Response:
    return JSONResponse("ok")


app = UnitOfWorkMiddleware(
    Starlette(routes=[Route("/works", work, methods=["POST"]), Route("/ready", ready)]),
    db,
    idempotency=Idempotency(),
    retry=Retry(attempts=ATTEMPTS) if ATTEMPTS else None,
    hook_timeout=None,
)
