"""The ASGI half of a server: it records what reaches it, and what is true then."""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable

    from asgi_uow._asgi import ASGIApp, Message, Receive, Scope, Send

    Probe = Callable[[], Awaitable[object]]

START = "http.response.start"
BODY = "http.response.body"


@dataclasses.dataclass
class Exchange:
    """One request: the messages in the order in which they reached the server."""

    messages: list[Message] = dataclasses.field(default_factory=list[Any])
    seen_at_start: list[object] = dataclasses.field(default_factory=list[object])
    """What the probe answered when a start message had reached the server."""
    error: BaseException | None = None
    """What left the application."""

    @property
    def types(self) -> list[str]:
        return [message["type"] for message in self.messages]

    @property
    def status(self) -> int:
        """The status of the only start; there has to be exactly one, at first."""
        assert [START] == [each for each in self.types if each != BODY]
        status = self.messages[0]["status"]
        assert isinstance(status, int)
        return status

    @property
    def headers(self) -> dict[str, str]:
        pairs = self.messages[0]["headers"]
        return {name.decode().lower(): value.decode() for name, value in pairs}

    @property
    def chunks(self) -> list[str]:
        """The parts of the body that are not empty."""
        bodies = [each.get("body", b"") for each in self.messages[1:]]
        return [body.decode() for body in bodies if body]

    @property
    def lines(self) -> list[str]:
        return "".join(self.chunks).splitlines()

    @property
    def is_over(self) -> bool:
        return [BODY, False] == [
            self.messages[-1]["type"],
            self.messages[-1].get("more_body", False),
        ]

    @property
    def is_complete(self) -> bool:
        """Tell whether the body has one end, the length that was announced."""
        ends = [not each.get("more_body", False) for each in self.messages[1:]]
        length = sum(len(each.get("body", b"")) for each in self.messages[1:])
        announced = int(self.headers.get("content-length", length))
        return ends == [*([False] * (len(ends) - 1)), True] and announced == length


async def nothing() -> None:
    """See nothing."""


def answering(work: Callable[[], Awaitable[object]], status: int = 200) -> ASGIApp:
    """Make an application of no framework: it does the work, then it answers."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await work()
        await send({"type": START, "status": status, "headers": []})
        await send({"type": BODY})

    return app


class Server:
    """Calls an application as a server does, without a socket."""

    def __init__(self, app: ASGIApp, probe: Probe = nothing) -> None:
        self.app = app
        self._probe = probe

    @asynccontextmanager
    async def lifespan(self) -> AsyncGenerator[None, None]:
        """Start the application, then shut it down."""
        events: asyncio.Queue[Message] = asyncio.Queue()
        answers: asyncio.Queue[Message] = asyncio.Queue()
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}

        async def run() -> None:
            await self.app(scope, events.get, answers.put)

        async def is_complete(event: str) -> bool:
            await events.put({"type": f"lifespan.{event}"})
            answer = await asyncio.wait_for(answers.get(), timeout=5)
            return bool(answer["type"] == f"lifespan.{event}.complete")

        task = asyncio.create_task(run())
        try:
            assert await is_complete("startup")
            yield
        finally:
            assert await is_complete("shutdown")
            await task

    @asynccontextmanager
    async def no_lifespan(self) -> AsyncGenerator[None, None]:
        """Find that the application has no lifespan, then go on without."""
        events: asyncio.Queue[Message] = asyncio.Queue()
        with pytest.raises(ValueError, match="lifespan"):
            await self.app({"type": "lifespan"}, events.get, events.put)
        yield

    async def request(
        self,
        path: str = "/",
        *,
        method: str = "GET",
        leave_after: Callable[[Message], bool] | None = None,
        spec_version: str = "2.3",
    ) -> Exchange:
        """Send a request; the client goes away after the first message that it says.

        What the application sends to a client that is gone is lost without a sign,
        as it is in every real server; from ASGI 2.4 on an `OSError` may tell.
        """
        exchange = Exchange()
        over = asyncio.Event()  # to an application, an end is a client that left
        request = iter([{"type": "http.request", "body": b"", "more_body": False}])

        async def receive() -> Message:
            message = next(request, None)
            if message is None:
                await over.wait()
                message = {"type": "http.disconnect"}
            return message

        async def send(message: Message) -> None:
            if over.is_set() and not exchange.is_over:
                if spec_version == "2.4":
                    message = "the client has gone"
                    raise OSError(message)
                return
            if message["type"] == START:
                # An iterator, in Sanic: whoever reads it first is the only one.
                message = {**message, "headers": list(message["headers"])}
                exchange.seen_at_start.append(await self._probe())
            exchange.messages.append(message)
            if exchange.is_over or (leave_after and leave_after(message)):
                over.set()

        try:
            scope = _scope("http", path, method=method)
            scope["asgi"]["spec_version"] = spec_version
            await self.app(scope, receive, send)
        except Exception as error:  # noqa: BLE001  # a server logs it
            exchange.error = error
        return exchange

    async def websocket(self, texts: Iterable[str], path: str = "/ws") -> list[str]:
        """Send messages, each when the one before is answered; return the answers."""
        incoming: asyncio.Queue[Message] = asyncio.Queue()
        outgoing: asyncio.Queue[str] = asyncio.Queue()
        answers: list[str] = []

        async def send(message: Message) -> None:
            if message["type"] == "websocket.send":
                await outgoing.put(message["text"])

        async def run() -> None:
            scope = _scope("websocket", path, scheme="ws", subprotocols=[])
            await self.app(scope, incoming.get, send)

        task = asyncio.create_task(run())
        await incoming.put({"type": "websocket.connect"})
        for text in texts:
            await incoming.put({"type": "websocket.receive", "text": text})
            answers.append(await asyncio.wait_for(outgoing.get(), timeout=5))
        await incoming.put({"type": "websocket.disconnect", "code": 1000})
        await task
        return answers


def _scope(kind: str, path: str, **others: object) -> Scope:
    return {
        "type": kind,
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"host", b"server")],
        "client": ("client", 1),
        "server": ("server", 80),
        "state": {},
        **others,
    }
