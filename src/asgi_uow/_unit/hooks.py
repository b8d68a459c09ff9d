"""Hooks: what was registered to happen around the end of a unit of work."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
import types
import warnings
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING, TypeAlias

import anyio.to_thread
from anyio.lowlevel import RunVar

if TYPE_CHECKING:
    import contextvars
    from collections.abc import Callable, Coroutine, Generator, Iterator, Mapping

    from asgi_uow._concurrency import Shield
    from asgi_uow._databases.journal import Frame

    Work: TypeAlias = Coroutine[object, object, None]

MOST_BY_HOOKS = 100  # that the hooks of one unit of work may register
MOST_THREADS = 40  # for the sync hooks of one event loop, and nobody else
THREAD_SECONDS = 5.0  # for which a sync hook waits for one, before its own time
_threads: RunVar[anyio.CapacityLimiter | None] = RunVar("asgi_uow.threads", None)


@dataclasses.dataclass(slots=True, eq=False)
class Hook:
    fn: Callable[..., object]
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    frame: Frame | None = None
    """The savepoint that it was registered in."""

    @property
    def name(self) -> str:
        return name_of(self.fn)

    @property
    def is_dropped(self) -> bool:
        """Whether its savepoint was rolled back."""
        return self.frame is not None and self.frame.is_undone()

    async def call(self, shield: Shield) -> None:
        """Await an async callable, run any other in a worker thread.

        What a sync callable returns is awaited if it can be, so that
        `lambda: publish(event)` works. A thread that is still running when this is
        cancelled is left alone; waiting for one takes no time of the `shield`.
        """
        if is_async(self.fn):
            await self.fn(*self.args, **self.kwargs)  # type: ignore[misc]
            return
        shield.pause()
        waiting = [await self._take_thread()]
        shield.restart()
        bound = functools.partial(self.fn, *self.args, **self.kwargs)
        alone = anyio.CapacityLimiter(1)  # anyio frees its own at a cancellation
        try:
            result, error = await anyio.to_thread.run_sync(
                _call_in_thread, bound, waiting, abandon_on_cancel=True, limiter=alone
            )
        finally:
            with suppress(IndexError):  # it has begun, and frees its thread itself
                waiting.pop()()
        if error is not None:
            raise error
        if inspect.isawaitable(result):
            await result

    async def _take_thread(self) -> Callable[..., object]:
        """Wait until one more thread may run; give what says that it has ended."""
        limiter = _threads.get()
        if limiter is None:
            _threads.set(limiter := anyio.CapacityLimiter(MOST_THREADS))
        with anyio.move_on_after(THREAD_SECONDS):
            try:  # cancelled where none has to wait, anyio before 4.16 keeps the thread
                limiter.acquire_on_behalf_of_nowait(self)
            except anyio.WouldBlock:
                await limiter.acquire_on_behalf_of(self)
            in_loop = asyncio.get_running_loop().call_soon_threadsafe
            return functools.partial(in_loop, limiter.release_on_behalf_of, self)
        message = f"no thread was free within {THREAD_SECONDS} seconds"
        raise TimeoutError(message + ": is another hook holding them?")


def _call_in_thread(
    fn: Callable[[], object], waiting: list[Callable[..., object]]
) -> tuple[object, BaseException | None]:
    with suppress(IndexError):  # it was cancelled just before it began
        free = waiting.pop()
        try:
            return fn(), None
        except BaseException as error:  # noqa: BLE001  # GeneratorExit ends the task
            return None, error
        finally:
            with suppress(RuntimeError):  # the loop is closed
                free()
    return None, None


class Hooks:
    """The hooks of one unit of work, a queue per phase in order of registration."""

    __slots__ = ("queues", "quota")

    def __init__(self, quota: Iterator[int] | None = None) -> None:
        self.quota: Iterator[int] = quota or iter(range(MOST_BY_HOOKS))
        """How many these hooks may still register, at any depth."""
        self.queues: dict[str, list[Hook]] = {}

    def queue(self, phase: str) -> list[Hook]:
        """Give the queue of a phase; what is registered meanwhile is appended."""
        return self.queues.setdefault(phase, [])

    def take(self, phase: str) -> list[Hook]:
        return self.queues.pop(phase, [])

    def __del__(self) -> None:
        """Warn of hooks that never ran: their unit was dropped without an end."""
        if any(self.queues.values()):
            names = ", ".join(hook.name for hook in chain(*self.queues.values()))
            message = f"a unit of work was collected with hooks that never ran: {names}"
            warnings.warn(message, ResourceWarning, stacklevel=2, source=self)


NO_HOOKS = Hooks()


def check_callable(phase: str, fn: object) -> None:
    """Raise `TypeError`, with the likely mistake, for what is no hook."""
    if callable(fn) and not _flags_of(fn) & inspect.CO_ASYNC_GENERATOR:
        return
    message = f"{phase}() takes a callable and its arguments, not {fn!r}. Did you "
    message += f"call the function? Write {phase}(fn, arg), not {phase}(fn(arg))."
    if callable(fn):
        message = f"{phase}({name_of(fn)}): an async generator function has no end to"
        message += " wait for. Pass an async function that reads it."
    if inspect.iscoroutine(fn):
        fn.close()  # otherwise it warns that it was never awaited
    raise TypeError(message)


async def call_hook(
    work: Work, context: contextvars.Context, shield: Shield
) -> BaseException | None:
    """Run the `work` of one hook in a context; give what it raised.

    A hook that does not suspend costs no task. One that does suspends this task, which
    is cancelled when its time is up.
    """
    shield.restart()
    error: BaseException | None = None
    try:
        await run_in(context, work)
    except BaseException as raised:  # noqa: BLE001  # hook isolation
        error = raised
    try:
        is_late = shield.is_late
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            # What cancelled one hook must not cancel the next one.
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
            while task.cancelling():
                task.uncancel()
            if error is None:
                return TimeoutError("it went on after its time")
            if is_late and isinstance(error, asyncio.CancelledError):
                return TimeoutError(f"no answer within {shield.seconds} seconds")
        return error
    finally:
        del error  # its traceback refers to this frame


@types.coroutine
def run_in(context: contextvars.Context, work: Work) -> Generator[object, object, None]:
    """Run `work` in a context of its own, and in this task."""
    resume: Callable[..., object] = work.send
    value: object = None
    while True:
        try:
            waits_for = context.run(resume, value)
        except StopIteration:
            return
        try:
            resume, value = work.send, (yield waits_for)
        except BaseException as error:  # noqa: BLE001  # the work's to handle
            resume, value = work.throw, error


def name_of(fn: Callable[..., object]) -> str:
    """Name any callable; never fails, whatever its attributes do."""
    named, name = _unwrapped(fn), None
    with suppress(Exception):
        name = getattr(named, "__qualname__", None)
    return name if isinstance(name, str) else type(named).__qualname__


def is_async(fn: Callable[..., object]) -> bool:
    """Tell whether what it returns has to be awaited, as far as can be seen."""
    if _flags_of(fn) & inspect.CO_COROUTINE:
        return True  # the usual case, without inspect's many questions
    made = _unwrapped(fn)
    call = getattr(made, "__call__", None)  # noqa: B004  # the method, not a test
    return inspect.iscoroutinefunction(made) or inspect.iscoroutinefunction(call)


def _flags_of(fn: object) -> int:
    if not isinstance(fn, types.FunctionType):
        fn = _unwrapped(fn)
        fn = getattr(fn, "__func__", None) if isinstance(fn, types.MethodType) else fn
    return fn.__code__.co_flags if isinstance(fn, types.FunctionType) else 0


def _unwrapped(fn: object) -> object:
    while isinstance(fn, functools.partial):
        fn = fn.func
    return fn
