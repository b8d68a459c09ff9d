"""Hooks: what was registered to happen around the end of a unit of work."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PHASES = ("before_commit", "after_commit", "after_rollback", "after_response")


@dataclasses.dataclass(frozen=True, slots=True)
class Hook:
    """One registered call."""

    fn: Callable[..., object]
    args: tuple[object, ...]
    kwargs: Mapping[str, object]

    @property
    def name(self) -> str:
        """The qualified name of the callable; a partial shows what it wraps."""
        return name_of(self.fn)

    async def call(self, seconds: float | None) -> None:
        """Await an async callable, run any other in a worker thread.

        What a sync callable returns is awaited if it can be, so that
        `lambda: publish(event)` works. Raises `TimeoutError` after that
        many `seconds`; a thread that is still running then is left alone.
        """
        bound = functools.partial(self.fn, *self.args, **self.kwargs)
        with anyio.fail_after(seconds):
            if _is_async(self.fn):
                result = bound()
            else:
                result = await anyio.to_thread.run_sync(bound, abandon_on_cancel=True)
            if inspect.isawaitable(result):
                await result


class Hooks:
    """The hooks of one unit of work, a queue per phase."""

    __slots__ = PHASES

    def __init__(self) -> None:
        """Make the queues."""
        self.before_commit: list[Hook] = []
        self.after_commit: list[Hook] = []
        self.after_rollback: list[Hook] = []
        self.after_response: list[Hook] = []

    def __bool__(self) -> bool:
        """Tell whether anything was registered."""
        return bool(
            self.before_commit
            or self.after_commit
            or self.after_rollback
            or self.after_response
        )

    def register(
        self,
        phase: str,
        fn: object,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
    ) -> None:
        """Append a call to the queue of `phase`; `TypeError` if not callable."""
        if not callable(fn):
            message = (
                f"{phase}() takes a callable and its arguments, not {fn!r}. Did you "
                f"call the function? Write {phase}(fn, arg), not {phase}(fn(arg))."
            )
            if inspect.iscoroutine(fn):
                fn.close()  # or it warns that it was never awaited
            raise TypeError(message)
        queue: list[Hook] = getattr(self, phase)
        queue.append(Hook(fn, args, kwargs))

    def clear(self) -> None:
        """Forget everything that was registered."""
        for phase in PHASES:
            getattr(self, phase).clear()


def name_of(fn: Callable[..., object]) -> str:
    """Name any callable; never fails."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    name: object = getattr(fn, "__qualname__", None)
    return name if isinstance(name, str) else type(fn).__qualname__


def _is_async(fn: Callable[..., object]) -> bool:
    while isinstance(fn, functools.partial):
        fn = fn.func
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(
        getattr(fn, "__call__", None),  # noqa: B004  # the method, not a test for it
    )
