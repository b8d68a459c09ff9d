"""The engines of a database: a writer, a read engine of its own, replicas."""

from __future__ import annotations

import copy
import os
from contextlib import asynccontextmanager, suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import anyio
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import StaticPool

from asgi_uow._concurrency import bounded, run_to_completion
from asgi_uow._databases import known, loops
from asgi_uow._databases.configuration import OF_SESSIONS, check
from asgi_uow._databases.connection import POLICY
from asgi_uow._databases.health import Replica
from asgi_uow._databases.keys import Claim, was_kept
from asgi_uow._databases.pool import Use, attach_listeners
from asgi_uow.errors import ConfigurationError, EngineNotInitialisedError
from asgi_uow.observers import logger

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
    from typing import TypeAlias

    from sqlalchemy import Connection, Engine

    # It is given the session, which is defined above this room.
    OnBegin: TypeAlias = Callable[[Any], Coroutine[Any, Any, object]]

READ_OPTIONS = {
    "autoflush": False,
    "twophase": False,
    "join_transaction_mode": "rollback_only",
}
PAUSE, TIMES_UNLISTED = 0.1, 5  # seconds; before a prepared transaction is given up
CANCEL_SECONDS = 2.0  # for connecting to a server and stopping a statement there


class Engines:
    def __init__(
        self,
        engine: AsyncEngine | None,
        *,
        readers: Sequence[AsyncEngine] = (),
        commit_on_exit: bool = True,
        resolve_unknown: bool = False,
        read_isolation: Literal["REPEATABLE READ"] | None = None,
        pooler: Literal["transaction", "session"] | None = None,
        on_begin: OnBegin | None = None,
        commit_flushes: bool = False,
        **session_options: Any,
    ) -> None:
        for name in sorted(session_options.keys() - OF_SESSIONS):
            message = f"{name!r} is no option of a session, or belongs to asgi-uow. "
            message += "An engine's go to create_async_engine() or Database.from_url()."
            raise ConfigurationError(message)
        check(locals() | session_options)
        # Not defaults of the class: an attribute that hides one is found slowly.
        self._engine: AsyncEngine | None = None
        self._read_engine: AsyncEngine | None = None
        self.is_memory: bool = False
        self.owns_engines: bool = False
        self.commit_on_exit = commit_on_exit
        self.on_begin = on_begin
        self.resolve_unknown = resolve_unknown
        self.commit_flushes = commit_flushes
        self.read_isolation: Literal["REPEATABLE READ"] | None = read_isolation
        self.pooler: Literal["transaction", "session"] | None = pooler
        self._readers = tuple(readers)
        for reader in self._readers:
            _check_engine(reader)
        self.replicas: tuple[Replica, ...] = tuple(map(Replica, self._readers))
        self.write_options: dict[str, Any] = {"expire_on_commit": False}
        self.write_options |= session_options
        self.read_options: dict[str, Any] = self.write_options | READ_OPTIONS
        if engine is not None:
            self.engine = engine
        else:
            self._make_readers_read_only()

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
        if engine.sync_engine.pool in (r.sync_engine.pool for r in self._readers):
            message = "A reader cannot be the writer: it is made read-only."
            raise ConfigurationError(message)
        facts = known.database_of(engine.dialect)
        unfit = self.read_isolation if facts.BEGIN_READ_ONLY else facts.SINGLE_WRITER
        unfit = unfit or self.write_options.get("twophase")
        if self.pooler == "transaction" and unfit:
            message = "pooler: not with SQLite, twophase, or read_isolation on MySQL."
            raise ConfigurationError(message)
        self.is_memory = known.is_memory(engine.url)
        attach_listeners(engine, Use(read_only=False, pooler=self.pooler))
        if not self.is_memory:  # there the one connection has to be writable
            self._read_engine = loops.derive_engine(engine)
        self._make_readers_read_only()
        self._engine = engine

    def _make_readers_read_only(self) -> None:
        """At once: a connection that is in the pool already stays what it is."""
        level = self.read_isolation or ("READ COMMITTED" if self.on_begin else None)
        for each in filter(None, (self._read_engine, *self._readers)):
            attach_listeners(each, Use(True, level, self.pooler))  # noqa: FBT003

    @property
    def read_engine(self) -> AsyncEngine:
        """The read engine on the writer's own server."""
        return self._read_engine or self.engine

    @property
    def readers(self) -> tuple[AsyncEngine, ...]:
        """The engines that read sessions use: the replicas, or the read engine."""
        return self._readers or (self.read_engine,)

    @cached_property
    def facts(self) -> known.Database:
        return known.database_of(self.engine.dialect)

    @cached_property
    def driver(self) -> known.Driver:
        return known.driver_of(self.engine.dialect)

    def engine_at(self, level: str) -> AsyncEngine:
        """Give the writer with another isolation level for its next transaction."""
        sync = self.engine.sync_engine
        levels = {*sync.dialect.get_isolation_level_values(None)}  # type: ignore[arg-type]
        begins_with, own = self.facts.BEGIN_AT_LEVEL, sync.get_execution_options()
        if level not in levels - {"AUTOCOMMIT"}:
            message = f"isolation_level() is one of {levels}, not AUTOCOMMIT: {level!r}"
            raise ConfigurationError(message)
        if "isolation_level" in own and not begins_with:
            message = "Give the engine's own isolation_level to create_async_engine()."
            raise ConfigurationError(message)
        options: dict[str, Any] = {"isolation_level": level}
        if begins_with:
            options = {POLICY: copy.copy(own[POLICY])}
            options[POLICY].begins_with = begins_with.format(level)
        engine = self.engine.execution_options(**options)
        engine.sync_engine._connection_cls = sync._connection_cls  # noqa: SLF001
        return engine

    @cached_property
    def name(self) -> str:
        return known.shown(self.engine.url)

    @cached_property
    def writes_to(self) -> object:
        """The same for databases whose writers wait for each other (SQLite)."""
        if not self.facts.SINGLE_WRITER:
            return self
        url = self.engine.url
        return self.engine if self.is_memory else os.path.realpath(url.database or "")

    @cached_property
    def place(self) -> str:
        """Where the database is: the same in every process, and not for outsiders."""
        url = self.engine.url
        places = [url.query.get(key) for key in ("host", "port", "unix_socket")]
        return f"{url.host}:{url.port}/{url.database} {places}"

    async def settle(
        self, xid: str | None, proof: str | Claim, seconds: float
    ) -> bool | None:
        """Commit what was prepared; else ask what became of the transaction."""
        if xid is not None:
            return await self.end_prepared(xid, seconds, commit=True)
        async with _aside(self.engine) as aside:
            return await was_kept(aside, proof, seconds)

    async def end_prepared(
        self, xid: str, seconds: float, *, commit: bool
    ) -> bool | None:
        """End a prepared transaction from aside; None if that could not be done.

        False if the server knows of none, as it may while who prepared it is connected.
        """

        def end(sync: Connection) -> bool:
            listed: list[str | bytes] = sync.recover_twophase()
            if is_listed := not {xid, xid.encode()}.isdisjoint(listed):
                by = sync.commit_prepared if commit else sync.rollback_prepared
                by(xid, recover=True)
            return is_listed

        async with _aside(self.engine) as aside:
            autocommit = aside.execution_options(isolation_level="AUTOCOMMIT")
            with anyio.move_on_after(seconds):
                unlisted = 0  # not once alone: a server may just be closing for it
                while unlisted < TIMES_UNLISTED:
                    # Of SQLAlchemy, or of the driver: all the same, it is asked again.
                    with suppress(Exception):
                        async with autocommit.connect() as connection:
                            if await connection.run_sync(end):
                                return True
                            unlisted += 1
                    await anyio.sleep(PAUSE)
                return False
        return None

    @property
    def engines(self) -> tuple[AsyncEngine, ...]:
        """All engines, each once: the writer, its read engine, the replicas."""
        return tuple({self.engine: 0, self.read_engine: 0}) + self._readers

    async def dispose(self) -> None:
        """Close every pooled connection of the writer and the readers, all at once."""
        await _dispose(set(self.engines))

    async def dispose_owned(self) -> None:
        """Close the connections of the engines that asgi-uow made."""
        if self.owns_engines:
            await self.dispose()
        elif self._read_engine is not None:
            await _dispose({self._read_engine})

    def __repr__(self) -> str:
        shown = "no engine" if getattr(self, "_engine", None) is None else self.name
        return f"{type(self).__name__}({shown})"


async def _dispose(engines: set[AsyncEngine]) -> None:
    await loops.close(*(each.pool for each in engines))
    for each in engines:
        await each.dispose()


@asynccontextmanager
async def _aside(engine: AsyncEngine) -> AsyncGenerator[AsyncEngine]:
    aside = loops.derive_engine(engine)
    try:
        yield aside
    finally:
        await aside.dispose()


async def cancel_statements(cancel_sql: list[tuple[Engine, str]]) -> None:
    """Cancel, from others, what a server goes on with when its connection is gone."""
    for engine, statement in cancel_sql:
        executing = bounded(_execute_aside(engine, statement), CANCEL_SECONDS)
        try:
            await run_to_completion(executing)
        except Exception:  # noqa: BLE001  # the cancellation goes on
            # It ended by itself, or the server is gone and its locks with it.
            logger.debug("%s was not run", statement, exc_info=True)


async def _execute_aside(engine: Engine, statement: str) -> None:
    async with _aside(AsyncEngine(engine)) as aside, aside.connect() as connection:
        await connection.exec_driver_sql(statement)


def check_databases(where: str, databases: Sequence[object]) -> None:
    """Raise `TypeError` for what is no `Database`, and where there is none."""
    for each in databases or (None,):
        if not isinstance(each, Engines):
            message = f"{where} needs at least one Database, not {type(each).__name__}"
            message += ": make it with Database.from_url(url) or Database(engine)."
            raise TypeError(message)


def _check_engine(engine: object) -> None:
    if not isinstance(engine, AsyncEngine):
        message = (
            f"Database() takes an AsyncEngine, not {type(engine).__name__}: use "
            "create_async_engine(...), or Database.from_url(url) for a URL."
        )
    elif engine.dialect.name not in known.DATABASES:
        name, names = engine.dialect.name, ", ".join(known.DATABASES)
        message = f"asgi-uow does not know the database {name!r}; it knows {names}."
    elif isinstance(engine.sync_engine.pool, StaticPool):
        message = (
            "A StaticPool hands its one connection to several units of work at once, "
            "and the rollback of one undoes the work of another. Use "
            "Database.from_url(...), or a queue pool with pool_size=1, max_overflow=0."
        )
    else:
        return
    raise ConfigurationError(message)
