"""A connection of one of our engines: what is begun, sent and ended on it."""

from __future__ import annotations

import asyncio
import functools
import time
from contextlib import closing
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NoReturn

import sqlalchemy as sa
from sqlalchemy.engine.interfaces import ExecuteStyle
from sqlalchemy.exc import DBAPIError
from sqlalchemy.util import await_only

from asgi_uow import errors
from asgi_uow._databases import known, loops
from asgi_uow._databases.driver_errors import means

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sqlalchemy.engine import RootTransaction

    from asgi_uow._databases.journal import Journal

ERROR_SEEN = "asgi_uow.error_seen"
POLICY = "asgi_uow.policy"
SETTINGS_CHANGED = "asgi_uow.settings_changed"

# Execution options after which a connection is not what its pool made it.
CHANGING_OPTIONS = {"isolation_level", "postgresql_readonly", "postgresql_deferrable"}

SECONDS_TO_FAIL = 1.0  # for calls on a connection that was cut off

raw_of = attrgetter("_connection")  # the driver's, in what every async dialect makes


class Connection(sa.Connection):
    journal: Journal | None = None  # only a writer's has one
    deadline: Any = None  # until its unit ends, if that has one
    record: Any = None  # of its session, if somebody asks for what that does
    sent: float = 0.0  # when its last statement was: perf_counter()
    is_beginning: bool = False  # its settings are set anew in each transaction
    is_kept = False  # for later calls: somebody was given it, or has changed it
    _send_rollback = sa.Connection._rollback_impl  # noqa: SLF001

    def _begin_impl(self, transaction: RootTransaction) -> None:
        super()._begin_impl(transaction)
        statement = self._execution_options[POLICY].begins_with
        if statement is None:
            return
        begin = getattr(self.connection.driver_connection, "begin_with", None)
        if begin is not None:
            begin(statement)  # sent with the first statement
            return
        try:
            execute(self.connection, statement)
        except BaseException as error:  # noqa: BLE001  # raised again, wrapped
            self._handle_dbapi_exception(error, statement, None, None, None)

    @property
    def invalidated(self) -> bool:
        # Also when another task has closed it: SQLAlchemy, which asks when a statement
        # has failed, takes any other for one that it can throw away.
        return self._dbapi_connection is None or super().invalidated

    def _revalidate_connection(self) -> Any:
        if self.journal is not None and self._transaction is None:
            # Its unit has ended; nobody would close another.
            raise errors.TransactionGoneError
        return super()._revalidate_connection()

    def _handle_dbapi_exception(self, *args: Any, **kwargs: Any) -> NoReturn:
        try:
            super()._handle_dbapi_exception(*args, **kwargs)
        finally:
            # Cancelled while it closes a dead one, SQLAlchemy forgets only half of it.
            fairy = self._dbapi_connection
            if fairy is not None and fairy.dbapi_connection is None:
                self.invalidate()

    def call_alone(self, end: Callable[[], object], kind: str = "") -> None:
        """Wait until nobody's statement is in flight, call; none begins meanwhile."""
        journal = self.journal
        if kind and self.record is not None and journal is not None:
            end = functools.partial(self.record.send, kind, end)
        # Cursors hold the lock, COMMIT and ROLLBACK do not; a driver knows its own.
        dbapi: Any = self._dbapi_connection.dbapi_connection  # type: ignore[union-attr]
        lock = getattr(dbapi, "_execute_mutex", known.NO_LOCK)
        driver = self._execution_options[POLICY].driver
        if lock._locked or lock._waiters:  # noqa: SLF001
            await_only(lock.acquire())
        lock._locked = True  # where it is free without a turn of greenlets  # noqa: SLF001
        try:
            while driver.is_busy(raw_of(dbapi)):
                await_only(asyncio.sleep(0.005))
            if journal is not None and kind == "commit":
                journal.begin_commit()
            end()
        finally:
            lock.release()

    def _rollback_impl(self) -> None:
        fairy = self._dbapi_connection
        if self.journal is not None:
            self.journal.record_rollback(fairy and fairy.dbapi_connection)
        if fairy is not None and fairy.dbapi_connection is not None:
            self.call_alone(self._send_rollback, "rollback")
        if fairy is not None and fairy is self._dbapi_connection:
            fairy.info.pop(ERROR_SEEN, None)

    def check_statement(self, statement: str, parameters: object) -> None:
        """Have the journal look at what came before, and at one that is not plain."""
        journal, kind = self.journal, known.kind_of(statement)
        if kind in {"setting", "local"}:
            policy = self._execution_options[POLICY]
            all_last: bool = policy.database.SET_LOCAL_LASTS
            lasts = all_last or kind == "setting" or "False" in repr(parameters)
            # Where nothing else can be set, each transaction sets it anew.
            if lasts and not (self.is_beginning and all_last):
                self.info[SETTINGS_CHANGED] = not policy.is_memory
        if journal is None:
            return
        dbapi = self._dbapi_connection.dbapi_connection  # type: ignore[union-attr]
        if journal.ending is None:
            if journal.executed:
                journal.look(dbapi)
            if kind or journal.entries or journal.commits_last:
                journal.check_statement(statement, raw_of(dbapi))
        elif journal.ending is not asyncio.current_task():
            operation = "A statement"
            raise errors.ConcurrentUseError(operation, "the unit of work is ending")
        journal.executed = True

    def _commit_impl(self) -> None:
        self.call_alone(super()._commit_impl, "commit")
        if self.journal is not None:
            self.journal.committed = True

    def _prepare_twophase_impl(self, xid: str) -> None:
        if self.journal is not None:
            self.journal.xid = xid
        super()._prepare_twophase_impl(xid)

    def _commit_twophase_impl(self, xid: Any, is_prepared: bool) -> None:  # noqa: FBT001
        if self.journal is not None:
            self.journal.begin_commit()
        commit = functools.partial(super()._commit_twophase_impl, xid, is_prepared)
        if self.record is not None:
            commit = functools.partial(self.record.send, "commit", commit)
        commit()  # a statement: it takes turns
        if self.journal is not None:
            self.journal.committed = True

    def _savepoint_impl(self, name: str | None = None) -> str:
        try:
            name = super()._savepoint_impl(name)
        except DBAPIError as error:
            if means(error, "unsupported"):
                raise errors.NoSavepointsError from error
            raise
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

    def _send_rollback(self) -> None:
        raw: Any = self._dbapi_connection.dbapi_connection  # type: ignore[union-attr]
        if not self.dialect.detect_autocommit_setting(raw):
            super()._send_rollback()
        elif self.engine._has_events:  # noqa: SLF001  # otherwise there is nothing to do
            self.dispatch.rollback(self)

    def execution_options(self, **options: Any) -> Any:
        writes = options.get("isolation_level") == "AUTOCOMMIT"
        writes = writes or not options.get("postgresql_readonly", True)
        # Behind a pooler only the transaction of each read is read-only.
        if writes and self._execution_options[POLICY].pooler == "transaction":
            operation = "AUTOCOMMIT, or postgresql_readonly=False,"
            raise errors.ReadOnlySessionError(operation)
        if not CHANGING_OPTIONS.isdisjoint(options):
            self.info[SETTINGS_CHANGED] = self.is_kept = True
        return super().execution_options(**options)

    def check_statement(self, statement: str, parameters: object) -> None:
        policy = self._execution_options[POLICY]
        if policy.pooler == "transaction":
            kind = known.kind_of(statement)
            commits = kind == "implicit_commit" and policy.database.IMPLICIT_COMMIT
            if commits or kind == "transaction_control":
                operation = "What ends a read-only transaction"
                raise errors.ReadOnlySessionError(operation)
        # One of them may be what makes the connection read-only.
        if self.is_beginning:
            super().check_statement(statement, parameters)
        elif known.changes_settings(statement):
            self.info[SETTINGS_CHANGED] = self.is_kept = True


def info_of(connection: sa.Connection) -> dict[Any, Any]:
    """Give the pool's info of a connection; the public way makes five calls."""
    entry = connection._dbapi_connection._connection_record  # type: ignore[union-attr]  # noqa: SLF001
    return connection.info if entry is None else entry.info


def end_calls(driver: known.Driver, raw: Any) -> None:
    """Cut a connection off, and let what is in flight on it fail before it is closed.

    libpq frees what a call of psycopg still reads, and the process would crash.
    """
    driver.cut_off(raw)
    until = time.monotonic() + SECONDS_TO_FAIL
    while driver.is_busy(raw) and time.monotonic() < until:
        await_only(asyncio.sleep(0.005))


def close_for_good(connections: Iterable[sa.Connection], driver: known.Driver) -> None:
    """Close connections that a close() which failed may have forgotten."""
    for connection in connections:
        if not connection.closed:
            if not connection.invalidated:
                fairy: Any = connection.connection
                raw = raw_of(fairy.dbapi_connection)
                if not loops.leave(raw, fairy._connection_record):  # noqa: SLF001
                    end_calls(driver, raw)
            connection.invalidate()
            connection.close()


def execute(connection: Any, statement: str) -> None:
    """Send a statement of our own past the journal."""
    with closing(connection.cursor()) as cursor:
        cursor.execute(statement)


def check_statement(cursor: Any, statement: str, *rest: Any) -> bool | None:
    """Look at a statement before it is sent, and send it in time."""
    # The context comes last, with parameters before it or without.
    connection = getattr(rest[-1], "root_connection", None)
    if isinstance(connection, Connection):
        driver = connection._execution_options[POLICY].driver  # noqa: SLF001
        # By whatever it is sent: the ORM loads objects by itself.
        last = driver.exclusive_streams and driver.last_result(raw_of(cursor))
        if last and last.unbuffered_active:
            operation = "A statement"
            raise errors.ConcurrentUseError(operation, "a stream() is still being read")
        connection.check_statement(statement, rest[0])
        connection.sent = time.perf_counter()
        if connection.deadline is not None or connection.record is not None:
            _send(connection, cursor, statement, *rest)
            return True  # SQLAlchemy has nothing left to do
    return None


def _pass_on(dialect: Any, name: str, *args: Any) -> None:
    listeners = [*getattr(dialect.dispatch, name)]
    later = listeners[listeners.index(check_statement) + 1 :]  # than ours
    if not any(listener(*args) for listener in later):
        getattr(dialect, name)(*args)


def _send(connection: Connection, cursor: Any, statement: str, *rest: Any) -> None:
    """Do what SQLAlchemy would, in time, and note how long it takes."""
    context, deadline, record = rest[-1], connection.deadline, connection.record
    name = "do_execute" if rest[1:] else "do_execute_no_params"
    if context.execute_style is ExecuteStyle.EXECUTEMANY:
        name = "do_executemany"
    send = functools.partial(_pass_on, context.dialect, name, cursor, statement, *rest)
    if deadline is not None:
        send = functools.partial(deadline.execute, connection, send)
    journal = connection.journal
    is_own = known.OWN in context.execution_options or connection.is_beginning
    if record is not None and not (is_own or (journal and journal.ending)):
        send = functools.partial(record.execute, send, statement, context)
    send()
