"""What an attempt leaves behind does not hinder the next one, nor keep anything."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

import asgi_uow as uow
from asgi_uow import Retry, errors
from tests.entrypoints.test_replay import read
from tests.entrypoints.test_replay_apart import another, ask, attempt
from tests.support.asgi import respond
from tests.support.conflicts import READ, WRITE, conflict, conflicting_shop
from tests.support.databases import on

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from asgi_uow import Database
    from asgi_uow._asgi import Message, Receive, Scope, Send
    from tests.servers import Backend

pytestmark = on("aiosqlite")


class Client:
    """Sends a body in parts, when it is told to."""

    def __init__(self) -> None:
        self._messages: asyncio.Queue[Message] = asyncio.Queue()

    def send(self, body: bytes, *, more: bool = False) -> None:
        message = {"type": "http.request", "body": body, "more_body": more}
        self._messages.put_nowait(message)

    def leave(self) -> None:
        self._messages.put_nowait({"type": "http.disconnect"})

    async def receive(self) -> Message:
        return await self._messages.get()


async def test_who_waits_for_the_end(backend: Backend) -> None:
    """A task that waits for the client to leave keeps nobody from the body."""
    client = Client()
    client.send(b"the body")
    bodies: list[bytes] = []
    ends: list[asyncio.Task[Message]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        bodies.append(await read(receive))
        ends.append(asyncio.ensure_future(receive()))
        await asyncio.sleep(0)  # it waits now
        if attempt() == 1:
            await conflict(backend)
        client.leave()
        await asyncio.wait(ends)
        await respond(send)

    async with conflicting_shop(backend) as db, asyncio.timeout(10):
        response = await ask(app, db, client.receive)
    assert (200, [b"the body"] * 2) == (response.status, bodies)
    assert [{"type": "http.disconnect"}] * 2 == [each.result() for each in ends]


@pytest.mark.parametrize("is_early", [False, True])
async def test_who_reads_on(backend: Backend, *, is_early: bool) -> None:
    """What it takes is in the body, also once there cannot be another attempt."""
    client = Client()
    bodies: list[bytes] = []
    left: list[asyncio.Task[Message]] = []

    async def take() -> None:
        client.send(b"one,", more=True)
        await asyncio.wait(left)

    async def read_ahead(receive: Receive) -> Message:
        await receive()
        return await receive()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if attempt() == 1:
            left.append(asyncio.ensure_future(read_ahead(receive)))
            await asyncio.sleep(0)
            if not is_early:
                uow.after_rollback(take)
            await conflict(backend)
        if is_early:
            await send({"type": "http.response.early_hint", "links": []})
            await take()
        client.send(b"two,", more=True)
        client.send(b"end")
        bodies.append(await read(receive))
        await respond(send)

    retry = Retry(methods=["GET"], max_body=65536 if is_early else 3, backoff=0.001)
    async with conflicting_shop(backend) as db, asyncio.timeout(10):
        response = await ask(app, db, client.receive, retry=retry)
    assert (None, [b"one,two,end"]) == (response.error, bodies)


async def entered(other: Database, go_on: Callable[[], Awaitable[object]]) -> None:
    async with other:
        await go_on()
        await other.write.execute(WRITE)


async def called(other: Database, go_on: Callable[[], Awaitable[object]]) -> None:
    async with other:
        await other.write.execute(WRITE)
        uow.before_commit(go_on)


@pytest.mark.parametrize(("audit", "attempts"), [(entered, 2), (called, 1)])
async def test_a_unit_inside(
    backend: Backend,
    tmp_path: Path,
    audit: Callable[..., Awaitable[None]],
    attempts: int,
) -> None:
    """Its work is kept once: it may not commit, or the request is not done again."""
    tasks: list[asyncio.Task[None]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        waits, may_go_on = asyncio.Event(), asyncio.Event()
        for each in released:
            each.set()
            await asyncio.wait(tasks)

        async def go_on() -> None:
            waits.set()
            await may_go_on.wait()

        tasks.append(asyncio.ensure_future(audit(other, go_on)))
        await waits.wait()
        if attempt() == 1:
            released.append(may_go_on)
            await conflict(backend)
        may_go_on.set()
        await asyncio.wait(tasks)
        await respond(send)

    released: list[asyncio.Event] = []
    async with another(tmp_path) as (other, beside), conflicting_shop(backend) as db:
        async with asyncio.timeout(10):
            response = await ask(app, db)
        for each in released:
            each.set()
        await asyncio.wait(tasks)
        assert (attempts == 2) == (response.status == 200)
        assert attempts == len(tasks)
        assert 1 == await beside.scalar(READ)
    failure = tasks[0].exception()
    if attempts == 2:
        assert isinstance(failure, errors.CommitFailedError)
        assert "that an attempt before has left" in str(failure.__cause__)
    else:
        assert failure is None
