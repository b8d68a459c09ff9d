"""The same endpoint without a framework, on Starlette and on FastAPI."""

from __future__ import annotations

import asyncio
import importlib
from typing import TYPE_CHECKING, Any, TypeAlias

from starlette.applications import Starlette
from starlette.requests import Request  # noqa: TC002 - FastAPI reads annotations
from starlette.responses import PlainTextResponse
from starlette.routing import Route

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AsyncExitStack

    from asgi_uow._asgi import ASGIApp, Message, Receive, Scope, Send

    Host: TypeAlias = Callable[..., Any]
    """Makes an application of a function that returns the status of its response."""


class Started:
    """An application whose lifespan starts before its first request.

    Servers do that, and give each request the lifespan's state.
    """

    def __init__(self, app: Any, stack: AsyncExitStack) -> None:
        self.app = app
        self._state: dict[str, object] = {}
        self._lock = asyncio.Lock()
        self._over = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        stack.push_async_callback(self._stop)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._state:
            async with self._lock:  # the first requests may come at once
                if not self._state:
                    self._state.update(await self._start())
        scope["state"].update(self._state)
        await self.app(scope, receive, send)

    async def _start(self) -> dict[str, object]:
        is_started = asyncio.Event()
        messages = [{"type": "lifespan.startup"}]
        state: dict[str, object] = {"is_started": True}

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await self._over.wait()
            return {"type": "lifespan.shutdown"}

        async def send(message: Message) -> None:
            assert not message["type"].endswith("failed"), message
            is_started.set()

        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": state}
        self._task = asyncio.create_task(self.app(scope, receive, send))
        started = asyncio.create_task(is_started.wait())
        await asyncio.wait({self._task, started}, return_when="FIRST_COMPLETED")
        if not is_started.is_set():
            await self._task  # raises why
        return state

    async def _stop(self) -> None:
        self._over.set()
        if self._task is not None:
            await self._task


def on_asgi(
    handle: Callable[[Any], Awaitable[int]],
    *,
    stack: AsyncExitStack,  # noqa: ARG001
) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001
        status = await handle(scope)
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    return app


def on_starlette(
    handle: Callable[[Any], Awaitable[int]], *, stack: AsyncExitStack, **options: Any
) -> Started:
    async def endpoint(request: Request) -> PlainTextResponse:
        return PlainTextResponse("done", await handle(request))

    return Started(Starlette(routes=[Route("/", endpoint)], **options), stack)


def on_fastapi(
    handle: Callable[[Any], Awaitable[int]],
    *,
    stack: AsyncExitStack,
    dependency: Any = None,
    **options: Any,
) -> Started:
    """Give the function what the dependency gives, if there is one, or the request."""

    async def endpoint(request: Request) -> PlainTextResponse:
        return PlainTextResponse("done", await handle(request))

    async def dependent(given: Any = dependency) -> PlainTextResponse:
        return PlainTextResponse("done", await handle(given))

    app = importlib.import_module("fastapi").FastAPI(**options)
    route = app.get("/", response_model=None)
    route(endpoint if dependency is None else dependent)
    return Started(app, stack)


def behind(app: Any, middleware: Any, *args: Any, **options: Any) -> Any:
    """Put an application behind a middleware, in the way of its framework."""
    if not isinstance(app, Started):
        return middleware(app, *args, **options)
    app.app.add_middleware(middleware, *args, **options)
    return app
