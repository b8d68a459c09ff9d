"""Read replicas: which one a unit of work reads from, and what happens if it fails."""

from __future__ import annotations

import random
import sys
import time
from typing import TYPE_CHECKING

import anyio
from sqlalchemy import exc as sa_exc
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.pool import QueuePool

from . import _dialects
from ._causal import READ_FROM_WRITER
from ._positions import wait_for
from .observers import ReaderBehind, ReaderFailed, ReaderRestored

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine

    from ._session import Session
    from .observers import Event

CONNECT_SECONDS = 5.0
"""Seconds that a reader gets to accept a connection."""

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

    @property
    def name(self) -> str:
        """Its URL without the password."""
        return _dialects.shown(self.engine.url)

    @property
    def is_healthy(self) -> bool:
        """Whether it may be tried (again)."""
        return time.monotonic() >= self.left_until

    @property
    def free(self) -> int:
        """How many connections its pool could still give; 0 if pools do not count."""
        pool = self.engine.sync_engine.pool
        if not isinstance(pool, QueuePool):
            return 0
        more = pool._max_overflow  # noqa: SLF001  # -1 is no limit
        return pool.size() + (sys.maxsize if more < 0 else more) - pool.checkedout()

    def failed(self) -> float | None:
        """Leave it alone for a while, and give the seconds; None if it is already.

        With jitter, or every process would come back at the same moment.
        """
        if not self.is_healthy:
            return None  # several requests ran into the same failure
        longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2**self.failures)
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
        self._choice: Replica | None = None
        self._decided = False

    async def lead(self, session: Session) -> None:
        """Bind a session that is not connected yet, and connect it."""
        sync = session.sync_session
        if self._wrote():
            sync.bind = self._fallback.sync_engine
        elif not sync.connections:
            if self._decided and await self._use(session, self._choice):
                return
            await self._choose(session)

    async def moved(self, session: Session, error: Exception) -> bool:
        """Tell whether a call that failed may be made again, on another server.

        Only if the reader was lost before this session had read anything.
        """
        replica = self._choice
        if session.has_read or replica is None or not _dialects.is_lost(error):
            return False
        await session.let_go()
        self._leave(replica, error)
        await self._choose(session)
        return True

    async def _choose(self, session: Session) -> None:
        self._decided = False
        for replica in by_free_connections(self._replicas):
            if await self._use(session, replica):
                break
        else:
            await self._use(session, None)

    async def _use(self, session: Session, replica: Replica | None) -> bool:
        """Connect a session to a reader, or leave it to connect to the fallback."""
        if replica is None:
            self._choice, self._decided = None, True
            session.sync_session.bind = self._fallback.sync_engine
            return True
        session.sync_session.bind = replica.engine.sync_engine
        try:
            # To wait for a busy pool says nothing about the server.
            with anyio.fail_after(CONNECT_SECONDS if replica.free > 0 else None):
                connection = await AsyncSession.connection(session)
            fresh = self._decided or self._must_see is None
            if self._must_see is not None and not fresh:
                fresh = await wait_for(connection, self._must_see, self._left())
        except (sa_exc.DBAPIError, OSError) as error:
            if not _dialects.is_unavailable(error):
                raise
            await session.let_go()
            self._leave(replica, error)
            return False
        if not fresh:
            await session.let_go()
            self._report(ReaderBehind(replica.name, self._seconds))
            return False
        if replica.failures:
            replica.failures = 0
            self._report(ReaderRestored(replica.name))
        self._choice, self._decided = replica, True
        return True

    def _leave(self, replica: Replica, error: Exception) -> None:
        seconds = replica.failed()
        if seconds is not None:
            self._report(ReaderFailed(replica.name, error, seconds))

    def _left(self) -> float:
        """Give what is left of the seconds to wait in, for all readers together."""
        if self._until is None:
            self._until = time.monotonic() + self._seconds
        return max(0.0, self._until - time.monotonic())
