"""Reads on replicas: spread, left when they fail, used again, and done without."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from asgi_uow import (
    Database,
    UnitOfWorkMiddleware,
    current_read_session,
    current_session,
)
from asgi_uow.observers import LoggingObserver, ReaderFailed, ReaderRestored
from tests.promises.test_p10_cancellation import SLEEPING
from tests.servers import eventually
from tests.support import shop
from tests.support.asgi import BODY, START, endpoint, request, serve
from tests.support.databases import checked_out
from tests.support.site import Site, prolong_pauses

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from asgi_uow._asgi import Receive, Scope, Send
    from tests.integration.cluster.servers import Cluster

PORT = {"mariadb": "SELECT @@port", "postgresql": "SELECT current_setting('port')"}


LOCK = {
    "mariadb": "SELECT GET_LOCK('held', 60)",
    "postgresql": "SELECT pg_advisory_lock(1)",
}
WAITING = {
    "mariadb": "SELECT count(*) FROM information_schema.processlist"
    " WHERE state = 'User lock'",
    "postgresql": "SELECT count(*) FROM pg_stat_activity"
    " WHERE wait_event_type = 'Lock' AND wait_event = 'advisory'",
}
"""How many wait for the lock."""


class ClusterSite(Site):
    """A site on a cluster, and which server answered its reads."""

    def __init__(self, cluster: Cluster, db: Database) -> None:
        super().__init__(db)
        self.cluster = cluster
        self.ports: list[int] = []
        self._sql = PORT[cluster.backend.name]

    async def read(self) -> None:
        port = await current_read_session().scalar(self._sql)
        self.ports.append(int(port))

    @property
    def replica_ports(self) -> set[int]:
        return {server.port for server in self.cluster.replicas}


@asynccontextmanager
async def site_on(cluster: Cluster, **options: Any) -> AsyncGenerator[ClusterSite]:
    backends = [cluster.at(server) for server in cluster.replicas]
    urls = [backend.url for backend in backends]
    db = Database.from_url(cluster.backend.url, read_urls=urls, **options)
    yield ClusterSite(cluster, db)
    await db.dispose()


@pytest.fixture
async def site(cluster: Cluster) -> AsyncIterator[ClusterSite]:
    async with site_on(cluster) as site:
        yield site


async def test_spread(site: ClusterSite) -> None:
    """Reads go to all replicas, and none to the writer."""
    responses = await asyncio.gather(*(site.get() for _ in range(30)))
    assert {200} == {response.status for response in responses}
    assert site.replica_ports == set(site.ports)
    assert set(checked_out(site.db)) == {0}


async def test_one_per_unit(site: ClusterSite) -> None:
    """All reads of one request go to one replica."""

    async def handler() -> None:
        for _ in range(5):
            await site.read()

    for _ in range(5):
        site.ports.clear()
        await site.send(handler)
        assert 1 == len(set(site.ports))


async def test_the_least_busy(mariadb_cluster: Cluster) -> None:
    """A unit takes the replica that has the most connections to give."""
    async with site_on(mariadb_cluster) as site:
        busy = site.db.readers[0]
        async with busy.connect(), busy.connect():
            await asyncio.gather(*(site.get() for _ in range(2)))
            assert {mariadb_cluster.replicas[1].port} == set(site.ports)


async def test_own_writes(site: ClusterSite) -> None:
    """After a write the reads of the unit go to the writer, also after the commit."""
    await shop.create(site.cluster.backend)
    primary = site.cluster.primary.port

    async def handler() -> None:
        await site.read()
        await shop.insert(1)
        await site.read()
        found = await current_read_session().scalar("SELECT count(*) FROM items")
        assert 1 == found

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await handler()
        await send({"type": START, "status": 201, "headers": []})
        await site.read()
        await send({"type": BODY, "body": b""})

    response = await serve(app, site.db)
    assert response.error is None
    assert site.ports[0] in site.replica_ports
    assert [primary, primary] == site.ports[1:]


async def test_replica_killed(site: ClusterSite) -> None:
    """A replica is killed in a run of 500 reads: none fails, and it is used again."""
    victim = site.cluster.replicas[0]
    statuses: Counter[int] = Counter()

    async def client() -> None:
        while sum(statuses.values()) < 500:
            statuses[(await site.get()).status] += 1

    async def kill() -> None:
        async def has_begun() -> bool:
            return sum(statuses.values()) > 100

        await eventually(True, has_begun)
        await asyncio.to_thread(victim.kill)

    async with asyncio.TaskGroup() as group:
        for _ in range(10):
            group.create_task(client())
        group.create_task(kill())

    assert {200} == set(statuses)
    assert site.told(ReaderFailed)

    await asyncio.to_thread(victim.start)

    async def is_used_again() -> bool:
        site.ports.clear()
        assert 200 == (await site.get()).status
        return victim.port in site.ports

    await eventually(True, is_used_again, within=30)
    assert site.told(ReaderRestored)
    assert {0} == set(checked_out(site.db))


async def test_no_replica_left(site: ClusterSite) -> None:
    """Without a healthy replica the writer's server is read from."""
    for server in site.cluster.replicas:
        await asyncio.to_thread(server.kill)

    responses = [await site.get()]
    prolong_pauses(site.db)
    responses += [await site.get() for _ in range(2)]

    assert [200] * 3 == [response.status for response in responses]
    assert {site.cluster.primary.port} == set(site.ports)
    failed = site.events.of(ReaderFailed)
    # Left alone for a while: the second request does not try them again.
    assert len(site.cluster.replicas) == len(failed)
    assert all("secret" not in repr(event) for event in failed)


async def test_lost_in_the_middle(site: ClusterSite) -> None:
    """What was read already cannot be read again elsewhere: the request fails."""

    async def handler() -> None:
        await site.read()
        for server in site.cluster.replicas:
            await asyncio.to_thread(server.kill)
        await site.read()

    response = await site.send(handler)

    assert 503 == response.status
    assert {0} == set(checked_out(site.db))


async def test_lost_before_the_first_answer(site: ClusterSite) -> None:
    """A replica that dies during the first read is done without."""
    name = site.cluster.backend.name
    locked = LOCK[name]

    async def handler() -> None:
        await current_read_session().execute(locked)
        await site.read()

    async with contextlib.AsyncExitStack() as held:
        backends = [site.cluster.at(server) for server in site.cluster.replicas]
        for backend in backends:
            engine = create_async_engine(backend.url, poolclass=NullPool)
            connection = await held.enter_async_context(engine.connect())
            await connection.exec_driver_sql(locked)
            held.push_async_callback(connection.invalidate)  # its server is dead then
        task = asyncio.create_task(site.send(handler))

        async def waiting() -> list[object]:
            return [await backend.scalar(WAITING[name]) for backend in backends]

        async def anywhere() -> bool:
            return 1 in await waiting()

        await eventually(True, anywhere)
        victim = site.cluster.replicas[(await waiting()).index(1)]
        for server in site.cluster.replicas:
            if server is not victim:
                await asyncio.to_thread(server.kill)
        await asyncio.to_thread(victim.kill)
        response = await task

    assert 200 == response.status
    assert [site.cluster.primary.port] == site.ports
    assert site.told(ReaderFailed)


async def test_cancelled_read(site: ClusterSite) -> None:
    """P10: a read that is cancelled is stopped on the replica that it runs on."""
    name = site.cluster.backend.name
    sleep = {"mariadb": "SELECT sleep(60)", "postgresql": "SELECT pg_sleep(60)"}[name]
    backends = [site.cluster.at(server) for server in site.cluster.replicas]

    async def sleeping() -> bool:
        counts = [await backend.scalar(SLEEPING[name]) for backend in backends]
        return [1] == [count for count in counts if count]

    async def handler() -> None:
        async with asyncio.TaskGroup() as group:
            read = group.create_task(current_read_session().execute(sleep))
            await eventually(True, sleeping)
            read.cancel()
            await asyncio.wait((read,))
        await eventually(False, sleeping)

    response = await site.send(handler)
    assert (200, None) == (response.status, response.error)
    assert {0} == set(checked_out(site.db))


async def test_a_wrong_statement_is_no_outage(site: ClusterSite) -> None:
    """An error of a statement leaves the replica in use and reaches the handler."""

    async def handler() -> None:
        await current_read_session().execute("SELECT nothing FROM nowhere")

    response = await site.send(handler)
    assert response.error is not None
    assert 0 == site.told(ReaderFailed)
    await site.get()
    assert site.ports[0] in site.replica_ports


async def test_busy_pool_is_no_outage(mariadb_cluster: Cluster) -> None:
    """A replica whose pool is busy is done without, and stays in use."""
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.2}
    async with site_on(mariadb_cluster, **options) as site:
        first, second = site.db.readers
        async with first.connect(), second.connect():
            assert 200 == (await site.get()).status
        assert 200 == (await site.get()).status
        assert mariadb_cluster.primary.port == site.ports[0]
        assert site.ports[1] in site.replica_ports
        assert 0 == site.told(ReaderFailed)


async def test_logged(
    postgresql_cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """A replica that fails and comes back is in the log, without a password."""
    victim = postgresql_cluster.replicas[0]
    async with site_on(postgresql_cluster) as site:
        app = UnitOfWorkMiddleware(
            endpoint(site.read), site.db, observers=[LoggingObserver()]
        )
        await asyncio.to_thread(victim.kill)
        await request(app)
        await asyncio.to_thread(victim.start)
        caplog.set_level("INFO", "asgi_uow")

        async def is_used_again() -> bool:
            await request(app)
            return site.ports[-1] == victim.port

        await eventually(True, is_used_again, within=30)
    assert "is left alone for" in caplog.text
    assert "is used again" in caplog.text


# Health


async def test_check(site: ClusterSite) -> None:
    """The report says how each server is, and how far readers are behind."""
    report = await site.db.check()

    assert report.ok
    assert "writer" == report.writer.role
    assert all(0 < each.seconds < 60 for each in (report.writer, *report.readers))
    assert [True] * len(site.cluster.replicas) == [each.ok for each in report.readers]
    lags = {each.lag for each in report.readers}
    # MariaDB tells only those who have a privilege for it.
    assert lags == ({None} if site.cluster.backend.name == "mariadb" else {0.0})


async def test_check_with_servers_down(site: ClusterSite) -> None:
    """A reader that is down is reported and not the end; a writer is."""
    victim = site.cluster.replicas[0]
    await asyncio.to_thread(victim.kill)
    report = await site.db.check(timeout=5)
    assert report.ok
    down = report.readers[0]
    assert not down.ok
    assert down.error is not None
    assert str(victim.port) in down.name

    await asyncio.to_thread(site.cluster.primary.kill)
    report = await site.db.check(timeout=5)
    assert not report.ok


async def test_check_of_a_writer_that_is_a_replica(cluster: Cluster) -> None:
    """A writer that takes no writes, as after a failover, is not well."""
    db = Database.from_url(cluster.at(cluster.replicas[0]).url)
    report = await db.check()
    await db.dispose()
    assert not report.ok
    assert report.writer.error == "it takes no writes: it is a replica"


async def test_check_takes_no_longer(mariadb_cluster: Cluster) -> None:
    """A server that does not answer in time is down; the check returns."""
    options = {"pool_size": 1, "max_overflow": 0}
    async with (
        site_on(mariadb_cluster, **options) as site,
        site.db.read_engine.connect(),
    ):
        report = await site.db.check(timeout=0.1)
    assert "no answer within 0.1 seconds" == report.writer.error


async def test_session_of_a_unit_that_only_writes(site: ClusterSite) -> None:
    """The write session has nothing to do with replicas."""
    await shop.create(site.cluster.backend)

    async def handler() -> None:
        port = await current_session().scalar(PORT[site.cluster.backend.name])
        assert site.cluster.primary.port == int(port)

    assert 200 == (await site.send(handler)).status
