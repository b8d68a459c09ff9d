"""One cluster, from its first use to the end of the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.integration.galera.servers import GaleraCluster, GaleraNode
from tests.servers.plugin import require

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


@pytest.fixture(scope="session")
def running_clusters() -> Iterator[list[GaleraCluster]]:
    """The cluster, once there is one."""
    clusters: list[GaleraCluster] = []
    yield clusters
    for cluster in clusters:
        cluster.close()


@pytest.fixture
async def cluster(
    running_clusters: list[GaleraCluster],
) -> AsyncIterator[GaleraCluster]:
    """An empty database on a Galera cluster, all of it running."""
    require(GaleraNode)
    if not running_clusters:
        running_clusters.append(await GaleraCluster().__aenter__())
    [cluster] = running_clusters
    async with cluster.fresh_database():
        yield cluster
