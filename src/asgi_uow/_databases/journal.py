"""The error journal: what the database has said against a transaction.

A driver that reports COMMIT as successful does not mean that the work was kept.
PostgreSQL answers COMMIT with ROLLBACK once a statement has failed, and MySQL has
rolled everything back after a deadlock and commits only what came later. Both said so
before; the journal remembers it. It costs no statement.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, TypeVar

from sqlalchemy import event

from asgi_uow._databases import driver_errors as _driver_errors
from asgi_uow._databases import known
from asgi_uow._unit.hooks import Hooks
from asgi_uow.errors import ManagedTransactionError, TransactionGoneError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection
    from sqlalchemy.engine import Engine
    from sqlalchemy.engine.interfaces import ExceptionContext

    from asgi_uow._databases.known import Driver

T = TypeVar("T", bound=BaseException)

ROLLBACK_ON_TIMEOUT = "asgi_uow.rollback_on_timeout"
"""The key in a MySQL connection's info: does 1205 roll everything back there?"""

JOURNAL = "asgi_uow.journal"
"""The key in a connection's info under which its session's journal is found."""


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """An error that gave up the work done at savepoint depth `depth` and deeper."""

    error: BaseException
    depth: int


class Journal:
    """What went wrong on the connection of one write session."""

    def __init__(
        self,
        is_ending: Callable[[], bool] = lambda: True,
        hooks: Hooks | None = None,
    ) -> None:
        """Start with a clean sheet; `is_ending`: does the unit itself end it now?

        `hooks` follow the savepoints of the connection, also of those that no
        session has opened.
        """
        self._is_ending = is_ending
        self._hooks = Hooks() if hooks is None else hooks
        self.last: BaseException | None = None
        self.committed_by: str | None = None
        """The statement for which MySQL committed on its own, if it did."""
        self._entries: list[Entry] = []
        self._savepoints: list[str] = []
        self._opened = 0
        self._ddl: str | None = None

    @property
    def doomed_by(self) -> BaseException | None:
        """The first error for which work was given up that nobody has undone since."""
        return self._entries[0].error if self._entries else None

    def note(self, context: ExceptionContext, driver: Driver, raw: object) -> None:
        """Note an error, and what it has given up."""
        error = context.original_exception
        self.last = context.sqlalchemy_exception or error
        if context.is_disconnect or self._rolled_back_on_timeout(context):
            self.give_up(self.last)
        elif driver.aborts_transaction(raw, error):
            depth = len(self._savepoints) if driver.savepoints_survive else 0
            self._entries.append(Entry(self.last, depth))
        if _driver_errors.code_of(error) in known.codes("syntax"):
            self._ddl = None
        self.executed()

    def _rolled_back_on_timeout(self, context: ExceptionContext) -> bool:
        code = _driver_errors.code_of(context.original_exception)
        connection = context.connection
        return (
            code in known.codes("lock_timeout")
            and connection is not None
            and bool(connection.info.get(ROLLBACK_ON_TIMEOUT))
        )

    def commit(self) -> None:
        """Refuse a COMMIT of work that is given up, or that is not the unit's.

        Called by SQLAlchemy just before COMMIT is sent, whoever wants it.
        """
        if not self._is_ending():
            operation = "connection.commit()"
            raise self.give_up(ManagedTransactionError(operation))
        if self._entries:
            raise TransactionGoneError from self.doomed_by

    def give_up(self, error: T) -> T:
        """Note that nothing of the transaction may be kept, because of `error`."""
        self._entries.append(Entry(error, depth=0))
        return error

    def rollback(self) -> None:
        """Note a ROLLBACK that is not the unit's: a failed flush, or one by hand."""
        if not self._is_ending():
            operation = "connection.rollback()"
            self.give_up(self.last or ManagedTransactionError(operation))

    def savepoint(self) -> None:
        """Note a SAVEPOINT; SQLAlchemy numbers them per connection."""
        self._opened += 1
        name = f"sa_savepoint_{self._opened}"
        self._savepoints.append(name)
        self._hooks.open((self, name))

    def leave_savepoint(self, name: str, *, undone: bool) -> None:
        """Note RELEASE, or ROLLBACK TO, which undoes what was given up inside."""
        if name in self._savepoints:
            depth = self._savepoints.index(name)
            for left in reversed(self._savepoints[depth:]):
                if undone:
                    self._hooks.undo((self, left), owner=self)
                else:
                    self._hooks.keep((self, left))
            del self._savepoints[depth:]
            if undone:
                self._entries = [each for each in self._entries if each.depth <= depth]

    def executing(self, statement: str, *, in_transaction: bool, mysql: bool) -> None:
        """Refuse what would end the transaction; note DDL, for which MySQL commits."""
        if self._is_ending():
            return
        if not in_transaction and not mysql and self._entries:
            raise TransactionGoneError from self.doomed_by
        kind = known.kind_of(statement)
        if kind is known.Kind.TRANSACTION_CONTROL:
            operation = f"{statement!r}"
            raise ManagedTransactionError(operation)
        if mysql and in_transaction and kind is known.Kind.IMPLICIT_COMMIT:
            self._ddl = statement

    def executed(self) -> None:
        """Note that the DDL was run; MySQL has committed even if it failed."""
        self.committed_by = self.committed_by or self._ddl
        self._ddl = None


def attach(connection: Connection, journal: Journal) -> None:
    """Have the errors of `connection` noted until it goes back to its pool."""
    connection.info[JOURNAL] = journal


def listen(engine: Engine) -> None:
    """Write the journals of the connections of a writer engine."""
    writer = _Writer(engine)
    event.listen(engine, "handle_error", writer.on_error)
    event.listen(engine, "commit", writer.on_commit)
    event.listen(engine, "rollback", writer.on_rollback)
    event.listen(engine, "savepoint", writer.on_savepoint)
    event.listen(engine, "release_savepoint", writer.on_release)
    event.listen(engine, "rollback_savepoint", writer.on_rollback_to)
    event.listen(engine, "before_cursor_execute", writer.on_execute)
    if writer.is_mysql:
        event.listen(engine, "after_cursor_execute", writer.on_executed)


class _Writer:
    """Hands SQLAlchemy's events to the journal of the connection they are about."""

    def __init__(self, engine: Engine) -> None:
        self.driver = known.driver_of(engine.dialect)
        self.is_mysql = engine.dialect.name in {"mysql", "mariadb"}

    def on_error(self, context: ExceptionContext) -> None:
        journal, raw = _find(context.connection)
        if raw is not None:
            journal.note(context, self.driver, raw)

    def on_commit(self, connection: Connection) -> None:
        _find(connection)[0].commit()

    def on_rollback(self, connection: Connection) -> None:
        _find(connection)[0].rollback()

    def on_savepoint(self, connection: Connection, _: str | None) -> None:
        _find(connection)[0].savepoint()

    def on_release(self, connection: Connection, name: str, _: object) -> None:
        _find(connection)[0].leave_savepoint(name, undone=False)

    def on_rollback_to(self, connection: Connection, name: str, _: object) -> None:
        _find(connection)[0].leave_savepoint(name, undone=True)

    def on_execute(
        self, connection: Connection, _cursor: object, statement: str, *_: object
    ) -> None:
        journal, raw = _find(connection)
        is_open = self.driver.in_transaction(raw)
        journal.executing(statement, in_transaction=is_open, mysql=self.is_mysql)

    def on_executed(self, connection: Connection, *_: object) -> None:
        _find(connection)[0].executed()


def _find(connection: Connection | None) -> tuple[Journal, object]:
    """Give the journal of a connection and the driver's connection, if it has one.

    A connection that no unit of work uses gets a journal that nobody reads.
    """
    if connection is None or connection.closed or connection.invalidated:
        return Journal(), None
    journal: Journal = connection.info.get(JOURNAL) or Journal()
    return journal, connection.connection.driver_connection
