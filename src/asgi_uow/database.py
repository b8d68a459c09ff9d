"""`Database`: what an application creates once and uses everywhere."""

from __future__ import annotations

import asyncio
import weakref
from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy import exc as sa_exc
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool

from asgi_uow._databases import configuration as _config
from asgi_uow._databases import dialects as _dialects
from asgi_uow._databases.engines import Engines
from asgi_uow._databases.health import check
from asgi_uow._entrypoints.accessors import current_unit_of_work
from asgi_uow._entrypoints.block import leave, unit_of_work
from asgi_uow.errors import ConfigurationError, MissingDriverError, NoUnitOfWorkError

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
            readers=[_create_engine(each, engine_options) for each in read_urls],
            commit_on_exit=commit_on_exit,
            resolve_unknown=resolve_unknown,
            read_isolation=read_isolation,
        )
        writer = _create_engine(url, engine_options)
        if _dialects.is_memory(writer.url):
            database.use(writer)
        else:
            database.use(writer, _create_engine(url, engine_options))
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


def _create_engine(url: str | URL, options: Mapping[str, Any]) -> AsyncEngine:
    parsed = _async_url(url)
    defaults = _dialects.engine_defaults(parsed)
    if parsed.drivername == "sqlite+aiosqlite":
        options = _with_safe_connection(options)
    if "poolclass" not in options:
        defaults["pool_timeout"] = _dialects.POOL_TIMEOUT
    forced: dict[str, Any] = {}
    if _dialects.is_memory(parsed):
        # The database is the connection: one, for one unit at a time, for good.
        forced = {
            "poolclass": AsyncAdaptedQueuePool,
            "pool_size": 1,
            "max_overflow": 0,
            "pool_recycle": -1,
        }
    try:
        _check_async(parsed)
        return create_async_engine(parsed, **{**defaults, **options, **forced})
    except ModuleNotFoundError as error:
        driver = parsed.get_driver_name()
        raise MissingDriverError(driver, _dialects.EXTRAS.get(driver)) from error
    except sa_exc.NoSuchModuleError as error:
        message = f"SQLAlchemy knows no database {parsed.drivername!r}."
        raise ConfigurationError(message) from error
    except (TypeError, sa_exc.ArgumentError) as error:
        raise ConfigurationError(str(error)) from error


def _check_async(url: URL) -> None:
    # Before SQLAlchemy looks for the driver: to install it would not help.
    if not url.get_dialect().get_async_dialect_cls(url).is_async:
        message = (
            f"{url.drivername!r} is not an async driver: leave the driver out "
            "to get the usual one, or name an async one."
        )
        raise ConfigurationError(message)


def _with_safe_connection(options: Mapping[str, Any]) -> dict[str, Any]:
    try:
        from asgi_uow._databases.sqlite_connection import connect  # noqa: PLC0415  # needs the extra
    except ImportError:
        return dict(options)  # SQLAlchemy says so below
    theirs = options.get("connect_args", {})
    return {**options, "connect_args": {"async_creator_fn": connect, **theirs}}


def _async_url(url: str | URL) -> URL:
    try:
        parsed = make_url(url)
    except (sa_exc.ArgumentError, ValueError):
        # Not chained: SQLAlchemy 2.0 quotes the string, password and all.
        message = (
            "The database URL cannot be read; it should look like "
            "postgresql://user:password@host/name or sqlite:///app.db. A password "
            "with special characters has to be percent-encoded."
        )
        raise ConfigurationError(message) from None
    if parsed.drivername == "postgres":
        parsed = parsed.set(drivername="postgresql")
    if "+" not in parsed.drivername and parsed.drivername in _dialects.ASYNC_DRIVERS:
        driver = _dialects.ASYNC_DRIVERS[parsed.drivername]
        parsed = parsed.set(drivername=f"{parsed.drivername}+{driver}")
    if parsed.get_backend_name() in {"mysql", "mariadb"} and (
        "charset" not in parsed.query
    ):
        parsed = parsed.update_query_dict({"charset": "utf8mb4"})
    return parsed
