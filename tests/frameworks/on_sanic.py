from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from sanic import Sanic
from sanic.exceptions import SanicException
from sanic.response import text

from asgi_uow import UnitOfWorkMiddleware

if TYPE_CHECKING:
    from sanic import HTTPResponse, Request

    from asgi_uow import Database
    from asgi_uow._asgi import ASGIApp
    from tests.frameworks.conformance import (
        Handler,
        OnMessage,
        Reply,
        Site,
        SyncHandler,
    )

NUMBERS = itertools.count()  # names have to differ

# Without it a second application in one process cannot start.
# https://github.com/sanic-org/sanic/blob/v25.12.1/sanic/touchup/service.py
Sanic.test_mode = True


class SanicAdapter:
    """Sanic in ASGI mode, which answers what its handlers and `send` raise."""

    answers_failures = True

    def application(self, site: Site, *databases: Database, **options: Any) -> ASGIApp:
        app = Sanic(f"test-{next(NUMBERS)}", configure_logging=False)
        for path, handler in site.routes.items():
            app.add_route(_endpoint(handler), path, name=f"route{next(NUMBERS)}")
        for path, sync_handler in site.sync_routes.items():
            app.add_route(_sync(sync_handler), path, name=f"route{next(NUMBERS)}")
        for path, on_message in site.websockets.items():
            app.add_websocket_route(_converse(on_message), path)
        return UnitOfWorkMiddleware(app, *databases, **options) if databases else app

    def abort(self, status: int) -> Exception:
        return SanicException(status_code=status)


def _endpoint(handler: Handler) -> Any:
    async def endpoint(request: Request) -> HTTPResponse | None:
        reply = await handler()
        if reply.chunks is not None:
            await _stream(request, reply)
        elif reply.background is not None:
            await _send_and_go_on(request, reply)
        else:
            return text(reply.text, reply.status, reply.headers)
        return None

    return endpoint


async def _stream(request: Request, reply: Reply) -> None:
    """Send the start first: what a handler does before is not the response's yet."""
    assert reply.chunks is not None
    response: Any = await request.respond(status=reply.status, headers=reply.headers)
    await response.send("")
    async for chunk in reply.chunks:
        await response.send(chunk)
    await response.eof()


async def _send_and_go_on(request: Request, reply: Reply) -> None:
    """Start the task when the response has been sent; `add_task` does not wait."""
    response: Any = await request.respond(text(reply.text, reply.status, reply.headers))
    await response.eof()
    assert reply.background is not None
    request.app.add_task(reply.background())


def _sync(handler: SyncHandler) -> Any:
    def endpoint(_: Request) -> HTTPResponse:
        reply = handler()
        return text(reply.text, reply.status, reply.headers)

    return endpoint


def _converse(on_message: OnMessage) -> Any:
    async def endpoint(_: Request, websocket: Any) -> None:
        while (message := await websocket.recv()) is not None:
            await websocket.send(await on_message(message))

    return endpoint
