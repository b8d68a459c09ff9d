"""What a request holds while it waits for something."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from typing import TYPE_CHECKING

from asgi_uow import UnitOfWorkMiddleware

from .apps import NoOp, handler, unused_database
from .questions import ask

if TYPE_CHECKING:
    from asgi_uow._asgi import ASGIApp, Scope

REQUESTS = 10_000
WARM_UP = 100


async def parked_bytes() -> tuple[float, float]:
    """Return the bytes that a request holds in a no-op middleware and in ours."""
    goes_on = asyncio.Event()

    async def park(scope: Scope) -> None:  # noqa: ARG001
        await goes_on.wait()

    app = handler(park)
    return (
        await _held(NoOp(app), goes_on),
        await _held(UnitOfWorkMiddleware(app, unused_database()), goes_on),
    )


async def _held(app: ASGIApp, goes_on: asyncio.Event) -> float:
    held = 0
    for number in (WARM_UP, REQUESTS):  # the first time fills caches, too
        goes_on.clear()
        gc.collect()
        tracemalloc.start()
        tasks = [asyncio.create_task(ask(app)) for _ in range(number)]
        await asyncio.sleep(0)
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        goes_on.set()
        await asyncio.gather(*tasks)
        del tasks
    return held / REQUESTS
