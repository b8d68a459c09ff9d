"""The error journal: what the database has said against a transaction.

A COMMIT that a driver reports as successful may have kept nothing: PostgreSQL answers
ROLLBACK once a statement has failed, MySQL commits only what came after a deadlock.
Both said so before; the journal remembers it. It costs no statement.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from asgi_uow._databases import known
from asgi_uow._databases.driver_errors import code_of, means
from asgi_uow.errors import ManagedTransactionError, TransactionGoneError

if TYPE_CHECKING:
    from asyncio import Task
    from collections.abc import Callable, Collection, Coroutine

    from sqlalchemy.engine.interfaces import ExceptionContext

    from asgi_uow._databases.keys import Claim

    Callback: TypeAlias = Callable[[], Coroutine[object, object, None]]

T = TypeVar("T", bound=BaseException)


@dataclasses.dataclass(slots=True, eq=False)
class Frame:
    """One savepoint, as what was registered inside it sees it."""

    around: Frame | None
    undone: bool = False

    def is_undone(self) -> bool:
        return self.undone or (self.around is not None and self.around.is_undone())


class Savepoints:
    """The open savepoints of a unit of work and of those nested in it.

    RELEASE leaves what was registered inside to the savepoint around. Anything else
    undoes it, together with savepoints opened since, and makes callbacks due.
    """

    __slots__ = ("_callbacks", "due", "opened")

    def __init__(self) -> None:
        self.opened: dict[object, Frame] = {}
        self._callbacks: list[tuple[Frame, Callback]] = []
        self.due: dict[object, list[Callback]] = {}  # by the journal that saw it undone

    @property
    def innermost(self) -> Frame | None:
        return next(reversed(self.opened.values()), None)

    def open(self, key: object) -> None:
        self.opened[key] = Frame(self.innermost)

    def release(self, key: object) -> None:
        self.opened.pop(key, None)

    def roll_back(self, key: object, by: object) -> None:
        """Record any other end, seen by the journal `by`; those inside stay open."""
        if key not in self.opened:
            return
        keys = list(self.opened)
        ended, *later = keys[keys.index(key) :]
        for each in (ended, *later):
            self.opened.pop(each).undone = True
        for each in later:
            self.open(each)
        undone = [each for each in self._callbacks if each[0].is_undone()]
        self._callbacks = [each for each in self._callbacks if each not in undone]
        for _, callback in reversed(undone):
            self.due.setdefault(by, []).append(callback)

    def call_if_undone(self, frame: Frame, callback: Callback) -> None:
        self._callbacks.append((frame, callback))

    def clear(self) -> None:
        self._callbacks.clear()
        self.due.clear()


@dataclasses.dataclass(slots=True, eq=False)
class Journal:
    """What went wrong in the transaction of one write session."""

    _database: known.Database
    _driver: known.Driver
    savepoints: Savepoints
    ending: Task[object] | None = None  # in which the unit itself ends the transaction
    executed: bool = False  # whether a statement was sent
    was_open: bool = False
    ended_unseen: bool = False  # committed or not, by what nobody asked the unit for
    commit_sent: bool = False  # given to the driver: it may be carried out from now on
    xid: str | None = None  # its name on the server, once the driver was given PREPARE
    committed: bool | None = False  # whether COMMIT was acknowledged; None: in doubt
    last: BaseException | None = None
    implicit_commit: str | None = None  # the verb of what the database committed for
    kept: str | None = None  # the verb of what was kept at once, as nothing was open
    commits_last: bool = False  # whether one of the two is the last statement so far
    claim: Claim | str | None = None  # a key that it has claimed, or a mark of its end
    entries: list[tuple[BaseException, int]] = dataclasses.field(default_factory=list)
    """Errors that aborted the work done at a savepoint depth and deeper."""
    _names: list[str] = dataclasses.field(default_factory=list)

    @property
    def doomed_by(self) -> BaseException | None:
        """The first error that aborted work, unless a savepoint has undone it since."""
        return self.entries[0][0] if self.entries else None

    def doom(self, error: T) -> T:
        """Record that nothing of the transaction may be kept, because of `error`."""
        self.entries.append((error, 0))
        return error

    def look(self, dbapi: Any) -> None:
        """Ask the driver whether the transaction is still the one that was begun.

        A text does not tell: a comment, a procedure, the driver's own cursor hide what
        ends it. MySQL opens one only for what reads or writes a table.
        """
        lock = getattr(dbapi, "_execute_mutex", known.NO_LOCK)
        if lock._locked or self.entries or self.commit_sent or self.xid:  # noqa: SLF001
            return
        if self._driver.in_transaction(dbapi._connection):  # noqa: SLF001
            self.was_open = True
        elif self.implicit_commit is not None:
            self.was_open = False
        elif self.was_open or (self.executed and not self._database.IMPLICIT_COMMIT):
            self.doom(ManagedTransactionError("Something that ends the transaction"))
            self.ended_unseen = True

    def record_error(
        self, context: ExceptionContext, raw: object, aborting: Collection[int | str]
    ) -> None:
        """Record an error, and what it has aborted; see `Database.set_up`."""
        error = context.original_exception
        self.last = context.sqlalchemy_exception or error
        if context.is_disconnect or code_of(error) in aborting:
            self.doom(self.last)
        elif self._driver.aborts_transaction(raw, error):
            depth = len(self._names) if self._driver.savepoints_survive else 0
            self.entries.append((self.last, depth))
        if self.commits_last and self.implicit_commit is None:
            self.kept = None
        elif self.commits_last and means(error, "syntax"):
            self.implicit_commit = None
        self.commits_last = False

    def check_statement(self, statement: str, raw: object) -> None:
        """Refuse what would end the transaction; note DDL that commits."""
        kind = known.kind_of(statement)
        is_open = self._driver.in_transaction(raw)
        commits_for_ddl = self._database.IMPLICIT_COMMIT is not None
        is_gone = self.entries and not is_open and not commits_for_ddl
        if self.ended_unseen or is_gone:
            raise TransactionGoneError from self.doomed_by
        if kind == "transaction_control" and known.controls(self._database, statement):
            raise ManagedTransactionError(known.without_literals(statement))
        self.commits_last = False
        if kind == "implicit_commit" and commits_for_ddl and not self.implicit_commit:
            verb = known.without_literals(statement)
            if is_open:
                self.implicit_commit, self.commits_last = verb, True
            elif not self.kept and verb.startswith(self._database.KEPT_AT_ONCE):
                self.kept, self.commits_last = verb, True

    def begin_commit(self) -> None:
        """Refuse a COMMIT of aborted work, or one that is not the unit's."""
        if self.ending is None:
            raise self.doom(ManagedTransactionError("connection.commit()"))
        if self.entries:
            raise TransactionGoneError from self.doomed_by
        self.commit_sent = True

    def record_rollback(self, dbapi: Any) -> None:
        """Record a ROLLBACK that is not the unit's: a failed flush, or one by hand."""
        if self.ending is None:
            if dbapi is not None:
                self.look(dbapi)  # there may be nothing left that it could undo
            self.doom(self.last or ManagedTransactionError("connection.rollback()"))

    def open_savepoint(self, name: str) -> None:
        self._names.append(name)
        self.savepoints.open((self, name))

    def end_savepoint(self, name: str, *, undone: bool) -> None:
        """Record RELEASE, or ROLLBACK TO, which undoes what was aborted inside."""
        while name in self._names:
            key = (self, self._names.pop())
            if undone:
                self.savepoints.roll_back(key, by=self)
            else:
                self.savepoints.release(key)
        if undone:
            depth = len(self._names)
            self.entries = [each for each in self.entries if each[1] <= depth]
