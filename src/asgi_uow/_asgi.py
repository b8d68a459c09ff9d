"""ASGI's shapes, as loose as Litestar and asgiref need them, and our own answers."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, TypeAlias

Scope: TypeAlias = Any
Message: TypeAlias = Any
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

START = "http.response.start"
BODY = "http.response.body"
FAILURE = "asgi_uow.failure"  # the key in the scope of what an `error_app` answers
RETRY_AFTER = 1  # seconds a client is asked to wait before it tries again


async def respond(send: Send, status: int, fields: dict[str, str], body: bytes) -> None:
    """Send a whole response."""
    headers = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({"type": START, "status": status, "headers": headers})
    await send({"type": BODY, "body": body})


async def problem_details(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001
    """Answer with what `problem` gives for the failure in the scope."""
    await respond(send, *problem(scope[FAILURE]))


def problem(failure: Exception) -> tuple[int, dict[str, str], bytes]:
    """Give status, headers and body of a small `application/problem+json` (RFC 9457).

    503 with `Retry-After` (RFC 9110, 10.2.3) where the work is proven not kept and
    trying again may help, otherwise 500. Says nothing about the cause.
    """
    # A failure of our own says so itself; any other is a database out of reach.
    retry_after: int | None = getattr(failure, "retry_after", RETRY_AFTER)
    if retry_after is None:
        return described(500, "The request could not be completed.")
    return described(503, "Nothing was changed; please try again.", retry_after)


def described(
    status: int, detail: str, retry_after: int | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Give status, headers and body of a problem that has no type of its own."""
    title = HTTPStatus(status).phrase
    about = {"type": "about:blank", "title": title, "status": status, "detail": detail}
    body = json.dumps(about).encode()
    headers = {"content-type": "application/problem+json"}
    if retry_after is not None:
        headers["retry-after"] = str(retry_after)
    return status, {**headers, "content-length": str(len(body))}, body


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
