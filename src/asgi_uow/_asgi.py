"""ASGI's shapes; with a stricter `Scope`, Litestar and asgiref do not type-check."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

Scope: TypeAlias = Any
Message: TypeAlias = Any
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

START = "http.response.start"
BODY = "http.response.body"


async def respond(send: Send, status: int, fields: dict[str, str], body: bytes) -> None:
    """Send a whole response."""
    headers = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({"type": START, "status": status, "headers": headers})
    await send({"type": BODY, "body": body})


class Response:
    """Notes when a response leaves: its times are those of `time.perf_counter()`."""

    status: int | None = None
    started: float | None = None
    ended: float = 0.0

    def __init__(self, forward: Send) -> None:
        self._forward = forward

    async def send(self, message: Message) -> None:
        if message["type"] == START:
            self.status, self.started = message["status"], time.perf_counter()
        try:
            await self._forward(message)
        finally:
            self.ended = time.perf_counter()


def path_of(scope: Scope) -> str | None:
    """Give the path without its query: the route's template if the framework says it.

    Litestar names the template; Starlette and FastAPI the route, below its mount. It
    is asked after COMMIT, so it raises nothing, whatever has put what into the scope.
    """
    route, root, above = map(scope.get, ("route", "root_path", "app_root_path"))
    if hasattr(route, "endpoint") and isinstance(getattr(route, "path", None), str):
        is_mounted = isinstance(root, str) and isinstance(above, str)
        return (root.removeprefix(above) if is_mounted else "") + str(route.path)
    found = scope.get("path_template") or scope.get("path")
    return None if found is None else str(found)
