"""Applications, and a client that calls them as a server does, without a socket."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

import asgi_uow as uow
from asgi_uow.observers import HookFailed
from tests.support.observer import Events

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from asgi_uow import Database
    from asgi_uow._asgi import ASGIApp, Message, Receive, Scope, Send

Handler: TypeAlias = "Callable[[], Awaitable[object]]"
START = "http.response.start"
BODY = "http.response.body"


@dataclasses.dataclass
class Response:
    """What reached the server, in order, and what else came of a request."""

    messages: list[Message] = dataclasses.field(default_factory=list[Any])
    seen: list[object] = dataclasses.field(default_factory=list[object])
    """What the probe answered when a start had reached the server."""
    error: BaseException | None = None
    """What left the application."""
    events: Events = dataclasses.field(default_factory=Events)
    units: list[uow.UnitOfWork] = dataclasses.field(default_factory=list[Any])
    hooks: list[str] = dataclasses.field(default_factory=list[str])
    """The hooks that were called: "commit" or "rollback"."""

    @property
    def types(self) -> list[str]:
        return [message["type"] for message in self.messages]

    @property
    def status(self) -> int:
        """The status of the only start; there has to be exactly one, at first."""
        assert [START] == [each for each in self.types if each != BODY], self
        status = self.messages[0]["status"]
        assert isinstance(status, int)
        return status

    @property
    def headers(self) -> dict[str, str]:
        pairs = self.messages[0]["headers"]
        return {name.decode().lower(): value.decode() for name, value in pairs}

    @property
    def cookie(self) -> bytes:
        """What the client sends with its next request, if it was given one."""
        return self.headers.get("set-cookie", "").partition(";")[0].encode()

    @property
    def chunks(self) -> list[str]:
        """The parts of the body that are not empty."""
        bodies = [each.get("body", b"") for each in self.messages[1:]]
        return [body.decode() for body in bodies if body]

    @property
    def is_over(self) -> bool:
        last = self.messages[-1]
        return last["type"] == BODY and not last.get("more_body", False)

    @property
    def is_complete(self) -> bool:
        """Tell whether the body has one end, the length that was announced."""
        ends = [not each.get("more_body", False) for each in self.messages[1:]]
        length = sum(len(each.get("body", b"")) for each in self.messages[1:])
        announced = int(self.headers.get("content-length", length))
        return ends == [*([False] * (len(ends) - 1)), True] and announced == length

    @property
    def failures(self) -> list[HookFailed]:
        """What was told of hooks that failed."""
        return self.events.of(HookFailed)

    @property
    def unit(self) -> uow.UnitOfWork:
        """The unit of work of the request."""
        [unit] = self.units
        return unit


def http_scope(path: str = "/", **others: object) -> dict[str, object]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [(b"host", b"server")],
        "client": ("client", 1),
        "server": ("server", 80),
        "state": {},
        **others,
    }


class Client:
    """Calls an application; `probe` looks at the database when a start arrives."""

    spec_version = "2.4"

    def __init__(self, app: ASGIApp, probe: Handler | None = None) -> None:
        self.app = app
        self._probe = probe

    async def take(self, message: Message, /) -> None:
        """Be given a message; as quick as can be."""

    async def request(
        self,
        path: str = "/",
        *,
        scope: Scope = None,
        receive: Receive | None = None,
        body: Sequence[bytes] = (b"",),
        leave_after: Callable[[Message], bool] | None = None,
        into: Response | None = None,
        **others: object,
    ) -> Response:
        """Send a request; the client goes away after the first message that it says.

        What the application sends to a client that is gone is lost without a sign,
        as it is in every real server; from ASGI 2.4 on an `OSError` tells.
        """
        response = Response() if into is None else into
        if scope is None:
            scope = http_scope(path, **others)
            scope["asgi"] = {"version": "3.0", "spec_version": self.spec_version}
        over = asyncio.Event()  # to an application, an end is a client that left

        async def send(message: Message) -> None:
            if over.is_set() and not response.is_over:
                if scope["asgi"]["spec_version"] == "2.4":
                    reason = "the client has gone"
                    raise OSError(reason)
                return
            if message["type"] == START:
                # An iterator, in Sanic: whoever reads it first is the only one.
                message = {**message, "headers": list(message["headers"])}
                if self._probe is not None:
                    response.seen.append(await self._probe())
            response.messages.append(message)
            await self.take(message)
            if response.is_over or (leave_after and leave_after(message)):
                over.set()

        try:
            await self.app(scope, receive or receiving(over, body), send)
        except Exception as error:  # noqa: BLE001  # what a server would log
            response.error = error
        return response


def receiving(over: asyncio.Event, body: Sequence[bytes] = (b"",)) -> Receive:
    """Give a body in these parts, and when all is over say that the client has left."""
    parts = [*body]

    async def receive() -> Message:
        if not parts:
            await over.wait()
            return {"type": "http.disconnect"}
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    return receive


async def no_body() -> Message:
    """Stand for a request that nobody reads; not an `Exception`, which is caught."""
    pytest.fail("receive() was called: only an application may read the request")


async def respond(send: Send, status: int = 200, body: bytes = b"ok") -> None:
    """Send a complete response."""
    await send({"type": START, "status": status, "headers": []})
    await send({"type": BODY, "body": body})


def endpoint(handler: Handler, status: int = 200) -> ASGIApp:
    """Make the smallest application: run `handler`, then answer."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await handler()
        await respond(send, status)

    return app


async def request(
    app: ASGIApp, *, scope: Scope = None, probe: Handler | None = None
) -> Response:
    """Send one request to an application."""
    return await Client(app, probe).request(scope=scope)


async def serve(
    app: ASGIApp,
    *databases: Database,
    probe: Handler | None = None,
    into: Response | None = None,
    **options: Any,
) -> Response:
    """Send one request to an application behind the middleware, and observe it."""
    response = Response() if into is None else into
    options = {"observers": [response.events], **options}
    client = Client(uow.UnitOfWorkMiddleware(app, *databases, **options), probe)
    return await client.request(receive=no_body, into=response)


async def handle(
    handler: Handler,
    *databases: Database,
    status: int = 200,
    hooks: bool = False,
    into: Response | None = None,
    **options: Any,
) -> Response:
    """Have a handler do the work of one request, then answer.

    With `hooks` it registers one of either kind, to see which is called.
    """
    response = Response() if into is None else into

    async def work() -> None:
        response.units.append(uow.current_unit_of_work())
        if hooks:
            uow.after_commit(response.hooks.append, "commit")
            uow.after_rollback(response.hooks.append, "rollback")
        await handler()

    return await serve(endpoint(work, status), *databases, into=response, **options)
