"""Taking turns: a lock per session, re-entrant per task."""

from __future__ import annotations

import asyncio


class Turn:
    """Lets one task at a time use a session.

    Overlap is what counts, not which task owns the session: frameworks switch
    tasks between a request's middleware and its endpoint.
    """

    __slots__ = ("_depth", "_lock", "_owner")

    def __init__(self) -> None:
        """Start free."""
        self._lock = asyncio.Lock()
        self._owner: asyncio.Task[object] | None = None
        self._depth = 0

    @property
    def is_free(self) -> bool:
        """Whether nobody is using the session."""
        return self._owner is None

    @property
    def is_mine(self) -> bool:
        """Whether the current task is the one whose turn it is."""
        return self._owner is asyncio.current_task()

    async def __aenter__(self) -> None:
        """Wait for the call in flight, unless it is this task's own."""
        task = asyncio.current_task()
        if self._owner is not task:
            await self._lock.acquire()
            self._owner = task
        self._depth += 1

    async def __aexit__(self, *exc_info: object) -> None:
        """Let the next one in."""
        self._depth -= 1
        if not self._depth:
            self._owner = None
            self._lock.release()
