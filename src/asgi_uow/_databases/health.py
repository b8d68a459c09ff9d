"""How the servers of a database are: for a health check behind `/healthz`."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import sys
import time
from typing import TYPE_CHECKING, Literal, TypeAlias

import anyio
import sqlalchemy as sa
from sqlalchemy import exc as sa_exc

from asgi_uow._databases import driver_errors, known

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

Role: TypeAlias = Literal["writer", "reader"]

LONGEST_PAUSE = 30.0  # seconds for which a reader that failed is left alone, at most


class Replica:
    """A reader, and how it has done lately."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.name = known.shown(engine.url)
        self.failures = 0
        self.open_until = 0.0
        self.half_open = False  # whether a request is finding out if it is up again

    @property
    def is_healthy(self) -> bool:
        return time.monotonic() >= self.open_until and not self.half_open

    @property
    def free(self) -> int:
        """How many connections its pool could still give; 0 if pools do not count."""
        pool = self.engine.sync_engine.pool
        if not isinstance(pool, sa.QueuePool):
            return 0
        more = pool._max_overflow  # noqa: SLF001  # -1 is no limit
        return pool.size() + (sys.maxsize if more < 0 else more) - pool.checkedout()

    @property
    def is_busy(self) -> bool:
        """Whether who wants a connection has to wait for somebody else's."""
        return isinstance(self.engine.sync_engine.pool, sa.QueuePool) and self.free <= 0

    def trip(self) -> float | None:
        """Leave it alone for a while, and give the seconds; None if it is already."""
        if time.monotonic() < self.open_until:
            return None  # several requests ran into the same failure
        longest = min(LONGEST_PAUSE, 0.5 * 2 ** min(self.failures, 10))
        # With jitter, or every process would come back at the same moment.
        seconds: float = longest * random.uniform(0.5, 1.0)  # noqa: S311  # no secret
        self.failures += 1
        self.open_until = time.monotonic() + seconds
        return seconds


def by_free_connections(replicas: Sequence[Replica]) -> list[Replica]:
    """Give the healthy ones, most free connections first."""
    healthy = [each for each in replicas if each.is_healthy]
    random.shuffle(healthy)
    return sorted(healthy, key=lambda each: -each.free)


@dataclasses.dataclass(frozen=True, slots=True)
class ServerHealth:
    """How one server is."""

    role: Role
    name: str
    """Its URL without the password."""
    ok: bool
    """Whether it answered in time; a writer also has to take writes."""
    seconds: float
    """From asking for a connection to the answer, or to giving up."""
    lag: float | None = None
    """Seconds a reader is behind; None if it does not tell, as MariaDB while
    replication is stopped, or to users without the privilege REPLICA MONITOR."""
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


async def check(
    writer: AsyncEngine, replicas: Sequence[Replica], seconds: float
) -> Health:
    """Ask every server at once, each for at most so many seconds."""
    asking = (_ask("reader", each.engine, seconds) for each in replicas)
    asked, *readers = await asyncio.gather(_ask("writer", writer, seconds), *asking)
    return Health(asked, tuple(readers))


async def _ask(role: Role, engine: AsyncEngine, seconds: float) -> ServerHealth:
    started = time.perf_counter()
    lag = error = None
    try:
        with anyio.fail_after(seconds):
            async with engine.connect() as connection:
                facts = known.database_of(engine.dialect)
                read_only = await connection.scalar(sa.text(facts.IS_READ_ONLY))
                if role == "reader":
                    lag = await _lag(connection, facts)
                elif read_only:
                    error = "it takes no writes: it is a replica"
    except TimeoutError:
        error = f"no answer within {seconds} seconds"
    except Exception as raised:  # noqa: BLE001  # reported, of whatever kind it is
        code = driver_errors.code_of(raised)
        error = type(raised).__name__ + (f" {code}" if code is not None else "")
    took, name = time.perf_counter() - started, known.shown(engine.url)
    return ServerHealth(role, name, error is None, took, lag, error)


async def _lag(connection: AsyncConnection, facts: known.Database) -> float | None:
    try:
        row = (await connection.execute(sa.text(facts.LAG))).mappings().first()
    except sa_exc.DBAPIError as error:
        if driver_errors.is_lost(error):
            raise
        return None
    lag = row["Seconds_Behind_Master"] if row else None
    return None if lag is None else float(lag)
