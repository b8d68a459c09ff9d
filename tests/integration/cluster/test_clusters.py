"""The clusters that the other tests of this package rely on."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from tests.integration.cluster.conftest import KINDS, on_cluster
from tests.servers import ServerError
from tests.servers.plugin import server_port
from tests.servers.process import is_free

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from tests.integration.cluster.servers import Cluster

CREATE = "CREATE TABLE t (id INTEGER PRIMARY KEY)"
INSERT = "INSERT INTO t VALUES (1)"
COUNT = "SELECT count(*) FROM t"

every_kind = pytest.mark.parametrize("kind", ["mariadb", "postgresql"])


@asynccontextmanager
async def client(url: str) -> AsyncGenerator[AsyncConnection, None]:
    """A connection as the library's users have one."""
    engine = create_async_engine(url)
    try:
        async with engine.connect() as connection:
            yield connection
    finally:
        await engine.dispose()


async def counts(cluster: Cluster) -> list[object]:
    """The number of rows on each replica."""
    return [await cluster.at(replica).scalar(COUNT) for replica in cluster.replicas]


# Replication


async def test_size(mariadb_cluster: Cluster, postgresql_cluster: Cluster) -> None:
    """MariaDB has two replicas, PostgreSQL one; both clusters run side by side."""
    assert 2 == len(mariadb_cluster.replicas)
    assert 1 == len(postgresql_cluster.replicas)


async def test_row_arrives(cluster: Cluster) -> None:
    """What the primary has committed, each replica has."""
    await cluster.backend.execute(CREATE, INSERT)
    await cluster.wait_until_applied()
    assert [1] * len(cluster.replicas) == await counts(cluster)


async def test_fresh_database(cluster: Cluster) -> None:
    """Each test's database is on every replica when the test begins, and empty."""
    for server in cluster.servers:
        with pytest.raises(DBAPIError, match=r"doesn't exist|does not exist"):
            await cluster.at(server).scalar(COUNT)


async def test_database_is_dropped(cluster: Cluster) -> None:
    """A database goes away on each server, whatever a replica's client has open."""
    async with AsyncExitStack() as stack:
        async with cluster.fresh_database() as backend:
            await backend.execute(CREATE)
            await cluster.wait_until_applied()
            everywhere = [cluster.at(server) for server in cluster.servers]
            connection = await stack.enter_async_context(client(everywhere[1].url))
            await connection.execute(text(COUNT))
        await cluster.wait_until_applied()
        await connection.invalidate()
    for database in everywhere:
        with pytest.raises(Exception, match=r"does not exist|Unknown database"):
            await database.scalar("SELECT 1")


@pytest.mark.parametrize(
    ("kind", "driver", "code"),
    [
        ("mariadb", "asyncmy", 1290),
        ("postgresql", "asyncpg", "25006"),
        ("postgresql", "psycopg", "25006"),
    ],
)
async def test_replica_refuses(
    request: pytest.FixtureRequest, kind: str, driver: str, code: object
) -> None:
    """Users write on the primary; a replica refuses, and lets them read."""
    async with on_cluster(request, kind) as cluster:
        await cluster.backend.execute(CREATE)
        async with client(cluster.at(cluster.primary, driver).url) as connection:
            await connection.execute(text(INSERT))
            await connection.commit()
        await cluster.wait_until_applied()
        for replica in cluster.replicas:
            async with client(cluster.at(replica, driver).url) as connection:
                assert 1 == (await connection.execute(text(COUNT))).scalar()
                with pytest.raises(DBAPIError, match="read-only") as refused:
                    await connection.execute(text("DELETE FROM t"))
                error = refused.value.orig
                assert error is not None
                assert code in {error.args[0], getattr(error, "sqlstate", None)}


async def test_stopped_applier(cluster: Cluster) -> None:
    """A replica whose applier is stopped receives a row, and has it when started."""
    await cluster.backend.execute(CREATE)
    await cluster.wait_until_applied()
    await cluster.stop_applier(0)
    await cluster.backend.execute(INSERT)
    await cluster.wait_until_received()
    assert 0 == (await counts(cluster))[0]
    await cluster.start_applier(0)
    await cluster.wait_until_applied()
    assert [1] * len(cluster.replicas) == await counts(cluster)


# Crashes


async def test_replica_is_killed(cluster: Cluster) -> None:
    """Nobody waits for a dead replica; when it is back it has what it missed."""
    await cluster.backend.execute(CREATE)
    await cluster.wait_until_applied()
    replica = cluster.replicas[0]
    replica.kill()
    assert is_free(replica.port)
    await cluster.backend.execute(INSERT)
    await cluster.wait_until_applied()
    replica.start()
    await cluster.wait_until_applied()
    assert [1] * len(cluster.replicas) == await counts(cluster)


@pytest.mark.parametrize("end", ["stop", "kill"])
async def test_primary_is_restarted(cluster: Cluster, end: str) -> None:
    """The replicas go on when the primary is back, even after a crash."""
    await cluster.backend.execute(CREATE)
    getattr(cluster.primary, end)()
    cluster.primary.start()
    await cluster.backend.execute(INSERT)
    await cluster.wait_until_applied()
    assert [1] * len(cluster.replicas) == await counts(cluster)


async def test_mended(cluster: Cluster) -> None:
    """What a test leaves behind, the next one finds running and up to date."""
    async with cluster.fresh_database():
        await cluster.stop_applier(0)
        for server in cluster.servers[::2]:
            server.kill()
    async with cluster.fresh_database() as backend:
        await backend.execute(CREATE, INSERT)
        await cluster.wait_until_applied()
        assert [1] * len(cluster.replicas) == await counts(cluster)


# Beginning and end


@every_kind
async def test_nothing_is_left(pytestconfig: pytest.Config, kind: str) -> None:
    """A cluster ends with its processes, its ports and its folder."""
    server_port(pytestconfig, kind)
    async with KINDS[kind]() as cluster:
        pids = [server.pid for server in cluster.servers]
        cluster.replicas[0].kill()
        assert cluster.folder.exists()
    for pid in pids:
        assert pid is not None
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert all(is_free(server.port) for server in cluster.servers)
    assert not cluster.folder.exists()


@every_kind
async def test_does_not_start(pytestconfig: pytest.Config, kind: str) -> None:
    """A cluster with a replica that does not start says why, and leaves nothing."""
    server_port(pytestconfig, kind)
    cluster = KINDS[kind]()
    replica = cluster.replicas[0]
    replica.data = replica.folder / "log" / "data"
    with pytest.raises(ServerError, match=r"Not a directory|File exists"):
        await cluster.__aenter__()
    assert [None] * len(cluster.servers) == [server.pid for server in cluster.servers]
    assert not cluster.folder.exists()
