"""Across requests a client sees what it wrote, although replicas are behind."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from http.cookies import SimpleCookie
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from sqlalchemy import event

import asgi_uow as uow
from asgi_uow import Database
from asgi_uow.observers import Event, ReaderBehind, ReaderFailed
from tests.servers import eventually
from tests.support import shop
from tests.support.asgi import http_scope, request, respond

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from asgi_uow._asgi import Receive, Scope, Send
    from tests.integration.cluster.servers import Cluster
    from tests.support.asgi import Response

SECRET = "a secret of the tests, long enough"
PAIRS = 200


class Client:
    """A browser: it keeps the cookie that it is given."""

    def __init__(
        self, cluster: Cluster, causal_reads: uow.CausalReads | None, **options: Any
    ) -> None:
        replicas = [cluster.at(server) for server in cluster.replicas]
        options = {"read_urls": [replica.url for replica in replicas], **options}
        self.db = Database.from_url(cluster.backend.url, **options)
        self.events: list[Event] = []
        self.found: list[object] = []
        self.cookie = b""
        self._app = uow.UnitOfWorkMiddleware(
            self._serve,
            self.db,
            causal_reads=causal_reads,
            observers=[self.events.append],
        )

    async def _serve(self, scope: Scope, _: Receive, send: Send) -> None:
        number = int(scope["path"].rpartition("/")[2])
        status = 200
        match scope["method"]:
            case "POST":
                await shop.insert(number)
            case "PUT":  # a conflict, which is not kept
                await shop.insert(number)
                status = 409
            case "HEAD":  # nothing to do
                pass
            case _:
                sql = "SELECT count(*) FROM items WHERE id = :id"
                self.found.append(
                    await uow.current_read_session().scalar(sql, id=number)
                )
        await respond(send, status)

    async def send(self, method: str, number: int) -> Response:
        headers = [(b"cookie", b"theme=dark; " + self.cookie)]
        scope = http_scope(method=method, path=f"/{number}", headers=headers)
        response = await request(self._app, scope=scope)
        assert response.headers.keys() <= {"set-cookie"}
        self.cookie = response.cookie or self.cookie
        return response

    async def pairs(self, numbers: range) -> int:
        """Write and read the number at once; how many were found?"""
        self.found.clear()
        for number in numbers:
            assert 200 == (await self.send("POST", number)).status
            assert 200 == (await self.send("GET", number)).status
        return sum(map(bool, self.found))


@pytest.fixture
async def make(cluster: Cluster) -> AsyncIterator[Callable[..., Client]]:
    await shop.create(cluster.backend)
    await cluster.wait_until_applied()
    clients: list[Client] = []

    def make(causal_reads: uow.CausalReads | None = None, **options: Any) -> Client:
        clients.append(Client(cluster, causal_reads, **options))
        return clients[-1]

    yield make
    for client in clients:
        await client.db.dispose()


async def stop_appliers(cluster: Cluster) -> None:
    for number in range(len(cluster.replicas)):
        await cluster.stop_applier(number)


async def test_own_writes_with_the_appliers_stopped(
    cluster: Cluster, make: Callable[..., Client]
) -> None:
    """200 of 200 writes are seen by the next request, without the option none."""
    await stop_appliers(cluster)
    careful = make(uow.CausalReads(SECRET, wait=0.01))
    careless = make()

    assert PAIRS == await careful.pairs(range(PAIRS))
    behind = [each for each in careful.events if isinstance(each, ReaderBehind)]
    assert PAIRS * len(cluster.replicas) == len(behind)
    assert 0 == await careless.pairs(range(PAIRS, 2 * PAIRS))


async def test_own_writes_while_the_appliers_run(
    cluster: Cluster, make: Callable[..., Client]
) -> None:
    """With replicas that keep up, all 200 are seen, and read on the replicas."""
    client = make(uow.CausalReads(SECRET, wait=10))

    assert PAIRS == await client.pairs(range(PAIRS))
    assert ReaderBehind not in map(type, client.events)


async def test_waits_for_an_applier(
    cluster: Cluster, make: Callable[..., Client]
) -> None:
    """A read waits until a replica has got there, and reads it there."""
    client = make(uow.CausalReads(SECRET, wait=30))
    await stop_appliers(cluster)
    await client.send("POST", 1)

    read = asyncio.create_task(client.send("GET", 1))
    for number in range(len(cluster.replicas)):
        await cluster.start_applier(number)
    await read

    assert [1] == client.found
    assert ReaderBehind not in map(type, client.events)


async def test_waits_before_the_snapshot(
    cluster: Cluster, make: Callable[..., Client]
) -> None:
    """What was applied during the wait is in the snapshot of all reads."""
    client = make(uow.CausalReads(SECRET, wait=30), read_isolation="REPEATABLE READ")
    await stop_appliers(cluster)
    await client.send("POST", 1)
    asked: list[str] = []

    def note(*args: Any) -> None:
        asked.append(args[2])

    for engine in client.db.readers:
        event.listen(engine.sync_engine, "before_cursor_execute", note)

    async def is_waiting() -> bool:
        return len(asked) > 1

    read = asyncio.create_task(client.send("GET", 1))
    await eventually(True, is_waiting)
    for number in range(len(cluster.replicas)):
        await cluster.start_applier(number)
    await read

    assert [1] == client.found
    assert ReaderBehind not in map(type, client.events)


async def test_stamped_only_after_a_write(make: Callable[..., Client]) -> None:
    """Who only reads, or whose work is not kept, gets no token."""
    client = make(uow.CausalReads(SECRET))
    for method, stamped in (("GET", 0), ("PUT", 0), ("HEAD", 0), ("POST", 1)):
        response = await client.send(method, 1)
        assert stamped == len(response.messages[0]["headers"])


async def test_cookie(make: Callable[..., Client]) -> None:
    """The token is a cookie that scripts and other sites do not get."""
    client = make(uow.CausalReads(SECRET, max_age=90, cookie="seen"))
    response = await client.send("POST", 1)
    [(_, value)] = response.messages[0]["headers"]
    morsel = SimpleCookie(value.decode())["seen"]
    assert ("90", True, "Lax", "/") == (
        morsel["max-age"],
        morsel["httponly"],
        morsel["samesite"],
        morsel["path"],
    )


async def test_tampered(cluster: Cluster, make: Callable[..., Client]) -> None:
    """A token that is not ours is nothing at all: the replica is read at once."""
    client = make(uow.CausalReads(SECRET, wait=30))
    await stop_appliers(cluster)
    await client.send("POST", 1)
    name, _, token = client.cookie.partition(b"=")
    other = itertools.cycle(b"AB")
    client.cookie = name + b"=" + bytes(next(other) for _ in token)

    await client.send("GET", 1)

    assert [0] == client.found


async def test_hooks_see_what_was_committed(
    cluster: Cluster, make: Callable[..., Client]
) -> None:
    """An after_commit hook reads on the writer's server what its unit has written."""
    db = make().db
    await stop_appliers(cluster)
    seen: list[object] = []

    async def hook() -> None:
        assert uow.current_session() is not uow.current_read_session()
        seen.append(await uow.current_read_session().scalar("SELECT id FROM items"))

    async with db:
        await shop.insert(1)
        uow.after_commit(hook)

    assert [1] == seen


async def test_position_that_cannot_be_learnt(
    cluster: Cluster, make: Callable[..., Client]
) -> None:
    """Then the client reads from the writer for a while; the write stays a success."""
    client = make(uow.CausalReads(SECRET, wait=30))
    await stop_appliers(cluster)
    await client.db.read_engine.dispose()
    engine = client.db.read_engine.sync_engine

    def refuse(*_: object) -> None:
        raise ConnectionRefusedError

    async with client.db.engine.connect():
        pass  # the listener is for all engines, and the writer connects no more
    event.listen(engine, "do_connect", refuse)
    assert 200 == (await client.send("POST", 1)).status
    event.remove(engine, "do_connect", refuse)
    await client.send("GET", 1)

    assert [1] == client.found
    assert ReaderBehind not in map(type, client.events)


async def test_parallel_reads_see_it_too(mariadb_cluster: Cluster) -> None:
    """Tasks that read at once go to one server, which is not behind."""
    await shop.create(mariadb_cluster.backend)
    await mariadb_cluster.wait_until_applied()
    client = Client(mariadb_cluster, uow.CausalReads(SECRET, wait=5))
    await mariadb_cluster.stop_applier(0)
    await client.send("POST", 1)
    found: set[tuple[object, ...]] = set()

    async def read() -> None:
        async with uow.parallel_read() as session:
            rows = await session.execute("SELECT count(*), @@port FROM items")
            found.add(tuple(rows.one()))

    async def app(_: Scope, __: Receive, send: Send) -> None:
        await asyncio.gather(*(read() for _ in range(4)))
        await respond(send)

    wrapped = uow.UnitOfWorkMiddleware(
        app, client.db, causal_reads=uow.CausalReads(SECRET, wait=5)
    )
    for _ in range(5):
        found.clear()
        scope = http_scope(headers=[(b"cookie", client.cookie)])
        assert 200 == (await request(wrapped, scope=scope)).status
        assert 1 == len(found)
        assert {1} == {count for count, _ in found}
    await client.db.dispose()


async def test_cancelled_while_waiting(
    cluster: Cluster, make: Callable[..., Client]
) -> None:
    """A read that follows one that was cancelled while it waited is not stale."""
    client = make(uow.CausalReads(SECRET, wait=0.3))
    await stop_appliers(cluster)
    await client.send("POST", 1)
    found: list[object] = []

    async def app(_: Scope, __: Receive, send: Send) -> None:
        with anyio.move_on_after(0.05):
            await uow.current_read_session().scalar("SELECT 1")
        found.append(
            await uow.current_read_session().scalar("SELECT count(*) FROM items")
        )
        await respond(send)

    wrapped = uow.UnitOfWorkMiddleware(
        app, client.db, causal_reads=uow.CausalReads(SECRET, wait=0.3)
    )
    scope = http_scope(headers=[(b"cookie", client.cookie)])
    assert 200 == (await request(wrapped, scope=scope)).status
    assert [1] == found


async def test_units_inside(cluster: Cluster, make: Callable[..., Client]) -> None:
    """What hooks and blocks inside a request write is in its token; they see it."""
    client = make(uow.CausalReads(SECRET, wait=0.01))
    db = client.db
    await stop_appliers(cluster)
    count = "SELECT count(*) FROM items"
    found: list[object] = []

    async def hook() -> None:
        async with db:
            found.append(await db.read.scalar(count))
            await shop.insert(2)

    async def app(scope: Scope, _: Receive, send: Send) -> None:
        if scope["method"] == "POST":
            async with uow.unit_of_work(db, independent=True):
                await shop.insert(1)
            uow.after_commit(hook)
        else:
            async with uow.unit_of_work(db, independent=True):
                found.append(await db.read.scalar(count))
        await respond(send)

    wrapped = uow.UnitOfWorkMiddleware(
        app, db, causal_reads=uow.CausalReads(SECRET, wait=0.01)
    )
    response = await request(wrapped, scope=http_scope(method="POST"))
    assert [1] == found
    scope = http_scope(headers=[(b"cookie", response.cookie)])
    await request(wrapped, scope=scope)
    assert [1, 2] == found


async def test_frozen_replica(postgresql_cluster: Cluster) -> None:
    """A replica that does not answer at all is waited for no longer than said."""
    await shop.create(postgresql_cluster.backend)
    await postgresql_cluster.wait_until_applied()
    client = Client(postgresql_cluster, uow.CausalReads(SECRET, wait=0.2))
    await client.send("POST", 1)
    await client.send("GET", 1)
    [replica] = postgresql_cluster.replicas
    assert replica.pid is not None
    pids = [replica.pid, *children_of(replica.pid)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        assert 200 == (await client.send("GET", 1)).status
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    assert [1, 1] == client.found
    assert ReaderFailed in map(type, client.events)
    await client.db.dispose()


def children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in tasks.split()]


async def test_read_only_behind_a_proxy(mariadb_cluster: Cluster) -> None:
    """Behind a pooler the read after the wait is in a read-only transaction too."""
    await shop.create(mariadb_cluster.backend)
    await mariadb_cluster.wait_until_applied()
    replica = mariadb_cluster.at(mariadb_cluster.replicas[0])
    async with replica.proxy() as proxy:
        url = replica.through(proxy.port)
        options = {"read_urls": [url], "pooler": "transaction"}
        client = Client(mariadb_cluster, uow.CausalReads(SECRET, wait=30), **options)
        assert 1 == await client.pairs(range(1, 2))
        read = "SELECT count(*) FROM items WHERE id = 1"
        assert ["START TRANSACTION READ ONLY", read, "ROLLBACK"] == proxy.trips[-3:]
        assert 2 == proxy.trips.count("START TRANSACTION READ ONLY")
        await client.db.dispose()
