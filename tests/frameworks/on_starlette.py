from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import BaseRoute, Route, WebSocketRoute

from asgi_uow import UnitOfWorkMiddleware

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.websockets import WebSocket

    from asgi_uow import Database
    from asgi_uow._asgi import ASGIApp
    from tests.frameworks.conformance import (
        Handler,
        OnMessage,
        Reply,
        Site,
        SyncHandler,
    )


def respond(reply: Reply) -> Response:
    """Make the response of Starlette, or FastAPI, for a reply."""
    background = reply.background and BackgroundTask(reply.background)
    if reply.chunks is not None:
        return StreamingResponse(reply.chunks, reply.status, reply.headers)
    return PlainTextResponse(reply.text, reply.status, reply.headers, None, background)


async def converse(websocket: WebSocket, on_message: OnMessage) -> None:
    """Answer every message, with Starlette's websocket or FastAPI's."""
    await websocket.accept()
    async for text in websocket.iter_text():
        await websocket.send_text(await on_message(text))


class StarletteAdapter:
    answers_failures = False

    def application(self, site: Site, *databases: Database, **options: Any) -> ASGIApp:
        routes: list[BaseRoute] = [
            *(Route(path, _endpoint(each)) for path, each in site.routes.items()),
            *(Route(path, _sync(each)) for path, each in site.sync_routes.items()),
            *(
                WebSocketRoute(path, _converse(each))
                for path, each in site.websockets.items()
            ),
        ]
        app = Starlette(routes=routes)
        if databases:
            app.add_middleware(UnitOfWorkMiddleware, *databases, **options)
        return app

    def abort(self, status: int) -> Exception:
        return HTTPException(status)


def _endpoint(handler: Handler) -> Any:
    async def endpoint(_: Request) -> Response:
        return respond(await handler())

    return endpoint


def _sync(handler: SyncHandler) -> Any:
    def endpoint(_: Request) -> Response:
        return respond(handler())

    return endpoint


def _converse(on_message: OnMessage) -> Any:
    async def endpoint(websocket: WebSocket) -> None:
        await converse(websocket, on_message)

    return endpoint
