"""Slow readers beside quick writers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from sqlalchemy.exc import TimeoutError as PoolTimeout

from asgi_uow import (
    Database,
    UnitOfWorkMiddleware,
    current_read_session,
    current_session,
)
from tests.servers import eventually
from tests.support import shop
from tests.support.asgi import BODY, START, Client, Response, respond
from tests.support.databases import checked_out
from tests.support.streams import ROWS, SELECT, fill

if TYPE_CHECKING:
    from asgi_uow._asgi import ASGIApp, Message, Receive, Scope, Send
    from tests.servers import Backend


class Slow(Client):
    """Takes the first piece, says so, and waits before it takes the next."""

    def __init__(
        self, app: ASGIApp, reading: asyncio.Queue[None], go_on: asyncio.Event
    ) -> None:
        super().__init__(app)
        self.reading = reading
        self.go_on = go_on
        self.has_piece = False

    async def take(self, message: Message, /) -> None:
        if message.get("more_body"):
            if not self.has_piece:
                self.reading.put_nowait(None)
            self.has_piece = True
            await self.go_on.wait()


async def read_or_write(scope: Scope, receive: Receive, send: Send) -> None:
    """Write for a POST; else open the stream while a 503 is still possible."""
    if scope["method"] == "POST":
        await current_session().execute(
            "INSERT INTO items (id) VALUES (:id)", id=int(scope["path"])
        )
        await respond(send, 201)
        return
    rows = await current_read_session().stream_scalars(SELECT)
    await send({"type": START, "status": 200, "headers": []})
    async for number in rows:
        await send({"type": BODY, "body": b"%d\n" % number, "more_body": True})
    await send({"type": BODY, "body": b""})


@pytest.fixture(params=["waits for its turn", "gets a 503"])
def patience(request: pytest.FixtureRequest) -> tuple[float, int]:
    """How long a request waits for a connection, and how many wait in vain."""
    return {"waits for its turn": (120.0, 0), "gets a 503": (0.5, 45)}[request.param]


async def test_slow_readers_stop_no_writer(
    backend: Backend, patience: tuple[float, int]
) -> None:
    """50 slow readers hold 5 connections; 200 writes on 5 others all succeed."""
    seconds, in_vain = patience
    await fill(backend)
    db = Database.from_url(
        backend.url, pool_size=5, max_overflow=0, pool_timeout=seconds
    )
    app = UnitOfWorkMiddleware(read_or_write, db)
    reading, go_on = asyncio.Queue[None](), asyncio.Event()
    clients = [Slow(app, reading, go_on) for _ in range(50)]
    readers = [asyncio.create_task(each.request()) for each in clients]
    for _ in range(5):
        await reading.get()
    await eventually(in_vain, lambda: how_many_ended(readers), within=30)

    lanes = [range(ROWS + lane, ROWS + 200, 5) for lane in range(5)]
    written = await asyncio.gather(*(write(app, numbers) for numbers in lanes))

    assert [[201] * 40] * 5 == written
    assert [0, 5] == checked_out(db)
    assert list(range(ROWS + 200)) == await shop.items(backend)
    go_on.set()
    responses = await asyncio.gather(*readers)
    refused = [each for each in responses if each.status == 503]
    assert in_vain == len(refused)
    assert all(isinstance(each.error, PoolTimeout) for each in refused)
    assert all("retry-after" in each.headers for each in refused)
    served = [each for each in responses if each.status == 200]
    assert 50 - in_vain == len(served)
    assert {None} == {each.error for each in served}
    late = 45 - in_vain  # they saw what had been written meanwhile
    pieces = [ROWS] * 5 + [ROWS + 200] * late
    assert pieces == sorted(len(each.chunks) for each in served)
    assert [0, 0] == checked_out(db)
    await db.dispose()


async def how_many_ended(tasks: list[asyncio.Task[Response]]) -> int:
    return sum(task.done() for task in tasks)


async def write(app: ASGIApp, numbers: range) -> list[int]:
    client = Client(app)
    responses = [await client.request(f"{n}", method="POST") for n in numbers]
    assert {None} == {each.error for each in responses}
    return [each.status for each in responses]
