"""Connections that a unit of work holds while nothing is executed: who keeps them."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import gc
import sysconfig
import time
from pathlib import Path
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from asgi_uow._databases.connection import is_in_use
from asgi_uow._decision import WRITABLE
from asgi_uow.observers import HeldIdle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from asgi_uow._sessions.managed import Shared
    from asgi_uow._sessions.session import Session
    from asgi_uow.observers import Event

_PATHS = sysconfig.get_paths()
LIBRARIES = (
    *(_PATHS[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    str(Path(__file__).parents[1]),  # this one, also where it is not installed
    "<",  # made at run time
)
PARTS: dict[type, tuple[str, str]] = {
    CoroutineType: ("cr_frame", "cr_await"),
    GeneratorType: ("gi_frame", "gi_yieldfrom"),
    AsyncGeneratorType: ("ag_frame", "ag_await"),
}


@dataclasses.dataclass(eq=False)
class Watch:
    """The sessions of one unit that hold a transaction; tells of them at most once."""

    shared: Shared
    seconds: float
    tell: Callable[[Event], None]
    task: asyncio.Task[Any] | None  # the request's: a caller's may have ended
    sessions: list[Session] = dataclasses.field(default_factory=list)
    context: contextvars.Context = dataclasses.field(
        default_factory=contextvars.copy_context
    )

    def begin(self) -> None:
        """Look after them from now on, in this event loop."""
        loop = asyncio.get_running_loop()
        self._rounds = _rounds.get(loop) or _Rounds()
        _rounds[loop] = self._rounds
        self._rounds.add(self)

    def end(self) -> None:
        self._rounds.watches.pop(self, None)

    def look(self) -> float | None:
        """Give the seconds after which to look again; None once it has told."""
        longest = 0.0
        for session in self.sessions:
            longest = max(longest, idle := self._idle(session))
            if idle >= self.seconds:
                place = _place_of(session.own_lock.last, self.task)
                held = HeldIdle(idle, place, session.sync_session.database.name)
                self.context.run(self.tell, held)
                return None
        return self.seconds - longest

    def _idle(self, session: Session) -> float:
        sync, lock = session.sync_session, session.own_lock
        states = WRITABLE if sync.access == "write" else session.usable_in
        held = [each for each in sync.connections if not each.closed]
        if lock.owner or sync.cursors or not held or self.shared.state not in states:
            return 0.0
        now = time.perf_counter()
        if sync.driver_exposed and any(map(is_in_use, held)):
            lock.released = now  # past the session: it is known from looks alone
        return now - lock.released


class _Rounds:
    """The watches of one event loop, which needs one timer for all."""

    def __init__(self) -> None:
        self.watches: dict[Watch, None] = {}
        self._due = 0.0  # when the timer comes, by the loop's clock; then in the past

    def add(self, watch: Watch) -> None:
        self.watches[watch] = None
        self._look_after(watch.seconds)

    def _look_after(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        if not loop.time() < self._due <= loop.time() + seconds:
            self._due = loop.time() + seconds
            # In an empty context: not that of the request which happens to be first.
            loop.call_at(self._due, self._look, context=contextvars.Context())

    def _look(self) -> None:
        for watch in tuple(self.watches):
            if (seconds := watch.look()) is None:
                watch.end()
            else:
                self._look_after(seconds)


_rounds: WeakKeyDictionary[asyncio.AbstractEventLoop, _Rounds] = WeakKeyDictionary()


def _place_of(last: Callable[[], Any] | None, task: Any) -> str:
    """Say where the first of two tasks that has not ended is waiting."""
    for each in (last and last(), task):
        if each is not None and not each.done():
            frames = [*_frames(each.get_coro())]
            lines = [(it.f_code, it.f_lineno) for it in frames]
            own = [it for it in lines if not it[0].co_filename.startswith(LIBRARIES)]
            code, line = (own or lines)[-1]
            return f"{code.co_filename}:{line} in {code.co_qualname}"
    return "a task that has ended"


def _frames(waiting: Any) -> Iterator[FrameType]:
    """Give the frames of a suspended coroutine; the one that waits comes last."""
    seen: set[int] = set()
    while type(waiting) in PARTS and id(waiting) not in seen:
        seen.add(id(waiting))
        frame, inner = (getattr(waiting, name) for name in PARTS[type(waiting)])
        if frame is not None:
            yield frame
        if type(inner) not in PARTS:
            # What stands between, such as anext(), has no attribute for it. A
            # generator that sends by itself, as ours for hooks, has it as a local.
            refers = gc.get_referents(waiting if inner is None else inner)
            inner = next((each for each in refers if type(each) in PARTS), None)
        waiting = inner
