"""A connection that comes back goes to whom has waited longest."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from sqlalchemy.util import await_only
from sqlalchemy.util.queue import AsyncAdaptedQueue, Empty, Full

from asgi_uow._databases.pool_entry import PoolEntry


class FairQueue(AsyncAdaptedQueue[Any]):
    """What a pool keeps its connections in; takes the place of SQLAlchemy's.

    That one only wakes the first who waits. Until it runs, a newcomer takes the
    connection, and it waits again behind all others; what comes back meanwhile finds
    the queue full, so that the pool closes it and soon makes another.
    """

    waiters: deque[asyncio.Future[Any]]

    def put_nowait(self, item: Any) -> None:
        while self.waiters:
            first = self.waiters.popleft()
            if not (first.done() or first.get_loop().is_closed()):
                return first.set_result(item)
        try:
            return self._queue.put_nowait(item)
        except asyncio.QueueFull:
            raise Full from None

    def get(self, block: bool = True, timeout: float | None = None) -> Any:  # noqa: FBT001, FBT002  # as SQLAlchemy has it
        try:
            return self._queue.get_nowait()
        except asyncio.QueueEmpty:
            if not block:
                raise Empty from None
        waiter = asyncio.get_running_loop().create_future()
        self.waiters.append(waiter)
        try:
            return await_only(_wait(waiter, timeout))
        except BaseException as error:
            if waiter in self.waiters:
                self.waiters.remove(waiter)
            elif not waiter.cancelled():
                self._pass_on(waiter.result())
            if isinstance(error, TimeoutError):
                raise Empty from None
            raise

    def _pass_on(self, item: Any) -> None:
        try:
            self.put_nowait(item)
        except Full:  # only the pool could close it: the next that comes back is
            self._queue._put(item)  # noqa: SLF001


def make_fair(queue: Any) -> None:
    """Have SQLAlchemy's queue be one, with what it holds."""
    queue.waiters, queue.__class__ = deque(), FairQueue


def free_place(pool: Any) -> None:
    """Have who waits connect, where a connection was closed or could not be made."""
    type(pool)._dec_overflow(pool)  # noqa: SLF001
    if pool._pool.waiters and pool._inc_overflow():  # noqa: SLF001
        pool._do_return_conn(PoolEntry(pool, connect=False))  # noqa: SLF001


async def _wait(waiter: asyncio.Future[Any], seconds: float | None) -> Any:
    async with asyncio.timeout(seconds):
        return await waiter
