from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from fastapi import (
    Depends,
    FastAPI,
    Form,
    HTTPException,
    Request,
    UploadFile,
    WebSocket,
)
from fastapi.concurrency import run_in_threadpool

from tests.integration.frameworks.on_starlette import (
    converse,
    error_handlers,
    lifespan,
    respond,
    with_middleware,
)
from tests.integration.frameworks.site import Adapter, Upload

if TYPE_CHECKING:
    from collections.abc import Callable

    from asgi_uow import Database
    from asgi_uow._asgi import ASGIApp
    from tests.integration.frameworks.site import (
        Handler,
        OnMessage,
        Site,
        SyncHandler,
        T,
        UploadHandler,
    )


class FastAPIAdapter(Adapter):
    name = "FastAPI"
    lacks: ClassVar = {"event_listener": "no events for handlers to emit"}

    def application(self, site: Site, *databases: Database, **options: Any) -> ASGIApp:
        app = FastAPI(exception_handlers=error_handlers(site), lifespan=lifespan(site))
        for path, handler in site.routes.items():
            app.add_api_route(path, _endpoint(handler), response_model=None)
        for path, handler in site.heads.items():
            app.add_api_route(path, _endpoint(handler), methods=["HEAD"])
        for path, sync_handler in site.sync_routes.items():
            app.add_api_route(path, _sync_endpoint(sync_handler), response_model=None)
        for path, injected in site.injected.items():
            app.add_api_route(
                path,
                _endpoint(injected.handler),
                dependencies=[Depends(injected.first), Depends(injected.second)],
            )
        for path, each in site.uploads.items():
            app.add_api_route(
                f"{path}/{{number}}",
                _upload(each),
                methods=["POST"],
                response_model=None,
            )
        for path, on_message in site.websockets.items():
            app.add_api_websocket_route(path, _converse(on_message))
        for path, mounted in site.mounts.items():
            app.mount(path, mounted)
        return with_middleware(app, site, databases, options)

    def not_found(self) -> Exception:
        return HTTPException(404)

    async def in_thread(self, function: Callable[[], T]) -> T:
        return await run_in_threadpool(function)


def _endpoint(handler: Handler) -> Any:
    async def endpoint() -> Any:
        return respond(await handler())

    return endpoint


def _sync_endpoint(handler: SyncHandler) -> Any:
    def endpoint() -> Any:
        return respond(handler())

    return endpoint


def _upload(handler: UploadHandler) -> Any:
    async def endpoint(
        number: int, title: Annotated[str, Form()], file: UploadFile, request: Request
    ) -> Any:
        name, content = str(file.filename), await file.read()
        upload = Upload(number, title, name, content, request.scope)
        return respond(await handler(upload))

    return endpoint


def _converse(on_message: OnMessage) -> Any:
    async def endpoint(websocket: WebSocket) -> None:
        await converse(websocket, on_message)

    return endpoint
