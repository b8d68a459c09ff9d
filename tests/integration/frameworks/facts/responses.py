"""What follows the start: bodies that take their time, and background tasks."""

from __future__ import annotations

import asyncio
import gc
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from asgi_uow import Outcome, after_commit, current_session, current_unit_of_work
from asgi_uow.errors import UnitOfWorkClosedError
from asgi_uow.observers import UnitFinished
from tests.integration.frameworks.case import count, database_fact, fact, in_use, write
from tests.integration.frameworks.site import Reply
from tests.support.asgi import BODY, START, http_scope

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from asgi_uow import Session
    from asgi_uow._asgi import Message
    from tests.integration.frameworks.case import Case

FILE = Path(__file__)
LINES = FILE.read_text(encoding="utf-8").splitlines()


@database_fact
async def p7_p8_stream(case: Case) -> None:
    """The read session serves a generator; the write session is gone and refuses."""

    async def chunks(session: Session) -> AsyncIterator[str]:
        yield f"{in_use(case.db.engine)} connections in use"
        yield f"{await count()} notes"
        assert "responding" == current_unit_of_work().state.value
        with pytest.raises(UnitOfWorkClosedError, match="async with db:"):
            await session.execute("INSERT INTO note VALUES (2)")
        with pytest.raises(UnitOfWorkClosedError, match="async with db:"):
            current_session()
        yield "refused"

    async def create() -> Reply:
        await write(1)
        return Reply(chunks=chunks(current_session()))

    async with case.serve({"/": create}) as server:
        exchange = await server.request()
    assert 200 == exchange.status
    assert [[1]] == exchange.seen
    assert ["0 connections in use", "1 notes", "refused"] == exchange.chunks
    assert exchange.is_complete
    assert [1] == await case.kept()


@fact
async def sync_stream(case: Case) -> None:
    """A generator that is not async runs after the commit, in the request's unit."""

    def chunks() -> Iterator[str]:
        yield "committed"
        assert Outcome.COMMITTED is current_unit_of_work().outcome
        yield "in the unit"

    async def create() -> Reply:
        await write(1)
        return Reply(sync_chunks=chunks())

    async with case.serve({"/": create}) as server:
        exchange = await server.request()
    assert [[1]] == exchange.seen
    assert ["committed", "in the unit"] == exchange.chunks
    assert exchange.is_complete


@fact
async def server_sent_events(case: Case) -> None:
    """Server-sent events come after the commit; the read session serves them."""

    async def events() -> AsyncIterator[str]:
        yield "committed"
        yield f"{await count()} notes"

    async def create() -> Reply:
        await write(1)
        return Reply(events=events())

    async with case.serve({"/": create}) as server:
        exchange = await server.request()
    assert exchange.headers["content-type"].startswith("text/event-stream")
    assert [[1]] == exchange.seen
    expected = ["data: committed", "data: 1 notes"]
    lines = "".join(exchange.chunks).split("\n")
    assert expected == [line.strip() for line in lines if line.strip()]


@fact
async def file(case: Case) -> None:
    """A file is sent after the commit."""

    async def create() -> Reply:
        await write(1)
        return Reply(file=FILE)

    async with case.serve({"/": create}) as server:
        exchange = await server.request()
    assert [[1]] == exchange.seen
    assert LINES == "".join(exchange.chunks).splitlines()
    assert exchange.is_complete


@database_fact
async def p7_p10_client_goes_away(case: Case) -> None:
    """A client that leaves in the middle undoes nothing and leaves nothing open."""
    notes = itertools.count(1)

    async def chunks() -> AsyncIterator[str]:
        yield "one"
        yield await count()

    async def create() -> Reply:
        await write(next(notes))
        return Reply(chunks=chunks())

    def is_first_chunk(message: Message) -> bool:
        return bool(message["type"] == BODY and message["body"] == b"one")

    async with case.serve({"/": create}) as server:
        while_connecting = await server.request(leave_after=is_first_chunk)
        to_the_end = await server.request()
        while_reading = await server.request(leave_after=is_first_chunk)
    assert ["one", "2"] == to_the_end.chunks
    for exchange in (while_connecting, while_reading):
        assert ["one"] == exchange.chunks
        assert exchange.error is None
    assert [1, 2, 3] == await case.kept()
    gc.collect()  # a connection that nobody closed warns now


@fact
async def p10_send_raises(case: Case) -> None:
    """A `send` that raises for a client that has left undoes nothing either."""
    ran: list[str] = []

    async def chunks() -> AsyncIterator[str]:
        yield await count()

    async def create() -> Reply:
        after_commit(ran.append, "hook")
        await write(1)
        return Reply(chunks=chunks())

    def is_start(message: Message) -> bool:
        return bool(message["type"] == START)

    async with case.serve({"/": create}) as server:
        exchange = await server.request(leave_after=is_start, scope=http_scope())
    assert [START] == exchange.types
    assert ["hook"] == ran
    assert [1] == await case.kept()
    assert [UnitFinished] == case.ends()


@fact
async def p9_background_task(case: Case) -> None:
    """A background task has no part in the request's unit; it opens its own."""
    done = asyncio.Event()

    async def in_background() -> None:
        with pytest.raises(UnitOfWorkClosedError, match="async with db:"):
            current_session()
        async with case.db:
            await write(2)
        done.set()

    async def create() -> Reply:
        await write(1)
        return Reply("created", background=in_background)

    async with case.serve({"/": create}) as server:
        exchange = await server.request()
        await asyncio.wait_for(done.wait(), timeout=5)
    assert [[1]] == exchange.seen
    assert [1, 2] == await case.kept()
