"""A connection of psycopg that a cancellation leaves in order."""

from __future__ import annotations

from asyncio import Task, create_task
from typing import Any

from anyio import CancelScope
from psycopg import AsyncConnection
from sqlalchemy.util import greenlet_spawn

from asgi_uow._databases import known, postgresql
from asgi_uow._databases.connection import end_calls

DRIVER = known.Driver(postgresql.Psycopg())
_endings: set[Task[None]] = set()


class Connection(AsyncConnection[Any]):
    """Mends two things that psycopg does.

    What it does for a cancellation is shielded from that of an anyio scope. A close()
    lets what is in flight fail first: that would go on with the number of the socket,
    which is soon another's.
    """

    async def cancel_safe(self, **options: Any) -> None:
        with CancelScope(shield=True):
            await super().cancel_safe(**options)

    async def close(self) -> None:
        if self.closed or not DRIVER.is_busy(self):
            await super().close()
        else:  # not awaited: who closes it may be cancelled
            ending = create_task(self._end_when_idle())
            _endings.add(ending)
            ending.add_done_callback(_endings.discard)

    async def _end_when_idle(self) -> None:
        try:
            await greenlet_spawn(end_calls, DRIVER, self)
        finally:
            await super().close()
