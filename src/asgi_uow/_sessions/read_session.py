"""The read session of a unit of work: where it reads, and for how long it connects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy.ext.asyncio import AsyncSession

from asgi_uow._concurrency import run_to_completion
from asgi_uow._databases import known
from asgi_uow._databases.driver_errors import causes, means
from asgi_uow._decision import State
from asgi_uow._sessions.managed import ReadOnlySession
from asgi_uow._sessions.session import READS, Session
from asgi_uow.errors import ReadOnlySessionError

if TYPE_CHECKING:
    from sqlalchemy import orm
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from asgi_uow._reading.route import Route
    from asgi_uow._sessions.savepoint import Savepoint
    from asgi_uow._sessions.statements import Call

UNCONNECTED = frozenset({"flush", "close"})
"""Calls that need no connection."""


class ReadSession(Session):
    """Reads from a replica or from the writer's server, or in its transaction."""

    sync_session_class: type[orm.Session] = ReadOnlySession
    # Narrower still.
    sync_session: ReadOnlySession  # pyright: ignore[reportIncompatibleVariableOverride]
    route: Route | None = None
    """Finds the replica to read from, where there is a choice."""
    sibling: Session | None = None
    usable_in: frozenset[State] = frozenset(State) - {State.CLOSED}

    def follow(self, writer: Session, *, always: bool) -> None:
        """Read in the transaction of the unit's write session while that is in use."""
        self.sibling = writer
        self.sync_session.sibling = writer.sync_session
        self.sync_session.joins_always = always

    @property
    def writer(self) -> Session | None:
        """The write session while reads belong into its transaction."""
        return None if self.sync_session.writer is None else self.sibling

    @property
    def host(self) -> Session:
        """The write session once the unit has used it: reads see its writes."""
        return self.writer or self

    @property
    def is_plain(self) -> bool:  # type: ignore[override]
        return self.route is None and self.sync_session.writer is None

    async def route_call(
        self, operation: str, method: Call, args: tuple[object, ...], kwargs: Any
    ) -> object:
        """Read in the writer's transaction, or from the server that the route finds."""
        if (writer := self.writer) is not None:
            async with writer.own_lock:
                writer.refuse_while_streaming(operation)
                return await method(self, *args, **kwargs)
        if self.route is None or method.__name__ in UNCONNECTED:
            return await method(self, *args, **kwargs)
        while True:
            await self.route.connect(self)
            try:
                result = await method(self, *args, **kwargs)
            except Exception as error:
                # Again on another server, if this one was lost before it was read from.
                again = method.__name__ in READS
                if not (again and await self.route.fail_over(self, error)):
                    raise
            else:
                if self.sync_session.connections:
                    self.route.has_read = True
                return result

    async def failed(self, error: BaseException, operation: str) -> None:
        """Have the next read begin anew where nothing more can be read.

        Raises `ReadOnlySessionError` for what the server has refused.
        """
        await super().failed(error, operation)
        if self.writer is None and not isinstance(error, Exception):
            await run_to_completion(self.release_connection())
        elif self._must_reconnect(error):
            await self.release_connection()
        named = isinstance(error, ReadOnlySessionError)
        if not named and means(error, "read_only"):
            raise ReadOnlySessionError(operation) from error

    def _must_reconnect(self, error: BaseException) -> bool:
        """Tell whether it has lost the connection, or ended a stream's transaction."""
        if self.writer is not None:
            return False
        connections = self.sync_session.connections
        if any(each.invalidated for each in connections):
            return True
        held = [
            (known.driver_of(each.dialect), each.connection.driver_connection)
            for each in connections
            if not each.closed
        ]
        return any(
            driver.in_transaction(raw)
            and any(driver.aborts_transaction(raw, each) for each in causes(error))
            for driver, raw in held
        )

    async def release_if_idle(self) -> None:
        """Return the connection to the pool if no call or stream is using it."""
        if self.writer is None and self.own_lock.is_free and not self.is_streaming:
            async with self.own_lock:
                await self.release_connection()

    async def release_connection(self) -> None:
        """Give the connection back; the next call takes another."""
        await self.close_streams()
        sync = self.sync_session
        await AsyncSession.run_sync(self, lambda _: sync.release_connection())

    # What the route asks for

    def is_bound_to(self, engine: AsyncEngine) -> bool:
        return self.sync_session.bind is engine.sync_engine

    def bind_to(self, engine: AsyncEngine) -> None:
        self.sync_session.bind = engine.sync_engine

    @property
    def is_connected(self) -> bool:
        return bool(self.sync_session.connections)

    async def open_connection(self) -> AsyncConnection:
        return await AsyncSession.connection(self)

    async def before_stream(self) -> None:
        """Begin a transaction for the cursor, if the driver needs one."""
        if self.writer is not None:
            return
        connection = await self.connection()
        driver = known.driver_of(connection.dialect)
        raw = await connection.get_raw_connection()
        if (
            driver.cursor_needs_begin
            and not driver.in_transaction(raw.driver_connection)
            and raw.dbapi_connection is not None
            # Otherwise the driver begins one by itself.
            and connection.dialect.detect_autocommit_setting(raw.dbapi_connection)
        ):
            await connection.exec_driver_sql("BEGIN")

    def begin_nested(self) -> Savepoint:
        """Refuse: there is no transaction to go back in."""
        operation = "begin_nested()"
        raise ReadOnlySessionError(operation)

    def refuse_changes(self) -> None:
        """Raise `ReadOnlySessionError` for changes that nobody would ever flush."""
        if self.has_changes and (
            any(map(self.is_modified, self.dirty)) or self.new or self.deleted
        ):
            operation = "A change to an object"
            raise ReadOnlySessionError(operation)
