"""A pool's entry: what becomes of a connection that two tasks throw away."""

from __future__ import annotations

import asyncio

from sqlalchemy.pool.base import _ConnectionRecord
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet


class PoolEntry(_ConnectionRecord):
    """Takes the place of SQLAlchemy's.

    There, who finds the connection dead while another is still closing it gives the
    entry back at once. Somebody connects in it, and what the first then forgets is
    that new connection, which nobody will close.
    """

    _closing: asyncio.Future[None] | None = None

    def invalidate(self, e: BaseException | None = None, soft: bool = False) -> None:  # noqa: FBT001, FBT002  # as SQLAlchemy has it
        if soft or not in_greenlet():
            super().invalidate(e, soft)
        elif self._closing is not None:
            await_only(asyncio.wait([self._closing]))
        else:
            self._closing = asyncio.get_running_loop().create_future()
            try:
                super().invalidate(e)
            finally:
                self._closing.set_result(None)
                self._closing = None
