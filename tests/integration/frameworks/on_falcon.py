from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, ClassVar

from falcon import HTTPNotFound, WebSocketDisconnected
from falcon.asgi import App, SSEvent

from asgi_uow import UnitOfWorkMiddleware
from tests.integration.frameworks.site import Adapter, Upload

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from falcon.asgi import Request, Response, WebSocket

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


class FalconAdapter(Adapter):
    name = "Falcon"
    lacks: ClassVar = {
        "failed_commit_answered_by_the_framework": "its handlers do not see it",
        "mounted_application": NO_MOUNTS,
        "replayed_mount": NO_MOUNTS,
        "sync_handler": "handlers are async",
        "sync_stream": "streams are async",
        "thread": "`sync_to_async` loses the context: use `asyncio.to_thread`",
        "event_listener": "no events for handlers to emit",
        "dependencies": "no dependencies",
        "p11_dependencies_at_once": "no dependencies",
        "dependency_with_yield": "no dependencies",
    }

    def application(self, site: Site, *databases: Database, **options: Any) -> ASGIApp:
        app = App(middleware=[_Middleware(site)])
        for path, handler in site.routes.items():
            app.add_route(path, _Get(handler))
        for path, handler in site.heads.items():
            app.add_route(path, _Head(handler))
        for path, each in site.uploads.items():
            app.add_route(f"{path}/{{number:int}}", _Post(each))
        for path, on_message in site.websockets.items():
            app.add_route(path, _Converse(on_message))
        for error, handle in site.error_handlers.items():
            app.add_error_handler(error, _handling(handle))
        return UnitOfWorkMiddleware(app, *databases, **options) if databases else app

    def not_found(self) -> Exception:
        return HTTPNotFound()


class _Middleware:
    def __init__(self, site: Site) -> None:
        self.site = site

    async def process_startup(self, _: Any, __: Any) -> None:
        await self.site.startup()

    async def process_shutdown(self, _: Any, __: Any) -> None:
        await self.site.shutdown()

    async def process_request(  # Falcon's types name the parameters
        self,
        req: Request,  # noqa: ARG002
        resp: Response,  # noqa: ARG002
    ) -> None:
        if self.site.middleware is not None:
            await self.site.middleware()

    async def process_response(
        self,
        req: Request,  # noqa: ARG002
        resp: Response,  # noqa: ARG002
        resource: object,  # noqa: ARG002
        req_succeeded: bool,  # noqa: ARG002
    ) -> None:
        await self.site.middleware_after()


def _fill(resp: Response, reply: Reply) -> None:
    resp.status = reply.status
    resp.set_headers(reply.headers)
    if reply.events is not None:
        resp.sse = _event_stream(reply.events)
    elif reply.file is not None:
        resp.set_stream(_read(reply.file), reply.file.stat().st_size)
    elif reply.chunks is not None:
        resp.stream = _encoded(reply.chunks)
    else:
        resp.text = reply.text
    if reply.background is not None:
        resp.schedule(reply.background)


async def _read(path: Path) -> AsyncIterator[bytes]:
    yield await asyncio.to_thread(path.read_bytes)


async def _event_stream(events: AsyncIterator[str]) -> AsyncIterator[SSEvent]:
    async for event in events:
        yield SSEvent(text=event)


async def _encoded(chunks: AsyncIterator[str]) -> AsyncIterator[bytes]:
    async for chunk in chunks:
        yield chunk.encode()


class _Get:
    def __init__(self, handler: Handler) -> None:
        self.handler = handler

    async def on_get(self, _: Request, resp: Response) -> None:
        _fill(resp, await self.handler())


class _Head:
    def __init__(self, handler: Handler) -> None:
        self.handler = handler

    async def on_head(self, _: Request, resp: Response) -> None:
        _fill(resp, await self.handler())


class _Post:
    def __init__(self, handler: UploadHandler) -> None:
        self.handler = handler

    async def on_post(self, req: Request, resp: Response, number: int) -> None:
        parts: dict[str, tuple[str, bytes]] = {}
        async for part in await req.get_media():
            parts[part.name] = part.filename or "", await part.stream.read()
        (_, title), (name, content) = parts["title"], parts["file"]
        upload = Upload(number, title.decode(), name, content, req.scope)
        _fill(resp, await self.handler(upload))


class _Converse:
    def __init__(self, on_message: OnMessage) -> None:
        self.on_message = on_message

    async def on_websocket(self, _: Request, socket: WebSocket) -> None:
        await socket.accept()
        try:
            while True:
                text = await socket.receive_text()
                await socket.send_text(await self.on_message(text))
        except WebSocketDisconnected:
            pass


def _handling(handler: SyncHandler) -> Any:
    async def handle(_: Request, resp: Response, __: Exception, ___: Any) -> None:
        _fill(resp, handler())

    return handle
