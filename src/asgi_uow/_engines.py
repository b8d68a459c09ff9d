"""The engines of a database: a writer, a read engine of its own, replicas.

Every engine, also one that was passed in, gets the same care: a connection that has
an open transaction is rolled back before another unit of work sees it, a dead one is
replaced before it is handed out, and a read engine is read-only from the first moment
of each connection.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from anyio import move_on_after, sleep
from sqlalchemy import event, text
from sqlalchemy import exc as sa_exc
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import StaticPool

from . import _dialects, _journal
from ._managed import ManagedSession, ReadOnlySession
from ._session import Session
from ._shield import bounded
from .errors import ConfigurationError, EngineNotInitialisedError, ReadOnlySessionError
from .observers import logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from sqlalchemy import Connection
    from sqlalchemy.engine import Engine
    from sqlalchemy.engine.interfaces import DBAPIConnection, ExceptionContext
    from sqlalchemy.pool import ConnectionPoolEntry, PoolResetState

ERROR_SEEN = "asgi_uow.error_seen"
IDLE_SINCE = "asgi_uow.idle_since"

ASIDE_SECONDS = 2.0
"""Seconds for connecting to the server and stopping a cancelled statement."""

RESOLVE_PAUSE = 0.05
"""Seconds between two questions to a server that cannot tell yet."""

PING_AFTER_IDLE = 30.0
"""Seconds of idleness after which a connection is pinged before it is handed out."""


class Engines:
    """A writer engine, a read engine on the same server, and replicas."""

    def __init__(
        self,
        engine: AsyncEngine | None,
        *,
        readers: Sequence[AsyncEngine] = (),
        commit_on_exit: bool = True,
        resolve_unknown: bool = False,
        **session_options: Any,
    ) -> None:
        """See `asgi_uow.Database`."""
        _refuse_reserved(session_options)
        self.commit_on_exit = commit_on_exit
        self.resolve_unknown = resolve_unknown
        self._session_options: dict[str, Any] = {"expire_on_commit": False}
        self._session_options |= session_options
        self._readers = tuple(readers)
        self._engine: AsyncEngine | None = None
        self._read_engine: AsyncEngine | None = None
        self._owned = False
        self.is_memory = False
        for reader in self._readers:
            _prepare(reader, read_only=True)
        if engine is not None:
            self.engine = engine

    @property
    def engine(self) -> AsyncEngine:
        """The writer; may be assigned once when the database was made without."""
        if self._engine is None:
            raise EngineNotInitialisedError
        return self._engine

    @engine.setter
    def engine(self, engine: AsyncEngine) -> None:
        if self._engine is not None:
            message = "This Database has an engine already; make another Database."
            raise ConfigurationError(message)
        _check_engine(engine)
        if self.resolve_unknown and engine.dialect.name != "postgresql":
            message = "resolve_unknown works on PostgreSQL only (pg_xact_status)."
            raise ConfigurationError(message)
        self.is_memory = _dialects.is_memory(engine.url)
        if self.is_memory:
            self._read_engine = engine
        else:
            self._read_engine = _derive_engine(engine)
            _prepare(self._read_engine, read_only=True)
        _prepare(engine, read_only=False)
        self._engine = engine

    @property
    def read_engine(self) -> AsyncEngine:
        """The read engine on the writer's own server."""
        if self._read_engine is None:
            raise EngineNotInitialisedError
        return self._read_engine

    @property
    def readers(self) -> tuple[AsyncEngine, ...]:
        """The engines that read sessions use: the replicas, or the read engine."""
        return self._readers or (self.read_engine,)

    @property
    def name(self) -> str:
        """The writer's URL without its password."""
        return self.engine.url.render_as_string(hide_password=True)

    def write_session(
        self,
        check: Callable[[str], None],
        note: Callable[[Exception], None],
    ) -> Session:
        """Make the write session of a unit; it connects when it executes."""
        return Session(
            self.engine,
            session_class=ManagedSession,
            check=check,
            note=note,
            run_aside=self._run_aside,
            **self._session_options,
        )

    def make_read_session(
        self,
        check: Callable[[str], None],
        note: Callable[[Exception], None],
        writer: Callable[[], Session | None],
    ) -> Session:
        """Make the read session of a unit; `writer` says where its reads belong."""
        return Session(
            self.readers[0],
            session_class=ReadOnlySession,
            check=check,
            note=note,
            run_aside=self._run_aside,
            writer=writer,
            **self._session_options
            | {"autoflush": False, "join_transaction_mode": "rollback_only"},
        )

    async def _run_aside(self, statement: str) -> None:
        """Run a statement on a connection of its own, for a few seconds at most."""

        async def run() -> None:
            async with aside.connect() as connection:
                await connection.exec_driver_sql(statement)

        aside = _derive_engine(self.engine)
        try:
            await bounded(run(), ASIDE_SECONDS)
        except (sa_exc.DBAPIError, OSError):
            # It ended by itself, or the server is gone and its locks with it.
            logger.debug("%s was not run", statement, exc_info=True)
        finally:
            await aside.dispose()

    async def was_committed(self, transaction_id: str, seconds: float) -> bool | None:
        """Ask PostgreSQL what became of a transaction; None if it cannot be told.

        Asks again for so many `seconds` while the server is away or still at it.
        """
        query = text("SELECT pg_xact_status(CAST(CAST(:id AS text) AS xid8))")
        status: str | None = "in progress"
        aside = _derive_engine(self.engine)
        with move_on_after(seconds):
            while status == "in progress":
                await sleep(RESOLVE_PAUSE)
                with suppress(sa_exc.DBAPIError, OSError):
                    async with aside.connect() as connection:
                        status = await connection.scalar(query, {"id": transaction_id})
        await aside.dispose()
        return {"committed": True, "aborted": False}.get(status or "")

    async def dispose(self) -> None:
        """Close every pooled connection of the writer and the readers."""
        for engine in {self.engine, self.read_engine, *self._readers}:
            await engine.dispose()

    async def dispose_owned(self) -> None:
        """Close the connections of the engines that asgi-uow made."""
        if self._owned:
            await self.dispose()
        elif self._read_engine is not None and self._read_engine is not self._engine:
            await self._read_engine.dispose()

    def __repr__(self) -> str:
        """Show the URL without its password."""
        shown = "no engine" if self._engine is None else self.name
        return f"{type(self).__name__}({shown})"


def _refuse_reserved(session_options: Iterable[str]) -> None:
    for name in ("sync_session_class", "close_resets_only", "bind", "autocommit"):
        if name in session_options:
            message = f"The session option {name!r} belongs to asgi-uow; leave it out."
            raise ConfigurationError(message)


def _check_engine(engine: object) -> None:
    if not isinstance(engine, AsyncEngine):
        message = (
            f"Database() takes an AsyncEngine, not {type(engine).__name__}: use "
            "create_async_engine(...), or Database.from_url(url) for a URL."
        )
        raise ConfigurationError(message)
    if isinstance(engine.sync_engine.pool, StaticPool):
        message = (
            "A StaticPool hands its one connection to several units of work at once, "
            "and the rollback of one undoes the work of another. Use "
            "Database.from_url(...), or a queue pool with pool_size=1, max_overflow=0."
        )
        raise ConfigurationError(message)


def _derive_engine(engine: AsyncEngine) -> AsyncEngine:
    """Make an engine with a pool of its own that connects just as `engine` does.

    Where AUTOCOMMIT is set on it, nothing is sent when a connection is closed.
    """
    return create_async_engine(
        engine.url,
        pool=engine.sync_engine.pool.recreate(),
        skip_autocommit_rollback=True,
        echo=engine.sync_engine.echo,
        hide_parameters=engine.sync_engine.hide_parameters,
    )


def _prepare(engine: AsyncEngine, *, read_only: bool) -> None:
    """Attach the listeners; all of them run inside SQLAlchemy's greenlet."""
    target = engine.sync_engine
    # First, so that those that follow know what a disconnect is.
    event.listen(target, "handle_error", _note_error)
    if target.dialect.name == "sqlite":
        event.listen(target, "connect", _sqlite_settings)
        if not read_only:
            event.listen(target, "begin", _sqlite_begin)
    if read_only:
        event.listen(target, "connect", _Reader(target).make_read_only)
        event.listen(target, "handle_error", _name_read_only_error)
    else:
        _journal.listen(target)
    care = _Care(target)
    event.listen(target, "checkout", care.check_alive)
    event.listen(target, "checkin", care.note_idle)
    event.listen(target, "reset", care.roll_back_if_open)


class _Reader:
    """Makes the connections of a read engine read-only, once each."""

    def __init__(self, engine: Engine) -> None:
        self.dialect = engine.dialect

    def make_read_only(self, dbapi_connection: DBAPIConnection, _: object) -> None:
        # Last of the connect listeners, so no isolation level set before survives.
        self.dialect.set_isolation_level(dbapi_connection, "AUTOCOMMIT")
        cursor = dbapi_connection.cursor()
        cursor.execute(_dialects.READ_ONLY_STATEMENT[self.dialect.name])
        cursor.close()


class _Care:
    """Looks after pooled connections by asking the driver, not the server."""

    def __init__(self, engine: Engine) -> None:
        self.dialect = engine.dialect
        self.driver = _dialects.driver_of(engine.dialect)

    def check_alive(
        self,
        dbapi_connection: DBAPIConnection,
        entry: ConnectionPoolEntry,
        _: object,
    ) -> None:
        """Replace a connection that is dead, or does not answer after idleness."""
        raw = self.dialect.get_driver_connection(dbapi_connection)
        idle_since: float | None = entry.info.pop(IDLE_SINCE, None)
        if self.driver.is_dead(raw):
            message = "the connection was closed while it was idle"
            raise sa_exc.DisconnectionError(message)
        if idle_since is None or time.monotonic() - idle_since < PING_AFTER_IDLE:
            return
        try:
            self.dialect.do_ping(dbapi_connection)
        except self.dialect.loaded_dbapi.Error as error:
            message = "the connection did not answer after a time of idleness"
            raise sa_exc.DisconnectionError(message) from error

    def note_idle(self, _: object, entry: ConnectionPoolEntry) -> None:
        """Remember when a connection came back, and that it is nobody's now."""
        entry.info[IDLE_SINCE] = time.monotonic()
        entry.info.pop(_journal.JOURNAL, None)

    def roll_back_if_open(
        self,
        dbapi_connection: DBAPIConnection,
        entry: ConnectionPoolEntry,
        state: PoolResetState,
    ) -> None:
        """Send ROLLBACK only if a transaction is open or an error was seen.

        SQLAlchemy itself sends none after a failed COMMIT, and the next user of the
        connection would commit what failed. An error packet of MySQL carries no
        status flag, hence the note that `_note_error` leaves.
        """
        if state.terminate_only or not state.asyncio_safe:
            return
        raw = self.dialect.get_driver_connection(dbapi_connection)
        if entry.info.pop(ERROR_SEEN, False) or self.driver.in_transaction(raw):
            dbapi_connection.rollback()
            if self.driver is not _dialects.UNKNOWN_DRIVER and (
                self.driver.in_transaction(raw)
            ):
                message = "the transaction could not be rolled back"
                raise sa_exc.DisconnectionError(message)


def _note_error(context: ExceptionContext) -> None:
    if _dialects.is_driver_disconnect(context.original_exception):
        context.is_disconnect = True
    connection = context.connection
    if connection is not None and not connection.invalidated and not connection.closed:
        connection.info[ERROR_SEEN] = True


def _name_read_only_error(context: ExceptionContext) -> None:
    error = context.sqlalchemy_exception
    if error is not None and _dialects.code_of(error) in _dialects.READ_ONLY_CODES:
        operation = "A statement"
        raise ReadOnlySessionError(operation) from error


def _sqlite_settings(dbapi_connection: DBAPIConnection, _: object) -> None:
    """Wait for locks, keep foreign keys, and let BEGIN be sent by `_sqlite_begin`."""
    dbapi_connection.isolation_level = None
    cursor = dbapi_connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {_dialects.SQLITE_BUSY_TIMEOUT}")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.close()


def _sqlite_begin(connection: Connection) -> None:
    """Take the write lock at once: an upgrade later can fail without waiting.

    A SAVEPOINT opened before any DML needs the explicit BEGIN too, or its RELEASE
    commits. https://www.sqlite.org/lang_savepoint.html
    """
    connection.exec_driver_sql("BEGIN IMMEDIATE")
