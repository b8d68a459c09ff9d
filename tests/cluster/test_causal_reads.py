"""Across requests a client sees what it wrote, although replicas are behind."""

from __future__ import annotations

import asyncio
import itertools
from http.cookies import SimpleCookie
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import event

from asgi_uow import (
    CausalReads,
    Database,
    UnitOfWorkMiddleware,
    after_commit,
    current_read_session,
    current_session,
)
from asgi_uow.observers import Event, ReaderBehind
from tests import shop
from tests.asgi import http_scope, request, respond

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from asgi_uow._asgi import Receive, Scope, Send
    from tests.asgi import Response
    from tests.servers.cluster import Cluster

SECRET = "a secret of the tests, long enough"
PAIRS = 200


class Client:
    """A browser: it keeps the cookie that it is given."""

    def __init__(self, cluster: Cluster, causal_reads: CausalReads | None) -> None:
        replicas = [cluster.at(server) for server in cluster.replicas]
        self.db = Database.from_url(
            cluster.backend.url, read_urls=[replica.url for replica in replicas]
        )
        self.events: list[Event] = []
        self.found: list[object] = []
        self.cookie = b""
        self._app = UnitOfWorkMiddleware(
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
                self.found.append(await current_read_session().scalar(sql, id=number))
        await respond(send, status)

    async def send(self, method: str, number: int) -> Response:
        headers = [(b"cookie", b"theme=dark; " + self.cookie)]
        scope = http_scope(method=method, path=f"/{number}", headers=headers)
        response = await request(self._app, scope=scope)
        for name, value in response.messages[0]["headers"]:
            assert b"set-cookie" == name
            self.cookie = value.partition(b";")[0]
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

    def make(causal_reads: CausalReads | None = None) -> Client:
        clients.append(Client(cluster, causal_reads))
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
    careful = make(CausalReads(SECRET, wait=0.01))
    careless = make()

    assert PAIRS == await careful.pairs(range(PAIRS))
    behind = [each for each in careful.events if isinstance(each, ReaderBehind)]
    assert PAIRS * len(cluster.replicas) == len(behind)
    assert 0 == await careless.pairs(range(PAIRS, 2 * PAIRS))


async def test_own_writes_while_the_appliers_run(
    cluster: Cluster, make: Callable[..., Client]
) -> None:
    """With replicas that keep up, all 200 are seen, and read on the replicas."""
    client = make(CausalReads(SECRET, wait=10))

    assert PAIRS == await client.pairs(range(PAIRS))
    assert ReaderBehind not in map(type, client.events)


async def test_waits_for_an_applier(
    cluster: Cluster, make: Callable[..., Client]
) -> None:
    """A read waits until a replica has got there, and reads it there."""
    client = make(CausalReads(SECRET, wait=30))
    await stop_appliers(cluster)
    await client.send("POST", 1)

    read = asyncio.create_task(client.send("GET", 1))
    for number in range(len(cluster.replicas)):
        await cluster.start_applier(number)
    await read

    assert [1] == client.found
    assert ReaderBehind not in map(type, client.events)


async def test_stamped_only_after_a_write(make: Callable[..., Client]) -> None:
    """Who only reads, or whose work is not kept, gets no token."""
    client = make(CausalReads(SECRET))
    for method, stamped in (("GET", 0), ("PUT", 0), ("HEAD", 0), ("POST", 1)):
        response = await client.send(method, 1)
        assert stamped == len(response.messages[0]["headers"])


async def test_cookie(make: Callable[..., Client]) -> None:
    """The token is a cookie that scripts and other sites do not get."""
    client = make(CausalReads(SECRET, max_age=90, cookie="seen"))
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
    client = make(CausalReads(SECRET, wait=30))
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
        assert current_session() is not current_read_session()
        seen.append(await current_read_session().scalar("SELECT id FROM items"))

    async with db:
        await shop.insert(1)
        after_commit(hook)

    assert [1] == seen


async def test_position_that_cannot_be_learnt(
    cluster: Cluster, make: Callable[..., Client]
) -> None:
    """Then the client reads from the writer for a while; the write stays a success."""
    client = make(CausalReads(SECRET, wait=30))
    await stop_appliers(cluster)
    await client.db.read_engine.dispose()
    engine = client.db.read_engine.sync_engine

    def refuse(*_: object) -> None:
        raise ConnectionRefusedError

    event.listen(engine, "do_connect", refuse)
    assert 200 == (await client.send("POST", 1)).status
    event.remove(engine, "do_connect", refuse)
    await client.send("GET", 1)

    assert [1] == client.found
    assert ReaderBehind not in map(type, client.events)
