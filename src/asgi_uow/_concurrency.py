"""Ends that no cancellation interrupts, time limits, and a lock for one session."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import math
import sys
from collections import deque
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from anyio import CancelScope

if TYPE_CHECKING:
    from collections.abc import Coroutine

    AnyTask: TypeAlias = asyncio.Task[object]

T = TypeVar("T")

GRACE = 7.0
"""Seconds a timed-out operation gets to close its connection; psycopg takes 5."""

# A task that never has to wait costs no turn of the event loop.
_start_at_once = (
    functools.partial(asyncio.Task, eager_start=True)
    if sys.version_info >= (3, 12)
    else asyncio.Task
)


class TimeLimit:
    """The seconds that a task, or one step of it, may take; None is no limit."""

    __slots__ = ("is_over", "seconds", "until")

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.is_over = False
        self.until: float = math.inf
        self.restart()

    def restart(self) -> None:
        """Begin the next step, which has all the time again."""
        self.is_over = False
        if self.seconds is not None:
            self.until = asyncio.get_running_loop().time() + self.seconds

    def pause(self) -> None:
        """Let the task do what has a limit of its own."""
        self.until = math.inf


class Shield:
    """Runs work in tasks of its own; what cancels the caller meanwhile has to wait.

    A native `task.cancel()` pierces anyio's shield and is absorbed by the loop; a
    level-triggered cancel scope would make the loop spin and is held off by the
    shield. The tasks are hidden from `asyncio.all_tasks()`, so that the end of
    `asyncio.run()`, which cancels every task it can see, waits for them.
    https://docs.python.org/3/library/asyncio-extending.html#task-lifetime-support

    If it `forwards` cancellations, the work is cancelled and gets `GRACE` seconds.
    """

    __slots__ = ("cancelled", "forwards")

    def __init__(self, *, forwards: bool = False) -> None:
        self.cancelled: asyncio.CancelledError | None = None
        self.forwards = forwards

    async def run(
        self,
        work: Coroutine[object, object, T],
        limit: TimeLimit | None = None,
        *,
        at_once: bool = True,
    ) -> T:
        """Await `work`; past its limit it is cancelled, and left `GRACE` later.

        Raises `TimeoutError` in both cases, unless it still gave a result. It also
        returns when `work` ignores its cancellation, as a driver may that waits for
        a server which stopped answering. What may start the like of itself in turn,
        as hooks do, does not start `at_once`: that is a call in this call.
        """
        start = _start_at_once if at_once else asyncio.Task
        task = start(work, loop=asyncio.get_running_loop())
        if not task.done():
            asyncio._unregister_task(task)  # noqa: SLF001  # public in the link above
            await self._wait(_Waiting(task, limit))
        if not task.done() or (
            limit is not None and limit.is_over and task.cancelled()
        ):
            message = f"no answer within {limit.seconds if limit else GRACE} seconds"
            raise TimeoutError(message)
        return task.result()

    async def _wait(self, waiting: _Waiting) -> None:
        scope: CancelScope | None = None
        try:
            while not waiting.is_over:
                try:
                    await waiting.wait()
                except asyncio.CancelledError as error:
                    self.cancelled = error
                    if scope is None:
                        scope = CancelScope(shield=True)
                        scope.__enter__()
                    if self.forwards:
                        waiting.cancel()
        finally:
            if scope is not None:
                scope.__exit__(None, None, None)
            waiting.stop()

    def deliver(self) -> None:
        """Raise the cancellation that came meanwhile, if one did."""
        if self.cancelled is not None:
            raise self.cancelled


class _Waiting:
    """A task that is waited for, and the timer that watches its limit."""

    __slots__ = ("given_up", "limit", "loop", "task", "timer", "waiter")

    def __init__(self, task: AnyTask, limit: TimeLimit | None) -> None:
        self.task = task
        self.limit = limit
        self.given_up = False
        self.loop = asyncio.get_running_loop()
        self.timer: asyncio.TimerHandle | None = None
        self.waiter: asyncio.Future[None] | None = None
        task.add_done_callback(self.wake)
        if limit is not None and limit.seconds is not None:
            self.watch(self.loop.time() + limit.seconds)

    @property
    def is_over(self) -> bool:
        return self.given_up or self.task.done()

    async def wait(self) -> None:
        self.waiter = self.loop.create_future()
        await self.waiter

    def wake(self, _: object = None) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    def watch(self, when: float) -> None:
        # In an empty context: the loop keeps that of a cancelled timer for long.
        context = contextvars.Context()
        self.timer = self.loop.call_at(when, self.look, context=context)

    def look(self) -> None:
        """Cancel the task if its time is up; give it up if that did not help."""
        limit = self.limit
        if limit is not None and self.loop.time() < limit.until:
            pause = limit.seconds or GRACE
            self.watch(min(limit.until, self.loop.time() + pause))
        elif limit is None or limit.is_over:
            self.given_up = True
            self.wake()
        else:
            self.cancel()

    def cancel(self) -> None:
        """Cancel the task; it is given up if it is not done in time."""
        limit = self.limit = self.limit or TimeLimit(GRACE)
        if not limit.is_over:
            limit.is_over = True
            limit.until = self.loop.time() + GRACE
            self.stop()
            self.watch(limit.until)
            self.task.cancel()

    def stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()


async def run_to_completion(work: Coroutine[object, object, T]) -> T:
    """Run `work` to its end whatever cancels the caller, then deliver the cancel."""
    shield = Shield()
    try:
        result = await shield.run(work)
    finally:
        shield.deliver()  # the work has told its failure by other ways
    return result


async def bounded(work: Coroutine[object, object, T], seconds: float | None) -> T:
    """Await `work` for at most `seconds`; then cancel it and raise `TimeoutError`.

    Unlike `asyncio.timeout()` this also returns when `work` does not react.
    """
    shield = Shield(forwards=True)
    try:
        result = await shield.run(work, TimeLimit(seconds))
    finally:
        shield.deliver()
    return result


class TaskLock:
    """Lets one task at a time use a session; its owner may take it again.

    Overlap is what counts, not which task owns the session: frameworks switch
    tasks between a request's middleware and its endpoint.
    """

    __slots__ = ("_depth", "_owner", "_waiting")

    def __init__(self) -> None:
        self._owner: AnyTask | None = None
        self._depth = 0
        self._waiting: deque[tuple[AnyTask, asyncio.Future[None]]] | None = None

    @property
    def is_free(self) -> bool:
        """Whether nobody is using the session."""
        return self._owner is None

    @property
    def is_mine(self) -> bool:
        """Whether the current task has the lock."""
        return self._owner is asyncio.current_task()

    def take(self, task: AnyTask) -> bool:
        """Take the lock if it is free, or the task's own."""
        if self._owner is None:
            self._owner = task
        elif self._owner is not task:
            return False
        self._depth += 1
        return True

    async def wait(self, task: AnyTask) -> None:
        """Wait until it is this task's turn; then the lock is taken."""
        granted = asyncio.get_running_loop().create_future()
        if self._waiting is None:
            self._waiting = deque()
        entry = (task, granted)
        self._waiting.append(entry)
        try:
            await granted
        except BaseException:
            if entry in self._waiting:
                self._waiting.remove(entry)
            else:  # it was granted at the same moment
                self.release()
            raise

    def release(self) -> None:
        """Hand the lock to the task that has waited for the longest time."""
        self._depth -= 1
        if self._depth:
            return
        self._owner = None
        if self._waiting:
            self._owner, granted = self._waiting.popleft()
            self._depth = 1
            # Cancelled in this turn of the loop: wait() will hand it on.
            if not granted.done():
                granted.set_result(None)

    async def __aenter__(self) -> None:
        """Wait for the call in flight, unless it is this task's own."""
        task = asyncio.current_task()
        if task is not None and not self.take(task):
            await self.wait(task)

    async def __aexit__(self, *exc_info: object) -> None:
        """Let the next one in."""
        self.release()
