"""The read session of a unit of work: where it reads, and for how long it connects."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from sqlalchemy.ext.asyncio import AsyncSession

from asgi_uow._concurrency import run_to_completion
from asgi_uow._databases.driver_errors import READ_ONLY_CODES, causes, code_of
from asgi_uow._databases.known import driver_of
from asgi_uow._sessions.managed import ReadOnlySession
from asgi_uow._sessions.session import Session
from asgi_uow.errors import ReadOnlySessionError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from sqlalchemy import Connection, orm
    from sqlalchemy.ext.asyncio import AsyncEngine

    from asgi_uow._reading.route import Route
    from asgi_uow._sessions.savepoint import Savepoint

UNCONNECTED = frozenset({"flush", "close"})
"""Calls that need no connection."""

REPEATABLE = frozenset(
    {"execute", "scalar", "scalars", "stream", "stream_scalars", "get", "get_one"}
)
"""The reads that are made again if the server is lost before anything was read."""


class ReadSession(Session):
    """Reads from a replica or from the writer's server, or in its transaction."""

    # Narrower still.
    sync_session: ReadOnlySession  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        bind: AsyncEngine,
        *,
        writer: Callable[[], Session | None],
        route: Route | None,
        **options: Any,
    ) -> None:
        """Bind to `bind` unless `route` finds another server to read from.

        `writer` gives the write session once the unit is to read there. For the
        `options` see `Session`.
        """
        self.writer = writer
        self.route = route
        super().__init__(bind, session_class=ReadOnlySession, **options)
        self.sync_session.find_joined = self._joined

    @property
    def host(self) -> Session:
        """The write session once the unit has used it: reads see its writes."""
        return self.writer() or self

    def _joined(self) -> Connection | None:
        writer = self.writer()
        return None if writer is None else writer.sync_session.own_connection()

    async def perform(
        self,
        method: Callable[..., Coroutine[object, object, object]],
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> object:
        """Make one call; raises `ReadOnlySessionError` for what the server refuses."""
        try:
            if self.route is not None:
                return await self._read(self.route, method, args, kwargs)
            return await super().perform(method, args, kwargs)
        except Exception as error:
            named = isinstance(error, ReadOnlySessionError)
            if named or code_of(error) not in READ_ONLY_CODES:
                raise
            operation = f"session.{method.__name__}()"
            raise ReadOnlySessionError(operation) from error

    async def failed(self, error: Exception) -> None:
        """Note it; where nothing more can be read there, the next read begins anew."""
        await super().failed(error)
        if self._has_spoilt(error):
            await self.let_go()

    def _has_spoilt(self, error: Exception) -> bool:
        """Tell whether it has lost the connection, or ended a stream's transaction."""
        if self.writer() is not None or self.sync_session.is_ending():
            return False
        connections = self.sync_session.connections
        if any(each.invalidated for each in connections):
            return True
        held = [
            (driver_of(each.dialect), each.connection.driver_connection)
            for each in connections
            if not each.closed
        ]
        return any(
            driver.in_transaction(raw) and driver.aborts_transaction(raw, each)
            for driver, raw in held
            for each in causes(error)
        )

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
            joined = self.writer() is not None
            try:
                result = await super().perform(method, args, kwargs)
            except Exception as error:
                again = method.__name__ in REPEATABLE and not (ending or joined)
                if not (again and await route.moved(self, error)):
                    raise
            else:
                if self.sync_session.connections:
                    route.note_read()
                return result

    async def cancelled(self) -> None:
        """Stop the statement and give the connection up; the next call reconnects."""
        await super().cancelled()
        if self.writer() is None:
            await run_to_completion(self.let_go())

    async def rest(self) -> None:
        """Hold no connection until the next call, unless one is needed in between."""
        streaming = any(stream.is_open for stream in self.streams)
        if self.writer() is None and self.own_turn.is_free and not streaming:
            async with self.own_turn:
                await self.let_go()

    async def let_go(self) -> None:
        """Give the connection back; the next call takes another.

        Objects stay loaded, which they would not after a rollback.
        """

        def let_go(session: orm.Session) -> None:
            transaction = session.get_transaction()
            if transaction is not None:
                transaction.close()

        sync = self.sync_session
        await self.close_streams()
        await AsyncSession.run_sync(self, let_go)
        sync.connections.clear()
        if sync.connected is not None:
            sync.held += time.perf_counter() - sync.connected
            sync.connected = None

    async def before_stream(self) -> None:
        """Begin a transaction for the cursor, if the driver needs one."""
        if self.writer() is not None:
            return
        connection = await self.connection()
        dialect = connection.dialect
        driver = driver_of(dialect)
        raw = await connection.get_raw_connection()
        if (
            driver.cursor_needs_begin
            and not driver.in_transaction(raw.driver_connection)
            and raw.dbapi_connection is not None
            # Or the driver begins one by itself.
            and dialect.detect_autocommit_setting(raw.dbapi_connection)
        ):
            await connection.exec_driver_sql("BEGIN")

    def begin_nested(self) -> Savepoint:
        """Refuse: there is no transaction to go back in."""
        operation = "begin_nested()"
        raise ReadOnlySessionError(operation)

    def refuse_changes(self) -> None:
        """Raise `ReadOnlySessionError` for changes that nobody would ever flush."""
        changed = any(map(self.is_modified, self.dirty))
        if changed or self.new or self.deleted:
            operation = "A change to an object"
            raise ReadOnlySessionError(operation)
