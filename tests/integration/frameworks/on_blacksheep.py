from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from blacksheep import (
    Application,
    Request,
    Response,
    StreamedContent,
    TextContent,
    WebSocket,
    WebSocketDisconnectError,
)
from blacksheep.exceptions import HTTPException
from blacksheep.server.responses import file
from blacksheep.server.routing import Router
from blacksheep.server.sse import ServerSentEventsResponse, TextServerSentEvent

from asgi_uow import UnitOfWorkMiddleware
from tests.integration.frameworks.site import Adapter, Upload

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from asgi_uow import Database
    from asgi_uow._asgi import ASGIApp
    from tests.integration.frameworks.site import (
        Handler,
        Hook,
        OnMessage,
        Reply,
        Site,
        SyncHandler,
        UploadHandler,
    )


class BlackSheepAdapter(Adapter):
    name = "BlackSheep"
    lacks: ClassVar = {
        "failed_commit_answered_by_the_framework": "its handlers do not see it",
        "p2_failed_commit_before_a_background_task": "no background tasks",
        "p9_background_task": "no background tasks",
        "sync_stream": "streams are async",
        "event_listener": "no events for handlers to emit",
        "dependencies": "its services are not async",
        "p11_dependencies_at_once": "its services are not async",
        "dependency_with_yield": "its services have no `yield`",
        "thread": "nothing of its own for threads",
    }

    def application(self, site: Site, *databases: Database, **options: Any) -> ASGIApp:
        app = Application(router=Router())
        for path, handler in site.routes.items():
            app.router.add_get(path, _endpoint(handler))
        for path, handler in site.heads.items():
            app.router.add_head(path, _endpoint(handler))
        for path, sync_handler in site.sync_routes.items():
            app.router.add_get(path, _sync_endpoint(sync_handler))
        for path, each in site.uploads.items():
            app.router.add_post(f"{path}/{{number}}", _upload(each))
        for path, on_message in site.websockets.items():
            app.router.add_ws(path, _converse(on_message))
        for path, mounted in site.mounts.items():
            app.mount(path, mounted)
        if site.middleware is not None:
            app.middlewares.append(_around(site.middleware, site.middleware_after))
        for error, handle in site.error_handlers.items():
            app.exception_handler(error)(_handling(handle))
        app.on_start(_event(site.startup))
        app.on_stop(_event(site.shutdown))
        return UnitOfWorkMiddleware(app, *databases, **options) if databases else app

    def not_found(self) -> Exception:
        return HTTPException(404)


def _respond(reply: Reply) -> Response:
    headers = [(name.encode(), text.encode()) for name, text in reply.headers.items()]
    if reply.events is not None:
        events = _event_stream(reply.events)
        return ServerSentEventsResponse(lambda: events)
    if reply.file is not None:
        return file(str(reply.file), "text/plain")
    if reply.chunks is not None:
        content = StreamedContent(b"text/plain", _encoding(reply.chunks))
        return Response(reply.status, headers, content)
    return Response(reply.status, headers, TextContent(reply.text))


async def _event_stream(events: AsyncIterator[str]) -> AsyncIterator[Any]:
    async for event in events:
        yield TextServerSentEvent(event)


def _encoding(chunks: AsyncIterator[str]) -> Callable[[], AsyncIterator[bytes]]:
    async def encoded() -> AsyncIterator[bytes]:
        async for chunk in chunks:
            yield chunk.encode()

    return encoded


def _endpoint(handler: Handler) -> Any:
    async def endpoint() -> Response:
        return _respond(await handler())

    return endpoint


def _sync_endpoint(handler: SyncHandler) -> Any:
    def endpoint() -> Response:
        return _respond(handler())

    return endpoint


def _upload(handler: UploadHandler) -> Any:
    async def endpoint(request: Request, number: int) -> Response:
        form: Any = await request.form()
        [file] = form["file"]
        name, content = file.file_name.decode(), file.data
        upload = Upload(number, form["title"], name, content, request.scope)
        return _respond(await handler(upload))

    return endpoint


def _converse(on_message: OnMessage) -> Any:
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            while True:
                text = await websocket.receive_text()
                await websocket.send_text(await on_message(text))
        except WebSocketDisconnectError:
            pass

    return endpoint


def _around(before: Hook, after: Hook) -> Any:
    async def middleware(request: Any, handler: Any) -> Any:
        await before()
        response = await handler(request)
        await after()
        return response

    return middleware


def _handling(handler: SyncHandler) -> Any:
    async def handle(_: Any, __: Any, ___: Any) -> Response:
        return _respond(handler())

    return handle


def _event(hook: Hook) -> Any:
    async def handle(_: Application) -> None:
        await hook()

    return handle
