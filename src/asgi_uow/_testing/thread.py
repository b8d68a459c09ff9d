"""The loop and thread in which the connections of sandboxes live."""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from asgi_uow._concurrency import register_at_fork, run_to_completion

if TYPE_CHECKING:
    from collections.abc import Coroutine

T = TypeVar("T")

CLOSE_SECONDS = 5.0  # for the connections that are left at the end of the process

_loops: list[asyncio.AbstractEventLoop] = []
_starting = threading.Lock()
register_at_fork(after_in_child=_loops.clear)


def background() -> asyncio.AbstractEventLoop:
    """Give the one loop, which runs until the process ends."""
    with _starting:
        if not _loops:
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=loop.run_forever, daemon=True)
            thread.start()
            atexit.register(_close, loop, thread)
            _loops.append(loop)
        return _loops[0]


def _close(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    if thread.is_alive():  # pragma: no branch  # it is not in a forked process
        closing = asyncio.run_coroutine_threadsafe(loop.shutdown_asyncgens(), loop)
        with suppress(TimeoutError):
            closing.result(CLOSE_SECONDS)


async def hand_over(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> T:
    """Await here what runs in another loop; it has ended when this has."""
    here, tasks = asyncio.get_running_loop(), list[asyncio.Task[T]]()
    ended = here.create_future()

    def tell(_: object) -> None:
        with suppress(RuntimeError):  # nobody waits: this loop is closed
            here.call_soon_threadsafe(ended.set_result, None)

    def start() -> None:
        tasks.append(loop.create_task(work))
        tasks[0].add_done_callback(tell)

    # A context of its own: timers that were cancelled keep theirs, and units in it.
    loop.call_soon_threadsafe(start, context=contextvars.Context())
    try:
        await asyncio.wait((ended,))
    except asyncio.CancelledError:
        loop.call_soon_threadsafe(lambda: tasks[0].cancel())
        with suppress(asyncio.CancelledError):
            await run_to_completion(asyncio.wait((ended,)))
        raise
    return tasks[0].result()
