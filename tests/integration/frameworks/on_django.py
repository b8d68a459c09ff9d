# Django ships no type hints.
# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from asgiref.sync import markcoroutinefunction, sync_to_async
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import FileResponse, Http404, HttpResponse, StreamingHttpResponse
from django.urls import path
from django.views.decorators.http import require_http_methods

from asgi_uow import UnitOfWorkMiddleware
from tests.integration.frameworks.site import Adapter, Site, Upload, event_stream

if TYPE_CHECKING:
    from collections.abc import Callable

    from django.http import HttpRequest
    from django.http.response import HttpResponseBase

    from asgi_uow import Database
    from asgi_uow._asgi import ASGIApp
    from tests.integration.frameworks.site import (
        Handler,
        Reply,
        SyncHandler,
        T,
        UploadHandler,
    )

NO_TASKS = "no background tasks in the serving process"
NO_MOUNTS = "no mounting of ASGI applications"
NO_LIFESPAN = "no lifespan: dispose of the engines yourself"

settings.configure(
    ALLOWED_HOSTS=["*"], MIDDLEWARE=[f"{__name__}.Middleware"], SITE=Site()
)


class DjangoAdapter(Adapter):
    """Django, which serves one site per process: its settings say which."""

    name = "Django"
    has_lifespan = False
    lacks: ClassVar = {
        "failed_commit_answered_by_the_framework": "its handlers do not see it",
        "mounted_application": NO_MOUNTS,
        "replayed_mount": NO_MOUNTS,
        "p2_failed_commit_before_a_background_task": NO_TASKS,
        "p9_background_task": NO_TASKS,
        "event_listener": "its signals are called, as functions are",
        "dependencies": "no dependencies",
        "p11_dependencies_at_once": "no dependencies",
        "dependency_with_yield": "no dependencies",
        "websocket": "no websockets",
        "lifespan": NO_LIFESPAN,
        "shutdown": NO_LIFESPAN,
    }

    def application(self, site: Site, *databases: Database, **options: Any) -> ASGIApp:
        urls: Any = ModuleType("urls")
        urls.urlpatterns = [
            *(_path(url, _view(each)) for url, each in site.routes.items()),
            *(_path(url, _head(each)) for url, each in site.heads.items()),
            *(
                _path(f"{url}/<int:number>", _upload(each))
                for url, each in site.uploads.items()
            ),
            *(_path(url, _sync_view(each)) for url, each in site.sync_routes.items()),
        ]
        settings.SITE = site
        settings.ROOT_URLCONF = urls
        app = get_asgi_application()
        return UnitOfWorkMiddleware(app, *databases, **options) if databases else app

    def not_found(self) -> Exception:
        missing: Exception = Http404()
        return missing

    async def in_thread(self, function: Callable[[], T]) -> T:
        return await sync_to_async(function)()


class Middleware:
    """The site's own middleware; error handlers are one too."""

    async_capable = True
    sync_capable = False

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response
        self.site: Site = settings.SITE
        markcoroutinefunction(self)

    async def __call__(self, request: HttpRequest) -> HttpResponseBase:
        if self.site.middleware is not None:
            await self.site.middleware()
        response: HttpResponseBase = await self.get_response(request)
        await self.site.middleware_after()
        return response

    def process_exception(
        self, _: HttpRequest, error: Exception
    ) -> HttpResponseBase | None:
        handler = self.site.error_handlers.get(type(error))
        return handler and _respond(handler())


def _path(url: str, view: Any) -> Any:
    return path(url.removeprefix("/"), view)


def _respond(reply: Reply) -> HttpResponseBase:
    if reply.events is not None:
        events = event_stream(reply.events)
        return StreamingHttpResponse(events, content_type="text/event-stream")
    if reply.file is not None:
        return FileResponse(reply.file.open("rb"))
    chunks = reply.chunks or reply.sync_chunks
    if chunks is not None:
        return StreamingHttpResponse(chunks, status=reply.status, headers=reply.headers)
    return HttpResponse(reply.text.encode(), status=reply.status, headers=reply.headers)


def _view(handler: Handler) -> Any:
    async def view(_: HttpRequest) -> HttpResponseBase:
        return _respond(await handler())

    return view


def _head(handler: Handler) -> Any:
    return require_http_methods(["HEAD"])(_view(handler))


def _upload(handler: UploadHandler) -> Any:
    async def view(request: Any, number: int) -> HttpResponseBase:
        title, file = request.POST["title"], request.FILES["file"]
        upload = Upload(number, title, file.name, file.read(), request.scope)
        return _respond(await handler(upload))

    return require_http_methods(["POST"])(view)


def _sync_view(handler: SyncHandler) -> Any:
    def view(_: HttpRequest) -> HttpResponseBase:
        return _respond(handler())

    return view
