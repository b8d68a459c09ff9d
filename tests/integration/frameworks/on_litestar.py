from __future__ import annotations

from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction
from typing import TYPE_CHECKING, Any, ClassVar

from litestar import Litestar, Request, WebSocket, asgi, get, head, post, websocket
from litestar.background_tasks import BackgroundTask
from litestar.concurrency import sync_to_thread
from litestar.di import NamedDependency, Provide
from litestar.events import listener
from litestar.exceptions import NotFoundException, WebSocketDisconnect
from litestar.response import File, Response, ServerSentEvent, Stream

from asgi_uow import UnitOfWorkMiddleware
from tests.integration.frameworks.site import Adapter, Upload

if TYPE_CHECKING:
    from collections.abc import Callable

    from asgi_uow import Database
    from asgi_uow._asgi import ASGIApp
    from tests.integration.frameworks.site import (
        Handler,
        Hook,
        Injected,
        OnMessage,
        Reply,
        Site,
        SyncHandler,
        T,
        UploadHandler,
    )

FAILURES = "its handlers do not see it"
STATE = "Litestar keeps the form outside: wrap the application"


class LitestarAdapter(Adapter):
    """Litestar inside the middleware."""

    name = "Litestar, wrapped"
    listens_in_unit = False
    lacks: ClassVar = {"failed_commit_answered_by_the_framework": FAILURES}

    def application(self, site: Site, *databases: Database, **options: Any) -> ASGIApp:
        app = _litestar(site)
        return UnitOfWorkMiddleware(app, *databases, **options) if databases else app

    def not_found(self) -> Exception:
        return NotFoundException()

    async def in_thread(self, function: Callable[[], T]) -> T:
        return await sync_to_thread(function)


class LitestarMiddlewareAdapter(LitestarAdapter):
    """Litestar with the middleware in its own list."""

    name = "Litestar, `middleware=[...]`"
    lacks: ClassVar = {
        **LitestarAdapter.lacks,
        "replayed": STATE,
        "replayed_answer": STATE,
        "replayed_mount": STATE,
        "shutdown": "its middleware sees no lifespan: `on_shutdown=[db.dispose]`",
    }

    def application(self, site: Site, *databases: Database, **options: Any) -> ASGIApp:
        def unit_of_work(app: ASGIApp) -> ASGIApp:
            return UnitOfWorkMiddleware(app, *databases, **options)

        return _litestar(site, middleware=[unit_of_work] if databases else [])


def _litestar(site: Site, **options: Any) -> Litestar:
    handlers = [
        *(get(path)(_endpoint(each)) for path, each in site.routes.items()),
        *(head(path)(_head(each)) for path, each in site.heads.items()),
        *(
            get(path, sync_to_thread=True)(_sync_endpoint(each))
            for path, each in site.sync_routes.items()
        ),
        *(
            post(f"{path}/{{number:int}}")(_upload(each))
            for path, each in site.uploads.items()
        ),
        *(_injected(path, each) for path, each in site.injected.items()),
        *(get(path)(_emitting(path)) for path in site.listeners),
        *(websocket(path)(_converse(each)) for path, each in site.websockets.items()),
        *(
            asgi(path, is_mount=True, copy_scope=True)(_mounted(each))
            for path, each in site.mounts.items()
        ),
    ]
    return Litestar(
        handlers,
        before_request=_before(site.middleware) if site.middleware else None,
        after_request=_after(site.middleware_after) if site.middleware else None,
        exception_handlers={
            error: _handling(each) for error, each in site.error_handlers.items()
        },
        listeners=[listener(path)(each) for path, each in site.listeners.items()],
        on_startup=[site.startup],
        on_shutdown=[site.shutdown],
        logging_config=None,
        openapi_config=None,
        **options,
    )


def _respond(reply: Reply) -> Response[Any]:
    if reply.events is not None:
        return ServerSentEvent(reply.events)
    if reply.file is not None:
        return File(reply.file)
    chunks = reply.chunks or reply.sync_chunks
    if chunks is not None:
        return Stream(chunks, status_code=reply.status, headers=reply.headers)
    return Response(
        reply.text,
        status_code=reply.status,
        headers=reply.headers,
        media_type="text/plain",
        background=BackgroundTask(reply.background) if reply.background else None,
    )


def _endpoint(handler: Handler) -> Any:
    async def endpoint() -> Response[Any]:
        return _respond(await handler())

    return endpoint


def _head(handler: Handler) -> Any:
    async def endpoint() -> None:
        await handler()

    return endpoint


def _sync_endpoint(handler: SyncHandler) -> Any:
    def endpoint() -> Response[Any]:
        return _respond(handler())

    return endpoint


def _upload(handler: UploadHandler) -> Any:
    async def endpoint(request: Request[Any, Any, Any]) -> Response[Any]:
        form = await request.form()
        file = form["file"]
        name, content = file.filename, await file.read()
        number = request.path_params["number"]
        upload = Upload(number, form["title"], name, content, request.scope)
        return _respond(await handler(upload))

    return endpoint


def _injected(path: str, injected: Injected) -> Any:
    async def endpoint(
        first: NamedDependency[Any], second: NamedDependency[Any]
    ) -> Response[Any]:
        return _respond(await injected.handler())

    dependencies = {
        "first": _provide(injected.first),
        "second": _provide(injected.second),
    }
    return get(path, dependencies=dependencies)(endpoint)


def _provide(dependency: Any) -> Provide:
    """Have it run in a thread if it is a function and not async."""
    here = (iscoroutinefunction, isasyncgenfunction, isgeneratorfunction)
    in_thread = not any(is_one(dependency) for is_one in here)
    return Provide(dependency, sync_to_thread=in_thread or None)


def _emitting(event: str) -> Any:
    async def endpoint(request: Request[Any, Any, Any]) -> None:
        request.app.emit(event)

    return endpoint


def _converse(on_message: OnMessage) -> Any:
    async def endpoint(socket: WebSocket[Any, Any, Any]) -> None:
        await socket.accept()
        try:
            while True:
                await socket.send_text(await on_message(await socket.receive_text()))
        except WebSocketDisconnect:
            pass

    return endpoint


def _mounted(mounted: ASGIApp) -> Any:
    async def endpoint(scope: Any, receive: Any, send: Any) -> None:
        await mounted(scope, receive, send)

    return endpoint


def _before(before: Hook) -> Any:
    async def before_request(_: Request[Any, Any, Any]) -> None:
        await before()

    return before_request


def _after(after: Hook) -> Any:
    async def after_request(response: Response[Any]) -> Response[Any]:
        await after()
        return response

    return after_request


def _handling(handler: SyncHandler) -> Any:
    def handle(_: Request[Any, Any, Any], __: Exception) -> Response[Any]:
        return _respond(handler())

    return handle
