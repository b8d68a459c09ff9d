"""Servers: the ASGI half of one, as frameworks meet it, and uvicorn."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import httpx
import pytest
import uvicorn

from tests.servers import eventually
from tests.servers.process import HOST
from tests.support.asgi import Client, http_scope

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable

    from asgi_uow._asgi import ASGIApp, Message, Receive, Scope, Send


class Server(Client):
    """A server of the spec that most servers are of."""

    spec_version = "2.3"

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

    async def websocket(self, texts: Iterable[str], path: str = "/ws") -> list[str]:
        """Send messages, each when the one before is answered; return the answers."""
        incoming: asyncio.Queue[Message] = asyncio.Queue()
        outgoing: asyncio.Queue[str] = asyncio.Queue()
        answers: list[str] = []
        scope = http_scope(path, type="websocket", scheme="ws", subprotocols=[])
        del scope["method"]

        async def send(message: Message) -> None:
            if message["type"] == "websocket.send":
                await outgoing.put(message["text"])

        task = asyncio.create_task(self._call(scope, incoming, send))
        await incoming.put({"type": "websocket.connect"})
        for text in texts:
            await incoming.put({"type": "websocket.receive", "text": text})
            answers.append(await asyncio.wait_for(outgoing.get(), timeout=5))
        await incoming.put({"type": "websocket.disconnect", "code": 1000})
        await task
        return answers

    async def _call(
        self, scope: object, incoming: asyncio.Queue[Message], send: Send
    ) -> None:
        await self.app(scope, incoming.get, send)


@asynccontextmanager
async def on_uvicorn(app: ASGIApp) -> AsyncGenerator[httpx.AsyncClient, None]:
    """Serve an application on a free port, inside what knows who is logged in."""

    async def with_user(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["state"]["user"] = "ann"
        await app(scope, receive, send)

    config = uvicorn.Config(with_user, HOST, 0, ws="none", log_config=None)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())

    async def is_started() -> bool:
        return server.started or serving.done()

    try:
        await eventually(expected=True, probe=is_started)
        port = server.servers[0].sockets[0].getsockname()[1]
        async with httpx.AsyncClient(base_url=f"http://{HOST}:{port}") as client:
            yield client
    finally:
        server.should_exit = True
        await serving
