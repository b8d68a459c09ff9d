"""How the servers of a database are: for a health check behind `/healthz`."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Literal

import anyio
from sqlalchemy import exc as sa_exc
from sqlalchemy import text

from asgi_uow._databases import driver_errors as _driver_errors
from asgi_uow._databases import known

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from asgi_uow._databases.engines import Engines


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
