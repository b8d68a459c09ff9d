"""A raw ASGI client: what reached the server, in order, and what was kept then."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from asgi_uow.observers import (
    CommitFailed,
    HookFailed,
    ImplicitCommit,
    ReleaseFailed,
    UnitFinished,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from asgi_uow._asgi import ASGIApp, Message, Receive, Scope, Send
    from asgi_uow.observers import Event

START = "http.response.start"
BODY = "http.response.body"


@dataclasses.dataclass
class Response:
    """What the server was given, and what the application raised to it."""

    messages: list[Message] = dataclasses.field(default_factory=list)
    seen: list[object] = dataclasses.field(default_factory=list)
    error: BaseException | None = None

    @property
    def types(self) -> list[str]:
        return [message["type"] for message in self.messages]

    @property
    def status(self) -> int:
        """The status of the only start."""
        starts = [each for each in self.messages if each["type"] == START]
        assert 1 == len(starts), self
        status: int = starts[0]["status"]
        return status

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.messages[0]["headers"])


def http_scope(**extra: object) -> dict[str, object]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "GET",
        "path": "/",
        "raw_path": b"/",
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        **extra,
    }


async def no_body() -> Message:
    raise NotImplementedError  # no application of ours reads the body


async def request(
    app: ASGIApp,
    *,
    scope: Scope = None,
    receive: Receive = no_body,
    probe: Callable[[], Awaitable[object]] | None = None,
) -> Response:
    """Send one request; `probe` looks at the database when the start arrives."""
    response = Response()

    async def send(message: Message) -> None:
        if probe is not None and message["type"] == START:
            response.seen.append(await probe())
        response.messages.append(message)

    try:
        await app(scope or http_scope(), receive, send)
    except Exception as error:  # noqa: BLE001  # what the server would log
        response.error = error
    return response


async def respond(send: Send, status: int = 200, body: bytes = b"ok") -> None:
    """Send a complete response."""
    await send({"type": START, "status": status, "headers": []})
    await send({"type": BODY, "body": body})


def results(events: list[Event]) -> list[Event]:
    """Give what came out; leave out beginnings, hooks and connections."""
    results = (CommitFailed, HookFailed, ImplicitCommit, ReleaseFailed, UnitFinished)
    return [each for each in events if isinstance(each, results)]


def endpoint(
    handler: Callable[[], Awaitable[object]],
    status: int = 200,
) -> ASGIApp:
    """Make the smallest application: run `handler`, then answer."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await handler()
        await respond(send, status)

    return app
