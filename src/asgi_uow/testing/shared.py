"""The one connection of a sandbox to a database, in a loop and thread of its own."""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import re
import threading
import weakref
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy.util import greenlet_spawn

from asgi_uow import errors
from asgi_uow._concurrency import register_at_fork
from asgi_uow._databases import known, loops
from asgi_uow._databases.connection import SETTINGS_CHANGED, execute, raw_of
from asgi_uow._databases.driver_errors import code_of, means
from asgi_uow._databases.engines import cancel_statements
from asgi_uow._databases.pool import ABORTING_CODES
from asgi_uow.testing.handed import HandedConnection, HandedPool

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator

    from asgi_uow._databases.engines import Engines

T = TypeVar("T")

WAIT = 10.0  # seconds for a transaction that is open, or for the database itself
OUTER, UNIT, CALL, CHECK = (
    f"asgi_uow_{name}" for name in ("sandbox", "unit", "call", "check")
)
WRITES = re.compile(r"(?i)\s*(?:INSERT|UPDATE|DELETE|REPLACE|LOAD|TRUNCATE)\b")
TWO_PHASE = re.compile(r"(?i)\s*(?:XA|PREPARE\s+TRANSACTION)\b")
SAVEPOINT = re.compile(r"(?i)\s*(SAVEPOINT|RELEASE|ROLLBACK)\b.*?(\S+)\s*$")
ABORTED = "25P02"  # only ROLLBACK is accepted

BUSY = (
    "The database is in use by another sandbox, or by a connection outside of it, for "
    "more than {} seconds: on SQLite one sandbox at a time. Close the other first."
)
HELD = (
    "{} has a transaction open in this sandbox, which has one connection: others wait "
    "for its end, and {} seconds are over. Leave its block before the next request."
)
INSIDE = (
    "A transaction inside another one of this unit of work, such as that of "
    "independent=True: a sandbox has one connection. Test it without a sandbox."
)
KEPT = (
    "{} ends the transaction of the sandbox on this database, with all that the test "
    "has done: do it before, or without a sandbox."
)
GONE = (
    "The database has rolled the whole sandbox back (a deadlock with another one?), or "
    "something has ended its transaction: nothing more can be done in it."
)
NO_ROLLBACK = (
    "What is written to {} stays, since its engine has no savepoints: make it InnoDB, "
    "or test without a sandbox."
)
WITHOUT_SAVEPOINTS = (
    "SELECT t.table_name FROM information_schema.tables t JOIN "
    "information_schema.engines e ON e.engine = t.engine "
    "WHERE t.table_schema = DATABASE() AND e.savepoints <> 'YES'"
)

_threads: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
_starting = threading.Lock()
register_at_fork(after_in_child=_threads.clear)


def background() -> asyncio.AbstractEventLoop:
    """Give the loop of the sandboxes' connections; it runs until the process ends."""
    with _starting:
        if not _threads:
            started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
            run = contextvars.Context().run
            args = asyncio.run, _serve(started)
            thread = threading.Thread(
                target=run, args=args, name="asgi_uow.testing", daemon=True
            )
            thread.start()
            _threads.append(started.result())
            atexit.register(_stop, thread, *_threads[0])
        return _threads[0][0]


async def _serve(
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]],
) -> None:
    end = asyncio.Event()
    started.set_result((asyncio.get_running_loop(), end))
    await end.wait()


def _stop(
    thread: threading.Thread, loop: asyncio.AbstractEventLoop, end: asyncio.Event
) -> None:
    if thread.is_alive():  # not in a forked process
        loop.call_soon_threadsafe(end.set)
        thread.join(WAIT)


class SharedConnection:
    """A connection in a transaction that is rolled back, in turns for who asks."""

    dbapi: Any
    is_over = is_gone = False
    holder: HandedConnection | None = None
    """Whose transaction is open: a savepoint; what another writes has to wait."""

    def __init__(self, db: Engines) -> None:
        self.engine, self.facts, self.driver = db.engine, db.facts, db.driver
        self.is_memory = db.is_memory
        self.dialect: Any = db.engine.dialect
        self.loop = background()
        self.pools: dict[loops.LoopEngine, HandedPool] = {}
        self.handed: weakref.WeakSet[HandedConnection] = weakref.WeakSet()
        self.tasks: set[asyncio.Task[None]] = set()
        self.aborting: object = ()
        self.is_changed = False  # has a setting been made that outlives a transaction?

    def pool_for(self, engine: loops.LoopEngine) -> HandedPool:
        if engine not in self.pools:
            self.pools[engine] = HandedPool(self, engine)
        return self.pools[engine]

    async def open(self) -> None:
        """Connect and begin; raises `SandboxError` where that cannot be undone."""
        self.turns = asyncio.Condition()
        connect = self.engine.sync_engine.raw_connection
        try:
            async with asyncio.timeout(WAIT):
                self.fairy = await greenlet_spawn(connect)
        except (TimeoutError, errors.WrongLoopError) as error:
            raise errors.SandboxError(BUSY.format(WAIT)) from error
        self.dbapi = self.fairy.dbapi_connection
        self.aborting = self.fairy.info.get(ABORTING_CODES, ())
        try:
            await greenlet_spawn(self._begin)
        except BaseException as error:
            self.is_gone = True
            await self.close()
            if means(error, "conflict"):
                raise errors.SandboxError(BUSY.format(WAIT)) from error
            if means(error, "unsupported"):
                raise errors.NoSavepointsError from error
            raise

    def _begin(self) -> None:
        if self.facts.IMPLICIT_COMMIT is not None:
            if found := self._ask(WITHOUT_SAVEPOINTS):
                names = ", ".join(sorted(row[0] for row in found))
                raise errors.SandboxError(NO_ROLLBACK.format(names))
            execute(self.dbapi, "START TRANSACTION")
        elif self.facts.SINGLE_WRITER:
            [(timeout,)] = self._ask("PRAGMA busy_timeout")
            execute(self.dbapi, f"PRAGMA busy_timeout = {int(WAIT * 1000)}")
            try:
                execute(self.dbapi, self.facts.BEGIN_WRITE or "BEGIN")
            finally:
                execute(self.dbapi, f"PRAGMA busy_timeout = {timeout}")
            self.unkept = set(self._ask("PRAGMA foreign_key_check"))
        execute(self.dbapi, f"SAVEPOINT {OUTER}")

    async def close(self) -> None:
        """Roll everything back; what is still in flight ends first."""
        self.is_over = True
        # Of a file there is to be none left when somebody deletes it.
        is_left = self.is_changed or self.is_gone or self.facts.SINGLE_WRITER
        if is_left and not self.is_memory:
            await greenlet_spawn(self.fairy.invalidate)
        await greenlet_spawn(self.fairy.close)

    async def end(self) -> None:
        """Close it when the call in flight has ended."""
        async with self.turns:
            self.is_over = True
            self.turns.notify_all()
        await asyncio.wait(self.tasks) if self.tasks else None
        await self.close()

    async def run(self, handed: HandedConnection, work: Callable[[], T]) -> T:
        """Run `work` in the turn of a connection; a cancelled one is ended first."""
        async with self._turn(handed):
            task = asyncio.ensure_future(greenlet_spawn(work))
            try:
                return await asyncio.shield(task)
            except asyncio.CancelledError:
                while not task.done():
                    await self._stop(task)
                if not task.cancelled():
                    task.exception()  # nobody asks for it
                raise
            finally:
                # MySQL and SQLite end it for some errors, or what a procedure does.
                if not self.driver.in_transaction(raw_of(self.dbapi)):
                    self.is_gone = True

    async def _stop(self, task: asyncio.Task[T]) -> None:
        statement = self.driver.cancel_sql(raw_of(self.dbapi))
        if statement is not None:
            await cancel_statements([(self.engine.sync_engine, statement)])
        elif not self.facts.SINGLE_WRITER:  # SQLite would roll everything back
            task.cancel()
        await asyncio.wait((task,))

    @asynccontextmanager
    async def _turn(self, handed: HandedConnection) -> AsyncGenerator[None]:
        try:
            async with asyncio.timeout(WAIT):
                await self.turns.acquire()
        except TimeoutError:
            raise errors.SandboxError(HELD.format("A call", WAIT)) from None
        try:
            try:
                async with asyncio.timeout(WAIT):
                    await self.turns.wait_for(lambda: self._is_free(handed))
            except TimeoutError:
                who = self.holder and (self.holder.unit or "A connection of an engine")
                raise errors.SandboxError(HELD.format(who, WAIT)) from None
            if self.is_over:
                message = "The sandbox has ended: nothing can be done in it any more."
                raise errors.SandboxError(message)
            if self.is_gone and not handed.is_gone:
                raise errors.SandboxError(GONE)
            yield
        finally:
            self.turns.notify_all()
            self.turns.release()

    def _is_free(self, handed: HandedConnection) -> bool:
        holder, unit = self.holder, handed.unit
        if self.is_over or holder is None or holder is handed:
            return True
        is_inside = unit is not None and holder.unit in (unit, *unit.outwards())
        if is_inside and not handed.read_only:
            raise errors.SandboxError(INSIDE)
        return is_inside

    # What follows runs in a greenlet, in the turn of `handed`.

    def execute(
        self, handed: HandedConnection, args: tuple[Any, ...], call: Callable[[], None]
    ) -> None:
        statement: str = args[0]
        self._check(handed, statement)
        try:
            if handed.read_only:
                with self._read_only(handed):
                    call()
            elif handed.is_auto and not handed.is_open:
                with self._savepoint(keep=True):
                    call()
            else:
                self.begin(handed)
                call()
        except self.dialect.loaded_dbapi.Error:
            handed.has_failed = True
            raise
        kind = known.kind_of(statement)
        if kind in {"setting", "local"} and handed.read_only and handed.is_open:
            handed.settings.append((statement, *args[1:]))
        self.is_changed = self.is_changed or kind == "setting"
        if (found := SAVEPOINT.match(statement)) is not None:
            _note(handed, found[1].upper(), found[2])

    def _check(self, handed: HandedConnection, statement: str) -> None:
        commits = self.facts.IMPLICIT_COMMIT is not None
        if commits and known.kind_of(statement) == "implicit_commit":
            verb = known.without_literals(statement)
            raise errors.SandboxError(KEPT.format(verb))
        if TWO_PHASE.match(statement):
            raise errors.SandboxError(KEPT.format("A two-phase commit"))
        if handed.read_only and commits and WRITES.match(statement):
            # There is no way to have the server refuse it within a transaction.
            message = "Cannot execute statement in a READ ONLY transaction"
            raise self.dialect.loaded_dbapi.OperationalError(1792, message)

    def begin(self, handed: HandedConnection) -> None:
        if handed.is_open:
            return
        if not handed.read_only:
            execute(self.dbapi, f"SAVEPOINT {UNIT}")
            self.holder = handed
        handed.is_open = True

    def commit(self, handed: HandedConnection) -> None:
        """Check what is left for COMMIT to check, and keep the savepoint's work."""
        if handed is self.holder:
            try:
                self._check_constraints()
            except self.dialect.loaded_dbapi.Error as error:
                if code_of(error) != ABORTED:
                    raise
                return self.rollback(handed)  # which is what the server does
            execute(self.dbapi, f"RELEASE SAVEPOINT {UNIT}")
        return self._end(handed)

    def rollback(self, handed: HandedConnection) -> None:
        if handed is self.holder and not self.is_gone:
            execute(self.dbapi, f"ROLLBACK TO SAVEPOINT {UNIT}")
            execute(self.dbapi, f"RELEASE SAVEPOINT {UNIT}")
        self._end(handed)

    def _end(self, handed: HandedConnection) -> None:
        if handed is self.holder:
            self.holder = None
        handed.is_open = handed.has_failed = False
        handed.settings, handed.savepoints = [], []

    def give_up(self, handed: HandedConnection) -> None:
        """Roll back what was open on a connection that is closed; nobody waits."""
        if handed.is_open:
            with suppress(RuntimeError):  # the process ends
                self.loop.call_soon_threadsafe(self._undo_later, handed)

    def _undo_later(self, handed: HandedConnection) -> None:
        async def undo() -> None:
            with suppress(errors.SandboxError):
                await self.run(handed, lambda: self.rollback(handed))

        task = self.loop.create_task(undo())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def _check_constraints(self) -> None:
        if self.facts.SINGLE_WRITER:
            if set(self._ask("PRAGMA foreign_key_check")) - self.unkept:
                message = "FOREIGN KEY constraint failed"
                error = self.dialect.loaded_dbapi.IntegrityError(message)
                error.sqlite_errorname = "SQLITE_CONSTRAINT_FOREIGNKEY"
                raise error
        elif self.facts.IMPLICIT_COMMIT is None:
            execute(self.dbapi, f"SAVEPOINT {CHECK}")
            execute(self.dbapi, "SET CONSTRAINTS ALL IMMEDIATE")
            execute(self.dbapi, f"ROLLBACK TO SAVEPOINT {CHECK}")
            execute(self.dbapi, f"RELEASE SAVEPOINT {CHECK}")

    @contextmanager
    def _savepoint(self, *, keep: bool) -> Generator[None]:
        execute(self.dbapi, f"SAVEPOINT {CALL}")
        is_done = False
        try:
            yield
            if keep:
                self._check_constraints()
            is_done = keep
        finally:
            if not self.driver.in_transaction(raw_of(self.dbapi)):
                self.is_gone = True
            else:
                if not is_done:
                    execute(self.dbapi, f"ROLLBACK TO SAVEPOINT {CALL}")
                execute(self.dbapi, f"RELEASE SAVEPOINT {CALL}")

    @contextmanager
    def _read_only(self, handed: HandedConnection) -> Generator[None]:
        with self._whole(), self._savepoint(keep=False):
            if self.facts.SINGLE_WRITER:
                execute(self.dbapi, self.facts.READ_ONLY_STATEMENT)
            elif self.facts.IMPLICIT_COMMIT is None:
                execute(self.dbapi, "SET TRANSACTION READ ONLY")
            try:
                for statement, *parameters in handed.settings:
                    self.dbapi.cursor().execute(statement, *parameters)
                yield
            finally:
                if self.facts.SINGLE_WRITER:
                    execute(self.dbapi, "PRAGMA query_only = OFF")
        if not handed.is_auto:
            handed.is_open = True

    @contextmanager
    def _whole(self) -> Generator[None]:
        """Let a unit read beside its own transaction, though an error has aborted it."""
        try:
            execute(self.dbapi, f"SAVEPOINT {CHECK}")
        except self.dialect.loaded_dbapi.Error as error:
            if code_of(error) != ABORTED or self.holder is None:
                raise
        else:
            execute(self.dbapi, f"RELEASE SAVEPOINT {CHECK}")
            yield
            return
        innermost = [UNIT, *self.holder.savepoints][-1]
        execute(self.dbapi, f"ROLLBACK TO SAVEPOINT {innermost}")
        try:
            yield
        finally:
            with suppress(self.dialect.loaded_dbapi.Error):
                execute(self.dbapi, "SELECT 1 / 0")  # as it was

    def _ask(self, statement: str) -> list[Any]:
        cursor = self.dbapi.cursor()
        try:
            cursor.execute(statement)
            return [tuple(row) for row in cursor.fetchall()]
        finally:
            cursor.close()


def _note(handed: HandedConnection, verb: str, name: str) -> None:
    if verb == "SAVEPOINT":
        handed.savepoints.append(name)
    elif name in handed.savepoints:
        kept = handed.savepoints.index(name) + (verb == "ROLLBACK")
        handed.savepoints = handed.savepoints[:kept]
        handed.has_failed = handed.has_failed and verb != "ROLLBACK"
