"""Pooled connections of every engine, also of one that was passed in.

A connection that has an open transaction is rolled back before another unit of work
sees it, a dead one is replaced before it is handed out, and a read engine is read-only
from the first moment of each connection.
"""

from __future__ import annotations

import asyncio
import functools
import time
from contextlib import closing
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.util import await_only

from asgi_uow._databases import driver_errors as failures
from asgi_uow._databases import known
from asgi_uow.errors import AsgiUowError, ConcurrentUseError, ReadOnlySessionError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import pool
    from sqlalchemy.engine import RootTransaction, interfaces
    from sqlalchemy.ext.asyncio import AsyncEngine

    from asgi_uow._databases.journal import Journal

    Isolation = Literal["REPEATABLE READ"] | None
    DBAPI = interfaces.DBAPIConnection
    Entry = pool.ConnectionPoolEntry

ABORTING_CODES = "asgi_uow.aborting_codes"
AUTOCOMMIT = "asgi_uow.autocommit"
BEGINS_WITH = "asgi_uow.begins_with"
CANCEL_SQL = "asgi_uow.cancel_sql"
DRIVER = "asgi_uow.driver"
ERROR_SEEN = "asgi_uow.error_seen"
IDLE_SINCE = "asgi_uow.idle_since"
SETTINGS_CHANGED = "asgi_uow.settings_changed"

PING_AFTER_IDLE = 30.0  # seconds; then a connection is pinged before it is handed out
# Execution options after which a connection is not what its pool made it.
CHANGING_OPTIONS = {"isolation_level", "postgresql_readonly", "postgresql_deferrable"}

raw_of = attrgetter("_connection")
"""The driver's connection, where every async dialect keeps it: the dialect calls."""


class Connection(sa.Connection):
    """A connection of one of our engines; only a writer's has a journal."""

    journal: Journal | None = None

    def _begin_impl(self, transaction: RootTransaction) -> None:
        super()._begin_impl(transaction)
        statement = self._execution_options.get(BEGINS_WITH)
        if statement is None:
            return
        begin = getattr(self.connection.driver_connection, "begin", None)
        if begin is not None:
            begin(statement)  # sent with the first statement
            return
        try:
            _execute(self.connection, statement)
        except BaseException as error:  # noqa: BLE001  # raised again, wrapped
            self._handle_dbapi_exception(error, statement, None, None, None)

    def call_alone(self, end: Callable[[], object]) -> None:
        """Wait until nobody's statement is in flight, call; none begins meanwhile."""
        # Cursors hold the lock, COMMIT and ROLLBACK do not; a driver knows its own.
        dbapi: Any = self._dbapi_connection.dbapi_connection  # type: ignore[union-attr]
        lock = getattr(dbapi, "_execute_mutex", known.NO_LOCK)
        driver = self._execution_options[DRIVER]
        await_only(lock.acquire())
        try:
            while driver.is_busy(raw_of(dbapi)):
                await_only(asyncio.sleep(0.005))
            end()
        finally:
            lock.release()

    def _rollback_impl(self) -> None:
        if self.journal is not None:
            self.journal.record_rollback()
        if self._still_open_and_dbapi_connection_is_valid:
            self.call_alone(super()._rollback_impl)
        if not self.invalidated and not self.closed:
            self.info.pop(ERROR_SEEN, None)

    def check_statement(self, statement: str) -> None:
        """Have the journal look at what came before, and at one that is not plain."""
        journal = self.journal
        if journal is None:
            return
        dbapi = self._dbapi_connection.dbapi_connection  # type: ignore[union-attr]
        if journal.ending is not None:
            if journal.ending is not asyncio.current_task():
                operation = "A statement"
                raise ConcurrentUseError(operation, "the unit of work is ending")
        elif journal.executed:
            journal.look(dbapi)
        if known.kind_of(statement) or journal.entries or journal.ddl is not None:
            journal.check_statement(statement, raw_of(dbapi))
        journal.executed = True

    def _commit_impl(self) -> None:
        self.call_alone(functools.partial(self._commit, super()._commit_impl))

    def _commit_twophase_impl(self, *args: Any) -> None:
        commit = super()._commit_twophase_impl  # a statement, which takes its turn
        self._commit(functools.partial(commit, *args))

    def _commit(self, send: Callable[[], None]) -> None:
        if self.journal is not None:
            self.journal.check_commit()
            self.journal.commit_sent = True
        send()
        if self.journal is not None:
            self.journal.committed = True

    def _savepoint_impl(self, name: str | None = None) -> str:
        name = super()._savepoint_impl(name)
        if self.journal is not None:
            self.journal.open_savepoint(name)
        return name

    def _release_savepoint_impl(self, name: str) -> None:
        if self.journal is not None:
            self.journal.end_savepoint(name, undone=False)
        super()._release_savepoint_impl(name)

    def _rollback_to_savepoint_impl(self, name: str) -> None:
        if self.journal is not None:
            self.journal.end_savepoint(name, undone=True)
        super()._rollback_to_savepoint_impl(name)


class ReaderConnection(Connection):
    """Remembers what makes a connection of a read engine another."""

    def execution_options(self, **options: Any) -> Any:
        if not CHANGING_OPTIONS.isdisjoint(options):
            self.info[SETTINGS_CHANGED] = True
        return super().execution_options(**options)

    def check_statement(self, statement: str) -> None:
        # One of them may be what makes the connection read-only.
        if known.changes_settings(statement):
            self.info[SETTINGS_CHANGED] = True


def attach_listeners(
    engine: AsyncEngine, *, read_only: bool, read_isolation: Isolation = None
) -> None:
    """Look after the connections of an engine; once, whoever asks for it again."""
    target = engine.sync_engine
    if issubclass(target._connection_cls, Connection):  # noqa: SLF001
        return
    policy = _Policy(target, read_only=read_only, read_isolation=read_isolation)
    # Not events of the engine: one listener there costs each statement 50 calls.
    target._connection_cls = ReaderConnection if read_only else Connection  # noqa: SLF001
    begin = policy.database.BEGIN_WRITE
    if read_only and begin is not None:
        # A snapshot of what the first read finds; in WAL that stops no writer.
        begin = None if read_isolation is None else "BEGIN"
    # Also if there is none: a derived engine has the options of its original.
    target.update_execution_options(**{BEGINS_WITH: begin, DRIVER: policy.driver})
    event.listen(target, "connect", policy.on_connect)
    event.listen(target, "checkout", policy.on_checkout)
    event.listen(target, "reset", policy.on_reset)
    event.listen(target, "handle_error", policy.on_error)
    for name in ("do_execute", "do_executemany", "do_execute_no_params"):
        event.listen(target, name, _check_statement)
    if read_only:
        # In AUTOCOMMIT there is nothing to roll back when a connection is closed.
        target.dialect.skip_autocommit_rollback = True


class _Policy:
    """What is done with the connections of one engine, mostly by asking the driver."""

    def __init__(
        self, engine: sa.Engine, *, read_only: bool, read_isolation: Isolation
    ) -> None:
        self.dialect = engine.dialect
        self.database = known.database_of(engine.dialect)
        self.driver = known.driver_of(engine.dialect)
        self.is_memory = known.is_memory(engine.url)
        self.read_only = read_only
        self.read_isolation: Isolation = read_isolation

    def on_connect(self, dbapi: DBAPI, entry: Entry) -> None:
        """Set up a connection; as the last listener, so nothing set before survives."""
        info, database = entry.info, self.database
        info[ABORTING_CODES] = database.set_up(dbapi, read_only=self.read_only)
        if self.read_only:
            self.dialect.set_isolation_level(dbapi, "AUTOCOMMIT")
            _execute(dbapi, database.READ_ONLY_STATEMENT)
            if self.read_isolation is not None and database.BEGIN_WRITE is None:
                self.dialect.set_isolation_level(dbapi, self.read_isolation)
        elif database.BEGIN_WRITE is None:
            info[AUTOCOMMIT] = self.dialect.detect_autocommit_setting(dbapi)
        process = self.driver.process_id(raw_of(dbapi))
        if database.CANCEL_SQL is not None and process is not None:
            info[CANCEL_SQL] = database.CANCEL_SQL.format(process)

    def on_checkout(self, dbapi: DBAPI, entry: Entry, _: object) -> None:
        """Replace a connection that is dead, or does not answer after idleness."""
        idle_since: float | None = entry.info.pop(IDLE_SINCE, None)
        if self.driver.is_dead(raw_of(dbapi)):
            message = "the connection was closed while it was idle"
            raise DisconnectionError(message)
        if idle_since is None or time.monotonic() - idle_since < PING_AFTER_IDLE:
            return
        try:
            self.dialect.do_ping(dbapi)
        except self.dialect.loaded_dbapi.Error as error:
            message = "the connection did not answer after a time of idleness"
            raise DisconnectionError(message) from error

    def on_reset(self, dbapi: DBAPI, entry: Entry, state: pool.PoolResetState) -> None:
        """Send ROLLBACK only if a transaction is open or an error was seen.

        SQLAlchemy itself sends none after a failed COMMIT, and the next user of the
        connection would commit what failed. An error packet of MySQL carries no
        status flag, hence the mark that `on_error` leaves.
        """
        info = entry.info
        info[IDLE_SINCE] = time.monotonic()
        raw = raw_of(dbapi)
        writable = self.read_only and self.driver.reports_writable(raw)
        if info.pop(SETTINGS_CHANGED, False) or writable:
            entry.invalidate(soft=True)  # replaced before anybody else gets it
        if state.terminate_only or not state.asyncio_safe:
            return
        is_open = info.pop(ERROR_SEEN, False) or self.driver.in_transaction(raw)
        if is_open and not self._is_busy(dbapi):
            dbapi.rollback()
            if self.read_only and self.driver.in_transaction(raw):
                # A BEGIN that SQLAlchemy does not know of: the cursor of a stream.
                _execute(dbapi, "ROLLBACK")
            is_open = self.driver.is_known and self.driver.in_transaction(raw)
        if (is_open or self._is_busy(dbapi)) and not self.is_memory:
            entry.invalidate()

    def _is_busy(self, dbapi: Any) -> bool:
        """Tell whether a statement is in flight, or waits for one that was."""
        lock = getattr(dbapi, "_execute_mutex", known.NO_LOCK)
        in_turn = lock._locked or lock._waiters  # noqa: SLF001
        return bool(in_turn) or self.driver.is_busy(raw_of(dbapi))

    def on_error(self, context: interfaces.ExceptionContext) -> None:
        """Say what is a disconnect, tell the journal, name a refused write."""
        error = context.original_exception
        demoted = not self.read_only and failures.means(error, "demoted")
        if demoted or failures.means(error, "disconnect"):
            context.is_disconnect = True
        if self.is_memory and not isinstance(error, Exception):
            context.is_disconnect = False  # the connection is the database
        connection = context.connection
        if isinstance(error, AsgiUowError):
            return  # nothing was sent
        if isinstance(connection, Connection) and not connection.invalidated:
            info, journal = connection.info, connection.journal
            info[ERROR_SEEN] = True
            foreign = not isinstance(error, self.dialect.loaded_dbapi.Error)
            if foreign and context.execution_context is not None:
                info[SETTINGS_CHANGED] = not self.is_memory
            if journal is not None:
                raw = connection.connection.driver_connection
                journal.record_error(context, raw, info.get(ABORTING_CODES, ()))
        if self.read_only and failures.means(error, "read_only"):
            operation = "A statement"
            raise ReadOnlySessionError(operation) from context.sqlalchemy_exception


def info_of(connection: sa.Connection) -> dict[Any, Any]:
    """Give the pool's info of a connection; the public way makes five calls."""
    entry = connection._dbapi_connection._connection_record  # type: ignore[union-attr]  # noqa: SLF001
    return connection.info if entry is None else entry.info


def _execute(connection: DBAPI | pool.PoolProxiedConnection, statement: str) -> None:
    with closing(connection.cursor()) as cursor:
        cursor.execute(statement)


def _check_statement(_: object, statement: str, *context: object) -> None:
    # The context comes last, with parameters before it or without.
    connection = getattr(context[-1], "root_connection", None)
    if isinstance(connection, Connection):
        connection.check_statement(statement)
