"""The session of a unit of work: SQLAlchemy's, with three additions.

It takes plain SQL with named parameters, its calls take turns, and only the unit of
work may commit, roll back or close it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncResult, AsyncSession

from asgi_uow._concurrency import Turn
from asgi_uow._databases.journal import Journal
from asgi_uow._databases.known import driver_of
from asgi_uow._sessions.kills import Kills, stop
from asgi_uow._sessions.savepoint import Savepoint
from asgi_uow._sessions.statements import TextSession
from asgi_uow._sessions.streams import take_turns
from asgi_uow.errors import ConcurrentUseError, UnitOfWorkClosedError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

    from sqlalchemy import orm
    from sqlalchemy.engine import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.util.typing import TupleAny

    from asgi_uow._sessions.managed import ManagedSession
    from asgi_uow._sessions.streams import Fetch, StreamResult
    from asgi_uow._unit.hooks import Hooks

F = TypeVar("F", bound="Callable[..., Coroutine[object, object, object]]")


def _takes_turn(method: F) -> F:
    """Let a call wait for the one in flight, then check that the unit is open."""

    @functools.wraps(method)
    async def call(self: Session, *args: object, **kwargs: object) -> object:
        operation = f"session.{method.__name__}()"
        # A read session takes its own turn, then the writer's if it reads there.
        async with self.own_turn, self.turn:
            self.check(operation)
            self.refuse_while_streaming(operation)
            perform = functools.partial(self.perform, method, args, kwargs)
            result = await self.attempt(perform)
        await self.call_undone()
        return result

    return call  # type: ignore[return-value]  # the same signature, see wraps


@dataclasses.dataclass(frozen=True, slots=True)
class Ties:
    """What ties a session to its unit of work."""

    check: Callable[[str], None]
    """Raises when the unit is not open (any more)."""
    note: Callable[[Exception], None]
    """Is told of every error."""
    hooks: Hooks
    """Follow the savepoints of the session."""
    call_undone: Callable[[object], Coroutine[object, object, None]]
    """Calls the hooks of savepoints that were rolled back."""


class Session(TextSession):
    """SQLAlchemy's `AsyncSession`, made by a unit of work and ended by it.

    Beside what `AsyncSession` offers it takes a plain string with named parameters:

        await session.execute("SELECT id FROM users WHERE name = :name", name="Ann")

    Calls from several tasks of one request take turns; two statements never meet on
    the connection. `commit()`, `rollback()`, `close()` and `begin()` raise
    `ManagedTransactionError`; `begin_nested()` is welcome. After the unit has been
    decided, every call on its write session raises `UnitOfWorkClosedError`.
    """

    # Narrower than SQLAlchemy's, which only reads it.
    sync_session: ManagedSession  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        bind: AsyncEngine,
        *,
        session_class: type[ManagedSession],
        ties: Ties,
        run_aside: Callable[[Engine, str], Coroutine[object, object, None]],
        **options: Any,
    ) -> None:
        """Bind to `bind`, as a session of the unit that `ties` leads to.

        `run_aside` runs a statement on a connection of its own to a server.
        """
        self._check = ties.check
        self._call_undone = ties.call_undone
        self.note: Callable[[Exception], None] = ties.note
        self.run_aside = run_aside
        self.own_turn: Turn = Turn()
        self.streams: list[StreamResult] = []
        super().__init__(
            bind,
            sync_session_class=session_class,
            close_resets_only=False,
            **options,
        )
        self.sync_session.connections = []
        self.sync_session.kills = Kills()
        self.sync_session.hooks = ties.hooks
        self.sync_session.journal = Journal(self.sync_session.is_ending, ties.hooks)

    async def attempt(
        self, call: Callable[[], Coroutine[object, object, object]]
    ) -> object:
        """Make one call, or one fetch of a stream, whose turn it is."""
        try:
            return await call()
        except Exception as error:
            await self.failed(error)
            raise
        except asyncio.CancelledError:
            await self.cancelled()
            raise

    async def perform(
        self,
        method: Callable[..., Coroutine[object, object, object]],
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> object:
        """Make one call."""
        return await method(self, *args, **kwargs)

    @property
    def host(self) -> Session:
        """The session on whose connection the calls are made."""
        return self

    @property
    def turn(self) -> Turn:
        """The lock to hold during a call."""
        return self.host.own_turn

    def check(self, operation: str) -> None:
        """Raise unless the unit of work is open, or is itself ending the session."""
        if not self.sync_session.is_ending():
            self._check(operation)

    def hand_over(self) -> None:
        """Let the current task, and no other, commit, roll back and close."""
        self.sync_session.finisher = asyncio.current_task()

    async def failed(self, error: Exception) -> None:
        """Note what was raised."""
        self.note(error)

    async def cancelled(self) -> None:
        """Have the server stop the statement whose call was cancelled."""
        await stop(self.sync_session.kills.take(), self.run_aside)

    async def call_undone(self) -> None:
        """Call the `after_rollback` hooks of savepoints, if the rollback is proven."""
        sync = self.sync_session
        if not sync.hooks.has_undone(sync.journal) or not self.is_writable:
            return
        # Not inside another call of this task: a hook may wait for its turn.
        if not self.turn.is_mine and self.doomed_by is None:
            await self._call_undone(sync.journal)

    @property
    def is_writable(self) -> bool:
        """Whether the unit of work is not decided yet."""
        try:
            self._check("")
        except UnitOfWorkClosedError:
            return False
        return True

    @property
    def doomed_by(self) -> BaseException | None:
        """The error for which the work of this session can no longer be committed.

        A failed flush dooms too: SQLAlchemy has rolled the transaction back.
        """
        journal = self.sync_session.journal
        if journal.doomed_by is None and not self.is_active:
            return journal.last
        return journal.doomed_by

    @property
    def has_changes(self) -> bool:
        """Whether a flush would have something to do."""
        return bool(self.new or self.dirty or self.deleted)

    def refuse_while_streaming(self, operation: str) -> None:
        """Raise `ConcurrentUseError` if a stream keeps the connection to itself."""
        streams = {*self.streams, *self.host.streams}
        if any(each.is_open for each in streams) and any(
            driver_of(connection.dialect).exclusive_streams
            for connection in self.sync_session.connections
        ):
            raise ConcurrentUseError(operation, "a stream() is still being read")

    async def throw_away(self) -> None:
        """Close the connections for good, also under a statement in flight."""

        def throw_away(session: orm.Session) -> None:
            # A close() that failed may have forgotten its connections.
            for connection in self.sync_session.connections:
                if not connection.closed:
                    connection.invalidate()
                    connection.close()
            session.close()

        self.hand_over()
        kills = self.sync_session.kills.take()
        await AsyncSession.run_sync(self, throw_away)
        await stop(kills, self.run_aside)

    async def close_streams(self) -> None:
        """Close the streams that nobody has read to their end."""
        while self.streams:
            await AsyncResult.close(self.streams.pop())  # whose turn it is

    def begin_nested(self) -> Savepoint:
        """Open a SAVEPOINT; what fails inside is undone, the rest goes on."""
        return Savepoint(self, nested=True)

    def _check_add(self, operation: str) -> None:
        self.check(operation)
        # SQLAlchemy only warns, and may lose the object.
        if self.sync_session._flushing and not self.turn.is_mine:  # noqa: SLF001
            raise ConcurrentUseError(operation, "another task is flushing")

    def add(self, instance: object, *, _warn: bool = True) -> None:
        """Place an object in the session; it is inserted at the next flush."""
        self._check_add("session.add()")
        super().add(instance, _warn=_warn)

    def add_all(self, instances: Iterable[object]) -> None:
        """Place several objects in the session."""
        self._check_add("session.add_all()")
        super().add_all(instances)

    def watch(self, stream: AsyncResult[*TupleAny]) -> AsyncResult[*TupleAny]:
        """Have the fetches of a stream take turns too."""
        turn = self.turn

        async def in_turn(fetch: Fetch) -> object:
            async with turn:
                try:
                    return await self.attempt(fetch)
                except DBAPIError:
                    await AsyncResult.close(watched)  # no more rows are on their way
                    raise

        watched = take_turns(stream, in_turn)
        host = self.host
        host.streams = [each for each in host.streams if each.is_open]
        host.streams.append(watched)
        return watched


# `delete_all`, `merge_all`: SQLAlchemy 2.1.
for _name in (
    "execute",
    "scalar",
    "scalars",
    "stream",
    "stream_scalars",
    "get",
    "get_one",
    "refresh",
    "run_sync",
    "delete",
    "delete_all",
    "merge",
    "merge_all",
    "flush",
    "connection",
    "commit",
    "rollback",
    "close",
    "reset",
    "invalidate",
):
    if hasattr(TextSession, _name):
        setattr(Session, _name, _takes_turn(getattr(TextSession, _name)))
