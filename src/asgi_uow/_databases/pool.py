"""The care every engine gets, also one that was passed in.

A connection that has an open transaction is rolled back before another unit of work
sees it, a dead one is replaced before it is handed out, and a read engine is read-only
from the first moment of each connection.
"""

from __future__ import annotations

import sqlite3
import time
from typing import TYPE_CHECKING, Literal

from sqlalchemy import event
from sqlalchemy import exc as sa_exc

from asgi_uow._databases import dialects as _dialects
from asgi_uow._databases import journal as _journal
from asgi_uow._databases.drivers import UNKNOWN_DRIVER, driver_of
from asgi_uow.errors import ReadOnlySessionError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Connection
    from sqlalchemy.engine import Engine
    from sqlalchemy.engine.interfaces import (
        DBAPIConnection,
        DBAPICursor,
        ExceptionContext,
    )
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.pool import ConnectionPoolEntry, PoolResetState

ERROR_SEEN = "asgi_uow.error_seen"
IDLE_SINCE = "asgi_uow.idle_since"
SETTINGS_CHANGED = "asgi_uow.settings_changed"

PING_AFTER_IDLE = 30.0
"""Seconds of idleness after which a connection is pinged before it is handed out."""

WAL_PAUSE = 50
"""Milliseconds between two attempts to have a SQLite file keep a write-ahead log."""


def prepare(
    engine: AsyncEngine,
    *,
    read_only: bool,
    read_isolation: Literal["REPEATABLE READ"] | None = None,
) -> None:
    """Attach the listeners; all of them run inside SQLAlchemy's greenlet."""
    target = engine.sync_engine
    # First, so that those that follow know what a disconnect is.
    event.listen(target, "handle_error", _note_error)
    event.listen(target, "rollback", _forget_error)
    if target.dialect.name == "sqlite":
        event.listen(target, "connect", _sqlite_settings)
        if not read_only:
            event.listen(target, "begin", _sqlite_begin)
        elif read_isolation is not None:
            event.listen(target, "begin", _sqlite_snapshot)
    if target.dialect.name in {"mysql", "mariadb"} and not read_only:
        event.listen(target, "connect", _ask_rollback_on_timeout)
    if _dialects.is_memory(target.url):
        event.listen(target, "handle_error", _keep_memory)
    if read_only:
        # In AUTOCOMMIT there is nothing to roll back when a connection is closed.
        target.dialect.skip_autocommit_rollback = True
        event.listen(target, "connect", _Reader(target, read_isolation).make_read_only)
        event.listen(target, "handle_error", _name_read_only_error)
        event.listen(target, "before_cursor_execute", _note_settings)
        event.listen(target, "set_connection_execution_options", _note_options)
    else:
        _journal.listen(target)
    care = _Care(target, read_only=read_only)
    event.listen(target, "checkout", care.check_alive)
    event.listen(target, "checkin", care.note_idle)
    event.listen(target, "reset", care.roll_back_if_open)


class _Reader:
    """Makes the connections of a read engine read-only, once each."""

    def __init__(
        self, engine: Engine, isolation: Literal["REPEATABLE READ"] | None
    ) -> None:
        self.dialect = engine.dialect
        self.isolation: Literal["REPEATABLE READ"] | None = isolation

    def make_read_only(self, dbapi_connection: DBAPIConnection, _: object) -> None:
        # Last of the connect listeners, so no isolation level set before survives.
        self.dialect.set_isolation_level(dbapi_connection, "AUTOCOMMIT")
        cursor = dbapi_connection.cursor()
        cursor.execute(_dialects.READ_ONLY_STATEMENT[self.dialect.name])
        cursor.close()
        if self.isolation is not None and self.dialect.name != "sqlite":
            self.dialect.set_isolation_level(dbapi_connection, self.isolation)


class _Care:
    """Looks after pooled connections by asking the driver, not the server."""

    def __init__(self, engine: Engine, *, read_only: bool) -> None:
        self.read_only = read_only
        self.dialect = engine.dialect
        self.driver = driver_of(engine.dialect)

    def check_alive(
        self,
        dbapi_connection: DBAPIConnection,
        entry: ConnectionPoolEntry,
        _: object,
    ) -> None:
        """Replace a connection that is dead, or does not answer after idleness."""
        raw = self.dialect.get_driver_connection(dbapi_connection)
        idle_since: float | None = entry.info.pop(IDLE_SINCE, None)
        if self.driver.is_dead(raw):
            message = "the connection was closed while it was idle"
            raise sa_exc.DisconnectionError(message)
        if idle_since is None or time.monotonic() - idle_since < PING_AFTER_IDLE:
            return
        try:
            self.dialect.do_ping(dbapi_connection)
        except self.dialect.loaded_dbapi.Error as error:
            message = "the connection did not answer after a time of idleness"
            raise sa_exc.DisconnectionError(message) from error

    def note_idle(self, _: object, entry: ConnectionPoolEntry) -> None:
        """Remember when a connection came back, and that it is nobody's now."""
        entry.info[IDLE_SINCE] = time.monotonic()
        entry.info.pop(_journal.JOURNAL, None)

    def roll_back_if_open(
        self,
        dbapi_connection: DBAPIConnection,
        entry: ConnectionPoolEntry,
        state: PoolResetState,
    ) -> None:
        """Send ROLLBACK only if a transaction is open or an error was seen.

        SQLAlchemy itself sends none after a failed COMMIT, and the next user of the
        connection would commit what failed. An error packet of MySQL carries no
        status flag, hence the note that `_note_error` leaves.
        """
        raw = self.dialect.get_driver_connection(dbapi_connection)
        changed = entry.info.pop(SETTINGS_CHANGED, False)
        if changed or (self.read_only and self.driver.may_write(raw)):
            entry.invalidate(soft=True)  # replaced before anybody else gets it
        if state.terminate_only or not state.asyncio_safe:
            return
        if entry.info.pop(ERROR_SEEN, False) or self.driver.in_transaction(raw):
            dbapi_connection.rollback()
            if self.driver is UNKNOWN_DRIVER:
                return
            if self.driver.in_transaction(raw):
                # A BEGIN that SQLAlchemy does not know of: the cursor of a stream.
                cursor = dbapi_connection.cursor()
                cursor.execute("ROLLBACK")
                cursor.close()


def _note_error(context: ExceptionContext) -> None:
    if _dialects.is_driver_disconnect(context.original_exception):
        context.is_disconnect = True
    connection = context.connection
    if connection is not None and not connection.invalidated and not connection.closed:
        connection.info[ERROR_SEEN] = True


def _note_options(connection: Connection, options: Mapping[str, object]) -> None:
    if not _dialects.CHANGING_OPTIONS.isdisjoint(options):
        connection.info[SETTINGS_CHANGED] = True


def _note_settings(
    connection: Connection, _cursor: object, statement: str, *_: object
) -> None:
    # One of them may be what makes the connection read-only.
    if _dialects.CHANGES_SETTINGS.search(statement):
        connection.info[SETTINGS_CHANGED] = True


def _forget_error(connection: Connection) -> None:
    if not connection.invalidated and not connection.closed:
        connection.info.pop(ERROR_SEEN, None)


def _keep_memory(context: ExceptionContext) -> None:
    """Keep the connection that is the database; the statement was undone."""
    if not isinstance(context.original_exception, Exception):
        context.is_disconnect = False


def _ask_rollback_on_timeout(
    dbapi_connection: DBAPIConnection,
    entry: ConnectionPoolEntry,
) -> None:
    cursor = dbapi_connection.cursor()
    cursor.execute("SELECT @@innodb_rollback_on_timeout")
    [value] = cursor.fetchone() or [0]
    cursor.close()
    entry.info[_journal.ROLLBACK_ON_TIMEOUT] = bool(value)


def _name_read_only_error(context: ExceptionContext) -> None:
    error = context.sqlalchemy_exception
    if error is not None and _dialects.code_of(error) in _dialects.READ_ONLY_CODES:
        operation = "A statement"
        raise ReadOnlySessionError(operation) from error


def _sqlite_settings(dbapi_connection: DBAPIConnection, _: object) -> None:
    """Wait for locks, keep foreign keys, and let BEGIN be sent by `_sqlite_begin`."""
    dbapi_connection.isolation_level = None
    cursor = dbapi_connection.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")
    _use_wal(dbapi_connection, cursor)
    cursor.close()


def _use_wal(dbapi_connection: DBAPIConnection, cursor: DBAPICursor) -> None:
    """Have the file keep a write-ahead log; other connections may be at it as well.

    The change from another journal takes an exclusive lock and does not wait for it;
    BEGIN EXCLUSIVE does, in its place. Once the file has changed, nothing is locked.
    """
    attempts = _dialects.SQLITE_BUSY_TIMEOUT // WAL_PAUSE
    cursor.execute(f"PRAGMA busy_timeout = {WAL_PAUSE}")
    while _is_busy(cursor, "PRAGMA journal_mode = WAL", raises=not attempts):
        attempts -= 1
        if not _is_busy(cursor, "BEGIN EXCLUSIVE"):
            dbapi_connection.rollback()
    cursor.execute(f"PRAGMA busy_timeout = {_dialects.SQLITE_BUSY_TIMEOUT}")


def _is_busy(cursor: DBAPICursor, statement: str, *, raises: bool = False) -> bool:
    try:
        cursor.execute(statement)
    except sqlite3.OperationalError as error:
        if error.sqlite_errorname == "SQLITE_READONLY":
            return False  # it keeps the journal it has
        if raises or not error.sqlite_errorname.startswith("SQLITE_BUSY"):
            raise
        return True
    return False


def _sqlite_begin(connection: Connection) -> None:
    """Take the write lock at once: an upgrade later can fail without waiting.

    A SAVEPOINT opened before any DML needs the explicit BEGIN too, or its RELEASE
    commits. https://www.sqlite.org/lang_savepoint.html
    """
    _send_begin(connection, "BEGIN IMMEDIATE")


def _sqlite_snapshot(connection: Connection) -> None:
    """Keep what the first read finds; in WAL that stops no writer."""
    _send_begin(connection, "BEGIN")


def _send_begin(connection: Connection, statement: str) -> None:
    begin = getattr(connection.connection.driver_connection, "begin", None)
    if begin is None:  # a foreign engine's connection is aiosqlite's own
        connection.exec_driver_sql(statement)
    else:
        begin(statement)
