"""`Database`: what an application creates once and uses everywhere."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any, Literal
from weakref import ref

from asgi_uow import errors
from asgi_uow._databases import configuration
from asgi_uow._databases.engines import Engines
from asgi_uow._databases.health import check
from asgi_uow._databases.loops import derive_engine
from asgi_uow._unit.block import leave_unit, open_unit, unit_of_work
from asgi_uow._unit.unit import current, require

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence
    from typing import Self, TypeAlias

    from sqlalchemy import URL

    from asgi_uow._databases.engines import OnBegin
    from asgi_uow._databases.health import Health
    from asgi_uow._sessions.session import Session
    from asgi_uow._unit.unit import UnitOfWork

    Leave: TypeAlias = Callable[..., Coroutine[object, object, None]]

NOTHING: tuple[int, Callable[[], unit_of_work | None]] = 0, lambda: None
LEAVING = "db.__aexit__() in another context (keep a unit_of_work(db) for that)"


class _ExitOfBlock:
    """`Database.__aexit__`: every block gets one of its own, which knows its unit.

    `async with` and exit stacks look it up before they enter, and call what they found.
    https://docs.python.org/3/reference/compound_stmts.html#the-async-with-statement
    """

    found = threading.local()

    def __init__(self, by_hand: Leave) -> None:
        self._by_hand, self.__doc__ = by_hand, by_hand.__doc__

    def __get__(self, db: Database | None, _: object = None) -> Leave:
        block = unit_of_work.__new__(unit_of_work)
        # Weak: somebody may look without entering. The frame tells who has looked.
        self.found.last = id(sys._getframe(1)), ref(block)  # noqa: SLF001

        async def leave(*args: Any) -> None:  # unittest asks whether it is async
            if block.is_entered:  # what comes first is `db` if the class was asked
                return await block.__aexit__(*args[-3:])
            return await self._by_hand(*args if db is None else (db, *args))

        return leave


class Database(Engines):
    """A database: its writer engine, its read engine, and units of work on them.

    `engine` is the writer. Reads use `readers`, or else an engine of their own on
    the writer's server, on which the database itself refuses writes.
    `commit_on_exit=False` has `async with db:`, not requests, roll back unless
    `force_commit()` is called. `resolve_unknown=True`: one more round trip before
    each COMMIT, so that one whose answer was lost can be settled; other databases than
    PostgreSQL need the table of `idempotency_table(metadata)` for it.
    `read_isolation="REPEATABLE READ"` gives the reads of a read session one snapshot,
    at the price of a transaction. `pooler="transaction"`, or `"session"`, says how a
    PgBouncer or a proxy in front of the server pools. `on_begin`: an async function
    that is given the session as the first thing in each transaction, of reads too.
    `commit_flushes=True`: the `commit()` of a library flushes, and the unit still
    decides. All other options are those of `sqlalchemy.orm.Session`; `expire_on_commit`
    is False unless passed.

    Create it at import time or at start-up; nothing connects before first use.
    Raises `ConfigurationError` for an engine or option that cannot work.
    """

    @classmethod
    def from_url(
        cls,
        url: str | URL | Sequence[str | URL],
        *,
        read_urls: Sequence[str | URL] = (),
        commit_on_exit: bool = True,
        resolve_unknown: bool = False,
        read_isolation: Literal["REPEATABLE READ"] | None = None,
        pooler: Literal["transaction", "session"] | None = None,
        on_begin: OnBegin | None = None,
        commit_flushes: bool = False,
        **engine_and_session_options: Any,
    ) -> Self:
        """Create the engines with defaults that suit the database.

        A URL without a driver, such as `mysql://...`, gets the async one. Several URLs
        are addresses of one database: one that takes writes is used, until it fails.
        Other options are those of `sqlalchemy.orm.Session`, or `create_async_engine`,
        and win over the defaults. The middleware closes the engines at lifespan
        shutdown.

        Raises `ConfigurationError` for a URL or option that cannot work and
        `MissingDriverError`, naming the extra, where the driver is not installed.
        """
        create, options = configuration.create_engine, engine_and_session_options
        names = configuration.OF_SESSIONS & options.keys()
        session_options = {name: options.pop(name) for name in names}
        configuration.check({"read_urls": read_urls})
        for name in {"async_creator", "pool"} & options.keys() if read_urls else ():
            message = f"{name} would connect reads too, not what read_urls name: pass "
            message += "engines of your own as `readers` to Database(engine)."
            raise errors.ConfigurationError(message)
        later = resolve_unknown or session_options.get("twophase")
        engine = configuration.create_writer(url, options, asks_later=later)
        database = cls(
            engine,
            readers=[
                derive_engine(engine, create(each, options)) for each in read_urls
            ],
            commit_on_exit=commit_on_exit,
            resolve_unknown=resolve_unknown,
            read_isolation=read_isolation,
            pooler=pooler,
            on_begin=on_begin,
            commit_flushes=commit_flushes,
            **session_options,
        )
        database.owns_engines = True
        return database

    @classmethod
    def from_config(
        cls, mapping: Mapping[str, object], *, prefix: str = "DATABASE_"
    ) -> Self:
        """Create the engines from `os.environ`, Sanic's `app.config` or the like.

        Reads `DATABASE_URL` and `READ_URLS` (several: comma-separated or a list),
        `ECHO`, `ECHO_POOL`, `POOL_SIZE`, `MAX_OVERFLOW`, `POOL_PRE_PING`,
        `POOL_RECYCLE` and `POOL_TIMEOUT` (seconds), `POOLER` and `POOL_CLASS` (a class
        name of `sqlalchemy.pool`), each with the prefix. Values may be strings; one
        that does not cast raises `ConfigurationError`. Warns of keys that look wrong.
        """
        found = configuration.read(mapping, prefix)
        return cls.from_url(
            found.url, read_urls=found.read_urls, **found.engine_options
        )

    @property
    def write(self) -> Session:
        """The write session of the current unit of work: `current_session(db)`."""
        return require("db.write").session(self)

    @property
    def read(self) -> Session:
        """The read session of the current unit: `current_read_session(db)`."""
        return require("db.read").read_session(self)

    async def check(self, *, timeout: float = 2.0) -> Health:  # noqa: ASYNC109  # its name
        """Ask writer and readers how they are, at once: for `/healthz`.

        Each gets `timeout` seconds, connecting included; one that is down is reported.
        """
        return await check(self.read_engine, self.replicas, timeout)

    async def __aenter__(self) -> UnitOfWork:
        """Open a unit of work for this database; see `unit_of_work`."""
        frame, found = getattr(_ExitOfBlock.found, "last", NOTHING)
        block = found() if frame == id(sys._getframe(1)) else None  # noqa: SLF001
        if block is None or block.is_entered:
            unit = open_unit((self,))
            unit.entered_by_hand = self
            return unit
        block.databases = (self,)
        return await block.__aenter__()

    async def __aexit__(
        self, exc_type: object, exc: BaseException | None, traceback: object
    ) -> None:
        """Commit, or roll back after an exception; raises if not kept."""
        unit = current.get()
        for each in () if unit is None else (unit, *unit.outwards()):
            if each.entered_by_hand is self:
                each.entered_by_hand = None
                return await leave_unit(each, exc)
        raise errors.NoUnitOfWorkError(LEAVING)

    if not TYPE_CHECKING:  # pragma: no branch
        __aexit__ = _ExitOfBlock(__aexit__)
