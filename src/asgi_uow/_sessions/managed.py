"""The synchronous sessions underneath: what they refuse, whoever calls."""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING, Any

from sqlalchemy import event, orm
from sqlalchemy.engine import CursorResult, IteratorResult
from sqlalchemy.ext.asyncio import async_session
from sqlalchemy.util import await_only

from asgi_uow import errors
from asgi_uow._databases.connection import (
    Connection,
    ReaderConnection,
    close_for_good,
    info_of,
    raw_of,
)
from asgi_uow._databases.driver_errors import is_outage, means
from asgi_uow._databases.journal import Savepoints
from asgi_uow._databases.known import OWN_STATEMENT, driver_of
from asgi_uow._databases.pool import AUTOCOMMIT, CANCEL_SQL
from asgi_uow._decision import NEW, WRITABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import sqlalchemy as sa

    from asgi_uow._concurrency import TaskLock
    from asgi_uow._databases.engines import Engines
    from asgi_uow._databases.journal import Journal
    from asgi_uow._decision import State
    from asgi_uow._sessions.deadline import Deadline
    from asgi_uow._sessions.record import Access, Record, Recorder
    from asgi_uow.observers import Event


class Shared:
    """What the sessions of a unit of work have in common, also with units around it."""

    def __init__(self, around: Shared | None, *, nested: bool, hook: bool) -> None:
        self.state: State = NEW
        self.recorder: Recorder | None = None  # if somebody asks for what went well
        self.outages: list[Exception] = []  # it may help to try again
        self.events: list[Event] = around.events if around and hook else []
        """What observers are told at the end; of a hook, with those of its unit."""
        self.deadline: Deadline | None = None
        self.stuck: int = 0  # how often a server did not answer in time at the end
        self.savepoints: Savepoints
        self.savepoints = around.savepoints if around and nested else Savepoints()
        self.writers: list[ManagedSession] = around.writers if around else []
        self.committed: set[Engines] = around.committed if around else set()
        """The databases in which something was committed, or may have been."""
        self.kept: list[int] = around.kept if around else [0]
        """How much of what no rollback undoes: commits, and hooks called for them."""

    def may_repeat(self, error: BaseException | None) -> bool:
        """Tell whether to try again may help; no unit of the request kept anything."""
        if error is None or self.committed:
            return False
        return is_outage(error, self.outages) or means(error, "conflict")

    def has_written(self, db: Engines) -> bool:
        """Tell whether reads of `db` must see what a unit among these has written."""
        return db in self.committed or any(
            each.database is db and bool(each.connections and not each.journal.entries)
            for each in self.writers
        )


class ManagedSession(orm.Session):
    """Only the unit of work may end it, also through `run_sync` and `sync_session`."""

    database: Engines
    shared: Shared
    journal: Journal
    lock: TaskLock
    connections: dict[sa.Connection, str | None]
    """Those on which it has begun a transaction, and what cancels a statement there."""
    access: Access = "write"
    record: Record | None = None  # of what it does, if somebody asks for that
    driver_exposed: bool = False  # has somebody been given the driver's connection?
    cursors: Sequence[Any] = ()  # on the server, of a read session
    follows_savepoints: bool = False
    beginning: asyncio.Task[object] | None = None  # in which `on_begin` is awaited

    def begin(self, nested: bool = False) -> orm.SessionTransaction:  # noqa: FBT001, FBT002
        """Open a SAVEPOINT; a transaction is the unit's to begin."""
        if not nested:
            operation = "session.begin()"
            raise errors.ManagedTransactionError(operation)
        if not self.follows_savepoints:
            # Not for every session: listeners cost all that open no savepoint too.
            self.follows_savepoints = True
            event.listen(self, "after_commit", _release_savepoint, insert=True)
            event.listen(self, "after_transaction_end", _end_savepoint)
        transaction = super().begin(nested=True)
        self.journal.savepoints.open(transaction)
        return transaction

    def connection(self, *args: Any, **kwargs: Any) -> sa.Connection:
        self.driver_exposed = True
        connection = super().connection(*args, **kwargs)
        connection.is_kept = True  # type: ignore[attr-defined]  # ours: see below
        if connection.get_transaction() and not isinstance(self, ReadOnlySession):
            # What follows past the session is seen by nobody, and asyncpg's BEGIN comes
            # with the first statement of SQLAlchemy alone.
            facts = self.database.facts
            question = None if facts.IMPLICIT_COMMIT else facts.QUESTION_BEFORE_COMMIT
            if question is not None and not self.journal.executed:
                connection.exec_driver_sql(question, execution_options=OWN_STATEMENT)
            self.journal.look(connection.connection.dbapi_connection)
        return connection

    def detach_objects(self) -> None:
        """Leave all objects as they are loaded; a rollback would expire them."""
        innermost = self._transaction
        for each in innermost._iterate_self_and_parents() if innermost else ():  # noqa: SLF001  # no other way
            for state in tuple(each._deleted):  # noqa: SLF001
                self._update_impl(state, revert_deletion=True)
            each._deleted.clear()  # noqa: SLF001
            each._key_switches.clear()  # noqa: SLF001
        self.expunge_all()

    def release_connection(self) -> None:
        """Return it whatever needs it; objects stay loaded, unlike after a rollback."""
        try:
            if self._transaction is not None:
                self._transaction.close()
        finally:
            for each in tuple(self.connections):
                if isinstance(each, ReaderConnection) and not each.closed:
                    each.invalidate()  # a close() that failed has forgotten it
            self.connections.clear()
        if self.record is not None:
            self.record.disconnect()

    def take_cancel_sql(self) -> list[tuple[sa.Engine, str]]:
        """Give, once, what cancels statements in flight on the connections held."""
        held, self.connections = self.connections, dict.fromkeys(self.connections)
        return [
            (each.engine, statement)
            for each, statement in held.items()
            # One that was given back may be running somebody else's statement.
            if statement is not None and not each.closed
        ]

    def cut_off(self) -> None:  # so that what waits for a server fails at once
        for each in [e for e in self.connections if not (e.closed or e.invalidated)]:
            raw = raw_of(each.connection.dbapi_connection)
            driver_of(each.dialect).cut_off(raw)  # a replica may have another

    def discard(self) -> None:
        """Close the connections for good, also under a statement in flight."""
        self.journal.ending = asyncio.current_task()
        close_for_good(self.connections, self.database.driver)
        super().close()


def _only_the_unit(name: str) -> Callable[[ManagedSession], None]:
    """Give the method of SQLAlchemy's session, refused to everybody else."""
    method: Callable[[orm.Session], None] = getattr(orm.Session, name)
    operation = f"session.{name}()"

    @functools.wraps(method)
    def call(self: ManagedSession) -> None:
        if self.journal.ending is not None:
            method(self)
        elif name == "commit" and self.database.commit_flushes:
            self.flush()
        else:
            raise errors.ManagedTransactionError(operation)

    return call


for _name in ("commit", "prepare", "rollback", "close", "invalidate", "reset"):
    setattr(ManagedSession, _name, _only_the_unit(_name))


class ReadOnlySession(ManagedSession):
    """Refuses to flush and to run DML; text that writes is the database's to refuse."""

    access: Access = "read"
    sibling: ManagedSession | None = None  # the write session of the unit
    executing: int = 0  # statements: of several tasks, or one for the rows of another

    @property
    def writer(self) -> ManagedSession | None:
        """The write session while reads belong into its transaction: used and whole."""
        sibling = self.sibling
        if sibling is None or sibling.shared.state not in WRITABLE:
            return None
        joins = sibling.connections and not sibling.journal.entries
        return sibling if joins or self.database.is_memory else None

    def get_bind(self, *args: Any, **kwargs: Any) -> sa.Engine | sa.Connection:
        """Read from the writer's transaction once the unit has used it."""
        if (host := self.writer) is not None:
            # Its own `connection()` refuses after a failed flush.
            found = next(iter(host.connections), None) or orm.Session.connection(host)
            if host.journal.entries:
                found.rollback()  # in memory SQLAlchemy may still see a transaction
            return found
        return super().get_bind(*args, **kwargs)

    def _execute_internal(self, statement: Any, *args: Any, **kwargs: Any) -> Any:
        # Behind execute(), scalar() and scalars(), and behind what loads an attribute.
        if getattr(statement, "is_dml", False):
            raise errors.ReadOnlySessionError(str(statement.__visit_name__).upper())
        # Nor wait in a call of the writer, for which whoever has the lock may wait.
        owners = self.lock.owner, self.sibling and self.sibling.lock.owner
        if asyncio.current_task() not in owners and (above := async_session(self)):
            # An attribute takes its turn, and may be cancelled, as a call does.
            again = functools.partial(self._execute_internal, statement, *args)
            return await_only(above.run_sync(lambda _: again(**kwargs)))
        self.executing += 1
        try:
            result = super()._execute_internal(statement, *args, **kwargs)
        except BaseException as error:
            self.executing -= 1
            if isinstance(error, Exception):  # one that was cancelled is in flight
                used = dict(self.connections)
                self.give_back()
                self.connections.update(used)  # failed() asks whether it was connecting
            raise
        self.executing -= 1
        cursor = result.raw if isinstance(result, IteratorResult) else result
        if isinstance(cursor, CursorResult) and cursor.context._is_server_side:  # noqa: SLF001  # no other way
            self.cursors: Sequence[Any] = [*self.cursors, cursor]
        self.give_back()
        return result

    def give_back(self, *, lend: bool = False) -> None:
        """Return the connection, unless something needs it after a call."""
        self.cursors = [each for each in self.cursors if not each._soft_closed]  # noqa: SLF001
        kept = (each for each in self.connections if getattr(each, "is_kept", False))
        is_kept = self.database.read_isolation or any(not each.closed for each in kept)
        is_in_use = self.executing or self.cursors or self._nested_transaction
        if not (is_in_use or self.beginning or (is_kept and not lend)):
            self.release_connection()


@event.listens_for(ManagedSession, "after_begin", propagate=True)
def _accept_connection(
    session: ManagedSession, _: orm.SessionTransaction, connection: sa.Connection
) -> None:
    if connection in session.connections:
        return
    info = info_of(connection)
    session.connections[connection] = info.get(CANCEL_SQL)
    if (deadline := session.shared.deadline) is not None:
        connection.deadline = deadline  # type: ignore[attr-defined]
    reader = session if isinstance(session, ReadOnlySession) else None
    host = (reader and reader.writer) or session
    if session.record is not None and host is session:
        connection.record = session.record.begin()  # type: ignore[attr-defined]
    # A read may have moved to another server, or to the writer, while it connected.
    is_read_only = isinstance(connection, ReaderConnection) and reader is not None
    if not is_read_only and connection.engine is not host.bind:
        message = "A session works on one engine: leave `binds` and bind_arguments out."
        raise errors.ConfigurationError(message)
    if reader is not None or not isinstance(connection, Connection):
        return
    options = connection._execution_options  # noqa: SLF001  # also its engine's
    if info.get(AUTOCOMMIT) or (AUTOCOMMIT in info and "isolation_level" in options):
        raw = connection.connection.dbapi_connection
        if raw and connection.dialect.detect_autocommit_setting(raw):
            message = "Leave AUTOCOMMIT out of engine and options: it has no rollback."
            raise errors.ConfigurationError(message)
    connection.journal = session.journal


def _release_savepoint(session: ManagedSession) -> None:
    # SQLAlchemy calls it for COMMIT too.
    if (savepoint := session.get_nested_transaction()) is not None:
        session.journal.savepoints.release(savepoint)


def _end_savepoint(session: ManagedSession, ended: orm.SessionTransaction) -> None:
    # A savepoint whose RELEASE was seen has been released already.
    if ended.nested:
        session.journal.savepoints.roll_back(ended, by=session.journal)


@event.listens_for(ManagedSession, "after_rollback", propagate=True)
def _keep_loaded(session: ManagedSession) -> None:
    # After a failed flush SQLAlchemy rolls back by itself, and expires what it can.
    if not session.in_nested_transaction():
        session.detach_objects()


@event.listens_for(ReadOnlySession, "before_flush", propagate=True)
def _refuse_flush(*_: object) -> None:
    operation = "A flush"
    raise errors.ReadOnlySessionError(operation)
