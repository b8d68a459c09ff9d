"""Savepoints in the place of transactions, on the one connection of a sandbox."""

from __future__ import annotations

import re
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from asgi_uow import errors
from asgi_uow._databases import known
from asgi_uow._databases.connection import execute, raw_of
from asgi_uow._databases.driver_errors import code_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from asgi_uow._databases.engines import Engines
    from asgi_uow._unit.unit import UnitOfWork

OUTER, UNIT, CALL = (f"asgi_uow_{name}" for name in ("sandbox", "unit", "call"))
WRITES = re.compile(r"(?i)\s*(?:INSERT|UPDATE|DELETE|REPLACE|LOAD)\b")
ENDS = re.compile(r"(?i)\s*(?:XA|PREPARE\s+TRANSACTION|(?:UN)?LOCK\s+TABLES?)\b")
SAVEPOINT = re.compile(r"(?i)\s*(SAVEPOINT|RELEASE|ROLLBACK)\b.*?(\S+)\s*$")
ABORTED = "25P02"  # of PostgreSQL: only ROLLBACK is accepted
REFUSED = 1792, "Cannot execute statement in a READ ONLY transaction"  # of MySQL
WITHOUT_SAVEPOINTS = (
    "SELECT t.table_name FROM information_schema.tables t"
    " JOIN information_schema.engines e ON e.engine = t.engine"
    " WHERE t.table_schema = DATABASE() AND e.savepoints <> 'YES'"
)
DEFERRABLE = "SELECT 1 FROM pg_constraint WHERE condeferrable LIMIT 1"

KEPT = (
    "{} would end the transaction of the sandbox on this database, and keep all that "
    "the test has done: do it before, or without a sandbox."
)
NO_ROLLBACK = (
    "What is written to {} stays, since its engine has no savepoints: make it InnoDB, "
    "or test without a sandbox."
)


class Part:
    """What is known of one of those who share the connection."""

    is_due = False  # is a transaction to begin, or was what begins it refused?
    is_open = False  # has it begun?
    has_failed = False  # and an error aborted it, or what follows a savepoint?
    is_gone = False  # has it been closed?

    def __init__(
        self, unit: UnitOfWork | None, *, read_only: bool, is_auto: bool
    ) -> None:
        self.unit, self.read_only, self.is_auto = unit, read_only, is_auto
        self.savepoints: list[str] = []  # of the user, in its transaction
        self.settings: list[tuple[Any, ...]] = []  # of a transaction that only reads


class Nesting:
    """What is done in a greenlet, in the turn of one who shares the connection."""

    dbapi: Any
    is_gone = False  # has the database ended the transaction by itself?
    is_changed = False  # is something left on the connection when it is rolled back?
    holder: Part | None = None
    """Whose transaction is open: a savepoint; what another writes has to wait."""

    def __init__(self, db: Engines) -> None:
        self.facts, self.driver = db.facts, db.driver
        self.dialect: Any = db.engine.dialect
        self.commits_for_ddl = db.facts.IMPLICIT_COMMIT is not None

    def begin_all(self, seconds: float) -> None:
        """Begin what is rolled back at the end; raises where that cannot be."""
        if self.commits_for_ddl:
            if found := self._ask(WITHOUT_SAVEPOINTS):
                names = ", ".join(sorted(row[0] for row in found))
                raise errors.SandboxError(NO_ROLLBACK.format(names))
            execute(self.dbapi, "START TRANSACTION")
        elif self.facts.BEGIN_WRITE is not None:
            [(timeout,)] = self._ask("PRAGMA busy_timeout")
            execute(self.dbapi, f"PRAGMA busy_timeout = {seconds * 1000:.0f}")
            execute(self.dbapi, self.facts.BEGIN_WRITE)
            execute(self.dbapi, f"PRAGMA busy_timeout = {timeout}")
            self.orphans = set(self._ask("PRAGMA foreign_key_check"))
        execute(self.dbapi, f"SAVEPOINT {OUTER}")

    def execute(
        self, part: Part, args: tuple[Any, ...], call: Callable[[], None]
    ) -> None:
        """Make a call in the transaction of `part`, or in one of its own."""
        statement: str = args[0]
        kind = known.kind_of(statement)
        self._check(part, statement, kind)
        is_alone = part.is_auto and not (part.is_open or part.is_due)
        try:
            if part.read_only:
                with self._read_only(part):
                    call()
            else:
                self.begin(part)
                call()
                if is_alone and self.has_transaction():
                    self.keep(part)
        except BaseException as error:
            part.has_failed |= isinstance(error, self.dialect.loaded_dbapi.Error)
            if is_alone:
                self.rollback(part)
            raise
        if kind in {"setting", "local"} and part.read_only and part.is_open:
            part.settings.append(args)
        # DDL that is undone leaves plans behind that fit no more.
        self.is_changed = self.is_changed or kind in {"setting", "implicit_commit"}
        if (found := SAVEPOINT.match(statement)) is not None:
            _note(part, found[1].upper(), found[2])

    def _check(self, part: Part, statement: str, kind: known.Kind | None) -> None:
        if self.commits_for_ddl and kind == "implicit_commit":
            # A syntax error is what the journal knows to have done nothing.
            message = KEPT.format(known.without_literals(statement))
            raise self.dialect.loaded_dbapi.ProgrammingError(1064, message)
        locks = statement.lstrip()[:4].upper() == "LOCK" and not self.commits_for_ddl
        if ENDS.match(statement) and not locks:  # PostgreSQL's ends with a transaction
            raise errors.SandboxError(KEPT.format(known.without_literals(statement)))
        if part.read_only and self.commits_for_ddl and WRITES.match(statement):
            # Within a transaction there is no way to have the server refuse it.
            raise self.dialect.loaded_dbapi.OperationalError(*REFUSED)

    def begin(self, part: Part) -> None:
        if not part.is_open and not part.read_only:
            execute(self.dbapi, f"SAVEPOINT {UNIT}")
            self.holder = part
        part.is_open = True

    def keep(self, part: Part) -> None:
        """Check what is left for COMMIT to check, and keep the savepoint's work."""
        if part is self.holder:
            try:
                self._check_constraints()
            except self.dialect.loaded_dbapi.Error as error:
                if code_of(error) != ABORTED:
                    raise
                return self.rollback(part)  # which is what the server does
            execute(self.dbapi, f"RELEASE SAVEPOINT {UNIT}")
        return self._end(part)

    def rollback(self, part: Part) -> None:
        if part is self.holder:
            self._undo(UNIT)
        self._end(part)

    def _end(self, part: Part) -> None:
        if part is self.holder:
            self.holder = None
        part.is_open = part.has_failed = False
        part.settings, part.savepoints = [], []

    def _check_constraints(self) -> None:
        if self.facts.BEGIN_WRITE is not None:
            if set(self._ask("PRAGMA foreign_key_check")) - self.orphans:
                message = "FOREIGN KEY constraint failed"
                error = self.dialect.loaded_dbapi.IntegrityError(message)
                error.sqlite_errorname = self.facts.REFUSED
                raise error
        elif not self.commits_for_ddl and self._ask(DEFERRABLE):
            with self._undone():
                execute(self.dbapi, "SET CONSTRAINTS ALL IMMEDIATE")

    @contextmanager
    def _undone(self) -> Generator[None]:
        execute(self.dbapi, f"SAVEPOINT {CALL}")
        try:
            yield
        finally:
            self._undo(CALL)

    def _undo(self, name: str) -> None:
        try:
            execute(self.dbapi, f"ROLLBACK TO SAVEPOINT {name}")
            execute(self.dbapi, f"RELEASE SAVEPOINT {name}")
        except self.dialect.loaded_dbapi.Error:
            self.is_gone = True  # with all savepoints, as after a deadlock

    def has_transaction(self) -> bool:
        """Tell whether there is a transaction: some errors end it, or a procedure."""
        return self.driver.in_transaction(raw_of(self.dbapi))

    @contextmanager
    def _read_only(self, part: Part) -> Generator[None]:
        if self.facts.BEGIN_WRITE is not None:
            execute(self.dbapi, self.facts.READ_ONLY_STATEMENT)
            try:
                yield
            finally:
                execute(self.dbapi, "PRAGMA query_only = OFF")
        else:
            with self._whole(), self._undone():
                if not self.commits_for_ddl:
                    execute(self.dbapi, "SET TRANSACTION READ ONLY")
                for each in part.settings:
                    self._ask(*each)
                yield
        part.is_open = not part.is_auto

    @contextmanager
    def _whole(self) -> Generator[None]:
        """Let a unit read beside its own transaction, also if that is aborted."""
        holder = self.holder
        if holder is None or self.commits_for_ddl or not holder.has_failed:
            yield
            return
        execute(self.dbapi, f"ROLLBACK TO SAVEPOINT {[UNIT, *holder.savepoints][-1]}")
        try:
            yield
        finally:
            with suppress(self.dialect.loaded_dbapi.Error):
                execute(self.dbapi, "SELECT 1 / 0")  # aborted, as it was

    def _ask(self, statement: str, *parameters: Any) -> list[Any]:
        with closing(self.dbapi.cursor()) as cursor:
            cursor.execute(statement, *parameters)
            return [tuple(row) for row in cursor.fetchall()]


def _note(part: Part, verb: str, name: str) -> None:
    """Keep the names of the user's open savepoints."""
    if verb == "SAVEPOINT":
        part.savepoints.append(name)
    elif name in part.savepoints:
        is_rollback = verb == "ROLLBACK"
        del part.savepoints[part.savepoints.index(name) + is_rollback :]
        part.has_failed = part.has_failed and not is_rollback
