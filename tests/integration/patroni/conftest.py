"""One cluster for the run; each test has an empty database, and all nodes running."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.integration.patroni.servers import Etcd, HAProxy, Node, Patroni
from tests.servers import PostgreSQLBackend
from tests.servers.plugin import require, server_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


@pytest.fixture(scope="session")
def running_patroni(pytestconfig: pytest.Config) -> Iterator[Patroni]:
    """The cluster; without its programs tests are skipped, in CI they fail."""
    server_port(pytestconfig, "postgresql")
    for kind in (Etcd, Node, HAProxy):
        require(kind)
    with Patroni() as patroni:
        yield patroni


@pytest.fixture
async def patroni(running_patroni: Patroni) -> Patroni:
    """The cluster with a leader, a synchronous standby and another standby."""
    await running_patroni.start()
    return running_patroni


@pytest.fixture
async def database(patroni: Patroni) -> AsyncIterator[PostgreSQLBackend]:
    """An empty database on all nodes, reached through HAProxy."""
    async with PostgreSQLBackend(patroni.haproxy.port) as database:
        await patroni.wait_until_applied()
        yield database
