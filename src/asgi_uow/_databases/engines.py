"""The engines of a database: a writer, a read engine of its own, replicas."""

from __future__ import annotations

import functools
import hashlib
from typing import TYPE_CHECKING, Any, Literal

from anyio import fail_after
from sqlalchemy import exc as sa_exc
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import StaticPool

from asgi_uow._concurrency import bounded
from asgi_uow._databases import known
from asgi_uow._databases.pool import prepare
from asgi_uow._reading.causal import READ_FROM_WRITER
from asgi_uow._reading.route import Replica
from asgi_uow._sessions.managed import ManagedSession
from asgi_uow._sessions.read_session import ReadSession
from asgi_uow._sessions.session import Session
from asgi_uow.errors import ConfigurationError, EngineNotInitialisedError
from asgi_uow.observers import logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from sqlalchemy.engine import Engine

    from asgi_uow._reading.route import Route
    from asgi_uow._sessions.session import Ties

ASIDE_SECONDS = 2.0
"""Seconds for connecting to the server and stopping a cancelled statement."""


class Engines:
    """A writer engine, a read engine on the same server, and replicas."""

    def __init__(
        self,
        engine: AsyncEngine | None,
        *,
        readers: Sequence[AsyncEngine],
        commit_on_exit: bool,
        resolve_unknown: bool,
        read_isolation: Literal["REPEATABLE READ"] | None,
        **session_options: Any,
    ) -> None:
        """See `asgi_uow.Database`."""
        _refuse_reserved(session_options)
        if read_isolation not in {None, "REPEATABLE READ"}:
            message = f"read_isolation is 'REPEATABLE READ' or None: {read_isolation!r}"
            raise ConfigurationError(message)
        self.read_isolation: Literal["REPEATABLE READ"] | None = read_isolation
        self.commit_on_exit = commit_on_exit
        self.resolve_unknown = resolve_unknown
        self._session_options: dict[str, Any] = {"expire_on_commit": False}
        self._session_options |= session_options
        self._readers = tuple(readers)
        self.replicas: tuple[Replica, ...] = tuple(map(Replica, self._readers))
        self._engine: AsyncEngine | None = None
        self._read_engine: AsyncEngine | None = None
        self._owned = False
        self.is_memory: bool = False
        self._check_not_a_reader(engine)
        for reader in self._readers:
            _check_engine(reader)
            prepare(reader, read_only=True, read_isolation=read_isolation)
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
        self.use(engine)

    def use(self, engine: AsyncEngine, read_engine: AsyncEngine | None = None) -> None:
        """Take the writer, and the read engine or one made like the writer."""
        if self._engine is not None:
            message = "This Database has an engine already; make another Database."
            raise ConfigurationError(message)
        _check_engine(engine)
        self._check_not_a_reader(engine)
        if self.resolve_unknown and engine.dialect.name != "postgresql":
            message = "resolve_unknown works on PostgreSQL only (pg_xact_status)."
            raise ConfigurationError(message)
        self.is_memory = known.is_memory(engine.url)
        if self.is_memory:
            self._read_engine = engine
        else:
            self._read_engine = read_engine or _derive_engine(engine)
            prepare(
                self._read_engine, read_only=True, read_isolation=self.read_isolation
            )
        prepare(engine, read_only=False)
        self._engine = engine

    def _check_not_a_reader(self, engine: AsyncEngine | None) -> None:
        if engine in self._readers:
            message = "A reader cannot be the writer: it is made read-only."
            raise ConfigurationError(message)

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
        return known.shown(self.engine.url)

    @property
    def one_writer(self) -> bool:
        """Whether the database lets only one transaction write at a time."""
        return self.engine.dialect.name == "sqlite"

    @functools.cached_property
    def key(self) -> str:
        """Names the database in tokens: the same in every process, and no secret."""
        url = self.engine.url
        places = [url.query.get(key) for key in ("host", "port", "unix_socket")]
        name = f"{url.host}:{url.port}/{url.database} {places}"
        return hashlib.sha256(name.encode()).hexdigest()[:8]

    async def position(self, seconds: float) -> str | None:
        """Tell how far a replica must be to have what was committed until now.

        None where there is nothing to wait for, `READ_FROM_WRITER` if it could not
        be learnt in so many `seconds`.
        """
        if not self.replicas:
            return None
        found: str | None = None
        try:
            with fail_after(seconds):
                async with self.read_engine.connect() as connection:
                    database = known.database_of(connection.dialect)
                    found = await database.position(connection)
        except (sa_exc.SQLAlchemyError, OSError):
            logger.warning("the position of %s was not learnt", self.name)
            return READ_FROM_WRITER
        return READ_FROM_WRITER if found is None else found

    def write_session(self, ties: Ties) -> Session:
        """Make the write session of a unit; it connects when it executes."""
        return Session(
            self.engine,
            session_class=ManagedSession,
            ties=ties,
            run_aside=self._run_aside,
            **self._session_options,
        )

    def make_read_session(
        self,
        ties: Ties,
        writer: Callable[[], Session | None],
        route: Route | None,
    ) -> ReadSession:
        """Make a read session of a unit; `writer` says where its reads belong.

        `route` finds the replica to read from, where there is a choice.
        """
        return ReadSession(
            self.read_engine,
            ties=ties,
            run_aside=self._run_aside,
            writer=writer,
            route=route,
            **self._session_options
            | {"autoflush": False, "twophase": False}
            | {"join_transaction_mode": "rollback_only"},
        )

    @staticmethod
    async def _run_aside(engine: Engine, statement: str) -> None:
        """Run a statement on a connection of its own, for a few seconds at most."""

        async def run() -> None:
            async with aside.connect() as connection:
                await connection.exec_driver_sql(statement)

        aside = _derive_engine(AsyncEngine(engine))
        try:
            await bounded(run(), ASIDE_SECONDS)
        except (sa_exc.DBAPIError, OSError):
            # It ended by itself, or the server is gone and its locks with it.
            logger.debug("%s was not run", statement, exc_info=True)
        finally:
            await aside.dispose()

    async def was_committed(self, transaction: str, seconds: float) -> bool | None:
        """Ask PostgreSQL what became of a transaction; see `asgi_uow._resolve`."""
        aside = _derive_engine(self.engine)
        try:
            database = known.database_of(aside.dialect)
            return await database.was_committed(aside, transaction, seconds)
        finally:
            await aside.dispose()

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
    if not known.is_known(engine.dialect):
        message = (
            f"asgi-uow does not know the database {engine.dialect.name!r}; it knows "
            f"{', '.join(known.names())}."
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
    """Make an engine with a pool of its own that connects just as `engine` does."""
    sync = engine.sync_engine
    return create_async_engine(
        engine.url,
        pool=sync.pool.recreate(),
        echo=sync.echo,
        hide_parameters=sync.hide_parameters,
        execution_options=sync.get_execution_options(),
        json_serializer=getattr(sync.dialect, "_json_serializer", None),
        json_deserializer=getattr(sync.dialect, "_json_deserializer", None),
    )
