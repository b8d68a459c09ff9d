"""A SQLite connection that survives the cancellation of a statement.

A cancelled statement of plain aiosqlite goes on in its thread. SQLAlchemy closes the
connection meanwhile, SQLite keeps a "zombie" with its locks as long as a cursor is
referenced, and a traceback references it: the database stays locked.
https://www.sqlite.org/c3ref/close.html
"""

from __future__ import annotations

import asyncio
import sqlite3
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

import aiosqlite

from asgi_uow._concurrency import run_to_completion

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

CHUNK = 64
"""Rows fetched per hop into the thread; aiosqlite's own default."""


class Connection(aiosqlite.Connection):
    """Stops and undoes what was cancelled before anybody hears of it."""

    def __init__(self, connector: Callable[[], sqlite3.Connection]) -> None:
        """Connect with `connector`, in the connection's own thread."""
        super().__init__(connector, CHUNK)
        self._stopped = False
        self._cursors: weakref.WeakSet[sqlite3.Cursor] = weakref.WeakSet()

    def stop(self) -> asyncio.Future[None] | None:
        """Stop the thread, once: a second request would wait for its answer forever."""
        if self._stopped:
            return None
        self._stopped = True
        future: asyncio.Future[None] | None = super().stop()
        return future

    async def _connect(self) -> Connection:
        """Connect to the end, then close again when cancelled."""
        try:
            await run_to_completion(super()._connect())
        except asyncio.CancelledError:
            await run_to_completion(self.close())
            raise
        return self

    async def _execute(
        self,
        fn: Callable[..., T],
        *args: Any,
        **kwargs: Any,
    ) -> T:
        """Run `fn` in the thread; when cancelled, interrupt, clean up, then go on."""
        try:
            result: T = await super()._execute(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        except asyncio.CancelledError:
            self._conn.interrupt()
            # The thread takes one call after the other: this one comes after `fn`.
            await run_to_completion(super()._execute(self._clean_up))  # type: ignore[no-untyped-call]
            raise
        if isinstance(result, sqlite3.Cursor):
            self._cursors.add(result)
        return result

    def _clean_up(self) -> None:
        for cursor in list(self._cursors):
            cursor.close()
        self._conn.rollback()


def connect(database: str, **options: Any) -> Connection:
    """Stand in for `aiosqlite.connect`."""
    connection = Connection(lambda: sqlite3.connect(database, **options))
    # aiosqlite before 0.22 is a thread, later ones have one.
    thread: Any = getattr(connection, "_thread", connection)
    thread.daemon = True
    return connection
