"""A SQLite connection that calls its thread once per statement and can be cancelled.

A cancelled statement of plain aiosqlite goes on in its thread. SQLAlchemy closes the
connection meanwhile, SQLite keeps a "zombie" with its locks as long as a cursor is
referenced, and a traceback references it: the database stays locked.
https://www.sqlite.org/c3ref/close.html
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
import weakref
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self, TypeVar

import aiosqlite
from aiosqlite import core

from asgi_uow._concurrency import run_to_completion

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

T = TypeVar("T")

PIECE = 50  # milliseconds
CHUNK = 64  # rows fetched ahead; aiosqlite's own default


class Cursor(aiosqlite.Cursor):
    """Executes a statement and fetches its first rows in one call into the thread.

    The cursor of sqlite3 is made for the statement and closed with the last row, so
    rows that were fetched ahead keep no lock. A `row_factory` is to be set before.
    """

    _conn: Connection

    def __init__(self, connection: Connection) -> None:
        raw: Any = connection._connection  # noqa: SLF001  # aiosqlite's own
        factory = getattr(raw, "row_factory", None)
        blank: Any = SimpleNamespace(connection=raw, row_factory=factory, arraysize=1)
        blank.description, blank.rowcount, blank.lastrowid = None, -1, None
        super().__init__(connection, blank)
        self._rows: list[Any] = []
        self._has_more = self._closed = False

    def __await__(self) -> Generator[None, None, Self]:
        yield from ()
        return self

    async def execute(self, sql: str, parameters: Any = None) -> Self:
        return await self._start("execute", sql, parameters)

    async def executemany(self, sql: str, parameters: Any) -> Self:
        return await self._start("executemany", sql, parameters)

    async def executescript(self, sql_script: str) -> Self:
        return await self._start("executescript", sql_script)

    async def fetchone(self) -> Any:
        rows = await self._take(1)
        return rows[0] if rows else None

    async def fetchmany(self, size: int | None = None) -> list[Any]:
        return await self._take(self.arraysize if size is None else size)

    async def fetchall(self) -> list[Any]:
        return await self._take(2**31 - 1)  # the most that sqlite3 can be asked for

    async def close(self) -> None:
        self._closed, self._rows = True, []
        if self._has_more:
            with suppress(ValueError):  # it was closed with its connection
                await self._conn.call(self._cursor.close)

    async def _start(self, method: str, *args: object) -> Self:
        self._check()
        self._rows = []
        await self._conn._execute(self._run, method, args)  # noqa: SLF001
        return self

    async def _take(self, size: int) -> list[Any]:
        self._check()
        missing = size - len(self._rows)
        if self._has_more and missing > 0:
            await self._conn.call(partial(self._read, max(missing, CHUNK)))
        rows, self._rows = self._rows[:size], self._rows[size:]
        return rows

    def _check(self) -> None:
        if self._closed:
            message = "Cannot operate on a closed cursor."
            raise sqlite3.ProgrammingError(message)

    def _run(self, method: str, args: tuple[object, ...]) -> None:
        if self._has_more:
            self._cursor.close()
        cursor: Any = self.connection.cursor()
        cursor.arraysize, cursor.row_factory = self.arraysize, self.row_factory
        self._cursor, self._has_more = cursor, False
        getattr(cursor, method)(*(each for each in args if each is not None))
        self._read(CHUNK)

    def _read(self, size: int) -> None:
        self._has_more = False
        try:
            # Not returned: the thread refers to a result until its next call.
            rows = self._cursor.fetchmany(size)
            self._rows += rows
            self._has_more = len(rows) == size
        finally:
            # Closed after an error, too: a row that cannot be decoded keeps its lock.
            if self._has_more:
                self._conn.cursors.add(self._cursor)
            else:
                self._cursor.close()


class Connection(aiosqlite.Connection):
    """Stops and undoes what was cancelled before anybody hears of it."""

    def __init__(
        self, database: str, iter_chunk_size: int = CHUNK, **options: Any
    ) -> None:
        super().__init__(partial(sqlite3.connect, database, **options), iter_chunk_size)
        self._thread.daemon = True
        self.file = Path(database.removeprefix("file:").partition("?")[0]).absolute()
        self.cursors: weakref.WeakSet[sqlite3.Cursor] = weakref.WeakSet()
        self._begin: str | None = None
        self._stopped: asyncio.Future[None] | None = None
        self._is_beginning = False
        self.is_hurried = False  # has a wait for the lock to end at once?

    def begin_with(self, statement: str) -> None:
        self._begin = statement  # executed just before the next statement
        self.is_hurried = False

    def _take_begin(self) -> str | None:
        begin, self._begin = self._begin, None
        return begin

    @property
    def in_transaction(self) -> bool:
        begins = self._begin is not None or self._is_beginning
        return begins or super().in_transaction

    def cursor(self) -> Cursor:  # type: ignore[override]  # awaited or entered alike
        return Cursor(self)

    async def commit(self) -> None:
        if self._take_begin() is None:
            await super().commit()

    async def rollback(self) -> None:
        if self._take_begin() is None:
            await super().rollback()

    async def close(self) -> None:
        self._take_begin()
        try:
            with suppress(ValueError):  # it is being closed
                await self.call(partial(_shut, self._connection, self.cursors))
        finally:
            self._connection = None
            await (self.stop() or asyncio.sleep(0))

    def stop(self) -> asyncio.Future[None] | None:
        """Stop the thread, once: a second request would wait for its answer forever."""
        running, self._running = self._running, False
        if running and self._thread.is_alive():  # not if it was forked
            self._tx.put_nowait((None, partial(_shut, self._connection, self.cursors)))
            self._stopped = super().stop()
        return self._stopped

    def abandon(self) -> None:
        """Close it and stop its thread, for whose answer no loop waits."""
        self._running, raw, self._connection = False, self._connection, None
        self._tx.put_nowait((None, partial(_shut, raw, self.cursors)))
        self._tx.put_nowait((None, lambda: core._STOP_RUNNING_SENTINEL))  # noqa: SLF001

    async def _connect(self) -> Connection:
        try:
            await run_to_completion(super()._connect())
        except BaseException as error:
            if isinstance(error, sqlite3.OperationalError):  # SQLite names no file
                error.args = (f"{error}: {self.file}; is there such a folder?",)
            await run_to_completion(self.close())
            raise
        return self

    async def _execute(self, fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        result = await self.call(partial(fn, *args, **kwargs), self._take_begin())
        if isinstance(result, sqlite3.Cursor):
            self.cursors.add(result)
        return result

    async def call(self, fn: Callable[[], T], begin: str | None = None) -> T:
        """Run `fn` in the thread; when cancelled, interrupt, clean up, then go on."""
        raw = self._conn  # raises if it is closed
        steps = [fn] if begin is None else [fn, partial(raw.execute, begin)]
        if begin is not None and self.is_hurried:
            steps[1] = partial(_begin_in_pieces, raw, begin, steps)
        self._is_beginning = self._is_beginning or begin is not None
        try:
            result: T = await super()._execute(_take_steps, steps)  # type: ignore[no-untyped-call]
        except sqlite3.Error:
            if steps:  # BEGIN itself has failed, and what follows needs one still
                self._begin = begin
            raise
        except asyncio.CancelledError:
            if begin is not None:
                steps.clear()  # one that has not begun is left out
            with suppress(ValueError, sqlite3.ProgrammingError):  # closed meanwhile
                await run_to_completion(self._undo())
            raise
        finally:
            self._is_beginning = self._is_beginning and begin is None
        return result

    async def _undo(self) -> None:
        # The thread makes one call after the other: this comes after the cancelled one.
        ended = asyncio.get_running_loop().create_future()
        self._tx.put_nowait((ended, bool))
        while not ended.done():
            # Once is not enough: SQLite forgets it when nothing is running just then.
            self._conn.interrupt()
            await asyncio.wait((ended,), timeout=0.05)
        await super()._execute(_clean_up, self._conn, self.cursors)  # type: ignore[no-untyped-call]


def _clean_up(raw: sqlite3.Connection, cursors: Iterable[sqlite3.Cursor]) -> None:
    for cursor in list(cursors):
        cursor.close()
    raw.rollback()


def _shut(raw: sqlite3.Connection | None, cursors: Iterable[sqlite3.Cursor]) -> None:
    """Close it in its thread, where it keeps no lock: whoever has a cursor."""
    if raw is not None:
        with suppress(sqlite3.Error, RuntimeError):  # a cursor was made meanwhile
            _clean_up(raw, cursors)
        raw.close()


def _begin_in_pieces(raw: sqlite3.Connection, statement: str, later: list[Any]) -> Any:
    """Wait for the lock in pieces, between which a cancellation is heard."""
    [timeout] = raw.execute("PRAGMA busy_timeout").fetchone()
    until = time.monotonic() + timeout / 1000
    raw.execute(f"PRAGMA busy_timeout = {min(timeout, PIECE)}")
    try:
        while True:
            try:
                return raw.execute(statement)
            except sqlite3.OperationalError as error:
                is_busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
                if not (is_busy and later and time.monotonic() < until):
                    raise
    finally:
        raw.execute(f"PRAGMA busy_timeout = {timeout}")


def _take_steps(steps: list[Callable[[], T]]) -> T | None:
    result = None
    while steps:  # emptied, as the thread refers to the list until its next call
        result = steps.pop()()
    return result
