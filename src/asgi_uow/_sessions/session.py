"""The session of a unit of work, and its savepoints: their calls take turns."""

from __future__ import annotations

import asyncio
import functools
import weakref
from contextlib import asynccontextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import anyio
from sqlalchemy import exc, orm
from sqlalchemy.ext.asyncio import AsyncSessionTransaction
from sqlalchemy.util import greenlet_spawn

from asgi_uow import errors
from asgi_uow._concurrency import TaskLock
from asgi_uow._databases import known
from asgi_uow._databases.driver_errors import is_of_database, is_unavailable, means
from asgi_uow._databases.engines import cancel_statements
from asgi_uow._databases.journal import Journal
from asgi_uow._decision import WRITABLE
from asgi_uow._sessions.beginning import BEGINNING, BeginningSession
from asgi_uow._sessions.managed import ManagedSession
from asgi_uow._sessions.record import recording
from asgi_uow._sessions.statements import StatementSession, StreamResult, adopt

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Mapping

    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncResult
    from sqlalchemy.util.typing import TupleAny

    from asgi_uow._databases.engines import Engines
    from asgi_uow._sessions.managed import Shared
    from asgi_uow._sessions.statements import Call, Execute

MOST_STUCK = 2  # then servers are not asked to stop a statement: each takes seconds
END_SECONDS = 30.0  # for RELEASE and ROLLBACK TO, also in a cancelled scope
READS = ("execute", "scalar", "scalars", "stream", "stream_scalars", "get", "get_one")
CHANGES = ("refresh", "run_sync", "delete", "delete_all", "merge", "merge_all", "flush")
RUN_SYNC = "session.run_sync()"  # only what that executes has a deadline
ENDS = ("connection", "commit", "rollback", "close", "reset", "invalidate")


def _guarded(method: Call) -> Call:
    """Let a call wait for the one in flight, then check that the unit is open."""
    operation = f"session.{method.__name__}()"

    @functools.wraps(method)
    async def call(self: Session, *args: object, **kwargs: object) -> object:
        lock, task = self.own_lock, asyncio.current_task()
        if task is not None and not lock.take(task):
            if any(each.beginning for each in BEGINNING.get()):
                raise errors.ConcurrentUseError(operation, "on_begin has not returned")
            await lock.wait(task)
        try:
            self.check(operation)
            if self.is_plain and lock.limit is nullcontext:
                result = await method(self, *args, **kwargs)
            else:
                with (nullcontext if operation == RUN_SYNC else lock.limit)():
                    result = await self.route_call(operation, method, args, kwargs)
            if self.sync_session.cursors:
                await self.give_back()
        except BaseException as error:
            await self.failed(error, operation)
            raise
        finally:
            lock.release()
        if self.shared.savepoints.due:
            await self.call_due()
        return result

    return call


class Session(StatementSession):
    """SQLAlchemy's `AsyncSession`, made by a unit of work and ended by it.

    Beside what `AsyncSession` offers it takes a plain string with named parameters::

        await session.execute("SELECT id FROM users WHERE name = :name", name="Ann")

    Calls from several tasks of one request take turns. `commit()`, `rollback()`,
    `close()`, `begin()` raise `ManagedTransactionError`; `begin_nested()` is welcome.
    Once the unit is decided, its write session raises `UnitOfWorkClosedError`.
    """

    sync_session_class: type[orm.Session] = ManagedSession
    beginning_class: type[orm.Session] = BeginningSession
    sync_session: ManagedSession  # pyright: ignore[reportIncompatibleVariableOverride]
    bind: AsyncEngine  # pyright: ignore[reportIncompatibleMethodOverride]
    usable_in = WRITABLE  # the states of its unit in which it may be called
    give_back: Call  # of a read session: return a connection that it needs no more
    is_plain = True  # calls need nothing but the session's own connection

    def __init__(
        self, db: Engines, bind: AsyncEngine, options: Mapping[str, Any], shared: Shared
    ) -> None:
        begins = db.on_begin is not None or shared.deadline is not None
        if begins or shared.recorder is not None:
            kind: Any = self.beginning_class if begins else self.sync_session_class
            self.sync_session_class = recording(kind) if shared.recorder else kind
        super().__init__(bind, close_resets_only=False, **options)
        self.own_lock: TaskLock = TaskLock(errors.WrongLoopError)
        if shared.deadline is not None:
            self.own_lock.limit = shared.deadline.limit
        self.shared = shared
        self.streams: dict[Any, weakref.ref[Call]] = {}
        self.journal: Journal = Journal(db.facts, db.driver, shared.savepoints)
        sync = self.sync_session
        sync.database, sync.shared, sync.journal = db, shared, self.journal
        sync.connections, sync.lock = {}, self.own_lock
        if shared.recorder is not None:
            shared.recorder.attach(sync)

    async def route_call(self, _: str, method: Call, args: Any, kwargs: Any, /) -> Any:
        """Make a call; on a read session in the writer's transaction, or by a route."""
        return await method(self, *args, **kwargs)

    @property
    def host(self) -> Session:
        return self  # on whose connection the calls are made

    def check(self, operation: str) -> None:
        """Raise unless the unit of work is open and no stream is in the way."""
        if self.shared.state not in self.usable_in:
            raise errors.UnitOfWorkClosedError(operation, self.shared.state)
        if self.streams:
            self.refuse_while_streaming(operation)

    def refuse_while_streaming(self, operation: str) -> None:
        """Raise `ConcurrentUseError` if a stream keeps the connection to itself."""
        held = self.sync_session.connections
        exclusive = (known.driver_of(each.dialect).exclusive_streams for each in held)
        if self.open_streams and any(exclusive):
            raise errors.ConcurrentUseError(operation, "a stream() is still being read")

    def bind_to(self, engine: AsyncEngine) -> None:
        self.bind = engine  # pyright: ignore[reportIncompatibleMethodOverride]
        self.sync_session.bind = engine.sync_engine

    async def failed(self, error: BaseException, operation: str) -> None:  # noqa: ARG002
        """Remember an outage; have the server stop a statement that was cancelled."""
        self.record_error(error)
        if asyncio.CancelledError in map(type, (error, error.__cause__)):
            await cancel_statements(self.sync_session.take_cancel_sql())

    def record_error(self, error: BaseException) -> None:
        is_outage = is_unavailable(error) or means(error, "conflict")
        if isinstance(error, Exception) and is_outage:
            self.shared.outages.append(error)
        if not self.sync_session.connections and (is_outage or is_of_database(error)):
            note = f"while connecting to {known.shown(self.bind.url)}"
            if note not in getattr(error, "__notes__", ()):
                error.add_note(note)

    async def call_due(self) -> None:
        """Call the `after_rollback` hooks of savepoints, if the rollback is proven."""
        # Not inside another call of this task: a hook may wait for its turn.
        is_proven = self.doomed_by is None and self.shared.state in WRITABLE
        if is_proven and not self.host.own_lock.is_mine:
            for callback in self.shared.savepoints.due.pop(self.journal, ()):
                await callback()

    @property
    def doomed_by(self) -> BaseException | None:
        """The error for which the work of this session can no longer be committed."""
        if self.journal.entries:
            return self.journal.doomed_by
        # SQLAlchemy has rolled the transaction back for a flush that failed.
        return None if self.sync_session.is_active else self.journal.last

    async def discard(self) -> None:
        cancel_sql = self.sync_session.take_cancel_sql()
        await greenlet_spawn(self.sync_session.discard)
        if self.shared.stuck < MOST_STUCK:
            await cancel_statements(cancel_sql)

    @property
    def open_streams(self) -> list[Any]:
        """Those of which rows may be on their way; one read to its end is closed."""
        return [each for each in self.streams if not each._soft_closed]  # noqa: SLF001

    async def close_streams(self) -> None:
        """Close the streams that nobody has read to their end; has the lock."""
        while self.streams:
            await greenlet_spawn(self.streams.popitem()[0].close)

    def begin_nested(self) -> Savepoint:
        """Open a SAVEPOINT; what fails inside is undone, the rest goes on."""
        return Savepoint(self, nested=True)

    def _check_add(self, operation: str) -> None:
        self.check(operation)
        # SQLAlchemy only warns, and may lose the object.
        if self.sync_session._flushing and not self.own_lock.is_mine:  # noqa: SLF001
            raise errors.ConcurrentUseError(operation, "another task is flushing")

    def add(self, instance: object, *, _warn: bool = True) -> None:
        self._check_add("session.add()")
        super().add(instance, _warn=_warn)

    def add_all(self, instances: Iterable[object]) -> None:
        self._check_add("session.add_all()")
        super().add_all(instances)

    async def open_stream(self, execute: Execute) -> AsyncResult[*TupleAny]:
        """Have the fetches of a stream wait for other calls too."""
        stream = await execute()
        host, result = self.host, stream._real_result  # noqa: SLF001  # no cycle

        async def serialize(fetch: Call) -> object:
            async with host.own_lock:
                try:
                    with host.own_lock.limit():
                        return await fetch()
                except BaseException as error:
                    await self.failed(error, "a fetch")
                    if isinstance(error, exc.DBAPIError):  # no more rows are coming
                        await greenlet_spawn(result.close)
                    raise
                finally:
                    if result._soft_closed and self.sync_session.cursors:  # noqa: SLF001
                        await self.give_back()

        still_open = {each: host.streams[each] for each in host.open_streams}
        host.streams = {**still_open, result: weakref.ref(serialize)}
        return adopt(StreamResult, stream, serialize)


class Savepoint(AsyncSessionTransaction):
    """SQLAlchemy's `AsyncSessionTransaction` for a SAVEPOINT, taking turns."""

    session: Session  # pyright: ignore[reportIncompatibleVariableOverride]
    ended: bool

    async def start(self, is_ctxmanager: bool = False) -> Savepoint:  # noqa: FBT001, FBT002
        async with self._turn():
            self.session.check("session.begin_nested()")
            self.ended = False
            await super().start(is_ctxmanager)
        return self

    async def commit(self) -> None:
        """Send RELEASE SAVEPOINT."""
        self.ended = True
        async with self._turn():
            await super().commit()

    async def rollback(self) -> None:
        """Send ROLLBACK TO SAVEPOINT."""
        self.ended = True
        async with self._turn():
            await super().rollback()
        await self.session.call_due()

    async def __aexit__(self, type_: object, value: object, traceback: object) -> None:
        """Release, or roll back to the savepoint after an exception.

        Raises `ConcurrentUseError` if another task has ended it with one around it;
        then it is not known what this block has kept, and nothing will be.
        """
        session, journal = self.session, self.session.journal
        try:
            with anyio.CancelScope(shield=True):
                await session.own_lock.__aenter__()
        except asyncio.CancelledError as error:
            journal.doom(error)  # the savepoint stays open
            raise
        try:
            async with self._turn():
                if session.shared.state not in WRITABLE:
                    return  # the decision has ended it, as it ends all of them
                is_open = self.sync_transaction in journal.savepoints.opened
                if not (self.ended or is_open):
                    why = "another task ended it"
                    lost = journal.doom(errors.ConcurrentUseError("A savepoint", why))
                    if value is None:
                        raise lost
                with anyio.fail_after(END_SECONDS, shield=True):
                    await super().__aexit__(type_, value, traceback)
        finally:
            session.own_lock.release()
        await session.call_due()

    @asynccontextmanager
    async def _turn(self) -> AsyncGenerator[None]:
        async with self.session.own_lock:
            try:
                yield
            except Exception as error:
                self.session.record_error(error)
                raise


# `delete_all`, `merge_all`: SQLAlchemy 2.1.
for _name in {*READS, *CHANGES, *ENDS}.intersection(dir(StatementSession)):
    setattr(Session, _name, _guarded(getattr(StatementSession, _name)))
