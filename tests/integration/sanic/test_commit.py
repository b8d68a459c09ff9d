"""Sanic's own server: what comes in between while COMMIT is under way."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from tests.integration.sanic.child import Child, create, get, kept, notes, serving
from tests.servers import RecordingProxy, ServerBackend, SQLiteBackend, eventually
from tests.servers.plugin import make_backend
from tests.servers.process import is_free
from tests.support import shop
from tests.support.databases import SERVERS, on

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator
    from pathlib import Path

    from tests.integration.sanic.child import Connection
    from tests.servers import Hold


@dataclasses.dataclass(frozen=True)
class Served:
    """The site, and its database behind a proxy."""

    site: Child
    backend: ServerBackend
    proxy: RecordingProxy

    @asynccontextmanager
    async def committing(self, number: int) -> AsyncGenerator[tuple[Connection, Hold]]:
        """Hold the answer to the COMMIT of a request; others may come in."""
        hold = self.proxy.hold_answer(is_commit)
        path = f"/answer/text/{number}"
        connection = await self.site.send(get(path, "connection: close"))
        await hold.answered.wait()
        yield connection, hold
        await eventually(0, lambda: self.site.state("checked_out"))
        assert [True, ["committed"], 0] == [
            await kept(self.backend, number),
            await notes(self.backend, number),
            await self.backend.open_transactions(),
        ]


def is_commit(trip: str) -> bool:
    return trip == "COMMIT"


@pytest.fixture(scope="module", params=["asyncmy", "asyncpg"])
async def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Served]:
    """The site for all tests of this module; each uses numbers of its own."""
    async with make_backend(request, request.param) as backend:
        assert isinstance(backend, ServerBackend)
        await create(backend)
        log = tmp_path_factory.mktemp("log")
        async with (
            backend.proxy() as proxy,
            serving(backend.through(proxy.port), log) as site,
        ):
            yield Served(site, backend, proxy)


async def test_p1_no_byte_before_the_answer_to_commit(served: Served) -> None:
    """Not a byte of the response is sent before the database has acknowledged COMMIT.

    Then the hook runs, in a transaction of its own, and then the response leaves.
    """
    async with served.committing(1) as (connection, hold):
        first = asyncio.create_task(connection.reader.read(1))
        assert 0 == await served.site.state("cancelling")
        assert not first.done()
        hold.release()
        assert b"H" == await first
        assert ["committed"] == await notes(served.backend, 1)
        assert (await connection.read_to_end()).startswith("TTP/1.1 200 ")


async def test_p10_disconnect_during_commit(served: Served) -> None:
    """Sanic cancels the handler of a client that has left; COMMIT and hooks go on."""
    async with served.committing(2) as (connection, hold):
        await connection.leave()
        await eventually(1, lambda: served.site.state("cancelling"))
        hold.release()
        await eventually(["committed"], lambda: notes(served.backend, 2))
    assert 200 == (await served.site.get("/answer/text/3")).status_code


async def test_p10_response_timeout_during_commit(served: Served) -> None:
    """RESPONSE_TIMEOUT does not interrupt COMMIT; the client gets Sanic's 503 then."""
    await served.site.get("/response-timeout/0.1")
    async with served.committing(4) as (connection, hold):
        await served.site.get("/response-timeout/60.0")
        await eventually(1, lambda: served.site.state("cancelling"))
        hold.release()
        assert (await connection.read_to_end()).startswith("HTTP/1.1 503 ")


async def test_response_timeout(served: Served) -> None:
    """In the handler it rolls back and answers 503; a stream it cuts short."""
    await served.site.get("/response-timeout/0.5")
    handler = await served.site.send(get("/hang/5"))
    stream = await served.site.send(get("/stream-and-hang/6"))

    assert (await handler.read_to_end()).startswith("HTTP/1.1 503 ")
    assert (await stream.read_to_end()).endswith("\r\n4\r\none \r\n")
    await served.site.get("/response-timeout/60.0")
    await eventually(0, lambda: served.site.state("checked_out"))
    numbers = (5, 6)
    assert [False, True] == [await kept(served.backend, each) for each in numbers]
    assert ["rolled back"] == await notes(served.backend, 5)
    assert ["committed"] == await notes(served.backend, 6)
    assert 0 == await served.backend.open_transactions()


@on(*SERVERS)
async def test_p10_shutdown_during_commit(
    backend: ServerBackend, tmp_path: Path
) -> None:
    """A server that is told to stop waits for COMMIT and for the hooks after it."""
    await create(backend)
    async with (
        backend.proxy() as proxy,
        serving(backend.through(proxy.port), tmp_path) as site,
    ):
        hold = proxy.hold_answer(is_commit)
        connection = await site.send(get("/answer/text/1"))
        await hold.answered.wait()
        await connection.leave()
        await eventually(1, lambda: site.state("cancelling"))
        site.process.send_signal(signal.SIGTERM)

        async def is_closed() -> bool:
            return is_free(site.port)

        await eventually(expected=True, probe=is_closed)
        hold.release()
        assert 0 == await asyncio.wait_for(site.process.wait(), 30)
        assert [1] == await shop.items(backend)
        assert ["committed"] == await notes(backend, 1)


async def test_shutdown_in_the_handler(sqlite: SQLiteBackend, tmp_path: Path) -> None:
    """What does not end within GRACEFUL_SHUTDOWN_TIMEOUT is cancelled, nothing kept."""
    await create(sqlite)
    async with serving(sqlite.url, tmp_path) as site:
        connection = await site.send(get("/hang/1"))
        await eventually(1, sqlite.open_transactions)

        assert 0 == await site.stop()
        assert "HTTP/1.1 200 " not in await connection.read_to_end()
    assert [] == await shop.items(sqlite)
    assert ["rolled back"] == await notes(sqlite, 1)
    assert 0 == await sqlite.open_transactions()


async def test_database_out_of_reach(tmp_path: Path) -> None:
    """A server that is down is a 503 with Retry-After, as with the middleware."""
    url = "postgresql://user:secret@127.0.0.1:1/app"
    async with serving(url, tmp_path) as site:
        response = await site.get("/answer/text/1")

        assert 503 == response.status_code
        assert "1" == response.headers["retry-after"]
        assert "application/problem+json" == response.headers["content-type"]
        assert "secret" not in response.text
