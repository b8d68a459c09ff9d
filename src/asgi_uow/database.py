"""`Database`: what an application creates once and uses everywhere."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary, ref

from asgi_uow import errors
from asgi_uow._databases import configuration
from asgi_uow._databases.engines import Engines
from asgi_uow._databases.health import check
from asgi_uow._decision import WRITABLE, State, decide_exit
from asgi_uow._unit.finish import end_unit
from asgi_uow._unit.unit import UnitOfWork, UnitOptions, current

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self, TypeAlias

    from sqlalchemy import URL
    from sqlalchemy.ext.asyncio import AsyncEngine

    from asgi_uow._databases.health import Health
    from asgi_uow._sessions.session import Session

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
        super().__init__(
            engine,
            readers,
            session_options,
            commit_on_exit=commit_on_exit,
            resolve_unknown=resolve_unknown,
            read_isolation=read_isolation,
        )
        self._entered: WeakKeyDictionary[UnitOfWork, ref[Task]] = WeakKeyDictionary()

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
        create = configuration.create_engine
        database = cls(
            None,
            readers=[create(each, engine_options) for each in read_urls],
            commit_on_exit=commit_on_exit,
            resolve_unknown=resolve_unknown,
            read_isolation=read_isolation,
        )
        database.use(create(url, engine_options), create(url, engine_options))
        database.owns_engines = True
        return database

    @classmethod
    def from_config(
        cls, mapping: Mapping[str, object], *, prefix: str = "DATABASE_"
    ) -> Self:
        """Create the engines from `os.environ`, Sanic's `app.config` or the like.

        Reads `DATABASE_URL`, `READ_URLS` (comma-separated or a list), `ECHO`,
        `ECHO_POOL`, `POOL_SIZE`, `MAX_OVERFLOW`, `POOL_PRE_PING`, `POOL_RECYCLE`
        and `POOL_TIMEOUT` (seconds) and `POOL_CLASS` (a class name of
        `sqlalchemy.pool`), each with the prefix. Values may be strings. Raises
        `ConfigurationError` naming key and kind for one that does not cast; warns of
        a key that looks misspelt and leaves all others alone.
        """
        config = configuration.read(mapping, prefix)
        urls = config.read_urls
        return cls.from_url(config.url, read_urls=urls, **config.engine_options)

    @property
    def write(self) -> Session:
        """The write session of the current unit of work: `current_session(db)`."""
        return _current("db.write").session(self)

    @property
    def read(self) -> Session:
        """The read session of the current unit: `current_read_session(db)`."""
        return _current("db.read").read_session(self)

    async def check(self, *, timeout: float = 2.0) -> Health:  # noqa: ASYNC109  # its name
        """Ask writer and readers how they are, at once: for `/healthz`.

        Each gets `timeout` seconds, waiting for a free connection included. Raises
        nothing for a server that is down: that is what the report is for.
        """
        return await check(self.read_engine, self.replicas, timeout)

    async def __aenter__(self) -> UnitOfWork:
        """Open a unit of work for this database; see `unit_of_work`."""
        unit = await unit_of_work(self).__aenter__()
        self._entered[unit] = ref(_task())
        return unit

    async def __aexit__(
        self, exc_type: object, exc: BaseException | None, traceback: object
    ) -> None:
        """Commit, or roll back after an exception; raises if not kept."""
        await _leave(self._take_entered(), exc)

    def _take_entered(self) -> UnitOfWork:
        """Give the unit that is being left: this task's last, or one left behind."""
        task, unit = _task(), current.get()
        entered = None if unit is None else self._entered.get(unit)
        if unit is None or entered is None or entered() is not task:
            by = {each: entered_by() for each, entered_by in self._entered.items()}
            mine = [each for each, other in by.items() if other is task]
            behind = [each for each, o in by.items() if o is None or o.done()]
            found = mine or behind or list(by)
            if not (mine or behind or len(found) == 1):
                operation = "leaving a unit of work that another task has entered"
                raise errors.NoUnitOfWorkError(operation)
            unit = found[-1]
        del self._entered[unit]
        return unit


def _task() -> Task:
    return asyncio.current_task()  # type: ignore[return-value]  # we are in a coroutine


def _current(operation: str) -> UnitOfWork:
    unit = current.get()
    if unit is None:
        raise errors.NoUnitOfWorkError(operation)
    return unit


class unit_of_work:  # noqa: N801  # used like a function: async with unit_of_work(db)
    """A unit of work outside a request: `async with unit_of_work(db) as uow:`.

    The general form of `async with db:`, for several databases or, with
    `independent=True`, for one with connection and outcome of its own inside
    another unit of the same database.

    Leaving the block commits; an exception rolls back and goes on. Raises
    `NestedUnitOfWorkError` inside an undecided unit of the same database.
    """

    def __init__(self, *databases: Engines, independent: bool = False) -> None:
        if not databases:
            message = "unit_of_work() needs at least one Database."
            raise TypeError(message)
        self.databases = databases
        self.independent = independent
        self.unit: UnitOfWork

    async def __aenter__(self) -> UnitOfWork:
        """Open the unit; no session and no connection yet."""
        around = current.get()
        unit = self.unit = UnitOfWork()
        unit.databases, unit.options, unit.state = self.databases, DEFAULTS, State.NEW
        if around is not None:
            unit.around, unit.options = around, around.options
            unit.must_see = around.must_see
            unit.is_nested = around.state in WRITABLE and not around.is_hook
            # Otherwise a hook that registers itself in such a block never ends.
            unit.quota = around.quota
            for db in self.databases:
                # A hook's own unit is in the way only once it is used.
                taken = around.holds(db) if around.is_hook else around.serves(db)
                if taken and around.state in WRITABLE and not self.independent:
                    raise errors.NestedUnitOfWorkError(db)
                # The enclosing unit cannot end before this one does: a deadlock.
                if unit.is_blocked_by_others(db):
                    raise errors.NestedUnitOfWorkError(db)
        current.set(unit)
        return unit

    async def __aexit__(
        self, exc_type: object, exc: BaseException | None, traceback: object
    ) -> None:
        """Commit or roll back, then close; raises if the work was not kept."""
        await _leave(self.unit, exc)


DEFAULTS = UnitOptions()


async def _leave(unit: UnitOfWork, error: BaseException | None) -> None:
    decision = decide_exit(
        error,
        rollback_only=unit.state is State.ROLLBACK_ONLY,
        doomed=unit.doomed_by is not None,
        forced=unit.forced,
        commit_on_exit=all(db.commit_on_exit for db in unit.databases),
    )
    try:
        await end_unit(unit, decision)
    finally:
        # Not by a token: blocks need not end in the order of their nesting
        # (generators), nor in the task that they began in.
        if current.get() is unit:
            left = (each for each in unit.outwards() if each.state is not State.CLOSED)
            current.set(next(left, None))
