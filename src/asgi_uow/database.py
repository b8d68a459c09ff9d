"""`Database`: what an application creates once and uses everywhere."""

from __future__ import annotations

import asyncio
import weakref
from typing import TYPE_CHECKING, Any, Literal

from asgi_uow._databases import configuration as _config
from asgi_uow._databases import known
from asgi_uow._databases.engines import Engines
from asgi_uow._databases.health import check
from asgi_uow._entrypoints.accessors import current_unit_of_work
from asgi_uow._entrypoints.block import leave, unit_of_work
from asgi_uow.errors import NoUnitOfWorkError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType
    from typing import Self, TypeAlias

    from sqlalchemy import URL
    from sqlalchemy.ext.asyncio import AsyncEngine

    from asgi_uow._databases.health import Health
    from asgi_uow._sessions.session import Session
    from asgi_uow._unit.unit import UnitOfWork

    Task: TypeAlias = asyncio.Task[object]


class Database(Engines):
    """A database: its writer engine, its read engine, and units of work on them.

    `engine` is the writer. Reads use `readers`, or else an engine of their own on
    the writer's server, on which the database itself refuses writes.
    `commit_on_exit=False` has `async with db:` roll back unless `force_commit()` is
    called; it says nothing about requests. `resolve_unknown=True` (PostgreSQL) asks
    for the transaction id before each COMMIT, one more round trip, so that a COMMIT
    whose answer was lost can be settled. `read_isolation="REPEATABLE READ"` gives
    the reads of a read session one snapshot, at the price of a transaction. All other
    options are those of SQLAlchemy's `Session`; `expire_on_commit` is False unless
    passed.

    Create it at import time or at start-up; nothing connects before first use.
    Raises `ConfigurationError` for an engine or option that cannot work.
    """

    def __init__(
        self,
        engine: AsyncEngine | None,
        *,
        readers: Sequence[AsyncEngine] = (),
        commit_on_exit: bool = True,
        resolve_unknown: bool = False,
        read_isolation: Literal["REPEATABLE READ"] | None = None,
        **session_options: Any,
    ) -> None:
        """See the class."""
        super().__init__(
            engine,
            readers=readers,
            commit_on_exit=commit_on_exit,
            resolve_unknown=resolve_unknown,
            read_isolation=read_isolation,
            **session_options,
        )
        self._entered: list[tuple[weakref.ref[Task], weakref.ref[UnitOfWork]]] = []

    @classmethod
    def from_url(
        cls,
        url: str | URL,
        *,
        read_urls: Sequence[str | URL] = (),
        commit_on_exit: bool = True,
        resolve_unknown: bool = False,
        read_isolation: Literal["REPEATABLE READ"] | None = None,
        **engine_options: Any,
    ) -> Self:
        """Create the engines with defaults that suit the database.

        `sqlite:///app.db`, `mysql://...`, `postgresql://...`: a URL without a driver
        gets the async one. `engine_options` are those of `create_async_engine`, for
        the writer and the readers alike, and win over the defaults. The middleware
        closes these engines after the application's lifespan shutdown.

        Raises `ConfigurationError` for a URL or option that cannot work and
        `MissingDriverError`, naming the extra, where the driver is not installed.
        """
        database = cls(
            None,
            readers=[_config.create_engine(each, engine_options) for each in read_urls],
            commit_on_exit=commit_on_exit,
            resolve_unknown=resolve_unknown,
            read_isolation=read_isolation,
        )
        writer = _config.create_engine(url, engine_options)
        if known.is_memory(writer.url):
            database.use(writer)
        else:
            database.use(writer, _config.create_engine(url, engine_options))
        database._owned = True
        return database

    @classmethod
    def from_config(
        cls,
        mapping: Mapping[str, object],
        *,
        prefix: str = "DATABASE_",
    ) -> Self:
        """Create the engines from `os.environ`, Sanic's `app.config` or the like.

        Reads `DATABASE_URL`, `READ_URLS` (comma-separated or a list), `ECHO`,
        `ECHO_POOL`, `POOL_SIZE`, `MAX_OVERFLOW`, `POOL_PRE_PING`, `POOL_RECYCLE`
        and `POOL_TIMEOUT` (seconds) and `POOL_CLASS` (a class name of
        `sqlalchemy.pool`), each with the prefix. Values may be strings. Raises
        `ConfigurationError` naming key and kind for one that does not cast; warns of
        a key that looks misspelt and leaves all others alone.
        """
        config = _config.read(mapping, prefix)
        return cls.from_url(
            config.url,
            read_urls=config.read_urls,
            **config.engine_options,
        )

    @property
    def write(self) -> Session:
        """The write session of the current unit of work: `current_session(db)`."""
        return current_unit_of_work().session(self)

    @property
    def read(self) -> Session:
        """The read session of the current unit: `current_read_session(db)`."""
        return current_unit_of_work().read_session(self)

    async def check(self, *, timeout: float = 2.0) -> Health:  # noqa: ASYNC109  # its name
        """Ask writer and readers how they are, at once: for `/healthz`.

        Each gets `timeout` seconds, waiting for a free connection included. Raises
        nothing for a server that is down: that is what the report is for.
        """
        return await check(self, timeout)

    async def __aenter__(self) -> UnitOfWork:
        """Open a unit of work for this database; see `unit_of_work`."""
        unit = await unit_of_work(self).__aenter__()
        self._entered.append((weakref.ref(_task()), weakref.ref(unit)))
        return unit

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Commit, or roll back after an exception; raises if not kept."""
        await leave(self._take_entered(), exc)

    def _take_entered(self) -> UnitOfWork:
        """Give the unit that is being left: this task's last, or one left behind."""
        alive = [(task(), unit) for task, ref in self._entered if (unit := ref())]
        mine = [unit for task, unit in alive if task is _task()]
        behind = [unit for task, unit in alive if task is None or task.done()]
        found = mine or behind or [unit for _, unit in alive]
        if not found or not (mine or behind or len(found) == 1):
            operation = "leaving a unit of work that another task has entered"
            raise NoUnitOfWorkError(operation)
        unit = found[-1]
        self._entered = [
            each for each in self._entered if each[1]() not in {None, unit}
        ]
        return unit


def _task() -> Task:
    return asyncio.current_task()  # type: ignore[return-value]  # we are in a coroutine
