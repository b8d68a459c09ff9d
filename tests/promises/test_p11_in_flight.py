"""P11: statements that pass the session's lock: `session.connection()`, cursors."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import literal_column
from sqlalchemy.ext.asyncio import AsyncAttrs
from sqlalchemy.orm import DeclarativeBase, Mapped, column_property, mapped_column
from sqlalchemy.util import greenlet_spawn

import asgi_uow as uow
from asgi_uow import Database
from tests.servers import eventually
from tests.support import shop
from tests.support.asgi import Response, handle
from tests.support.databases import DRIVERS, checked_out, on
from tests.support.gate import gate_at
from tests.support.private import State
from tests.support.writes import driver_connection

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from asgi_uow import Session
    from tests.servers import Backend
    from tests.support.gate import Gate

SECONDS = 10.0
"""For what takes milliseconds: whatever takes longer hangs."""
ONE_CONNECTION = {"pool_size": 1, "max_overflow": 0}


# The ways past the session's lock


async def on_connection(session: Session, statement: str) -> None:
    connection = await session.connection()
    await connection.exec_driver_sql(statement)


async def on_cursor(session: Session, statement: str) -> None:
    raw = await (await session.connection()).get_raw_connection()

    def execute() -> None:
        cursor = raw.cursor()
        cursor.execute(statement)
        cursor.close()

    await greenlet_spawn(execute)


async def on_driver(session: Session, statement: str) -> None:
    raw = await driver_connection(session)
    if hasattr(raw, "execute"):
        await raw.execute(statement)
    else:  # asyncmy
        async with raw.cursor() as cursor:
            await cursor.execute(statement)


WAYS: dict[str, Callable[[Session, str], Awaitable[None]]] = {
    "connection": on_connection,
    "cursor": on_cursor,
    "driver": on_driver,
}
ways = pytest.mark.parametrize("way", WAYS)


async def fail() -> None:
    raise ZeroDivisionError


async def state_of(response: Response) -> State:
    return response.unit.state


async def end_while_in_flight(
    db: Database,
    gate: Any,
    start: Callable[[], Awaitable[None]],
    status: int | None,
    **options: Any,
) -> tuple[Response, asyncio.Task[Response], asyncio.Task[None]]:
    """Have a handler leave a statement in flight; return when its unit is ending.

    Without a status the handler raises.
    """
    response, leaked = Response(), list[asyncio.Task[None]]()

    async def leak() -> None:
        await start()

    async def handler() -> None:
        await shop.insert(1)
        leaked.append(asyncio.create_task(leak()))
        await gate.reached()
        if status is None:
            await fail()

    work = handle(handler, db, status=status or 200, hooks=True, into=response, **options)
    request = asyncio.create_task(work)
    ending = State.COMMITTING if status == 200 else State.ROLLING_BACK

    async def is_ending() -> bool:
        return bool(response.units) and (request.done() or response.unit.state is ending)

    await eventually(True, is_ending)  # noqa: FBT003  # what is asked for
    return response, request, leaked[0]


async def works(db: Database, backend: Backend, kept: list[int]) -> None:
    """The next users of the pool are served, on a connection without a past."""
    assert [0, 0] == checked_out(db)
    for number in (98, 99):
        async with asyncio.timeout(SECONDS):
            after = await handle(lambda number=number: shop.insert(number), db)
        assert (200, None) == (after.status, after.error)
    assert [*kept, 98, 99] == await shop.items(backend)
    assert 0 == await backend.open_transactions()


# The end


@on(*DRIVERS)
@ways
@pytest.mark.parametrize("status", [200, 404, None])
async def test_the_end_waits(backend: Backend, way: str, status: int | None) -> None:
    """COMMIT and ROLLBACK come after the answer to what a leaked task has sent."""
    async with gate_at(backend, **ONE_CONNECTION) as (db, gate):

        async def start() -> None:
            await WAYS[way](uow.current_session(), gate.insert)

        async with asyncio.timeout(SECONDS):
            response, request, leaked = await end_while_in_flight(
                db, gate, start, status
            )
            assert not request.done()
            await gate.open()
            await request
            await leaked
        if status is None:
            assert isinstance(response.error, ZeroDivisionError)
        else:
            assert (status, None) == (response.status, response.error)
        assert ["commit" if status == 200 else "rollback"] == response.hooks
        await works(db, backend, [1, 2] if status == 200 else [])
