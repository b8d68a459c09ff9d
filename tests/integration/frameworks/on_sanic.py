from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, ClassVar

from sanic import Sanic
from sanic.exceptions import NotFound
from sanic.response import file, text

from asgi_uow import UnitOfWorkMiddleware
from tests.integration.frameworks.site import Adapter, Upload, event_stream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sanic import HTTPResponse, Request

    from asgi_uow import Database
    from asgi_uow._asgi import ASGIApp
    from tests.integration.frameworks.site import (
        Handler,
        OnMessage,
        Reply,
        Site,
        SyncHandler,
        UploadHandler,
    )

NO_MOUNTS = "no mounting of ASGI applications"
EVENT = "site.event.emitted"
NUMBERS = itertools.count()  # names have to differ

# Without it a second application in one process cannot start.
# https://github.com/sanic-org/sanic/blob/v25.12.1/sanic/touchup/service.py
Sanic.test_mode = True


class SanicAdapter(Adapter):
    """Sanic in ASGI mode, which answers what its handlers and `send` raise."""

    name = "Sanic"
    answers_failures = True
    lacks: ClassVar = {
        "failed_commit_answered_by_error_app": "Sanic answers it",
        "mounted_application": NO_MOUNTS,
        "replayed_mount": NO_MOUNTS,
        "sync_stream": "streams are written by async handlers",
        "dependencies": "no dependencies of its own",
        "p11_dependencies_at_once": "no dependencies of its own",
        "dependency_with_yield": "no dependencies of its own",
        "thread": "nothing of its own for threads",
    }

    def application(self, site: Site, *databases: Database, **options: Any) -> ASGIApp:
        app = Sanic(f"test-{next(NUMBERS)}", configure_logging=False)
        for path, handler in site.routes.items():
            app.add_route(_endpoint(handler), path, name=f"route{next(NUMBERS)}")
        for path, handler in site.heads.items():
            app.add_route(_endpoint(handler), path, methods=["HEAD"], name="head")
        for path, sync_handler in site.sync_routes.items():
            app.add_route(_sync(sync_handler), path, name=f"route{next(NUMBERS)}")
        for path, each in site.uploads.items():
            url = f"{path}/<number:int>"
            app.add_route(_upload(each), url, methods=["POST"], name="upload")
        for path, on_message in site.websockets.items():
            app.add_websocket_route(_converse(on_message), path)
        _add_hooks(app, site)
        return UnitOfWorkMiddleware(app, *databases, **options) if databases else app

    def not_found(self) -> Exception:
        return NotFound()


def _add_hooks(app: Any, site: Site) -> None:
    async def startup(_: Any) -> None:
        await site.startup()

    async def shutdown(_: Any) -> None:
        await site.shutdown()

    for path, listener in site.listeners.items():
        app.add_signal(listener, EVENT)
        app.add_route(_emit, path, name="emit")
    app.before_server_start(startup)
    app.after_server_stop(shutdown)
    if (before := site.middleware) is not None:

        async def on_request(_: Request) -> None:
            await before()

        app.on_request(on_request)

        async def on_response(_: Request, __: HTTPResponse) -> None:
            await site.middleware_after()

        app.on_response(on_response)
    for error, handler in site.error_handlers.items():
        app.exception(error)(_handling(handler))


async def _emit(request: Request) -> HTTPResponse:
    task = await request.app.dispatch(EVENT)
    await task
    return text("emitted")


def _handling(handler: SyncHandler) -> Any:
    async def handle(_: Request, __: Exception) -> HTTPResponse:
        return _respond(handler())

    return handle


def _respond(reply: Reply) -> HTTPResponse:
    return text(reply.text, reply.status, reply.headers)


def _endpoint(handler: Handler) -> Any:
    async def endpoint(request: Request) -> HTTPResponse | None:
        reply = await handler()
        if reply.file is not None:
            return await file(reply.file)
        if reply.events is not None:
            await _stream(request, reply, event_stream(reply.events))
        elif reply.chunks is not None:
            await _stream(request, reply, reply.chunks)
        elif reply.background is not None:
            await _send_and_go_on(request, reply)
        else:
            return _respond(reply)
        return None

    return endpoint


def _upload(handler: UploadHandler) -> Any:
    async def endpoint(request: Any, number: int) -> HTTPResponse:
        file = request.files.get("file")
        title = request.form.get("title")
        upload = Upload(number, title, file.name, file.body, request.scope)
        return _respond(await handler(upload))

    return endpoint


async def _stream(request: Request, reply: Reply, chunks: AsyncIterator[str]) -> None:
    """Send the start first: what a handler does before is not the response's yet."""
    response: Any = await request.respond(
        status=reply.status,
        headers=reply.headers,
        content_type="text/event-stream" if reply.events else "text/plain",
    )
    await response.send("")
    async for chunk in chunks:
        await response.send(chunk)
    await response.eof()


async def _send_and_go_on(request: Request, reply: Reply) -> None:
    """Start the task when the response has been sent; `add_task` does not wait."""
    response: Any = await request.respond(_respond(reply))
    await response.eof()
    assert reply.background is not None
    request.app.add_task(reply.background())


def _sync(handler: SyncHandler) -> Any:
    def endpoint(_: Request) -> HTTPResponse:
        return _respond(handler())

    return endpoint


def _converse(on_message: OnMessage) -> Any:
    async def endpoint(_: Request, websocket: Any) -> None:
        while (message := await websocket.recv()) is not None:
            await websocket.send(await on_message(message))

    return endpoint
