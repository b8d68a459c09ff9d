from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, HTTPException, WebSocket

from asgi_uow import UnitOfWorkMiddleware
from tests.frameworks.on_starlette import converse, respond

if TYPE_CHECKING:
    from asgi_uow import Database
    from asgi_uow._asgi import ASGIApp
    from tests.frameworks.conformance import Handler, OnMessage, Site, SyncHandler


class FastAPIAdapter:
    answers_failures = False

    def application(self, site: Site, *databases: Database, **options: Any) -> ASGIApp:
        app = FastAPI()
        for path, handler in site.routes.items():
            app.add_api_route(path, _endpoint(handler), response_model=None)
        for path, sync_handler in site.sync_routes.items():
            app.add_api_route(path, _sync(sync_handler), response_model=None)
        for path, on_message in site.websockets.items():
            app.add_api_websocket_route(path, _converse(on_message))
        if databases:
            app.add_middleware(UnitOfWorkMiddleware, *databases, **options)
        return app

    def abort(self, status: int) -> Exception:
        return HTTPException(status)


def _endpoint(handler: Handler) -> Any:
    async def endpoint() -> object:
        return respond(await handler())

    return endpoint


def _sync(handler: SyncHandler) -> Any:
    def endpoint() -> object:
        return respond(handler())

    return endpoint


def _converse(on_message: OnMessage) -> Any:
    async def endpoint(websocket: WebSocket) -> None:
        await converse(websocket, on_message)

    return endpoint
