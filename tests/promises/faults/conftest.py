"""Servers for these tests alone: nobody else's tests see them die."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.promises.faults.mortal import KINDS, Mortal, make_server
from tests.servers.plugin import server_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.servers import Server


@pytest.fixture(scope="session")
def mortal_servers() -> Iterator[dict[str, Server]]:
    """The servers by kind, each from its first use to the end of the run."""
    servers: dict[str, Server] = {}
    yield servers
    for server in servers.values():
        server.close()


@pytest.fixture
async def mortal(
    pytestconfig: pytest.Config, mortal_servers: dict[str, Server], driver: str
) -> AsyncIterator[Mortal]:
    """An empty database for `driver` on a server that may be killed."""
    kind = KINDS[driver]
    server_port(pytestconfig, kind)  # skips where there is no such server
    if kind not in mortal_servers:
        mortal_servers[kind] = make_server(kind)
    async with Mortal(mortal_servers[kind], driver) as mortal:
        yield mortal
