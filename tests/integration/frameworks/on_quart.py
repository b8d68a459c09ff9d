from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from quart import Quart, Response, request, send_file, websocket
from quart.utils import run_sync
from werkzeug.exceptions import NotFound

from asgi_uow import UnitOfWorkMiddleware
from tests.integration.frameworks.site import Adapter, Upload, event_stream

if TYPE_CHECKING:
    from collections.abc import Callable

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

NO_MOUNTS = "no mounting of ASGI applications"
AT_ONCE = "tasks start at once, beside the handler"


class QuartAdapter(Adapter):
    name = "Quart"
    lacks: ClassVar = {
        "failed_commit_answered_by_the_framework": "its handlers do not see it",
        "mounted_application": NO_MOUNTS,
        "replayed_mount": NO_MOUNTS,
        "p2_failed_commit_before_a_background_task": AT_ONCE,
        "p9_background_task": AT_ONCE,
        "event_listener": "its signals are called, as functions are",
        "dependencies": "no dependencies",
        "p11_dependencies_at_once": "no dependencies",
        "dependency_with_yield": "no dependencies",
    }

    def application(self, site: Site, *databases: Database, **options: Any) -> ASGIApp:
        app = Quart(__name__)
        for path, handler in site.routes.items():
            app.add_url_rule(path, path, _endpoint(handler))
        for path, handler in site.heads.items():
            app.add_url_rule(path, path, _endpoint(handler), methods=["HEAD"])
        for path, sync_handler in site.sync_routes.items():
            app.add_url_rule(path, path, _sync_endpoint(sync_handler))
        for path, each in site.uploads.items():
            url = f"{path}/<int:number>"
            app.add_url_rule(url, path, _upload(each), methods=["POST"])
        for path, on_message in site.websockets.items():
            app.add_websocket(path, path, _converse(on_message))
        if site.middleware is not None:
            app.before_request(site.middleware)
            app.after_request(_after(site.middleware_after))
        for error, handle in site.error_handlers.items():
            app.register_error_handler(error, _handling(handle))
        app.before_serving(site.startup)
        app.after_serving(site.shutdown)
        if databases:
            wrapped = UnitOfWorkMiddleware(app.asgi_app, *databases, **options)
            # For mypy no method can be replaced, though Quart's documentation says so.
            app.asgi_app = wrapped  # type: ignore[method-assign]
        return app

    def not_found(self) -> Exception:
        return NotFound()

    async def in_thread(self, function: Callable[[], T]) -> T:
        result: T = await run_sync(function)()
        return result


def _respond(reply: Reply) -> Response:
    if reply.events is not None:
        events = event_stream(reply.events)
        return Response(events, content_type="text/event-stream")
    content = reply.chunks or reply.sync_chunks or reply.text
    return Response(content, reply.status, reply.headers, content_type="text/plain")


def _endpoint(handler: Handler) -> Any:
    async def endpoint() -> Response:
        reply = await handler()
        if reply.file is not None:
            return await send_file(reply.file)
        return _respond(reply)

    return endpoint


def _sync_endpoint(handler: SyncHandler) -> Any:
    def endpoint() -> Response:
        return _respond(handler())

    return endpoint


def _upload(handler: UploadHandler) -> Any:
    async def endpoint(number: int) -> Response:
        title, file = (await request.form)["title"], (await request.files)["file"]
        name, content = str(file.filename), file.read()
        upload = Upload(number, title, name, content, request.scope)
        return _respond(await handler(upload))

    return endpoint


def _converse(on_message: OnMessage) -> Any:
    async def endpoint() -> None:
        while True:
            text = str(await websocket.receive())
            await websocket.send(await on_message(text))

    return endpoint


def _after(after: Hook) -> Any:
    async def after_request(response: Response) -> Response:
        await after()
        return response

    return after_request


def _handling(handler: SyncHandler) -> Any:
    async def handle(_: Exception) -> Response:
        return _respond(handler())

    return handle
