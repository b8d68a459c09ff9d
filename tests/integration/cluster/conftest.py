"""One cluster of each kind per worker, from its first use to the end of the run."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from tests.integration.cluster.servers import MariaDBCluster, PostgreSQLCluster
from tests.servers.plugin import server_port

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator

    from tests.integration.cluster.servers import Cluster

KINDS: dict[str, type[MariaDBCluster | PostgreSQLCluster]] = {
    "mariadb": MariaDBCluster,
    "postgresql": PostgreSQLCluster,
}


@pytest.fixture(scope="session")
def running_clusters() -> Iterator[dict[str, Cluster]]:
    """The clusters by kind."""
    clusters: dict[str, Cluster] = {}
    yield clusters
    for cluster in clusters.values():
        cluster.close()


@asynccontextmanager
async def on_cluster(
    request: pytest.FixtureRequest, kind: str
) -> AsyncGenerator[Cluster, None]:
    """The worker's cluster, all of it running, with an empty database."""
    server_port(request.config, kind)  # skips where there is no such server
    running = request.getfixturevalue("running_clusters")
    if kind not in running:
        running[kind] = await KINDS[kind]().__aenter__()
    cluster: Cluster = running[kind]
    async with cluster.fresh_database():
        yield cluster


@pytest.fixture
async def mariadb_cluster(request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    """An empty database on a MariaDB with two replicas."""
    async with on_cluster(request, "mariadb") as cluster:
        yield cluster


@pytest.fixture
async def postgresql_cluster(request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    """An empty database on a PostgreSQL with one replica."""
    async with on_cluster(request, "postgresql") as cluster:
        yield cluster


@pytest.fixture(params=["mariadb", "postgresql"])
async def cluster(request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    """An empty database on a cluster of each kind in turn."""
    async with on_cluster(request, request.param) as cluster:
        yield cluster
