"""Run to completion: an end that no cancellation interrupts."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from anyio import CancelScope

if TYPE_CHECKING:
    from collections.abc import Coroutine

T = TypeVar("T")

GRACE = 7.0
"""Seconds a timed-out operation gets to close its connection; psycopg takes 5."""


async def run_to_completion(work: Coroutine[object, object, T]) -> T:
    """Run `work` to its end whatever cancels the caller, then deliver the cancel.

    A native `task.cancel()` pierces anyio's shield and is absorbed by the loop; a
    level-triggered cancel scope would make the loop spin and is held off by the
    shield. The task is hidden from `asyncio.all_tasks()`, so that the end of
    `asyncio.run()`, which cancels every task it can see, waits for it.
    https://docs.python.org/3/library/asyncio-extending.html#task-lifetime-support
    """
    task = asyncio.create_task(work)
    asyncio._unregister_task(task)  # noqa: SLF001  # public in the link above
    cancelled: asyncio.CancelledError | None = None
    with CancelScope(shield=True):
        while not task.done():
            try:
                await asyncio.wait((task,))
            except asyncio.CancelledError as error:
                cancelled = error
    if cancelled is not None:
        # The failure, if any, has been stored by `work`; mark it as retrieved.
        task.exception()
        raise cancelled
    return task.result()


async def bounded(work: Coroutine[object, object, T], seconds: float | None) -> T:
    """Await `work` for at most `seconds`; then cancel it and raise `TimeoutError`.

    Unlike `asyncio.timeout()` this also returns when `work` does not react to its
    cancellation, as a driver may that waits for a server which stopped answering.
    """
    task = asyncio.create_task(work)
    asyncio._unregister_task(task)  # noqa: SLF001  # see run_to_completion
    try:
        await asyncio.wait((task,), timeout=seconds)
    finally:
        late = not task.done()
        if late:
            task.cancel()
            with CancelScope(shield=True):
                await asyncio.wait((task,), timeout=GRACE)
    if late and (not task.done() or task.cancelled()):
        message = f"no answer within {seconds} seconds"
        raise TimeoutError(message)
    return task.result()


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
