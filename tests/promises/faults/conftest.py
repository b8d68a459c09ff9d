"""Servers for these tests alone: nobody else's tests see them die."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.promises.faults.mortal import KINDS, Mortal, make_server
from tests.servers.pgbouncer import PgBouncer
from tests.servers.plugin import kind_of, server_port

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
    name, _, is_pooled = driver.partition("@")
    kind = KINDS[name]
    server_port(pytestconfig, kind_of(driver))  # skips where there is no such server
    if kind not in mortal_servers:
        mortal_servers[kind] = make_server(kind)
    if is_pooled and "pgbouncer" not in mortal_servers:
        mortal_servers["pgbouncer"] = PgBouncer(str(mortal_servers[kind].port))
        mortal_servers["pgbouncer"].start()
    pooler = mortal_servers["pgbouncer"] if is_pooled else None
    async with Mortal(mortal_servers[kind], name, pooler) as mortal:
        yield mortal
