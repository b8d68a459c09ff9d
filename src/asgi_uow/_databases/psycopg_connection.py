"""A connection of psycopg that a cancellation leaves in order."""

from __future__ import annotations

from asyncio import Task, create_task
from contextlib import suppress
from pkgutil import resolve_name
from typing import Any
from weakref import ref

from anyio import CancelScope, move_on_after

from asgi_uow._databases import known, postgresql
from asgi_uow._databases.connection import SECONDS_TO_FAIL

DRIVER = known.Driver(postgresql.Psycopg())
_endings: set[Task[None]] = set()


async def connect(conninfo: str = "", **options: Any) -> Any:
    """Connect, and mend two things that psycopg does.

    What it does for a cancellation is shielded from that of an anyio scope. A close()
    lets what is in flight fail first: that would go on with the number of the socket,
    which is soon another's.
    """
    raw = await resolve_name("psycopg:AsyncConnection.connect")(conninfo, **options)
    cancel, end, own = type(raw).cancel_safe, type(raw).close, ref(raw)

    async def cancel_safe(**options: Any) -> None:
        with CancelScope(shield=True):
            await cancel(own(), **options)

    async def close() -> None:
        conn: Any = own()
        if conn.closed or not DRIVER.is_busy(conn):
            await end(conn)
        else:  # not awaited: who closes it may be cancelled
            ending = create_task(_end_when_idle(conn, end))
            _endings.add(ending)
            ending.add_done_callback(_endings.discard)

    raw.cancel_safe, raw.close = cancel_safe, close
    return raw


async def _end_when_idle(conn: Any, end: Any) -> None:
    try:
        with suppress(Exception):  # psycopg's: the server was first
            DRIVER.cut_off(conn)
        with move_on_after(SECONDS_TO_FAIL):
            await conn.lock.acquire()
            conn.lock.release()
    finally:
        await end(conn)
