"""Read replicas: which one a unit of work reads from, and what happens if it fails."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from typing import TYPE_CHECKING

import anyio
from sqlalchemy import exc as sa_exc
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.pool import QueuePool

from asgi_uow._concurrency import run_to_completion
from asgi_uow._databases import driver_errors as _driver_errors
from asgi_uow._databases import known
from asgi_uow._reading.causal import READ_FROM_WRITER
from asgi_uow.observers import ReaderBehind, ReaderFailed, ReaderRestored

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from asgi_uow._sessions.read_session import ReadSession
    from asgi_uow.observers import Event

CONNECT_SECONDS = 5.0
"""Seconds that a reader gets to accept a connection."""

ANSWER_SECONDS = 1.0
"""Seconds that a reader gets to say how far it is, beside what it is waited for."""

UNREACHABLE = (sa_exc.DBAPIError, sa_exc.TimeoutError, OSError)
"""What it can mean if a reader does not give a connection."""

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
        self.left_until = 0.0
        self.is_probed = False
        """Whether a request is finding out if it is up again."""

    @property
    def name(self) -> str:
        """Its URL without the password."""
        return known.shown(self.engine.url)

    @property
    def is_healthy(self) -> bool:
        """Whether it may be tried (again)."""
        return time.monotonic() >= self.left_until and not self.is_probed

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

    def failed(self) -> float | None:
        """Leave it alone for a while, and give the seconds; None if it is already.

        With jitter, or every process would come back at the same moment.
        """
        if time.monotonic() < self.left_until:
            return None  # several requests ran into the same failure
        longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(self.failures, 10))
        seconds: float = longest * random.uniform(0.5, 1.0)  # noqa: S311  # no secret
        self.failures += 1
        self.left_until = time.monotonic() + seconds
        return seconds


def by_free_connections(replicas: Sequence[Replica]) -> list[Replica]:
    """Give the healthy ones, the one with the most free connections first."""
    healthy = [each for each in replicas if each.is_healthy]
    random.shuffle(healthy)
    return sorted(healthy, key=lambda each: -each.free)


class Route:
    """Where one unit of work reads: a replica if it can, else the writer's server.

    `wrote` tells whether the unit has used its write session: then its reads stay on
    the writer's server. `must_see` is the position that a reader must have reached;
    it gets `seconds` for that. `READ_FROM_WRITER` can be waited for on none.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        fallback: AsyncEngine,
        *,
        wrote: Callable[[], bool],
        report: Callable[[Event], None],
        must_see: str | None,
        seconds: float,
    ) -> None:
        """Choose nothing yet."""
        self._replicas = () if must_see == READ_FROM_WRITER else replicas
        self._fallback = fallback
        self._wrote = wrote
        self._report = report
        self._must_see = must_see
        self._until: float | None = None
        self._seconds = seconds
        self._choosing = asyncio.Lock()
        self._choice: Replica | None = None
        self._lost: list[Replica] = []
        self._decided = False
        self._has_read = False

    def note_read(self) -> None:
        """Note that something was read: from now on no other server will do."""
        self._has_read = True

    async def lead(self, session: ReadSession) -> None:
        """Bind a session that is not connected yet, and connect it."""
        sync = session.sync_session
        if self._wrote():
            sync.bind = self._fallback.sync_engine
        elif not sync.connections:
            async with self._choosing:  # one choice for all tasks of the unit
                if not (self._decided and await self._use(session, self._choice)):
                    await self._choose(session)

    async def moved(self, session: ReadSession, error: Exception) -> bool:
        """Tell whether a call that failed may be made again, on another server.

        Only if the reader was lost, or had to stop the statement for the sake of its
        replication, before anything was read. A statement that took too long is slow
        elsewhere too.
        """
        replica = self._used_by(session)
        lost = _driver_errors.is_lost(error) and not isinstance(error, TimeoutError)
        conflict = _driver_errors.code_of(error) == _driver_errors.RECOVERY_CONFLICT
        if replica is None or not (lost or conflict):
            return False
        if self._has_read and replica is self._choice:
            return False
        await session.let_go()
        self._leave(replica, error)
        # No way back: two replicas may both be in the way of a long read.
        self._lost.append(replica)
        async with self._choosing:
            if replica is self._choice or not await self._use(session, self._choice):
                await self._choose(session)
        return True

    def _used_by(self, session: ReadSession) -> Replica | None:
        """Tell where a session reads; the unit may have chosen again meanwhile."""
        bind = session.sync_session.bind
        found = (each for each in self._replicas if each.engine.sync_engine is bind)
        return next(found, None)

    async def _choose(self, session: ReadSession) -> None:
        self._decided = False
        for replica in by_free_connections(self._replicas):
            if replica not in self._lost and await self._use(session, replica):
                return
        await self._use(session, None)

    async def _use(self, session: ReadSession, replica: Replica | None) -> bool:
        """Connect a session to a reader, or leave it to connect to the fallback."""
        if replica is None:
            self._choice, self._decided = None, True
            session.sync_session.bind = self._fallback.sync_engine
            return True
        session.sync_session.bind = replica.engine.sync_engine
        replica.is_probed = replica.failures > 0
        busy = replica.is_busy
        try:
            reached = await self._connect(session)
        except BaseException as error:
            # Or the next call would read there, as if it had got there.
            await run_to_completion(session.let_go())
            if self._has_read or not isinstance(error, UNREACHABLE):
                raise
            if not _driver_errors.is_unavailable(error):
                raise
            # To wait in vain for a busy pool says nothing about the server.
            if not (busy and isinstance(error, TimeoutError | sa_exc.TimeoutError)):
                self._leave(replica, error)
            return False
        finally:
            replica.is_probed = False
        if not reached:
            await session.let_go()
            self._report(ReaderBehind(replica.name, self._seconds))
            return False
        if replica.failures and replica.is_healthy:
            replica.failures = 0
            self._report(ReaderRestored(replica.name))
        self._choice, self._decided = replica, True
        return True

    async def _connect(self, session: ReadSession) -> bool:
        """Connect; tells whether the reader has got as far as it must."""
        with anyio.fail_after(CONNECT_SECONDS):
            connection = await AsyncSession.connection(session)
        if self._must_see is None or self._decided:
            return True
        seconds = self._left()
        with anyio.fail_after(seconds + ANSWER_SECONDS):
            database = known.database_of(connection.dialect)
            reached = await database.wait_for(connection, self._must_see, seconds)
            await _end_snapshot(connection)
        return reached

    def _leave(self, replica: Replica, error: Exception) -> None:
        conflict = _driver_errors.code_of(error) == _driver_errors.RECOVERY_CONFLICT
        seconds = None if conflict else replica.failed()
        if seconds is not None:
            self._report(ReaderFailed(replica.name, error, seconds))

    def _left(self) -> float:
        """Give what is left of the seconds to wait in, for all readers together."""
        if self._until is None:
            self._until = time.monotonic() + self._seconds
        return max(0.0, self._until - time.monotonic())


async def _end_snapshot(connection: AsyncConnection) -> None:
    """Have the next statement take a snapshot: that of the wait is too old.

    Only where `read_isolation` has begun a transaction for the wait.
    """
    driver = known.driver_of(connection.dialect)
    raw = await connection.get_raw_connection()
    if driver.in_transaction(raw.driver_connection):
        await connection.run_sync(lambda sync: sync.connection.rollback())
