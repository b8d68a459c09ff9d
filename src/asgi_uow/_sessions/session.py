"""The session of a unit of work: SQLAlchemy's, with three additions.

It takes plain SQL with named parameters, its calls take turns, and only the unit of
work may commit, roll back or close it.
"""

from __future__ import annotations

import asyncio
import functools
import math
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncResult, AsyncSession
from sqlalchemy.util import greenlet_spawn

from asgi_uow import errors
from asgi_uow._concurrency import TaskLock, run_to_completion
from asgi_uow._databases import known
from asgi_uow._databases.driver_errors import is_unavailable
from asgi_uow._databases.engines import execute_on_new_connection
from asgi_uow._databases.journal import Journal
from asgi_uow._decision import WRITABLE
from asgi_uow._sessions.managed import ManagedSession
from asgi_uow._sessions.savepoint import Savepoint
from asgi_uow._sessions.statements import StatementSession, StreamResult, adopt

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import sqlalchemy as sa
    from sqlalchemy import orm
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.util.typing import TupleAny

    from asgi_uow._databases.engines import Engines
    from asgi_uow._sessions.managed import Shared
    from asgi_uow._sessions.statements import Call

F = TypeVar("F", bound="Call")

READS = ("execute", "scalar", "scalars", "stream", "stream_scalars", "get", "get_one")
CHANGES = ("refresh", "run_sync", "delete", "delete_all", "merge", "merge_all", "flush")
ENDS = ("connection", "commit", "rollback", "close", "reset", "invalidate")


def _guarded(method: F) -> F:
    """Let a call wait for the one in flight, then check that the unit is open."""
    operation = f"session.{method.__name__}()"

    @functools.wraps(method)
    async def call(self: Session, *args: object, **kwargs: object) -> object:
        task = asyncio.current_task()
        lock = self.own_lock
        if task is not None and not lock.take(task):
            await lock.wait(task)
        try:
            self.check(operation)
            if self.is_plain:
                result = await method(self, *args, **kwargs)
            else:
                result = await self.route_call(operation, method, args, kwargs)
        except BaseException as error:
            await self.failed(error, operation)
            raise
        finally:
            lock.release()
        if self.shared.savepoints.due:
            await self.call_due()
        return result

    return call  # type: ignore[return-value]  # the same signature, see wraps


class Session(StatementSession):
    """SQLAlchemy's `AsyncSession`, made by a unit of work and ended by it.

    Beside what `AsyncSession` offers it takes a plain string with named parameters:

        await session.execute("SELECT id FROM users WHERE name = :name", name="Ann")

    Calls from several tasks of one request take turns; two statements never meet on
    the connection. `commit()`, `rollback()`, `close()` and `begin()` raise
    `ManagedTransactionError`; `begin_nested()` is welcome. After the unit has been
    decided, every call on its write session raises `UnitOfWorkClosedError`.
    """

    sync_session_class: type[orm.Session] = ManagedSession
    # Narrower than SQLAlchemy's, which only reads it.
    sync_session: ManagedSession  # pyright: ignore[reportIncompatibleVariableOverride]

    usable_in = WRITABLE
    """The states of its unit in which it may be called."""
    is_plain = True
    """Whether calls need nothing but the session's own connection."""

    def __init__(
        self, db: Engines, bind: AsyncEngine, options: Mapping[str, Any], shared: Shared
    ) -> None:
        super().__init__(bind, close_resets_only=False, **options)
        self.own_lock: TaskLock = TaskLock()
        self.shared = shared
        self.streams: list[StreamResult] = []
        self.journal: Journal = Journal(db.facts, db.driver, shared.savepoints)
        sync = self.sync_session
        sync.database, sync.shared, sync.journal = db, shared, self.journal
        sync.connections = {}

    @property
    def host(self) -> Session:
        """The session on whose connection the calls are made."""
        return self

    @property
    def lock(self) -> TaskLock:
        return self.host.own_lock

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
        if self.is_streaming and any(exclusive):
            raise errors.ConcurrentUseError(operation, "a stream() is still being read")

    @property
    def is_streaming(self) -> bool:
        return any(each.is_open for each in self.streams)

    async def route_call(
        self, operation: str, method: Call, args: tuple[object, ...], kwargs: Any
    ) -> object:
        """Make a call for which another session or server has to be looked for."""
        raise NotImplementedError

    async def failed(self, error: BaseException, operation: str) -> None:  # noqa: ARG002
        """Remember an outage; have the server stop a statement that was cancelled."""
        if isinstance(error, Exception):
            self.record_error(error)
        elif isinstance(error, asyncio.CancelledError):
            await cancel_statements(self.sync_session.take_cancel_sql())

    def record_error(self, error: Exception) -> None:
        if is_unavailable(error):
            self.shared.outages.append(error)

    @property
    def is_decided(self) -> bool:
        """Whether the unit of work has begun to end."""
        return self.shared.state not in WRITABLE

    async def call_due(self) -> None:
        """Call the `after_rollback` hooks of savepoints, if the rollback is proven."""
        # Not inside another call of this task: a hook may wait for its turn.
        if not self.is_decided and self.doomed_by is None and not self.lock.is_mine:
            for callback in self.shared.savepoints.take_due(by=self.journal):
                await callback()

    @property
    def doomed_by(self) -> BaseException | None:
        """The error for which the work of this session can no longer be committed.

        A failed flush dooms too: SQLAlchemy has rolled the transaction back.
        """
        if not self.journal.entries and not self.sync_session.is_active:
            return self.journal.last
        return self.journal.doomed_by

    @property
    def has_changes(self) -> bool:
        return not self.sync_session._is_clean()  # noqa: SLF001  # no other way

    async def discard(self) -> None:
        cancel_sql = self.sync_session.take_cancel_sql()
        await AsyncSession.run_sync(self, lambda _: self.sync_session.discard())
        await cancel_statements(cancel_sql)

    async def close_streams(self) -> None:
        """Close the streams that nobody has read to their end; has the lock."""
        while self.streams:
            await AsyncResult.close(self.streams.pop())

    def begin_nested(self) -> Savepoint:
        """Open a SAVEPOINT; what fails inside is undone, the rest goes on."""
        return Savepoint(self, nested=True)

    def _check_add(self, operation: str) -> None:
        self.check(operation)
        # SQLAlchemy only warns, and may lose the object.
        if self.sync_session._flushing and not self.lock.is_mine:  # noqa: SLF001
            raise errors.ConcurrentUseError(operation, "another task is flushing")

    def add(self, instance: object, *, _warn: bool = True) -> None:
        self._check_add("session.add()")
        super().add(instance, _warn=_warn)

    def add_all(self, instances: Iterable[object]) -> None:
        self._check_add("session.add_all()")
        super().add_all(instances)

    def watch(self, stream: AsyncResult[*TupleAny]) -> AsyncResult[*TupleAny]:
        """Have the fetches of a stream wait for other calls too."""
        host, lock = self.host, self.lock
        close = stream._real_result.close  # noqa: SLF001  # the stream would be a cycle

        async def serialize(fetch: Call) -> object:
            async with lock:
                try:
                    return await fetch()
                except BaseException as error:
                    await self.failed(error, "a fetch")
                    if isinstance(error, DBAPIError):
                        await greenlet_spawn(close)  # no more rows are on their way
                    raise

        watched = adopt(StreamResult, stream, serialize)
        host.streams = [each for each in host.streams if each.is_open]
        host.streams.append(watched)
        return watched


async def cancel_statements(cancel_sql: list[tuple[sa.Engine, str]]) -> None:
    """Cancel statements in flight on their server, from other connections.

    MySQL goes on with a statement that was cancelled, locks and all, although the
    connection is gone. So does PostgreSQL if an anyio scope was cancelled: its drivers
    send a cancel request, but need an await for it, which the scope cancels too.
    """
    in_cancelled_scope = anyio.current_effective_deadline() == -math.inf
    for engine, statement in cancel_sql:
        if in_cancelled_scope or not known.driver_of(engine.dialect).cancels_on_server:
            await run_to_completion(execute_on_new_connection(engine, statement))


# `delete_all`, `merge_all`: SQLAlchemy 2.1.
for _name in {*READS, *CHANGES, *ENDS}.intersection(dir(StatementSession)):
    setattr(Session, _name, _guarded(getattr(StatementSession, _name)))
