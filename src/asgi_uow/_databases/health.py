"""How the servers of a database are: for a health check behind `/healthz`."""

from __future__ import annotations

import dataclasses
import random
import sys
import time
from typing import TYPE_CHECKING, Literal

import anyio
from sqlalchemy import exc as sa_exc
from sqlalchemy import text
from sqlalchemy.pool import QueuePool

from asgi_uow._databases import driver_errors as _driver_errors
from asgi_uow._databases import known

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from asgi_uow._databases.engines import Engines


FIRST_PAUSE = 0.5
"""Seconds for which a reader that failed is left alone, at most; then doubling."""

LONGEST_PAUSE = 30.0
"""Seconds after which the doubling ends."""


class Replica:
    """A reader, and how it has done lately."""

    def __init__(self, engine: AsyncEngine) -> None:
        """Take it for healthy."""
        self.engine = engine
        self.failures = 0
        self.open_until = 0.0
        self.half_open = False
        """Whether a request is finding out if it is up again."""

    @property
    def name(self) -> str:
        """Its URL without the password."""
        return known.shown(self.engine.url)

    @property
    def is_healthy(self) -> bool:
        """Whether it may be tried (again)."""
        return time.monotonic() >= self.open_until and not self.half_open

    @property
    def free(self) -> int:
        """How many connections its pool could still give; 0 if pools do not count."""
        pool = self.engine.sync_engine.pool
        if not isinstance(pool, QueuePool):
            return 0
        more = pool._max_overflow  # noqa: SLF001  # -1 is no limit
        return pool.size() + (sys.maxsize if more < 0 else more) - pool.checkedout()

    @property
    def is_busy(self) -> bool:
        """Whether who wants a connection has to wait for somebody else's."""
        pool = self.engine.sync_engine.pool
        return isinstance(pool, QueuePool) and self.free <= 0

    def trip(self) -> float | None:
        """Leave it alone for a while, and give the seconds; None if it is already.

        With jitter, or every process would come back at the same moment.
        """
        if time.monotonic() < self.open_until:
            return None  # several requests ran into the same failure
        longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(self.failures, 10))
        seconds: float = longest * random.uniform(0.5, 1.0)  # noqa: S311  # no secret
        self.failures += 1
        self.open_until = time.monotonic() + seconds
        return seconds


def by_free_connections(replicas: Sequence[Replica]) -> list[Replica]:
    """Give the healthy ones, the one with the most free connections first."""
    healthy = [each for each in replicas if each.is_healthy]
    random.shuffle(healthy)
    return sorted(healthy, key=lambda each: -each.free)


@dataclasses.dataclass(frozen=True, slots=True)
class ServerHealth:
    """How one server is."""

    role: Literal["writer", "reader"]
    name: str
    """Its URL without the password."""
    ok: bool
    """Whether it answered in time; a writer also has to take writes."""
    seconds: float
    """From asking for a connection to the answer, or to giving up."""
    lag: float | None = None
    """Seconds a reader is behind; None if it does not tell.

    MariaDB tells those who have the privilege REPLICA MONITOR, and says nothing
    while replication is stopped.
    """
    error: str | None = None
    """What is wrong, in words fit for the public: no message of the driver."""


@dataclasses.dataclass(frozen=True, slots=True)
class Health:
    """How the servers of a database are."""

    writer: ServerHealth
    readers: tuple[ServerHealth, ...]

    @property
    def ok(self) -> bool:
        """Whether requests can be served: readers that fail are done without."""
        return self.writer.ok


async def check(db: Engines, seconds: float) -> Health:
    """Ask every server at once, each for at most so many seconds."""
    found: dict[AsyncEngine, ServerHealth] = {}
    readers = [replica.engine for replica in db.replicas]

    async def ask(role: Literal["writer", "reader"], engine: AsyncEngine) -> None:
        found[engine] = await _ask(role, engine, seconds)

    async with anyio.create_task_group() as group:
        group.start_soon(ask, "writer", db.read_engine)
        for engine in readers:
            group.start_soon(ask, "reader", engine)
    return Health(found[db.read_engine], tuple(found[engine] for engine in readers))


async def _ask(
    role: Literal["writer", "reader"], engine: AsyncEngine, seconds: float
) -> ServerHealth:
    started = time.perf_counter()
    lag: float | None = None
    error: str | None = None
    try:
        with anyio.fail_after(seconds):
            async with engine.connect() as connection:
                statement = known.database_of(engine.dialect).IS_READ_ONLY
                read_only = (await connection.exec_driver_sql(statement)).scalar()
                if role == "reader":
                    lag = await _lag(connection)
                elif read_only:
                    error = "it takes no writes: it is a replica"
    except TimeoutError:
        error = f"no answer within {seconds} seconds"
    except (sa_exc.SQLAlchemyError, OSError) as raised:
        code = _driver_errors.code_of(raised)
        error = type(raised).__name__ + (f" {code}" if code is not None else "")
    return ServerHealth(
        role,
        known.shown(engine.url),
        error is None,
        time.perf_counter() - started,
        lag,
        error,
    )


async def _lag(connection: AsyncConnection) -> float | None:
    statement = known.database_of(connection.dialect).LAG
    if statement is None:
        return None
    try:
        row = (await connection.execute(text(statement))).mappings().first()
    except sa_exc.DBAPIError as error:
        if _driver_errors.is_lost(error):
            raise
        return None
    lag = None if row is None else row["Seconds_Behind_Master"]
    return None if lag is None else float(lag)
