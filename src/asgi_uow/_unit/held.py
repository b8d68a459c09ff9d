"""Connections that a unit of work holds while nothing is executed: who keeps them."""

from __future__ import annotations

import contextvars
import gc
import sysconfig
import time
from asyncio import _get_running_loop
from pathlib import Path
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import ref

from asgi_uow._concurrency import Shield
from asgi_uow._databases import known
from asgi_uow._databases.connection import raw_of
from asgi_uow._timers import timer_of
from asgi_uow.observers import HeldIdle

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator
    from types import FrameType

    import sqlalchemy as sa

    from asgi_uow._sessions.session import Session
    from asgi_uow.observers import Event

    Task: TypeAlias = asyncio.Task[Any]

LIBRARIES = (
    *map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")),
    str(Path(__file__).parents[1]),  # this one, also where it is not installed
    "<",  # made at run time
)
HOOKS = Shield._wait.__code__  # noqa: SLF001  # where a request waits for its hooks
PARTS: dict[type, tuple[str, str]] = {
    CoroutineType: ("cr_frame", "cr_await"),
    GeneratorType: ("gi_frame", "gi_yieldfrom"),
    AsyncGeneratorType: ("ag_frame", "ag_await"),
}


class Watch:
    """The sessions of one unit that hold a transaction; tells of them at most once."""

    def __init__(
        self, seconds: float, tell: Callable[[Event], None], task: Task | None
    ) -> None:
        """`task` is the request's: that of the last call may have ended."""
        self.own: ref[Watch] = ref(self)
        self.sessions: list[Session] = []
        self._seconds, self._tell, self._task = seconds, tell, task
        self.others: dict[Any, None] = {}
        if (loop := _get_running_loop()) is not None:
            self._enter(loop)
        elif task is not None:  # a thread asks for the session of a request
            task.get_loop().call_soon_threadsafe(self._enter, task.get_loop())

    def _enter(self, loop: asyncio.AbstractEventLoop) -> None:
        self._context, timer = contextvars.copy_context(), timer_of(loop)
        # Until its unit ends. A task that nobody refers to is to be collected.
        self.others = timer.limited
        timer.add(self.own, loop.time() + self._seconds)

    def look(self) -> float | None:
        """Give the seconds after which to look again; None once it has told."""
        longest = 0.0
        for session in self.sessions:
            longest = max(longest, idle := self._idle(session))
            if idle >= self._seconds:
                place = _place_of(session.own_lock.last, self._task)
                held = HeldIdle(idle, place, session.sync_session.database.name)
                self._context.run(self._tell, held)
                return None
        return self._seconds - longest

    def _idle(self, session: Session) -> float:
        sync, lock, states = session.sync_session, session.own_lock, session.usable_in
        held: list[Any] = [
            each for each in sync.connections if not (each.closed or each.invalidated)
        ]
        if lock.owner or sync.cursors or not held or session.shared.state not in states:
            return 0.0
        now = time.perf_counter()
        if any(map(_is_in_use, held)):
            lock.released = now  # past the session: it is known from looks alone
        # Attributes that are loaded, and connections, do not take the lock.
        released: float = max(lock.released, *(each.sent for each in held))
        return now - released


def _is_in_use(connection: sa.Connection) -> bool:
    """Tell whether a statement is in flight, by whatever it was sent."""
    dbapi: Any = connection.connection.dbapi_connection
    lock: Any = getattr(dbapi, "_execute_mutex", known.NO_LOCK)
    driver = known.driver_of(connection.dialect)
    return bool(lock._locked or driver.is_busy(raw_of(dbapi)))  # noqa: SLF001


def _place_of(last: Callable[[], Any] | None, task: Any) -> str:
    """Say where the first of two tasks that has not ended is waiting."""
    place = "a task that has ended"
    for each in (last and last(), task):
        if each is not None and not each.done():
            frames = filter(None, _frames(each.get_coro()))
            lines = [(it.f_code, it.f_lineno) for it in frames]
            own = [it for it in lines if not it[0].co_filename.startswith(LIBRARIES)]
            for code, line in (own or lines)[-1:]:
                return f"{code.co_filename}:{line} in {code.co_qualname}"
            place = "a coroutine that shows no frames"  # not one of Python's own
    return place


def _frames(waiting: Any) -> Iterator[FrameType | None]:
    """Give the frames of a suspended coroutine; the one that waits comes last."""
    seen: set[int] = set()
    while type(waiting) in PARTS and id(waiting) not in seen:
        seen.add(id(waiting))
        frame, inner = (getattr(waiting, name) for name in PARTS[type(waiting)])
        yield frame
        if getattr(frame, "f_code", None) is HOOKS:
            inner = frame.f_locals["task"].get_coro()
        elif type(inner) not in PARTS:
            # What stands between, such as anext(), has no attribute for it. A
            # generator that sends by itself, as ours for hooks, has it as a local.
            refers = gc.get_referents(waiting if inner is None else inner)
            inner = next((each for each in refers if type(each) in PARTS), None)
        waiting = inner
