"""Pooled connections of every engine, also of one that was passed in."""

from __future__ import annotations

import asyncio
import functools
import time
from contextlib import suppress
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Literal

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.util import await_only, greenlet_spawn

from asgi_uow import errors
from asgi_uow._concurrency import bounded
from asgi_uow._databases import driver_errors as failures
from asgi_uow._databases import known
from asgi_uow._databases.connection import (
    ERROR_SEEN,
    POLICY,
    SETTINGS_CHANGED,
    Connection,
    ReaderConnection,
    end_calls,
    execute,
    raw_of,
)

if TYPE_CHECKING:
    from sqlalchemy import pool
    from sqlalchemy.engine import interfaces
    from sqlalchemy.ext.asyncio import AsyncEngine

    from asgi_uow._databases.journal import Journal

    Isolation = Literal["REPEATABLE READ"] | None
    DBAPI = interfaces.DBAPIConnection
    Entry = pool.ConnectionPoolEntry
    Context = interfaces.ExceptionContext

ABORTING_CODES = "asgi_uow.aborting_codes"
AUTOCOMMIT = "asgi_uow.autocommit"
CANCEL_SQL = "asgi_uow.cancel_sql"
IDLE_SINCE = "asgi_uow.idle_since"

PING_AFTER_IDLE = 30.0  # seconds; then a connection is pinged before it is handed out
CLOSE_SECONDS = 2.0  # what SQLAlchemy gives asyncpg where it terminates a connection
PING_SECONDS = 3.0  # a new connection is made sooner than a slower answer comes


def attach_listeners(
    engine: AsyncEngine, *, read_only: bool, read_isolation: Isolation = None
) -> None:
    """Look after the connections of an engine, once; refuse another use of it."""
    target = engine.sync_engine
    policy = _Policy(target, read_only=read_only, read_isolation=read_isolation)
    if issubclass(target._connection_cls, Connection):  # noqa: SLF001
        if target.get_execution_options()[POLICY].used_for != policy.used_for:
            message = (
                "Another Database uses this engine as a writer or a reader, or with "
                "another read_isolation: make an engine for each use."
            )
            raise errors.ConfigurationError(message)
        return
    # Not events of the engine: one listener there costs each statement 50 calls.
    target._connection_cls = ReaderConnection if read_only else Connection  # noqa: SLF001
    target.update_execution_options(**{POLICY: policy})
    event.listen(target, "do_connect", policy.on_do_connect)
    event.listen(target, "connect", policy.on_connect)
    event.listen(target, "checkout", policy.on_checkout)
    event.listen(target, "reset", policy.on_reset)
    event.listen(target, "close", policy.on_close)
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
        self.used_for = (read_only, read_isolation)
        self.begins_with = self.database.BEGIN_WRITE
        if read_only and self.begins_with is not None:
            # A snapshot of what the first read finds; in WAL that stops no writer.
            self.begins_with = None if read_isolation is None else "BEGIN"

    def on_do_connect(self, _: Any, __: Any, ___: Any, options: dict[str, Any]) -> None:
        """Bound the wait, or connect in place of the driver; the engine's own wins."""
        options.update(dict(self.driver.connect_args) | options)
        if isinstance(name := options.get("async_creator_fn"), str):
            options["async_creator_fn"] = resolve_name(name)

    def on_connect(self, dbapi: DBAPI, entry: Entry) -> None:
        """Set up a connection; as the last listener, so nothing set before survives."""
        info, database = entry.info, self.database
        info[ABORTING_CODES] = database.set_up(dbapi, read_only=self.read_only)
        if self.read_only:
            self.dialect.set_isolation_level(dbapi, "AUTOCOMMIT")
            execute(dbapi, database.READ_ONLY_STATEMENT)
            if self.read_isolation is not None and database.BEGIN_WRITE is None:
                self.dialect.set_isolation_level(dbapi, self.read_isolation)
        elif database.BEGIN_WRITE is None:
            info[AUTOCOMMIT] = self.dialect.detect_autocommit_setting(dbapi)
        process = self.driver.process_id(raw_of(dbapi))
        if database.CANCEL_SQL is not None and process is not None:
            info[CANCEL_SQL] = database.CANCEL_SQL.format(process)

    def on_checkout(self, dbapi: DBAPI, entry: Entry, _: object) -> None:
        """Replace a connection that is dead or silent, or that was not set up here."""
        idle_since: float | None = entry.info.pop(IDLE_SINCE, None)
        raw = raw_of(dbapi)
        is_foreign = ABORTING_CODES not in entry.info and not self.is_memory
        if is_foreign or self.driver.is_dead(raw):
            message = "the connection was closed while it was idle, or not set up here"
            raise DisconnectionError(message)
        if idle_since is None or time.monotonic() - idle_since < PING_AFTER_IDLE:
            return
        try:
            cut = functools.partial(self.driver.cut_off, raw)
            ping = greenlet_spawn(self.dialect.do_ping, dbapi)
            await_only(bounded(ping, PING_SECONDS, cut=cut))
        except (self.dialect.loaded_dbapi.Error, TimeoutError) as error:
            message = "the connection did not answer after a time of idleness"
            raise DisconnectionError(message) from error

    def on_reset(self, dbapi: DBAPI, entry: Entry, state: pool.PoolResetState) -> None:
        """Send ROLLBACK where needed; SQLAlchemy does not after a failed COMMIT."""
        info = entry.info
        info[IDLE_SINCE] = time.monotonic()
        raw = raw_of(dbapi)
        writable = self.read_only and self.driver.reports_writable(raw)
        if info.pop(SETTINGS_CHANGED, False) or writable:
            entry.invalidate(soft=True)  # replaced before anybody else gets it
        if state.terminate_only or not state.asyncio_safe:
            return
        lock: Any = getattr(dbapi, "_execute_mutex", known.NO_LOCK)
        is_open = info.pop(ERROR_SEEN, False) or self.driver.in_transaction(raw)
        # Busy: a statement is in flight, or waits for one that was.
        is_busy = lock._locked or lock._waiters or self.driver.is_busy(raw)  # noqa: SLF001
        if is_open and not is_busy:
            dbapi.rollback()
            if self.read_only and self.driver.in_transaction(raw):
                # A BEGIN that SQLAlchemy does not know of: the cursor of a stream.
                execute(dbapi, "ROLLBACK")
            is_open = self.driver.is_known and self.driver.in_transaction(raw)
            is_busy = lock._locked or lock._waiters or self.driver.is_busy(raw)  # noqa: SLF001
        if (is_open or is_busy) and not self.is_memory:
            if is_busy:
                end_calls(self.driver, raw)
            entry.invalidate()

    def on_close(self, dbapi: DBAPI, _: object) -> None:
        """Bound the goodbye: asyncpg waits for the server to hang up."""
        with suppress(RuntimeError):  # no event loop, so nothing waits
            loop, cut = asyncio.get_running_loop(), self.driver.cut_off
            loop.call_later(CLOSE_SECONDS, cut, raw_of(dbapi))

    def on_error(self, context: Context) -> None:
        """Say what is a disconnect, tell the journal, name a refused write."""
        error = context.original_exception
        demoted = not self.read_only and failures.means(error, "demoted")
        if demoted or failures.means(error, "disconnect"):
            context.is_disconnect = True
        if self.is_memory and not isinstance(error, Exception):
            context.is_disconnect = False  # the connection is the database
        connection = context.connection
        if isinstance(error, errors.AsgiUowError):
            return  # nothing was sent
        if isinstance(connection, Connection) and not connection.invalidated:
            info, journal = connection.info, connection.journal
            info[ERROR_SEEN] = True
            foreign = not isinstance(error, self.dialect.loaded_dbapi.Error)
            if foreign and context.execution_context is not None:
                info[SETTINGS_CHANGED] = not self.is_memory
            if journal is not None:
                dbapi: Any = connection.connection.dbapi_connection
                is_harmless = known.HARMLESS.fullmatch(context.statement or "SELECT")
                if journal.ending is None and not is_harmless:
                    self._look_again(journal, dbapi, context)
                aborting = info.get(ABORTING_CODES, ())
                journal.record_error(context, raw_of(dbapi), aborting)
        if self.read_only and failures.means(error, "read_only"):
            refused = errors.ReadOnlySessionError("A statement")
            raise refused from context.sqlalchemy_exception

    def _look_again(self, journal: Journal, dbapi: Any, of: Context) -> None:
        """Learn whether a statement that failed, such as CALL, has ended it all."""
        driver, raw, error = self.driver, raw_of(dbapi), of.original_exception
        if of.is_disconnect:
            journal.ended_unseen = not failures.means(error, "demoted")
        elif driver.errors_hide_state and not driver.aborts_transaction(raw, error):
            journal.ended_unseen = True  # unless the server says otherwise
            execute(dbapi, self.database.QUESTION_BEFORE_COMMIT or "")
            journal.ended_unseen = False
            journal.look(dbapi)


def _check_statement(cursor: Any, statement: str, *context: object) -> None:
    # The context comes last, with parameters before it or without.
    connection = getattr(context[-1], "root_connection", None)
    if isinstance(connection, Connection):
        driver = connection._execution_options[POLICY].driver  # noqa: SLF001
        # By whatever it is sent: the ORM loads objects by itself.
        last = driver.exclusive_streams and driver.last_result(raw_of(cursor))
        if last and last.unbuffered_active:
            operation = "A statement"
            raise errors.ConcurrentUseError(operation, "a stream() is still being read")
        connection.check_statement(statement)
