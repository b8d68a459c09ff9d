"""A pool's entry: what becomes of a connection that two tasks throw away."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

from sqlalchemy.pool.base import _ConnectionRecord
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet


class PoolEntry(_ConnectionRecord):
    """Takes the place of SQLAlchemy's.

    There, who finds the connection dead while another is still closing it gives the
    entry back at once. Somebody connects in it, and what the first then forgets is
    that new connection, which nobody will close. Here that somebody waits.
    """

    def invalidate(self, e: BaseException | None = None, soft: bool = False) -> None:  # noqa: FBT001, FBT002  # as SQLAlchemy has it
        if soft or not in_greenlet():
            super().invalidate(e, soft)
        elif "get_connection" not in vars(self):  # otherwise it is being closed
            closed = asyncio.get_running_loop().create_future()
            vars(self)["get_connection"] = functools.partial(self._get_later, closed)
            try:
                super().invalidate(e)
            finally:
                del vars(self)["get_connection"]
                closed.set_result(None)

    def _get_later(self, closed: asyncio.Future[None]) -> Any:
        await_only(asyncio.wait([closed]))
        return self.get_connection()
