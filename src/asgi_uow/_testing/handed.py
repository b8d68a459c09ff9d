"""A connection of a sandbox, as SQLAlchemy and the drivers' facts see one.

What is done on it is handed over to the one connection of the sandbox, in whose loop
and thread it is executed; rows come back all at once. Its transaction is a savepoint.
"""

from __future__ import annotations

import asyncio
import os
import re
import weakref
from collections import deque
from contextlib import suppress
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy.connectors.asyncio import AsyncAdapt_dbapi_cursor
from sqlalchemy.pool import NullPool
from sqlalchemy.util import await_only

from asgi_uow import errors
from asgi_uow._databases import known, loops
from asgi_uow._databases.connection import POLICY
from asgi_uow._databases.pool import ABORTING_CODES
from asgi_uow._testing.nesting import Nesting, Part
from asgi_uow._testing.shared import SharedConnection, hand_over
from asgi_uow._unit.unit import current

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

IN_TRANSACTION, IN_ERROR = 2, 3  # of libpq; 0 is idle
VERBS = {
    re.compile(r"(?i)\s*(?:BEGIN|START\s+TRANSACTION)\b"): Nesting.begin,
    re.compile(r"(?i)\s*(?:COMMIT|END)\b(?!\s+PREPARED)"): Nesting.keep,
    re.compile(r"(?i)\s*ROLLBACK\b(?!\s+(?:TO|PREPARED)\b)"): Nesting.rollback,
}


class HandedConnection(Part):
    """A DBAPI connection whose transaction is a savepoint in that of the sandbox.

    And what is asked of a driver's own connection, in the words of each of them.
    """

    isolation_level: Any = None  # of SQLite: BEGIN is a statement
    _cancellations: tuple[()] = ()
    _result = _protocol = _read_waiter = None
    _stream_broken = is_hurried = False
    length = pos = 0
    lock = known.NO_LOCK

    def __init__(self, shared: SharedConnection, **how: bool) -> None:
        super().__init__(current.get(), **how)
        self.shared = shared
        loops.owners[self] = asyncio.get_running_loop(), shared.driver

    @property
    def itself(self) -> Any:
        return self

    driver_connection = _connection = _transport = _proto = pgconn = itself

    def is_closed(self) -> bool:
        return self.is_gone

    closed = broken = property(is_closed)

    def is_in_transaction(self) -> bool:
        return self.is_open or self.is_due

    get_transaction_status = is_in_transaction
    in_transaction = property(is_in_transaction)

    @property
    def transaction_status(self) -> int:
        if not self.is_in_transaction():
            return 0
        return IN_ERROR if self.has_failed else IN_TRANSACTION

    @staticmethod
    @cache
    def fileno() -> int:
        return os.pipe()[0]  # nothing is ever to be read from it

    def get_extra_info(self, *_: object) -> None:
        """It has no socket, settings or parameters."""

    get_settings = parameter_status = get_extra_info

    @property
    def autocommit(self) -> Any:  # MySQL's drivers have a method in its place
        return self.set_autocommit if self.shared.commits_for_ddl else self.is_auto

    def set_autocommit(self, value: bool) -> None:  # noqa: FBT001  # the drivers'
        self.is_auto = bool(value)

    def get_autocommit(self) -> bool:
        return self.is_auto

    def set_isolation_level(self, level: object) -> None:
        """Accept any: the sandbox's transaction has one already."""
        if isinstance(level, str):  # asyncpg's; psycopg's is a number
            self.is_auto = level == "autocommit"

    def begin_with(self, _: str) -> None:  # of SQLite: with the first statement
        self.is_due = True

    def cursor(self, *_: object, **__: object) -> HandedCursor:
        return HandedCursor(self)

    def commit(self) -> None:
        self.is_due = False
        if self.is_open or self.is_gone:  # which is refused
            self.run(self.shared.keep, self)

    def rollback(self) -> None:
        self.is_due = False
        if self.is_open and not (self.is_gone or self.shared.is_over):
            self.run(self.shared.rollback, self)

    def run(self, work: Callable[..., T], *args: Any) -> T:
        """Run in the sandbox's thread, when it is this connection's turn."""
        if self.is_gone:
            message = "connection is closed"
            raise self.shared.dialect.loaded_dbapi.OperationalError(message)
        running = self.shared.run(self, partial(work, *args))
        try:
            return await_only(hand_over(self.shared.loop, running))
        except errors.SandboxError:
            self.is_due |= not self.is_auto  # nobody has ended its transaction
            raise

    def close(self) -> None:
        """Undo what is open, as a server does; nobody waits for it."""
        if not self.is_gone:
            self.is_gone = True
            if self.is_open:
                self.is_due = True  # a driver's flag stays as it was
                undo = self.shared.run(self, partial(self.shared.rollback, self))
                with suppress(RuntimeError):  # the process ends
                    asyncio.run_coroutine_threadsafe(undo, self.shared.loop)

    terminate = abandon = abort = close

    def __getattr__(self, name: str) -> Any:
        message = (
            f"{name}: in a sandbox the driver's own connection cannot be had, as what "
            "it does would be in nobody's transaction. Go through SQLAlchemy."
        )
        raise AttributeError(message)


class HandedCursor(AsyncAdapt_dbapi_cursor):
    """A cursor whose rows are all here once it has executed; it has no other below."""

    description: Any = None
    rowcount: Any = -1
    lastrowid: Any = None
    arraysize: Any = 1
    _cursor: Any = None
    _awaitable_cursor_close = False

    def __init__(self, connection: HandedConnection) -> None:
        self._handed, self._connection = connection, connection._connection  # noqa: SLF001
        self._rows = deque()

    def execute(self, operation: str, parameters: Any = None) -> None:
        handed = self._handed
        if operation == handed.shared.facts.TRANSACTION_ID:
            operation = "SELECT NULL"  # later nobody could tell what became of a part
        for verb, do in VERBS.items():
            if verb.match(operation):
                return handed.run(do, handed.shared, handed)
        args = (operation,) if parameters is None else (operation, parameters)
        return self._run("execute", args)

    def executemany(self, operation: str, seq_of_parameters: Any) -> None:
        self._run("executemany", (operation, seq_of_parameters))

    def _run(self, method: str, args: tuple[Any, ...]) -> None:
        handed, call = self._handed, partial(self._call, method, args)
        handed.run(handed.shared.execute, handed, args, call)

    def _call(self, method: str, args: tuple[Any, ...]) -> None:
        cursor: Any = self._handed.shared.dbapi.cursor()
        with suppress(AttributeError):  # SQLAlchemy's own, for asyncpg
            cursor._invalidate_schema_cache_asof = self._invalidate_schema_cache_asof  # type: ignore[attr-defined]  # noqa: SLF001
        try:
            getattr(cursor, method)(*args)
            self.description, self.rowcount = cursor.description, cursor.rowcount
            self.lastrowid = getattr(cursor, "lastrowid", None)
            self._rows = deque(cursor.fetchall() if cursor.description else ())
        finally:
            cursor.close()


class HandedPool(NullPool):
    """Gives connections of a sandbox in the place of an engine's own pool."""

    def __init__(self, shared: SharedConnection, engine: loops.LoopEngine) -> None:
        def create(rec: Any) -> Any:
            policy: Any = engine.get_execution_options()[POLICY]
            in_transactions = policy.use.level or policy.pooler == "transaction"
            auto = policy.read_only and not in_transactions
            auto, read_only = auto or bool(shared.facts.BEGIN_WRITE), policy.read_only
            rec.info[ABORTING_CODES] = shared.aborting
            handed = HandedConnection(shared, read_only=read_only, is_auto=auto)
            self._own.add(handed)
            return handed

        self._own: weakref.WeakSet[HandedConnection] = weakref.WeakSet()
        super().__init__(create, dialect=engine.dialect)

    def checkedout(self) -> int:
        return sum(not each.is_gone for each in self._own)

    def checkedin(self) -> int:
        return 0  # none is kept: making one costs nothing

    def recreate(self) -> HandedPool:
        return self  # what an application disposes of in a test is not its sandbox
