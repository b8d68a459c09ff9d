"""What a request costs, counted: calls, tasks, objects and garbage, never seconds."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import sys
import threading
from collections import Counter
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Self

import asgi_uow
from tests.support.asgi import http_scope, no_body

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator
    from types import CodeType, FrameType
    from typing import Any, TypeAlias

    from asgi_uow._asgi import ASGIApp, Message, Scope

    TraceFunction: TypeAlias = Callable[[FrameType, str, Any], Any]

WARM_UP = 3
ASKED = 8
WAITS = {
    "BaseEventLoop.create_future": "futures",
    "BaseEventLoop.call_at": "timers",
    "Event.__init__": "events",
    "Lock.__init__": "locks",
    "Condition.__init__": "locks",
}
"""The functions that make what is waited for, by their names."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one request has cost."""

    functions: Counter[str]
    """The Python functions called; a coroutine counts each time it is resumed."""
    tasks: int
    """The tasks that ran, but for that of the request."""

    @property
    def calls(self) -> int:
        return self.functions.total()

    @property
    def greenlets(self) -> int:
        return self.functions["_AsyncIoGreenlet.__init__"]

    @property
    def hops(self) -> int:
        """How often a thread of aiosqlite has said that it is done."""
        return self.functions["BaseEventLoop.call_soon_threadsafe"]

    @property
    def waits(self) -> Counter[str]:
        """What was made to wait for."""
        made = Counter({"tasks": self.tasks} if self.tasks else {})
        for function, kind in WAITS.items():
            if self.functions[function]:
                made[kind] += self.functions[function]
        return made


class Recorder:
    """Notes which Python functions are called, and in which tasks.

    Inside `with` it also sees the threads that start there.
    """

    def __init__(self) -> None:
        self._codes: list[CodeType] = []
        self._tasks: set[asyncio.Task[object] | None] = set()
        self._is_on = False
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> Self:
        threading.setprofile(self._note_in_thread)
        return self

    def __exit__(self, *exc_info: object) -> None:
        threading.setprofile(None)

    async def request(self, app: ASGIApp) -> Cost:
        """Send one request, in a task of its own as a server does."""
        return await asyncio.create_task(self._request(app))

    async def _request(self, app: ASGIApp) -> Cost:
        self._codes.clear()
        self._tasks.clear()
        scope = http_scope()
        self._is_on = True
        sys.setprofile(self._note)
        try:
            await app(scope, no_body, take)
        finally:
            sys.setprofile(None)
            self._is_on = False
        own = {Recorder._request.__code__, take.__code__}
        functions = Counter(each.co_qualname for each in self._codes if each not in own)
        return Cost(functions, len(self._tasks - {None, asyncio.current_task()}))

    # Python traces nothing inside a profile function, so coverage cannot see these.
    def _note(  # pragma: no cover
        self, frame: FrameType, event: str, _: object
    ) -> None:
        if event == "call":
            self._codes.append(frame.f_code)
            # Also those that no task factory sees, and that all_tasks() does not show.
            self._tasks.add(asyncio.current_task(self._loop))

    def _note_in_thread(  # pragma: no cover
        self, frame: FrameType, event: str, _: object
    ) -> None:
        if event == "call" and self._is_on:
            self._codes.append(frame.f_code)


async def take(message: Message) -> None:
    """Be given a message, as a server is."""


async def cost(app: ASGIApp) -> Cost:
    """Give what a request costs on a warm pool.

    Of several the cheapest: an answer that comes in two pieces is more turns of the
    loop. The collector rests, since it calls finalizers.
    """
    with no_collector(), Recorder() as recorder:
        for _ in range(WARM_UP):
            await recorder.request(app)
        costs = [await recorder.request(app) for _ in range(ASKED)]
    return min(costs, key=lambda each: each.calls)


@contextmanager
def no_collector() -> Generator[None]:
    """Have garbage stay where it is; the objects of before are not looked at."""
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def is_ours(value: object) -> bool:
    module = str(type(value).__module__)
    return module.partition(".")[0] == asgi_uow.__name__


def live(kinds: tuple[type, ...]) -> list[object]:
    """Give the objects that are of a class of ours, or of one of these."""
    objects = gc.get_objects()
    return [each for each in objects if issubclass(type(each), kinds) or is_ours(each)]


async def garbage_of(work: Callable[[], Coroutine[object, object, None]]) -> list[str]:
    """Name the classes of our objects that only the collector can free afterwards."""
    await asyncio.create_task(work())  # what is made once is made
    with no_collector():
        await asyncio.create_task(work())
        flags = gc.get_debug()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            gc.collect()
        finally:
            gc.set_debug(flags)
        found = sorted(type(each).__name__ for each in gc.garbage if is_ours(each))
        gc.garbage.clear()
    return found


async def ask(app: ASGIApp) -> None:
    """Send a request, and forget what came of it."""
    scope: Scope = http_scope()
    with suppress(Exception):
        await app(scope, no_body, take)


class Steps:  # pragma: no cover - coverage is another trace function
    """Counts the bytecodes of what is called inside `with`: loops count, too."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Self:
        self._before = sys.gettrace()  # that of coverage
        sys._getframe().f_trace_opcodes = True  # 3.12 looks for it now
        sys.settrace(self._trace)
        return self

    def __exit__(self, *exc_info: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, _: object) -> TraceFunction:
        frame.f_trace_opcodes = True
        self.count += event == "opcode"
        return self._trace
