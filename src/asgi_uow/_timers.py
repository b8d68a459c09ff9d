"""One timer for each event loop, which looks at what has a limit of time."""

from __future__ import annotations

import math
import threading
from contextvars import Context
from typing import TYPE_CHECKING, Protocol
from weakref import ref

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, TimerHandle
    from collections.abc import Callable


class Limited(Protocol):
    def look(self) -> float | None:
        """Give the seconds after which to look again; None if that is not needed."""


class Timer:
    """Of one loop. A timer of its own for each would cost much more, and stay for long.

    https://github.com/python/cpython/issues/86296: asyncio keeps what is cancelled.
    """

    def __init__(self, loop: object) -> None:
        self.loop: Callable[[], object] = ref(loop)
        self.limited: dict[Callable[[], Limited | None], None] = {}
        """What gives each of them, or None where nobody else refers to it any more."""
        self._next = math.inf  # when it looks: by the clock of the loop
        self._handle: TimerHandle | None = None

    def add(self, each: Callable[[], Limited | None], when: float) -> None:
        """Look at it at that time of the loop's clock, or sooner."""
        self.limited[each] = None
        if when < self._next:
            self._look_at(when)

    def _look_at(self, when: float) -> None:
        if self._handle is not None:
            self._handle.cancel()
        loop: AbstractEventLoop = self.loop()  # type: ignore[assignment]  # it runs
        # In an empty context: not that of the request which happens to be first.
        self._handle = loop.call_at(when, self._look, loop, context=Context())
        self._next = when

    def _look(self, loop: AbstractEventLoop) -> None:
        self._next, self._handle, soonest = math.inf, None, 0.0
        try:
            found: list[float] = []
            for each in tuple(self.limited):
                # First: what one look raises is the loop's to log, and ends no other.
                self.limited.pop(each, None)
                if (it := each()) is not None and (seconds := it.look()) is not None:
                    self.limited[each] = None
                    found.append(seconds)
            soonest = min(found, default=math.inf)
        finally:
            when = loop.time() + soonest
            if self.limited and when < self._next:
                self._look_at(when)


_here = threading.local()
"""Where each thread finds the timer of its loop, which alone keeps that alive."""


def timer_of(loop: AbstractEventLoop) -> Timer:
    """Give the timer of the running loop."""
    timer: Timer | None = getattr(_here, "timer", lambda: None)()
    if timer is None or timer.loop() is not loop:
        timer = Timer(loop)
        _here.timer = ref(timer)
    return timer
