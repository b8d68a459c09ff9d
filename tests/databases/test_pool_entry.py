"""A connection that two tasks find dead at once: the next one is nobody's victim."""

from __future__ import annotations

import asyncio
import functools
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError

import asgi_uow as uow
from asgi_uow.errors import AsgiUowError, DoomedError
from tests.servers import eventually
from tests.support.databases import DRIVERS, behind_proxy, checked_out, on

if TYPE_CHECKING:
    from sqlalchemy.pool import ConnectionPoolEntry

    from asgi_uow import Database
    from tests.servers import ServerBackend

WHO = "SELECT pg_backend_pid()"


async def throw_away_twice(
    db: Database, backend: ServerBackend, closing: asyncio.Event
) -> None:
    """Cancel a statement, and send another while its connection is being closed."""
    async with db:
        connection = await uow.current_session().connection()
        slow = asyncio.create_task(connection.exec_driver_sql(backend.slow))
        await eventually(1, functools.partial(backend.running, backend.slow))
        slow.cancel()
        await eventually(0, backend.connections)
        closing.set()
        with pytest.raises(DBAPIError):
            await connection.exec_driver_sql("SELECT 1")
        await asyncio.wait([slow])


@on("asyncpg")
@pytest.mark.parametrize("gives_up", [False, True])
async def test_the_next_connection_is_kept(
    backend: ServerBackend, monkeypatch: pytest.MonkeyPatch, *, gives_up: bool
) -> None:
    """Who still closes the dead one does not forget what others have connected.

    It closes for long: the server has gone, but the client has not heard of it. Who
    comes next waits; one that gives up stops nobody.
    """
    monkeypatch.setattr("asgi_uow._databases.pool.CLOSE_SECONDS", 1.0)
    closing = asyncio.Event()

    async with behind_proxy(backend, pool_size=1, max_overflow=0) as (db, proxy):
        proxy.hide_ends()

        async def throw_away() -> None:
            with suppress(DoomedError):
                await throw_away_twice(db, backend, closing)

        async def come_next() -> object:
            await closing.wait()
            if gives_up:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.05), db:
                        await uow.current_session().scalar(WHO)
            async with db:
                number = await uow.current_session().scalar(WHO)
                await asyncio.wait([first])
            return number

        first = asyncio.create_task(throw_away())
        async with asyncio.timeout(10):
            number = await come_next()
            await first
            async with db:
                assert number == await uow.current_session().scalar(WHO)
        assert 1 == await backend.connections()
        assert [0, 0] == checked_out(db)


@on(*DRIVERS)
async def test_a_listener_throws_it_away_again(db: Database) -> None:
    """It waits for nobody: not for itself either."""
    again: list[object] = []

    @event.listens_for(db.engine.sync_engine, "close")
    def close(_: object, entry: ConnectionPoolEntry) -> None:
        if not again:
            again.append(entry)
            entry.invalidate()

    async with asyncio.timeout(10):
        with pytest.raises(AsgiUowError):
            async with db:
                connection = await uow.current_session().connection()
                await connection.invalidate()
        async with db:
            assert 1 == await uow.current_session().scalar("SELECT 1")
    assert [] != again
    assert [0, 0] == checked_out(db)
