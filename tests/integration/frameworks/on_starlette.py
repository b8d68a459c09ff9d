from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import FileResponse, PlainTextResponse, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute

from asgi_uow import UnitOfWorkMiddleware
from tests.integration.frameworks.site import Adapter, Upload, event_stream

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.websockets import WebSocket

    from asgi_uow import Database
    from asgi_uow._asgi import ASGIApp
    from tests.integration.frameworks.site import (
        Handler,
        Hook,
        OnMessage,
        Reply,
        Site,
        SyncHandler,
        T,
        UploadHandler,
    )


class StarletteAdapter(Adapter):
    name = "Starlette"
    lacks: ClassVar = {
        "event_listener": "no events for handlers to emit",
        "dependencies": "no dependencies",
        "p11_dependencies_at_once": "no dependencies",
        "dependency_with_yield": "no dependencies",
    }

    def application(self, site: Site, *databases: Database, **options: Any) -> ASGIApp:
        routes: list[BaseRoute] = [
            *(Route(path, _endpoint(each)) for path, each in site.routes.items()),
            *(
                Route(path, _endpoint(each), methods=["HEAD"])
                for path, each in site.heads.items()
            ),
            *(
                Route(path, _sync_endpoint(each))
                for path, each in site.sync_routes.items()
            ),
            *(
                Route(f"{path}/{{number:int}}", _upload(each), methods=["POST"])
                for path, each in site.uploads.items()
            ),
            *(
                WebSocketRoute(path, _converse(each))
                for path, each in site.websockets.items()
            ),
            *(Mount(path, app) for path, app in site.mounts.items()),
        ]
        app = Starlette(
            routes=routes,
            exception_handlers=error_handlers(site),
            lifespan=lifespan(site),
        )
        return with_middleware(app, site, databases, options)

    def not_found(self) -> Exception:
        return HTTPException(404)

    async def in_thread(self, function: Callable[[], T]) -> T:
        return await run_in_threadpool(function)


def with_middleware(
    app: Starlette, site: Site, databases: tuple[Database, ...], options: dict[str, Any]
) -> ASGIApp:
    """Add the middleware to Starlette, or FastAPI; the last one is outermost."""
    if site.middleware is not None:
        dispatch = _dispatch(site.middleware, site.middleware_after)
        app.add_middleware(BaseHTTPMiddleware, dispatch=dispatch)
    if databases:
        app.add_middleware(UnitOfWorkMiddleware, *databases, **options)
    return app


def respond(reply: Reply) -> Response:
    """Make the response of Starlette, or FastAPI, for a reply."""
    if reply.events is not None:
        events = event_stream(reply.events)
        return StreamingResponse(events, media_type="text/event-stream")
    if reply.file is not None:
        return FileResponse(reply.file)
    chunks = reply.chunks or reply.sync_chunks
    if chunks is not None:
        return StreamingResponse(chunks, reply.status, reply.headers)
    background = reply.background and BackgroundTask(reply.background)
    return PlainTextResponse(reply.text, reply.status, reply.headers, None, background)


def _endpoint(handler: Handler) -> Any:
    async def endpoint(_: Request) -> Response:
        return respond(await handler())

    return endpoint


def _sync_endpoint(handler: SyncHandler) -> Any:
    def endpoint(_: Request) -> Response:
        return respond(handler())

    return endpoint


def _upload(handler: UploadHandler) -> Any:
    async def endpoint(request: Request) -> Response:
        number = request.path_params["number"]
        async with request.form() as form:
            title, file = form["title"], form["file"]
            assert isinstance(title, str)
            assert isinstance(file, UploadFile)
            name, content = str(file.filename), await file.read()
            upload = Upload(number, title, name, content, request.scope)
            return respond(await handler(upload))

    return endpoint


async def converse(websocket: WebSocket, on_message: OnMessage) -> None:
    """Answer every message, with Starlette's websocket or FastAPI's."""
    await websocket.accept()
    async for text in websocket.iter_text():
        await websocket.send_text(await on_message(text))


def _converse(on_message: OnMessage) -> Any:
    async def endpoint(websocket: WebSocket) -> None:
        await converse(websocket, on_message)

    return endpoint


def error_handlers(site: Site) -> Any:
    def handling(handler: SyncHandler) -> Any:
        async def handle(_: Request, __: Exception) -> Response:
            return respond(handler())

        return handle

    return {error: handling(each) for error, each in site.error_handlers.items()}


def lifespan(site: Site) -> Any:
    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None, None]:
        await site.startup()
        yield
        await site.shutdown()

    return lifespan


def _dispatch(before: Hook, after: Hook) -> Any:
    async def dispatch(request: Request, call_next: Any) -> Response:
        await before()
        response: Response = await call_next(request)
        await after()
        return response

    return dispatch
