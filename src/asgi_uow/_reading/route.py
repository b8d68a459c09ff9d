"""Read replicas: which one a unit of work reads from, and what happens if it fails."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Protocol

import anyio
from sqlalchemy import exc as sa_exc

from asgi_uow._concurrency import run_to_completion
from asgi_uow._databases import driver_errors as failures
from asgi_uow._databases import known
from asgi_uow._databases.health import by_free_connections
from asgi_uow._reading.causal import READ_FROM_WRITER
from asgi_uow.errors import DeadlineExceededError
from asgi_uow.observers import ReaderBehind, ReaderFailed, ReaderRestored, logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from asgi_uow._databases.engines import Engines
    from asgi_uow._databases.health import Replica
    from asgi_uow._reading.causal import MustSee
    from asgi_uow.observers import Event

    Wrote = Callable[[], bool]

CONNECT_SECONDS = 5.0  # that a reader gets to accept a connection
ANSWER_SECONDS = 1.0  # to say how far it is, beside what it is waited for


class Reader(Protocol):
    """A read session, as its route sees it."""

    @property
    def bind(self) -> object: ...
    def bind_to(self, engine: AsyncEngine) -> None: ...
    async def open_connection(self) -> AsyncConnection: ...
    async def release_connection(self) -> None: ...


class Route:
    """Where one unit of work reads: a replica if it can, else the writer's server."""

    def __init__(
        self, db: Engines, events: list[Event], wrote: Wrote, must_see: MustSee
    ) -> None:
        self._position = must_see.position(db)
        self._replicas = () if self._position == READ_FROM_WRITER else db.replicas
        self._fallback = db.read_engine
        self._wrote = wrote
        self._events = events
        self._seconds = must_see.seconds
        self._until: float | None = None
        self._choosing = asyncio.Lock()
        self._choice: Replica | None = None
        self._barred: list[Replica] = []
        self.has_read = False  # once something was, no other server will do

    async def connect(self, reader: Reader) -> None:
        """Bind a session where it has to read from, the first time connected to it."""
        if self._wrote():  # the unit, or one around it: replicas may be behind
            reader.bind_to(self._fallback)
        elif self.has_read and self._choice is not None:
            reader.bind_to(self._choice.engine)
        else:
            async with self._choosing:  # one choice for all tasks of the unit
                await self._choose(reader)

    async def fail_over(self, reader: Reader, error: Exception) -> bool:
        """Tell whether a call that failed may be made again, on another server.

        Only if the reader was lost, or stopped the statement for its replication,
        before anything was read. What took too long is slow elsewhere too.
        """
        bound = (each for each in self._replicas if each.engine is reader.bind)
        replica = next(bound, None)
        if replica is None or (self.has_read and replica is self._choice):
            return False
        conflict = failures.means(error, "recovery_conflict")
        lost = failures.is_lost(error) and not isinstance(error, TimeoutError)
        if not (lost or conflict):
            return False
        await reader.release_connection()
        if not conflict:
            self._report_failed(replica, error)
        # Never retry a replica: two could cancel a long read in turn, for ever.
        self._barred.append(replica)
        async with self._choosing:
            if replica is self._choice:
                self._choice = None
            await self._choose(reader)
        return True

    async def _choose(self, reader: Reader) -> None:
        """Connect to the choice made before, or to the first that will do."""
        if self._choice is not None and await self._connect_to(reader, self._choice):
            return
        self._choice = None
        for replica in by_free_connections(self._replicas):
            if replica not in self._barred and await self._connect_to(reader, replica):
                self._choice = replica
                return
        self._barred = list(self._replicas)  # the unit keeps to the writer's server
        reader.bind_to(self._fallback)

    async def _connect_to(self, reader: Reader, replica: Replica) -> bool:
        """Connect a session to a replica, if that is there and far enough."""
        reader.bind_to(replica.engine)
        replica.half_open = replica.failures > 0
        busy = replica.is_busy
        try:
            reached = await self._reach(reader)
        except BaseException as error:
            # Otherwise the next call would use a replica that was never checked.
            await run_to_completion(reader.release_connection())
            if self.has_read or not isinstance(error, Exception):
                raise
            if isinstance(error, DeadlineExceededError):
                raise  # says nothing about the server
            absent = isinstance(error, TimeoutError) or failures.means(error, "absent")
            if not (absent or failures.is_unavailable(error)):
                raise
            # To wait in vain for a busy pool says nothing about the server.
            if not (busy and isinstance(error, TimeoutError | sa_exc.TimeoutError)):
                self._report_failed(replica, error)
            return False
        finally:
            replica.half_open = False
        if not reached:
            self._events.append(ReaderBehind(replica.name, self._seconds))
        elif replica.failures and replica.is_healthy:
            replica.failures = 0
            self._events.append(ReaderRestored(replica.name))
        return reached

    async def _reach(self, reader: Reader) -> bool:
        """Connect; tells whether the reader has got as far as it must."""
        with anyio.fail_after(CONNECT_SECONDS):
            connection = await reader.open_connection()
        if self._position is None or self._choice is not None:
            return True
        if self._until is None:  # for all readers together
            self._until = time.monotonic() + self._seconds
        seconds = max(0.0, self._until - time.monotonic())
        with anyio.fail_after(seconds + ANSWER_SECONDS):
            facts = known.database_of(connection.dialect)
            reached = await facts.wait_for(connection, self._position, seconds)
            # Ends the snapshot of `read_isolation`, which is too old.
            await reader.release_connection()
        return reached

    def _report_failed(self, replica: Replica, error: Exception) -> None:
        if (seconds := replica.trip()) is not None:
            self._events.append(ReaderFailed(replica.name, error, seconds))


async def written_position(db: Engines, seconds: float) -> str | None:
    """Tell how far a replica must be to have what was committed until now.

    None without replicas, `READ_FROM_WRITER` if that was not learnt in time.
    """
    if not db.replicas:
        return None
    try:
        with anyio.fail_after(seconds):
            async with db.read_engine.connect() as connection:
                found = await db.facts.position(connection)
    except Exception:  # noqa: BLE001  # what was committed is answered all the same
        logger.warning("the position of %s was not learnt", db.name)
        return READ_FROM_WRITER
    return READ_FROM_WRITER if found is None else found
