"""Ends that no cancellation interrupts, time limits, and a lock for one session."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import os
import sys
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar
from weakref import ref

from anyio import CancelScope

from asgi_uow._timers import timer_of

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Callable, Coroutine
    from contextlib import AbstractContextManager

    AnyTask: TypeAlias = asyncio.Task[object]
    Granted: TypeAlias = asyncio.Future[None]

T = TypeVar("T")

GRACE = 7.0  # seconds for what is late to close its connection; psycopg takes 5
CUT_GRACE = 1.0  # seconds for noticing that its connection was cut off

register_at_fork: Callable[..., object] = getattr(os, "register_at_fork", dict)
"""Does nothing on Windows, where nothing forks."""

# What never has to wait takes no turn of the loop.
EAGERLY: dict[str, Any] = {"eager_start": True} if sys.version_info >= (3, 12) else {}


class Shield:
    """Runs work in tasks of its own; what cancels the caller meanwhile has to wait.

    A native `task.cancel()` pierces anyio's shield and is absorbed by the loop; a
    level-triggered cancel scope would make the loop spin and is held off by the
    shield. One that `forwards` also cancels the work, which gets `GRACE` seconds then.
    The tasks are hidden from `asyncio.all_tasks()`, so that the end of
    `asyncio.run()`, which cancels every task it can see, waits for them.
    https://docs.python.org/3/library/asyncio-extending.html#task-lifetime-support
    """

    seconds: float | None
    is_late: bool

    def __init__(self, *, forwards: bool = False) -> None:
        self.cancelled: BaseException | None = None
        self._waiter: Granted | None = None
        self._forwards = forwards
        self._loop = asyncio.get_running_loop()

    async def run(
        self,
        work: Coroutine[object, object, T],
        seconds: float | None = None,
        *,
        at_once: bool = True,
        cut: Callable[[], None] | None = None,
    ) -> T:
        """Await `work`; after so many seconds it is cancelled, and left `GRACE` later.

        Raises `TimeoutError` in both cases, unless it still gave a result. `cut` is
        called before, to have `work` fail: what is cancelled may talk to the server
        first. What may start the like of itself, as hooks do, must not start `at_once`.
        """
        self.seconds, self._gave_up, self._cut = seconds, False, cut
        self.is_late = False
        if seconds is not None:
            self._until = self._loop.time() + seconds
        options = EAGERLY if at_once else {}
        step = self._to_its_end(work) if options else work
        task: asyncio.Task[T] = asyncio.Task(step, loop=self._loop, **options)
        if not options:  # it may be cancelled before it begins
            task.add_done_callback(self._wake)
        try:
            if not task.done():
                asyncio._unregister_task(task)  # noqa: SLF001  # public in the link
                await self._wait(task)
            was_stopped = task.cancelled() or self._cut is not cut
            if not task.done() or (self.is_late and was_stopped):
                if task.done() and not task.cancelled():
                    task.exception()  # what the cut was for: the loop need not tell
                message = f"no answer within {seconds} seconds"
                raise TimeoutError(message)
            return task.result()
        finally:
            del task  # an error in it refers to this frame

    async def _to_its_end(self, work: Coroutine[object, object, T]) -> T:
        try:
            return await work
        finally:
            if not self._loop.is_closed():
                self._wake()  # not by a callback, which takes a turn of the loop

    def restart(self) -> None:
        """Give the work all its seconds again, for its next step."""
        if self.seconds is not None:
            self._until = self._loop.time() + self.seconds
            if self.is_late:  # it would be looked at after `GRACE`
                self._timer.add(self._itself, self._until)
        self.is_late = False

    def pause(self) -> None:
        """Let the work do what has a limit of its own."""
        self._until = math.inf

    async def _wait(self, task: AnyTask) -> None:
        scope: CancelScope | None = None
        self._task, self._timer = task, timer_of(self._loop)
        itself = self._itself
        if self.seconds is not None:
            self._timer.add(itself, self._until)
        try:
            while not (task.done() or self._gave_up):
                self._waiter = self._loop.create_future()
                try:
                    await self._waiter
                except asyncio.CancelledError as error:
                    self.raise_later(error)
                    if scope is None:
                        scope = CancelScope(shield=True)
                        scope.__enter__()
                    if self._forwards and not self.is_late:
                        self._cancel(task)
        finally:
            if scope is not None:
                scope.__exit__(None, None, None)
            self._timer.limited.pop(itself, None)
            del self._task  # which refers to this frame

    def _itself(self) -> Shield:
        return self  # kept by the timer, as long as it waits

    def _wake(self, _: object = None) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def look(self) -> float | None:
        """Cancel the task if its time is up; give it up if that did not help."""
        left = self._until - self._loop.time()
        if left > 0:
            return min(left, self.seconds or GRACE)
        if self._cut is not None:
            cut, self._cut = self._cut, None
            self._give(CUT_GRACE)
            cut()
        elif self._task.cancelling():
            self._gave_up = True
            self._wake()
        else:
            self._cancel(self._task)
        return None

    def _give(self, seconds: float) -> None:
        self.is_late, self._until = True, self._loop.time() + seconds
        self._timer.add(self._itself, self._until)

    def _cancel(self, task: AnyTask) -> None:
        self._give(GRACE)
        task.cancel()

    def raise_later(self, error: BaseException) -> None:
        """Have `deliver()` raise it; a cancellation does not hide another error."""
        if self.cancelled is None or isinstance(self.cancelled, asyncio.CancelledError):
            self.cancelled = error

    def deliver(self) -> None:
        """Raise the cancellation that came meanwhile, if one did."""
        if self.cancelled is not None:
            raise self.cancelled


async def run_to_completion(work: Coroutine[object, object, T]) -> T:
    """Run `work` to its end whatever cancels the caller, then deliver the cancel."""
    return await bounded(work, None, forwards=False)


async def bounded(
    work: Coroutine[object, object, T],
    seconds: float | None,
    *,
    forwards: bool = True,
    cut: Callable[[], None] | None = None,
) -> T:
    """Raise `TimeoutError` after `seconds`, even if `work` ignores its cancellation."""
    shield = Shield(forwards=forwards)
    try:
        return await shield.run(work, seconds, cut=cut)
    finally:
        shield.deliver()  # what the work raised is its context


@dataclasses.dataclass(slots=True, weakref_slot=True, eq=False, repr=False)
class TaskLock:
    """Lets one task at a time use a session; its owner may take it again."""

    # Overlap is what counts: frameworks switch tasks within one request.
    elsewhere: type[Exception] = RuntimeError
    """Raised for a task of another loop than the first."""
    owner: AnyTask | None = None
    loop: AbstractEventLoop | None = None
    limit: Callable[[], AbstractContextManager[None]] = nullcontext
    released: float = 0.0  # since when nobody has it: perf_counter()
    last: ref[AnyTask] | None = None  # who had it then
    resume: Callable[[float], None] | None = None
    """Told, when it is taken, since when nobody had it."""
    _depth: int = 0
    _waiting: dict[Granted, AnyTask] = dataclasses.field(default_factory=dict)

    @property
    def is_mine(self) -> bool:
        return self.owner is asyncio.current_task()

    def take(self, task: AnyTask) -> bool:
        """Take the lock if it is free, or the task's own."""
        loop = task._loop  # noqa: SLF001  # no call
        if self.owner is None and (self.loop is loop or self.loop is None):
            self.owner, self.loop = task, loop
            if self.resume is not None:
                self.resume(self.released)
        elif self.owner is not task:
            return False
        self._depth += 1
        return True

    async def wait(self, task: AnyTask) -> None:
        """Wait until it is this task's turn; then the lock is taken."""
        loop = asyncio.get_running_loop()
        if self.loop is not loop and self.loop is not None:
            raise self.elsewhere(repr(self.loop))
        granted = loop.create_future()
        self._waiting[granted] = task
        try:
            with self.limit():
                await granted
        except BaseException:
            if self._waiting.pop(granted, None) is None:
                self.release()  # it was granted at the same moment
            raise

    def release(self) -> None:
        """Hand the lock to the task that has waited for the longest time."""
        self._depth -= 1
        if self._depth:
            return
        if self._waiting:
            granted = next(iter(self._waiting))
            self.owner, self._depth = self._waiting.pop(granted), 1
            # Cancelled in this turn of the loop: wait() will hand it on.
            if not granted.done():
                granted.set_result(None)
        else:
            self.last = None if self.owner is None else ref(self.owner)
            self.owner, self.released = None, time.perf_counter()

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        if task is not None and not self.take(task):
            await self.wait(task)

    async def __aexit__(self, *exc_info: object) -> None:
        self.release()
