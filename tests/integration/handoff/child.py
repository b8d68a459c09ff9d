"""A process that commits, says so, and waits before it goes on to its other hooks."""

from __future__ import annotations

import asyncio
import sys

from asgi_uow import Database, UnitOfWorkMiddleware, after_commit, before_commit
from tests.integration.handoff.queues import PgQueuer, Procrastinate, Taskiq
from tests.support import shop
from tests.support.asgi import endpoint, request

JOB_TABLES = {kind.__name__: kind for kind in (Procrastinate, PgQueuer)}


def say_and_wait() -> None:
    print("committed", flush=True)  # noqa: T201  # the other process reads it
    sys.stdin.readline()


async def main(kind: str, url: str, redis_url: str) -> None:
    async def handler() -> None:
        await shop.insert(7)
        before_commit(JOB_TABLES[kind]().enqueue, 7)
        after_commit(say_and_wait)
        after_commit(broker.send, 7)

    db = Database.from_url(url)
    async with Taskiq(redis_url) as broker:
        await request(UnitOfWorkMiddleware(endpoint(handler), db, hook_timeout=None))
    await db.dispose()


asyncio.run(main(*sys.argv[1:]))
