"""A node that conflicts with others, that is killed, that has lost the others."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event

from asgi_uow import (
    Database,
    Outcome,
    Retry,
    current_read_session,
    current_session,
    errors,
)
from asgi_uow.observers import CommitFailed, ReleaseFailed, RetryScheduled
from tests.integration.galera.servers import ISOLATE, SYNCED, GaleraCluster
from tests.servers import ServerError
from tests.servers.process import is_free
from tests.support.asgi import handle
from tests.support.databases import checked_out

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from tests.integration.galera.servers import GaleraNode

CREATE = "CREATE TABLE counters (id INTEGER PRIMARY KEY, value INTEGER NOT NULL)"
INSERT = "INSERT INTO counters VALUES (1, 0), (2, 0)"
ADD = "UPDATE counters SET value = value + 1 WHERE id = 1"
VALUE = "SELECT value FROM counters WHERE id = 1"
RETRY = Retry(backoff=0.001)


@asynccontextmanager
async def database(
    cluster: GaleraCluster, node: GaleraNode
) -> AsyncGenerator[Database]:
    """A database on one node, with a counter."""
    await cluster.create(CREATE, INSERT)
    db = Database.from_url(cluster.at(node).url)
    try:
        yield db
    finally:
        await db.dispose()


async def add() -> None:
    await current_session().execute(ADD)


async def read() -> None:
    await current_read_session().scalar(VALUE)


async def values(cluster: GaleraCluster) -> list[object]:
    """The value of the counter on each node, once it has all that is committed."""
    return [await cluster.at(node).scalar(SYNCED + VALUE) for node in cluster.nodes]


async def test_row_arrives(cluster: GaleraCluster) -> None:
    """What one node has committed, each has."""
    _, second, _ = cluster.nodes
    async with database(cluster, second) as db:
        assert 200 == (await handle(add, db)).status
    assert [1, 1, 1] == await values(cluster)


# Conflicts


@pytest.mark.parametrize("retry", [None, RETRY])
@pytest.mark.parametrize("again", [False, True])
async def test_conflict(
    cluster: GaleraCluster, retry: Retry | None, *, again: bool
) -> None:
    """Two nodes change a row: the later COMMIT is refused, and the request replayed.

    So is the next statement, when the node has applied what the other has committed.
    """
    first, second, _ = cluster.nodes
    attempts: list[int] = []

    async def work() -> None:
        attempts.append(1)
        await add()
        if len(attempts) == 1:
            await cluster.at(second).execute(ADD)
            if again:
                await cluster.at(first).scalar(SYNCED + VALUE)
                await current_session().execute("SELECT 1 FROM counters")

    async with database(cluster, first) as db:
        response = await handle(work, db, hooks=True, retry=retry)
        assert [0, 0] == checked_out(db)
    if retry is None:
        assert (503, "1") == (response.status, response.headers["retry-after"])
        assert ["rollback"] == response.hooks
        assert [1, 1, 1] == await values(cluster)
    else:
        assert 200 == response.status
        assert [1213] == [each.code for each in response.events.of(RetryScheduled)]
        assert ["rollback", "commit"] == response.hooks
        assert [2, 2, 2] == await values(cluster)


async def test_swallowed(cluster: GaleraCluster) -> None:
    """After a conflict in a statement nothing that follows it is kept alone."""
    first, second, _ = cluster.nodes

    async def work() -> None:
        await add()
        await cluster.at(second).execute(ADD)
        await cluster.at(first).scalar(SYNCED + VALUE)
        with pytest.raises(Exception, match="1213"):
            await current_session().execute("SELECT 1 FROM counters")
        await current_session().execute("UPDATE counters SET value = 7 WHERE id = 2")

    async with database(cluster, first) as db:
        assert 503 == (await handle(work, db)).status
    assert [(1, 1), (2, 0)] == await cluster.backend.fetch("SELECT * FROM counters")


# A node that has lost the others


async def test_node_without_the_others(cluster: GaleraCluster) -> None:
    """It answers 503 to what writes and reads, and all is well when it is back."""
    _, node, _ = cluster.nodes

    async with database(cluster, node) as db:
        for handler in (add, read):
            assert 200 == (await handle(handler, db)).status
        assert (await db.check()).ok
        await cluster.isolate(node)
        for handler in (add, read):
            response = await handle(handler, db, hooks=True)
            assert (503, "1") == (response.status, response.headers["retry-after"])
            assert ["rollback"] == response.hooks
            assert [] == response.events.of(ReleaseFailed)
        assert "OperationalError 1047" == (await db.check()).writer.error
        await cluster.rejoin(node)
        for handler in (add, read):
            assert 200 == (await handle(handler, db)).status
        assert (await db.check()).ok
        assert [0, 0] == checked_out(db)
    assert [2, 2, 2] == await values(cluster)


async def test_commit_without_the_others(cluster: GaleraCluster) -> None:
    """A COMMIT that the node refuses leaves nothing that a later one would keep."""
    _, node, _ = cluster.nodes

    async def work() -> None:
        await add()
        await cluster.isolate(node)

    async with database(cluster, node) as db:
        response = await handle(work, db, hooks=True)
        assert (503, Outcome.ROLLED_BACK) == (response.status, response.unit.outcome)
        assert ["rollback"] == response.hooks
        assert 1047 == response.events.only(CommitFailed).code
        assert [] == response.events.of(ReleaseFailed)
        await cluster.rejoin(node)
        for _ in range(2):  # also on the connection that had the transaction
            assert 200 == (await handle(add, db)).status
    assert [2, 2, 2] == await values(cluster)


@pytest.mark.parametrize("handler", [add, read])
async def test_another_node(
    cluster: GaleraCluster, handler: Callable[[], Awaitable[None]]
) -> None:
    """Behind a load balancer the replay of a request reaches another node."""
    first, node, _ = cluster.nodes
    async with database(cluster, node) as db:

        def balance(*args: Any) -> None:
            args[-1]["port"] = ports[-1]

        ports = [node.port]
        event.listen(db.engine.sync_engine, "do_connect", balance)
        assert 200 == (await handle(handler, db)).status
        await cluster.isolate(node)
        ports.append(first.port)
        response = await handle(handler, db, retry=RETRY)
        assert 200 == response.status
        assert [1047] == [each.code for each in response.events.of(RetryScheduled)]


@pytest.mark.parametrize("fault", [GaleraCluster.kill, GaleraCluster.isolate])
async def test_next_address(cluster: GaleraCluster, fault: Callable[..., Any]) -> None:
    """A database with several addresses goes on at once on the next node."""
    await cluster.create(CREATE, INSERT)
    db = Database.from_url([cluster.at(node).url for node in cluster.nodes])
    assert 200 == (await handle(add, db, retry=RETRY)).status
    await fault(cluster, cluster.nodes[0])
    for handler in (add, read):
        assert 200 == (await handle(handler, db, retry=RETRY)).status
    assert (await db.check()).ok
    await cluster.rejoin(cluster.nodes[0])
    assert [2, 2, 2] == await values(cluster)
    await db.dispose()


async def test_commit_in_doubt(cluster: GaleraCluster) -> None:
    """A COMMIT during which the node loses the others may be kept by those."""
    _, node, _ = cluster.nodes
    attempts: list[int] = []

    async def work() -> None:
        attempts.append(1)
        await add()
        await node.ask(ISOLATE.format(1))

    async with database(cluster, node) as db:
        response = await handle(work, db, hooks=True, retry=RETRY)
        await cluster.rejoin(node)
    assert (500, Outcome.UNKNOWN) == (response.status, response.unit.outcome)
    assert isinstance(response.error, errors.OutcomeUnknownError)
    assert 1180 == response.events.only(CommitFailed).code
    assert ([1], []) == (attempts, response.hooks)


async def test_killed(cluster: GaleraCluster) -> None:
    """A node that was killed comes back with what the others have done meanwhile."""
    first, node, _ = cluster.nodes
    async with database(cluster, node) as db:
        assert 200 == (await handle(add, db)).status
        await cluster.kill(node)
        assert "down" == await node.status("cluster_status")
        response = await handle(add, db, retry=RETRY)
        assert 503 == response.status
        assert [2003] * 2 == [each.code for each in response.events.of(RetryScheduled)]
        await cluster.at(first).execute(ADD)
        await cluster.rejoin(node)
        assert 200 == (await handle(add, db)).status
    assert [3, 3, 3] == await values(cluster)


# Beginning and end


@pytest.mark.parametrize("fault", [GaleraCluster.kill, GaleraCluster.isolate])
async def test_mended(cluster: GaleraCluster, fault: Callable[..., Any]) -> None:
    """What a test leaves behind, the next one finds running and connected."""
    async with cluster.fresh_database() as backend:
        await backend.execute(CREATE, INSERT)
        await fault(cluster, cluster.nodes[0])
    assert [True] * 3 == [await node.is_synced() for node in cluster.nodes]
    assert ["3"] * 3 == [await node.status("cluster_size") for node in cluster.nodes]


@pytest.mark.usefixtures("cluster")  # skips where there is no such server
async def test_nothing_is_left() -> None:
    """A cluster ends with its processes, its ports and its folder."""
    async with GaleraCluster() as cluster:
        pids = [node.pid for node in cluster.nodes]
        await cluster.kill(cluster.nodes[0])
        assert cluster.folder.exists()
    for pid in pids:
        assert pid is not None
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert all(is_free(node.port) for node in cluster.nodes)
    assert not cluster.folder.exists()


@pytest.mark.usefixtures("cluster")
async def test_does_not_start() -> None:
    """A cluster with a node that does not start says why, and leaves nothing."""
    cluster = GaleraCluster()
    node = cluster.nodes[1]
    node.data = node.folder / "log" / "data"
    with pytest.raises(ServerError, match=r"Not a directory|File exists"):
        await cluster.__aenter__()
    assert [None] * 3 == [node.pid for node in cluster.nodes]
    assert not cluster.folder.exists()
