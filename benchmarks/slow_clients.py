"""Clients that read slowly: `python -m benchmarks.slow_clients`, half a minute.

A request inserts a row, then streams 1 MB to a client that takes two seconds to read
it. Seen meanwhile: how many connections the pools have given out, and how long another
client waits for a request with one SELECT. FastAPI's yield dependency keeps its session
until the body is sent. Socket buffers are small, as if the network were slow.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import time
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import uvicorn
from fastapi import Depends, FastAPI
from sqlalchemy import Engine, event
from sqlalchemy.ext.asyncio import AsyncSession  # noqa: TC002 - FastAPI reads it
from sqlalchemy.pool import QueuePool
from starlette.responses import PlainTextResponse, StreamingResponse

from asgi_uow import (
    Database,
    UnitOfWorkMiddleware,
    read_session_dependency,
    session_dependency,
)
from tests.servers.process import HOST

from .apps import INSERT, SELECT, engine_of
from .databases import Databases
from .peers import sessions_of
from .questions import Question
from .tables import print_table

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from sqlalchemy import Connection

    from asgi_uow._asgi import ASGIApp

    Maker: TypeAlias = Callable[[str, AsyncExitStack], ASGIApp]

PLACE = "postgresql-asyncpg"
CHUNK = b"x" * 16_384
CHUNKS = 64
SECONDS = 2.0
BUFFER = 16_384
POOL: dict[str, Any] = {"pool_size": 10, "max_overflow": 0}


def endpoints(write: Any, read: Any) -> FastAPI:
    """Make the application; these dependencies give the sessions."""
    app = FastAPI()

    async def body() -> AsyncGenerator[bytes]:
        for _ in range(CHUNKS):
            yield CHUNK

    async def slow(session: AsyncSession = write) -> StreamingResponse:
        await session.execute(INSERT)
        return StreamingResponse(body())

    async def quick(session: AsyncSession = read) -> PlainTextResponse:
        return PlainTextResponse(str(await session.scalar(SELECT)))

    app.get("/slow", response_model=None)(slow)
    app.get("/quick", response_model=None)(quick)
    return app


def yield_dependency(scope: Any, url: str, stack: AsyncExitStack) -> ASGIApp:
    sessions = sessions_of(engine_of(url, stack, **POOL))

    async def open_session() -> AsyncGenerator[AsyncSession]:
        async with sessions.begin() as session:
            yield session

    dependency = Depends(open_session, scope=scope)
    return endpoints(dependency, dependency)


def ours(url: str, stack: AsyncExitStack) -> ASGIApp:
    database = Database.from_url(url, **POOL)
    stack.push_async_callback(database.dispose)
    app = endpoints(Depends(session_dependency), Depends(read_session_dependency))
    app.add_middleware(UnitOfWorkMiddleware, database)
    return app


CONTESTANTS: dict[str, Maker] = {
    "yield dependency": partial(yield_dependency, "request"),
    "yield, scope=function": partial(yield_dependency, "function"),
    "ours": ours,
}


@asynccontextmanager
async def served(app: ASGIApp) -> AsyncGenerator[int]:
    """Serve in this process, where the pools can be seen; give the port."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        listener.bind((HOST, 0))
        config = uvicorn.Config(app, lifespan="off", log_level="warning")
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(0.01)
        yield listener.getsockname()[1]
        server.should_exit = True
        await task


async def get(
    port: int, path: str, *, seconds: float = 0.0, begun: asyncio.Event | None = None
) -> float:
    """Make a request, read for at least so long; return how long it took."""
    loop = asyncio.get_running_loop()
    begin = time.monotonic()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        client.setblocking(False)  # noqa: FBT003 - has no keyword
        await loop.sock_connect(client, (HOST, port))
        request = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        await loop.sock_sendall(client, request.encode())
        total, first, answer = len(CHUNK) * CHUNKS, 0.0, b""
        while data := await loop.sock_recv(client, len(CHUNK)):
            answer += data
            first = first or time.monotonic()
            if begun is not None:
                begun.set()
            pause = first + seconds * len(answer) / total - time.monotonic()
            await asyncio.sleep(max(0.0, pause))
    assert answer.startswith(b"HTTP/1.1 200"), answer[:200]
    return time.monotonic() - begin


async def compare(url: str, name: str, clients: int) -> tuple[str, ...]:
    """Return the line of a contestant with so many slow clients."""
    pools: set[QueuePool] = set()

    def add_pool(connection: Connection) -> None:
        if isinstance(pool := connection.engine.pool, QueuePool):
            pools.add(pool)

    event.listen(Engine, "engine_connect", add_pool)
    async with AsyncExitStack() as stack:
        stack.callback(event.remove, Engine, "engine_connect", add_pool)
        app = CONTESTANTS[name](url, stack)
        port = await stack.enter_async_context(served(app))
        warm_up = (get(port, "/quick") for _ in range(POOL["pool_size"]))
        await asyncio.gather(*warm_up)  # opens connections
        begun = [asyncio.Event() for _ in range(clients)]
        slow = asyncio.gather(
            *(get(port, "/slow", seconds=SECONDS, begun=each) for each in begun)
        )
        with suppress(TimeoutError):  # more clients than connections: they wait
            async with asyncio.timeout(SECONDS / 2):
                await asyncio.gather(*(each.wait() for each in begun))
        held = sum(pool.checkedout() for pool in pools)
        took = [await get(port, "/quick")]
        while not slow.done():
            took.append(await get(port, "/quick"))
        longest = max(await slow)
    quick = f"{max(took) * 1000:,.0f}"
    return f"{clients} slow clients", name, str(held), quick, f"{longest:.1f}"


async def main() -> None:
    """Measure with fewer slow clients than connections, and with as many."""
    parser = argparse.ArgumentParser(prog="benchmarks.slow_clients")
    parser.add_argument("--clients", nargs="+", type=int, default=(5, 10))
    options = parser.parse_args()
    async with Databases() as databases:
        [url] = (await databases.urls([Question(PLACE, {}, PLACE)])).values()
        lines = [
            await compare(url, name, clients)
            for clients in options.clients
            for name in CONTESTANTS
        ]
    print(f"A pool gives out {POOL['pool_size']} connections.")
    titles = ("connections held", "longest quick request, ms", "slow request, s")
    print_table(("beside", "contestant", *titles), lines)


if __name__ == "__main__":
    asyncio.run(main())
