"""The synchronous sessions underneath: what they refuse, whoever calls."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from sqlalchemy import event, orm

from asgi_uow._databases import journal as _journal
from asgi_uow.errors import (
    ConfigurationError,
    ManagedTransactionError,
    ReadOnlySessionError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection
    from sqlalchemy.engine import Engine
    from sqlalchemy.orm import ORMExecuteState, SessionTransaction

    from asgi_uow._databases.journal import Journal
    from asgi_uow._sessions.kills import Kills
    from asgi_uow._unit.hooks import Hooks


class ManagedSession(orm.Session):
    """Refuses to be ended by hand, also through `run_sync` and `sync_session`."""

    read_only = False

    finisher: asyncio.Task[object] | None = None
    """The task of the unit of work that ends this session."""

    committed = False
    """Whether the database has acknowledged the COMMIT of the whole transaction."""

    connected: float | None = None
    """Since when it holds a connection of its own, by `time.perf_counter()`."""

    held: float = 0.0
    """Seconds for which it has held those that it has given back."""

    connections: list[Connection]
    """The connections on which this session has begun a transaction."""

    kills: Kills
    """What stops a statement in flight on each of those connections."""

    journal: Journal
    """What the database has said against the transaction."""

    hooks: Hooks
    """The hooks of the unit, which follow its savepoints."""

    exposed: bool = False
    """Whether somebody was given the connection, and with it the driver's own."""

    def is_ending(self) -> bool:
        """Tell whether the current task is the one that ends this session."""
        return self.finisher is not None and self.finisher is asyncio.current_task()

    def _only_the_unit(self, operation: str) -> None:
        if not self.is_ending():
            raise ManagedTransactionError(operation)

    def begin(self, nested: bool = False) -> SessionTransaction:  # noqa: FBT001, FBT002
        """Open a SAVEPOINT; a transaction is the unit's to begin."""
        if not nested:
            operation = "session.begin()"
            raise ManagedTransactionError(operation)
        return super().begin(nested=True)

    def commit(self) -> None:
        """Commit, if the unit of work says so."""
        self._only_the_unit("session.commit()")
        super().commit()

    def prepare(self) -> None:
        """Prepare a two-phase commit, if the unit of work says so."""
        self._only_the_unit("session.prepare()")
        super().prepare()

    def rollback(self) -> None:
        """Roll back, if the unit of work says so."""
        self._only_the_unit("session.rollback()")
        super().rollback()

    def close(self) -> None:
        """Close, if the unit of work says so."""
        self._only_the_unit("session.close()")
        super().close()

    def connection(self, *args: Any, **kwargs: Any) -> Connection:
        """Give the connection; what its driver is asked for is not seen from here."""
        self.exposed = True
        return super().connection(*args, **kwargs)

    def own_connection(self) -> Connection:
        """Give the connection to asgi-uow itself."""
        return super().connection()

    def joined(self) -> Connection | None:
        """Give the connection of another session that this one uses, if it does."""
        return None

    def reset(self) -> None:
        """Refuse."""
        operation = "session.reset()"
        raise ManagedTransactionError(operation)

    def invalidate(self) -> None:
        """Invalidate the connection, if the unit of work says so."""
        self._only_the_unit("session.invalidate()")
        super().invalidate()


class ReadOnlySession(ManagedSession):
    """The synchronous read session: refuses to flush and to run DML.

    Text that writes is refused by the database, whose read engine is read-only.
    """

    read_only = True

    find_joined: Callable[[], Connection | None]
    """Gives the writer's connection once the reads of the unit belong there."""

    def joined(self) -> Connection | None:
        """Give the writer's connection once this session reads there."""
        return self.find_joined()

    def get_bind(self, *args: object, **kwargs: object) -> Engine | Connection:
        """Read from the writer's transaction once the unit has used it."""
        connection = self.joined()
        if connection is not None:
            return connection
        return super().get_bind(*args, **kwargs)  # type: ignore[arg-type]


@event.listens_for(ManagedSession, "after_begin", propagate=True)
def _remember_connection(
    session: ManagedSession,
    transaction: SessionTransaction,  # noqa: ARG001
    connection: Connection,
) -> None:
    if connection not in session.connections:
        session.connections.append(connection)
        if session.connected is None and session.joined() is None:
            session.connected = time.perf_counter()
        session.kills.add(connection)
        if not isinstance(session, ReadOnlySession):
            _refuse_autocommit(connection)
            _journal.attach(connection, session.journal)


def _refuse_autocommit(connection: Connection) -> None:
    # SQLite's driver looks like AUTOCOMMIT always; there BEGIN is sent by hand.
    raw = connection.connection.dbapi_connection
    dialect = connection.dialect
    if dialect.name != "sqlite" and raw and dialect.detect_autocommit_setting(raw):
        message = (
            "The engine, or the execution options of the connection, say AUTOCOMMIT: "
            "nothing could be rolled back. Leave the isolation level out."
        )
        raise ConfigurationError(message)


@event.listens_for(ManagedSession, "after_commit", propagate=True, insert=True)
def _note_commit(session: ManagedSession) -> None:
    # First of the listeners: one of the application's that raises undoes no COMMIT.
    # SQLAlchemy calls them for the RELEASE of a savepoint too.
    savepoint = session.get_nested_transaction()
    if savepoint is None:
        session.committed = True
    else:
        session.hooks.keep(savepoint)


@event.listens_for(ManagedSession, "after_transaction_create", propagate=True)
def _open_savepoint(session: ManagedSession, transaction: SessionTransaction) -> None:
    if transaction.nested:
        session.hooks.open(transaction)


@event.listens_for(ManagedSession, "after_transaction_end", propagate=True)
def _end_savepoint(session: ManagedSession, transaction: SessionTransaction) -> None:
    # A savepoint whose RELEASE was seen has been kept already; any other is gone.
    if transaction.nested:
        session.hooks.undo(transaction, owner=session.journal)


@event.listens_for(ReadOnlySession, "before_flush", propagate=True)
def _refuse_flush(*_: object) -> None:
    operation = "A flush"
    raise ReadOnlySessionError(operation)


@event.listens_for(ReadOnlySession, "do_orm_execute", propagate=True)
def _refuse_dml(state: ORMExecuteState) -> None:
    if state.is_insert or state.is_update or state.is_delete:
        operation = str(getattr(state.statement, "__visit_name__", "DML")).upper()
        raise ReadOnlySessionError(operation)
