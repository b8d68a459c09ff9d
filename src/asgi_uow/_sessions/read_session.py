"""The read session of a unit of work: where it reads, and for how long it connects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import orm
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.util import greenlet_spawn

from asgi_uow._concurrency import run_to_completion
from asgi_uow._databases import known
from asgi_uow._databases.driver_errors import causes, means
from asgi_uow._decision import State
from asgi_uow._sessions.beginning import BeginningReadSession
from asgi_uow._sessions.managed import ReadOnlySession
from asgi_uow._sessions.session import READS, Savepoint, Session
from asgi_uow.errors import ReadOnlySessionError

if TYPE_CHECKING:
    import sqlalchemy as sa
    from sqlalchemy.ext.asyncio import AsyncResult
    from sqlalchemy.util.typing import TupleAny

    from asgi_uow._reading.route import Route
    from asgi_uow._sessions.statements import Call, Execute


class ReadSession(Session):
    """Reads from a replica or from the writer's server, or in its transaction."""

    sync_session_class: type[orm.Session] = ReadOnlySession
    beginning_class: type[orm.Session] = BeginningReadSession
    sync_session: ReadOnlySession  # pyright: ignore[reportIncompatibleVariableOverride]
    route: Route | None = None  # finds the replica to read from, if there is a choice
    sibling: Session
    usable_in: frozenset[State] = frozenset(State) - {State.CLOSED}

    def follow(self, writer: Session) -> None:
        """Read in the transaction of the unit's write session while that is in use."""
        self.sibling = writer
        self.sync_session.sibling = writer.sync_session

    @property
    def host(self) -> Session:
        return self if self.sync_session.writer is None else self.sibling

    @property
    def is_plain(self) -> bool:  # type: ignore[override]
        return self.route is None and self.sync_session.writer is None

    async def route_call(
        self, operation: str, method: Call, args: tuple[object, ...], kwargs: Any, /
    ) -> object:
        if (host := self.host) is not self:
            async with host.own_lock:
                host.refuse_while_streaming(operation)
                return await method(self, *args, **kwargs)
        if self.route is None or method.__name__ in {"flush", "close", "commit"}:
            return await method(self, *args, **kwargs)  # these need no connection
        while True:
            await self.route.connect(self)
            try:
                result = await method(self, *args, **kwargs)
            except Exception as error:
                reads = method.__name__ in READS
                if not (reads and await self.route.fail_over(self, error)):
                    raise
            else:
                self.route.has_read |= self.sync_session.beginning is None
                await self.give_back()  # it may have executed nothing
                return result

    async def failed(self, error: BaseException, operation: str) -> None:
        """Have the next read begin anew; name what the server has refused to write."""
        await super().failed(error, operation)
        if self.host is self:
            lost = any(_is_lost(each, error) for each in self.sync_session.connections)
            if lost or not isinstance(error, Exception):
                await run_to_completion(self.release_connection())
            await self.give_back()
        if means(error, "read_only") and not isinstance(error, ReadOnlySessionError):
            raise ReadOnlySessionError(operation) from error

    async def give_back(self) -> None:
        """Return the connection if nothing needs it; its caller has the lock."""
        if self.sync_session.connections:
            await greenlet_spawn(self.sync_session.give_back)

    async def lend_connection(self) -> None:
        """Return the connection to others, unless a call or a stream is using it."""
        if self.sync_session.connections and self.own_lock.owner is None:
            async with self.own_lock:
                await greenlet_spawn(self.sync_session.give_back, lend=True)

    async def release_connection(self) -> None:
        """Give the connection back; the next call takes another."""
        await self.close_streams()
        await greenlet_spawn(self.sync_session.release_connection)

    async def open_connection(self) -> AsyncConnection:
        with self.own_lock.limit():
            connection = await AsyncSession.run_sync(self, orm.Session.connection)
        return AsyncConnection._retrieve_proxy_for_target(connection)  # noqa: SLF001

    async def open_stream(self, execute: Execute) -> AsyncResult[*TupleAny]:
        """Begin a transaction for the cursor, if the driver needs one."""
        if self.host is self:
            connection = await self.open_connection()
            driver = known.driver_of(connection.dialect)
            raw: Any = await connection.get_raw_connection()
            if (
                driver.cursor_needs_begin
                and not driver.in_transaction(raw.driver_connection)
                # Otherwise the driver begins one by itself.
                and connection.dialect.detect_autocommit_setting(raw.dbapi_connection)
            ):
                own = known.OWN_STATEMENT
                await connection.exec_driver_sql("BEGIN", execution_options=own)
        return await super().open_stream(execute)

    def begin_nested(self) -> Savepoint:
        """Refuse: there is no transaction to go back in."""
        operation = "begin_nested()"
        raise ReadOnlySessionError(operation)

    def refuse_changes(self) -> None:
        """Raise `ReadOnlySessionError` for changes that nobody would ever flush."""
        if not self.sync_session._is_clean() and (  # noqa: SLF001  # no other way
            any(map(self.is_modified, self.dirty)) or self.new or self.deleted
        ):
            operation = "A change to an object"
            raise ReadOnlySessionError(operation)


def _is_lost(connection: sa.Connection, error: BaseException) -> bool:
    """Tell whether a connection is of no use, or the transaction of its stream."""
    if connection.closed or connection.invalidated:
        return not connection.closed
    driver = known.driver_of(connection.dialect)
    raw = connection.connection.driver_connection
    return driver.in_transaction(raw) and any(
        driver.aborts_transaction(raw, cause) for cause in causes(error)
    )
