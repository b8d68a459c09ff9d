"""What a request holds while it waits for something."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from typing import TYPE_CHECKING

from .apps import NoOp, answer, ours
from .questions import ask

if TYPE_CHECKING:
    from collections.abc import Callable

    from asgi_uow._asgi import ASGIApp, Receive, Scope, Send

REQUESTS = 1000
CONTESTANTS: dict[str, Callable[[ASGIApp], ASGIApp]] = {
    "no-op middleware": NoOp,
    "ours": ours,
}


async def parked_bytes(middleware: Callable[[ASGIApp], ASGIApp]) -> float:
    """Return the bytes of one request that waits in a handler and uses nothing."""
    goes_on = asyncio.Event()

    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        await goes_on.wait()
        await answer(scope, receive, send)

    app = middleware(handler)
    for measured in (False, True):  # the first time imports and fills caches
        goes_on.clear()
        gc.collect()
        if measured:
            tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        tasks = [asyncio.create_task(ask(app)) for _ in range(REQUESTS)]
        await asyncio.sleep(0)
        gc.collect()
        held = tracemalloc.get_traced_memory()[0] - before
        goes_on.set()
        await asyncio.gather(*tasks)
        del tasks
    tracemalloc.stop()
    return held / REQUESTS
