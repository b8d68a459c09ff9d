from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest

from tests.integration.asgi_servers.child import running
from tests.integration.asgi_servers.facts import FACTS
from tests.integration.asgi_servers.servers import SERVERS
from tests.servers import SQLiteBackend
from tests.support import shop

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from tests.integration.asgi_servers.case import ServerFact
    from tests.integration.asgi_servers.child import Child
    from tests.integration.asgi_servers.servers import ASGIServer

CELLS = [
    (server, fact)
    for server in SERVERS
    for fact in FACTS
    if fact.name not in server.lacks
]


def name(part: ASGIServer | ServerFact) -> str:
    return part.name


@pytest.fixture(scope="module")
async def children(
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Callable[[ASGIServer], Awaitable[Child]]]:
    """Servers that go on running, each started when first asked for."""
    started: dict[str, Child] = {}
    async with AsyncExitStack() as stack:

        async def get(server: ASGIServer) -> Child:
            if server.name not in started:
                folder = tmp_path_factory.mktemp("site")
                backend = await stack.enter_async_context(SQLiteBackend(folder))
                await shop.create(backend)
                child = await stack.enter_async_context(running(server, backend))
                started[server.name] = child
            return started[server.name]

        yield get


@pytest.mark.parametrize(
    ("server", "fact"),
    [(server, fact) for server, fact in CELLS if not fact.ends_server],
    ids=name,
)
async def test_running(
    fact: ServerFact,
    server: ASGIServer,
    children: Callable[[ASGIServer], Awaitable[Child]],
) -> None:
    """Every fact holds on every server that can show it."""
    await fact.check(await children(server))


@pytest.mark.parametrize(
    ("server", "fact"),
    [(server, fact) for server, fact in CELLS if fact.ends_server],
    ids=name,
)
async def test_ending(
    fact: ServerFact, server: ASGIServer, sqlite: SQLiteBackend
) -> None:
    """Every fact about the end holds on every server that can show it."""
    await fact.hold(server, sqlite)
