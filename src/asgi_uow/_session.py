"""The session of a unit of work: SQLAlchemy's, with three additions.

It takes plain SQL with named parameters, its calls take turns, and only the unit of
work may commit, roll back or close it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import math
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from anyio import current_effective_deadline, fail_after
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction

from ._dialects import READ_ONLY_CODES, code_of
from ._drivers import driver_of
from ._journal import Journal
from ._shield import run_to_completion
from ._streams import take_turns
from ._text import TextSession
from ._turn import Turn
from .errors import (
    ConcurrentUseError,
    ReadOnlySessionError,
    TransactionGoneError,
    UnitOfWorkClosedError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator, Iterable
    from types import TracebackType

    from sqlalchemy import Connection, orm
    from sqlalchemy.engine import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncResult
    from sqlalchemy.util.typing import TupleAny

    from ._hooks import Hooks
    from ._managed import ManagedSession
    from ._replicas import Route
    from ._streams import StreamResult

UNCONNECTED = frozenset({"flush", "close"})
"""Calls for which a read session needs no connection."""

END_SECONDS = 30.0
"""Seconds for RELEASE and ROLLBACK TO, which a cancelled scope does not interrupt."""

REPEATABLE = frozenset(
    {"execute", "scalar", "scalars", "stream", "stream_scalars", "get", "get_one"}
)
"""The reads that are made again if the server is lost before anything was read."""

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
            try:
                if self.route is not None:
                    result = await self._read(self.route, method, args, kwargs)
                else:
                    result = await method(self, *args, **kwargs)
            except Exception as error:
                self.note(error)
                self.name_read_only_error(operation, error)
                raise
            except asyncio.CancelledError:
                await self.stop_statement()
                if self.sync_session.read_only and self.writer() is None:
                    await run_to_completion(self.let_go())  # the next call reconnects
                raise
        await self.call_undone()
        return result

    return call  # type: ignore[return-value]  # the same signature, see wraps


class Savepoint(AsyncSessionTransaction):
    """SQLAlchemy's `AsyncSessionTransaction` for a SAVEPOINT, taking turns."""

    __slots__ = ("ended",)

    # Narrower than SQLAlchemy's, which only reads it.
    session: Session  # pyright: ignore[reportIncompatibleVariableOverride]
    ended: bool

    async def start(self, is_ctxmanager: bool = False) -> Savepoint:  # noqa: FBT001, FBT002
        """Send SAVEPOINT."""
        async with self.session.turn:
            self.session.check("session.begin_nested()")
            self.ended = False
            with self._noting():
                await super().start(is_ctxmanager)
        return self

    async def commit(self) -> None:
        """Send RELEASE SAVEPOINT."""
        self.ended = True
        async with self.session.turn:
            with self._noting():
                await super().commit()

    async def rollback(self) -> None:
        """Send ROLLBACK TO SAVEPOINT."""
        self.ended = True
        async with self.session.turn:
            with self._noting():
                await super().rollback()
        await self.session.call_undone()

    async def __aexit__(
        self,
        type_: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release, or roll back to the savepoint after an exception.

        Raises `ConcurrentUseError` if another task has ended it with one around it;
        then it is not known what this block has kept, and nothing will be.
        """
        async with self.session.turn:
            if not self.session.is_writable:
                return  # the decision has ended it, as it ends all of them
            if not self.ended and not self._is_open():
                error = ConcurrentUseError("A savepoint", "another task ended it")
                self.session.sync_session.journal.give_up(error)
                if value is None:
                    raise error
            with self._noting(), fail_after(END_SECONDS, shield=True):
                await super().__aexit__(type_, value, traceback)
        await self.session.call_undone()

    @contextmanager
    def _noting(self) -> Generator[None]:
        try:
            yield
        except Exception as error:
            self.session.note(error)
            raise

    def _is_open(self) -> bool:
        """Tell whether SQLAlchemy still has this savepoint among the open ones."""
        transaction = self.session.sync_session.get_nested_transaction()
        while transaction is not None and transaction is not self.sync_transaction:
            transaction = transaction.parent
        return transaction is not None


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
        writer: Callable[[], Session | None] = lambda: None,
        route: Route | None = None,
        **options: Any,
    ) -> None:
        """Bind to `bind`, as a session of the unit that `ties` leads to.

        `writer` gives the write session once a read session
        is to read there, `route` finds the server to read from otherwise;
        `run_aside` runs a statement on a connection of its own to a server.
        """
        self._check = ties.check
        self._call_undone = ties.call_undone
        self.note: Callable[[Exception], None] = ties.note
        self.run_aside = run_aside
        self.writer = writer
        self.route = route
        self.own_turn: Turn = Turn()
        self.streams: list[StreamResult] = []
        super().__init__(
            bind,
            sync_session_class=session_class,
            close_resets_only=False,
            **options,
        )
        self.sync_session.connections = []
        self.sync_session.kills = []
        self.sync_session.hooks = ties.hooks
        self.sync_session.journal = Journal(self.sync_session.is_ending, ties.hooks)
        self.sync_session.joined = self._joined

    async def _read(
        self,
        route: Route,
        method: Callable[..., Coroutine[object, object, object]],
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> object:
        """Read from the server that `route` finds; from another if that is lost."""
        ending = self.sync_session.is_ending()
        while True:
            needed = method.__name__ not in UNCONNECTED and not ending
            if needed and self.writer() is None:
                await route.lead(self)
            try:
                result = await method(self, *args, **kwargs)
            except Exception as error:
                again = method.__name__ in REPEATABLE and not ending
                if not (again and await route.moved(self, error)):
                    raise
            else:
                if self.sync_session.connections:
                    route.note_read()
                return result

    def name_read_only_error(self, operation: str, error: Exception) -> None:
        """Raise `ReadOnlySessionError` for what SQLAlchemy's event did not see."""
        refused = code_of(error) in READ_ONLY_CODES
        named = isinstance(error, ReadOnlySessionError)
        if self.sync_session.read_only and refused and not named:
            raise ReadOnlySessionError(operation) from error

    async def rest(self) -> None:
        """Hold no connection until the next call, unless one is needed in between."""
        streaming = any(stream.is_open for stream in self.streams)
        if self.writer() is None and self.own_turn.is_free and not streaming:
            async with self.own_turn:
                await self.let_go()

    async def let_go(self) -> None:
        """Give the connection of a read session back; the next call takes another.

        Objects stay loaded, which they would not after a rollback.
        """

        def let_go(session: orm.Session) -> None:
            transaction = session.get_transaction()
            if transaction is not None:
                transaction.close()

        sync = self.sync_session
        await AsyncSession.run_sync(self, let_go)
        sync.connections.clear()
        if sync.connected is not None:
            sync.held += time.perf_counter() - sync.connected
            sync.connected = None

    def _joined(self) -> Connection | None:
        writer = self.writer()
        return None if writer is None else writer.sync_session.own_connection()

    @property
    def turn(self) -> Turn:
        """The lock to hold during a call: of the session whose connection is used."""
        writer = self.writer()
        return self.own_turn if writer is None else writer.turn

    def check(self, operation: str) -> None:
        """Raise unless the unit of work is open, or is itself ending the session."""
        if not self.sync_session.is_ending():
            self._check(operation)

    def hand_over(self) -> None:
        """Let the current task, and no other, commit, roll back and close."""
        self.sync_session.finisher = asyncio.current_task()

    async def stop_statement(self) -> None:
        """Have the server stop the statement that was just cancelled.

        MySQL goes on with it, locks and all, although the connection is gone. So does
        PostgreSQL if an anyio scope was cancelled: its drivers tell the server, but
        are cancelled at that too.
        """
        kills, self.sync_session.kills = self.sync_session.kills, []
        in_cancelled_scope = current_effective_deadline() == -math.inf
        for engine, statement in kills:
            if in_cancelled_scope or not driver_of(engine.dialect).tells_the_server:
                await run_to_completion(self.run_aside(engine, statement))

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

    def refuse_changes(self) -> None:
        """Raise `ReadOnlySessionError` for changes that nobody would ever flush."""
        changed = any(map(self.is_modified, self.dirty))
        if changed or self.new or self.deleted:
            operation = "A change to an object"
            raise ReadOnlySessionError(operation)

    def refuse_while_streaming(self, operation: str) -> None:
        """Raise `ConcurrentUseError` if a stream keeps the connection to itself."""
        writer = self.writer()
        streams = self.streams if writer is None else [*self.streams, *writer.streams]
        if any(each.is_open for each in streams) and any(
            driver_of(connection.dialect).streams_alone
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
        await AsyncSession.run_sync(self, throw_away)
        await self.stop_statement()

    async def close_streams(self) -> None:
        """Close the streams that nobody has read to their end."""
        while self.streams:
            await self.streams.pop().close()

    async def require_whole(self) -> None:
        """Raise unless the transaction is there and whole, just before COMMIT.

        `ConnectionError` if the driver knows that a connection is dead: this tells
        "certainly not committed" from "nobody knows". `TransactionGoneError` if a
        statement through the driver itself, which the journal does not see, has
        ended it or has failed; PostgreSQL has to be asked for that.
        """
        for connection in self.sync_session.connections:
            raw = connection.connection.driver_connection
            driver = driver_of(connection.dialect)
            if driver.is_dead(raw):
                message = "the connection was lost before COMMIT was sent"
                raise ConnectionError(message)
            if connection.dialect.name == "sqlite" and not driver.in_transaction(raw):
                raise self.sync_session.journal.give_up(TransactionGoneError())
            if connection.dialect.name == "postgresql" and self.sync_session.exposed:
                try:
                    await self.scalar("SELECT 1")
                except DBAPIError as error:
                    raise TransactionGoneError from error

    def begin_nested(self) -> Savepoint:
        """Open a SAVEPOINT; what fails inside is undone, the rest goes on.

        Refused on a read session: there is no transaction to go back in.
        """
        if self.sync_session.read_only:
            operation = "begin_nested()"
            raise ReadOnlySessionError(operation)
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

    async def before_stream(self) -> None:
        """Begin a transaction for the cursor of a read session, if it needs one."""
        if not self.sync_session.read_only or self.writer() is not None:
            return
        connection = await self.connection()
        driver = driver_of(connection.dialect)
        raw = await connection.get_raw_connection()
        if driver.cursor_needs_begin and not driver.in_transaction(
            raw.driver_connection
        ):
            await connection.exec_driver_sql("BEGIN")

    def watch(self, stream: AsyncResult[*TupleAny]) -> AsyncResult[*TupleAny]:
        """Have the fetches of a stream take turns too."""
        turn = self.turn
        watched = take_turns(stream, lambda: turn)
        owner = self.writer() or self
        owner.streams = [each for each in owner.streams if each.is_open]
        owner.streams.append(watched)
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
