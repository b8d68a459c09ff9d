"""Pooled connections of every engine, also of one that was passed in."""

from __future__ import annotations

import asyncio
import functools
import time
from contextlib import suppress
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.util import await_only, greenlet_spawn

from asgi_uow import errors
from asgi_uow._concurrency import bounded, run_to_completion
from asgi_uow._databases import driver_errors as failures
from asgi_uow._databases import known, loops
from asgi_uow._databases.connection import (
    ERROR_SEEN,
    POLICY,
    SETTINGS_CHANGED,
    Connection,
    ReaderConnection,
    check_statement,
    end_calls,
    execute,
    raw_of,
)
from asgi_uow._databases.nodes import NODE, Nodes
from asgi_uow._databases.pool_entry import PoolEntry

if TYPE_CHECKING:
    from sqlalchemy import pool
    from sqlalchemy.engine import interfaces
    from sqlalchemy.ext.asyncio import AsyncEngine

    from asgi_uow._databases.journal import Journal

    DBAPI = interfaces.DBAPIConnection
    Entry = pool.ConnectionPoolEntry
    Context = interfaces.ExceptionContext

ABORTING_CODES = "asgi_uow.aborting_codes"
AUTOCOMMIT = "asgi_uow.autocommit"
CANCEL_SQL = "asgi_uow.cancel_sql"
KEEPS_STATEMENTS = "asgi_uow.keeps_statements"
READ_ONLY_SESSION = "asgi_uow.read_only_session"
IDLE_SINCE = "asgi_uow.idle_since"

POOLER_FOUND = (
    "A pooler such as PgBouncer loses the statements that this driver prepares. Pass "
    'pooler="transaction" to Database.from_url(), connect_args=dict({}) to an engine.'
)
PING_AFTER_IDLE = 30.0  # seconds; then a connection is pinged before it is handed out
CLOSE_SECONDS = 2.0  # what SQLAlchemy gives asyncpg where it terminates a connection
PING_SECONDS = 3.0  # a new connection is made sooner than a slower answer comes


class Use(NamedTuple):
    """What an engine is used for."""

    read_only: bool
    level: Literal["READ COMMITTED", "REPEATABLE READ"] | None = None  # in transactions
    pooler: Literal["transaction", "session"] | None = None


def attach_listeners(engine: AsyncEngine, use: Use) -> None:
    """Look after the connections of an engine, once; refuse another use of it."""
    target = engine.sync_engine
    root: Any = loops.attach(target)
    if root.use not in (None, use):
        message = (
            "Another Database uses this engine as a writer or a reader, or with "
            "other options for reads: make an engine for each use."
        )
        raise errors.ConfigurationError(message)
    root.use = use
    if issubclass(target._connection_cls, Connection):  # noqa: SLF001
        return
    policy = _Policy(root.like, target, use)
    # Not events of the engine: one listener there costs each statement 50 calls.
    target._connection_cls = ReaderConnection if use.read_only else Connection  # noqa: SLF001
    target.update_execution_options(**{POLICY: policy})
    for each in (root.like, *root.pools.values()):
        each._creator = policy.connect  # noqa: SLF001  # outlives its pool
        if use.read_only:
            # In AUTOCOMMIT there is nothing to roll back; a listener looks if there is.
            each._reset_on_return = sa.pool.reset_none  # noqa: SLF001
    if check_statement in target.dialect.dispatch.do_execute:
        return  # they are those of the engine that this one is derived from
    event.listen(target, "do_connect", policy.on_do_connect)
    event.listen(target, "connect", policy.on_first, insert=True)
    event.listen(target, "checkout", policy.on_checkout)
    event.listen(target, "reset", policy.on_reset)
    event.listen(target, "close", policy.on_close)
    event.listen(target, "handle_error", policy.on_error)
    for name in ("do_execute", "do_executemany", "do_execute_no_params"):
        event.listen(target, name, check_statement)


class _Policy:
    """What is done with the connections of one engine, mostly by asking the driver.

    Engines with one dialect share listeners; a connection's `info` has its own policy.
    """

    def __init__(self, pool: Any, engine: sa.Engine, use: Use) -> None:
        self.creator, self.engine = pool._invoke_creator, engine  # noqa: SLF001
        self.dialect: Any = engine.dialect  # of which PostgreSQL's does more
        self.database = known.database_of(engine.dialect)
        self.driver = known.driver_of(engine.dialect)
        self.is_memory = known.is_memory(engine.url)
        # An engine that is derived from this one connects through it.
        self.nodes: Nodes | None = getattr(engine, "nodes", None)
        self.use, self.read_only = use, use.read_only
        self.pooler = use.pooler or self.database.POOLER
        self.begins_with = self.database.BEGIN_WRITE
        if use.read_only and self.begins_with is not None:
            # A snapshot of what the first read finds; in WAL that stops no writer.
            self.begins_with = use.level and "BEGIN"
        elif use.read_only and use.pooler == "transaction":
            self.begins_with = self.database.BEGIN_READ_ONLY
            event.listen(engine, "after_cursor_execute", self.after_read)

    def on_do_connect(self, _: Any, entry: Any, args: Any, options: Any) -> None:
        """Bound the wait, or connect in place of the driver; the engine's own wins."""
        if NODE in entry.info and self.nodes:
            self.nodes.direct(entry, args, options)
        kept = (options.get(name, True) for name, _ in self.driver.pooled_args)
        entry.info[KEEPS_STATEMENTS] = any(each and not callable(each) for each in kept)
        pooled = self.driver.pooled_args if self.pooler == "transaction" else ()
        options.update(dict((*self.driver.connect_args, *pooled)) | options)
        if isinstance(name := options.get("async_creator_fn"), str):
            options["async_creator_fn"] = resolve_name(name)

    def connect(self, rec: Any) -> DBAPI:  # as SQLAlchemy names it
        """Connect, and say whose connection it is."""
        create, rec.__class__ = self.creator, PoolEntry
        dbapi: DBAPI = self.nodes.connect(create, rec) if self.nodes else create(rec)
        rec.info[POLICY] = self  # what it was derived from has said the same
        return dbapi

    def on_first(self, dbapi: DBAPI, entry: Entry) -> None:
        """Find a pooler, before anything is set that it would hand on to others."""
        policy: _Policy = entry.info[POLICY]
        raw = raw_of(dbapi)
        loops.own(raw, self.driver, policy.engine if self.is_memory else None)
        if policy.pooler is None and await_only(self.driver.is_pooled(raw)):
            if entry.info.get(KEEPS_STATEMENTS):  # not known of a creator's own
                self.dialect.do_close(dbapi)
                message = POOLER_FOUND.format(self.driver.pooled_args)
                raise errors.ConfigurationError(message)
            policy.pooler = "transaction"
            if policy.read_only:
                listening = policy.engine, "after_cursor_execute", policy.after_read
                event.listen(*listening)

    def after_read(self, connection: sa.Connection, *_: object) -> None:
        # No text tells: a string of several statements, or a procedure, may commit.
        if not self.driver.in_transaction(connection.connection.driver_connection):
            connection.invalidate()
            raise errors.TransactionGoneError

    def set_up(self, dbapi: DBAPI, info: dict[Any, Any]) -> None:
        """Set up a connection, after all listeners: nothing set by them survives."""
        database = self.database
        if self.driver.in_transaction(raw_of(dbapi)):
            self.dialect.do_commit(dbapi)  # what a listener has set in it is to last
        info[ABORTING_CODES] = database.set_up(dbapi, read_only=self.read_only)
        if self.read_only and self.pooler != "transaction":
            info[READ_ONLY_SESSION] = True
            self.dialect.set_isolation_level(dbapi, "AUTOCOMMIT")
            execute(dbapi, database.READ_ONLY_STATEMENT)
            if self.use.level is not None and database.BEGIN_WRITE is None:
                self.dialect.set_isolation_level(dbapi, self.use.level)
        elif self.read_only and database.BEGIN_READ_ONLY is None:
            self.dialect.set_readonly(dbapi, True)  # noqa: FBT003
            self.dialect.set_isolation_level(dbapi, self.use.level or "READ COMMITTED")
        elif not self.read_only and database.BEGIN_WRITE is None:
            info[AUTOCOMMIT] = self.dialect.detect_autocommit_setting(dbapi)
        if not (self.pooler or self.nodes):  # another server has a stranger's number
            info[CANCEL_SQL] = self.driver.cancel_sql(raw_of(dbapi))

    def on_checkout(self, dbapi: DBAPI, entry: Entry, _: object) -> None:
        """Set up a new connection; replace a dead, silent or foreign one."""
        info, raw = entry.info, raw_of(dbapi)
        idle_since: float | None = info.pop(IDLE_SINCE, None)
        is_foreign = POLICY not in info and not self.is_memory
        is_foreign = is_foreign or bool(self.nodes and self.nodes.is_left(info))
        if is_foreign or self.driver.is_dead(raw):
            message = "the connection was closed while it was idle, or not made here"
            raise DisconnectionError(message)
        if ABORTING_CODES not in info:
            policy: _Policy = info.setdefault(POLICY, self)
            policy.set_up(dbapi, info)
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
        info, raw = entry.info, raw_of(dbapi)
        info[IDLE_SINCE] = time.monotonic()
        read_only = (info[POLICY] if POLICY in info else self).read_only  # noqa: SIM401
        writable = READ_ONLY_SESSION in info and self.driver.reports_writable(raw)
        if changed := info.pop(SETTINGS_CHANGED, False) or writable:
            entry.invalidate(soft=True)  # if not below: it may hold a lock
        if state.terminate_only or not state.asyncio_safe:
            return
        lock: Any = getattr(dbapi, "_execute_mutex", known.NO_LOCK)
        is_open = info.pop(ERROR_SEEN, False) or self.driver.in_transaction(raw)
        # Busy: a statement is in flight, or waits for one that was.
        is_busy = lock._locked or lock._waiters or self.driver.is_busy(raw)  # noqa: SLF001
        if is_open and not is_busy:
            dbapi.rollback()
            if read_only and self.driver.in_transaction(raw):
                # A BEGIN that SQLAlchemy does not know of: the cursor of a stream.
                execute(dbapi, "ROLLBACK")
            is_open = self.driver.is_known and self.driver.in_transaction(raw)
            is_busy = lock._locked or lock._waiters or self.driver.is_busy(raw)  # noqa: SLF001
        if (changed or is_open or is_busy) and not self.is_memory:
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
        error, engine = context.original_exception, context.engine
        options = {} if engine is None else engine.get_execution_options()
        read_only = options.get(POLICY, self).read_only
        late = error if isinstance(error, errors.DeadlineExceededError) else None
        is_late = late is not None and late.__cause__ is not None
        context.invalidate_pool_on_disconnect &= not is_late
        demoted = not read_only and failures.means(error, "demoted")
        if self.nodes is not None:
            self.nodes.doubts += demoted  # after which all connect anew
        if is_late or demoted or failures.means(error, "disconnect"):
            context.is_disconnect = True
        if self.is_memory and (is_late or not isinstance(error, Exception)):
            context.is_disconnect = False  # the connection is the database
        connection = context.connection
        if isinstance(error, errors.AsgiUowError) and not is_late:
            context.is_disconnect = False  # nothing was sent
            return
        raw = _raw_if_open(connection)
        if raw is not None and (requests := self.driver.cancellations(raw)):
            stopping = asyncio.wait(requests, timeout=CLOSE_SECONDS)
            await_only(run_to_completion(stopping))  # SQLAlchemy cuts them off
            raw = _raw_if_open(connection)
        if isinstance(connection, Connection) and raw is not None:
            self._record(context, connection, raw)
        if read_only and failures.means(error, "read_only"):
            refused = errors.ReadOnlySessionError("A statement")
            raise refused from context.sqlalchemy_exception

    def _record(self, of: Context, connection: Connection, raw: object) -> None:
        info, journal = connection.info, connection.journal
        info[ERROR_SEEN] = True
        foreign = not isinstance(of.original_exception, self.dialect.loaded_dbapi.Error)
        if foreign and of.execution_context is not None:
            info[SETTINGS_CHANGED] = not self.is_memory
        if journal is not None:
            dbapi: Any = connection.connection.dbapi_connection
            is_harmless = known.HARMLESS.fullmatch(of.statement or "SELECT")
            if journal.ending is None and not is_harmless:
                self._look_again(journal, dbapi, of)
            journal.record_error(of, raw, info.get(ABORTING_CODES, ()))

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


def _raw_if_open(connection: sa.Connection | None) -> Any:
    if not isinstance(connection, Connection) or connection.invalidated:
        return None
    return raw_of(connection.connection.dbapi_connection)
