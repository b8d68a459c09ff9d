"""Messages to a broker outside the database, sent by `after_commit` hooks."""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING

import anyio
import pytest
from celery.signals import (  # type: ignore[import-untyped]  # has no type hints
    before_task_publish,
)
from redis.asyncio import Redis

from asgi_uow import Database, after_commit, set_rollback_only
from asgi_uow.observers import HookFailed
from tests.integration.handoff.queues import Broker, CeleryOnRedis, Taskiq
from tests.servers.process import HOST, free_port
from tests.support import shop
from tests.support.asgi import handle

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import TypeAlias

    from asgi_uow.observers import Event
    from tests.servers import Backend

    Step: TypeAlias = Callable[[Backend], Awaitable[None]]


@pytest.mark.parametrize("status", [200, 201, 303])
async def test_commit(
    db: Database, backend: Backend, broker: Broker, status: int
) -> None:
    """A response that commits has sent its message, once, when it leaves."""

    async def handler() -> None:
        await shop.insert(7)
        after_commit(broker.send, 7)
        assert [] == broker.numbers()

    async def look() -> object:
        return await shop.items(backend), broker.numbers()

    response = await handle(handler, db, status=status, probe=look)

    assert status == response.status
    assert [([7], [7])] == response.seen
    assert [7] == broker.numbers()


async def refuse(_: Backend) -> None:
    set_rollback_only("a dry run")


async def fail(_: Backend) -> None:
    message = "out of stock"
    raise LookupError(message)


async def go_on(_: Backend) -> None:
    """Leave it to the status."""


async def break_commit(backend: Backend) -> None:
    await shop.insert_then_break_commit(backend, 8)


@pytest.mark.parametrize(
    ("step", "status"),
    [(go_on, 404), (go_on, 500), (refuse, 200), (fail, 200), (break_commit, 200)],
)
async def test_rollback(
    db: Database, backend: Backend, broker: Broker, step: Step, status: int
) -> None:
    """Work that is not kept sends nothing."""

    async def handler() -> None:
        await shop.insert(7)
        after_commit(broker.send, 7)
        await step(backend)

    await handle(handler, db, status=status)

    assert [] == await shop.items(backend)
    assert [] == broker.numbers()


async def test_celery_sends_from_a_worker_thread(
    sqlite: Backend, redis_url: str
) -> None:
    """The event loop is free while `delay` waits for Redis."""
    threads: list[threading.Thread] = []

    def look(**_: object) -> None:
        threads.append(threading.current_thread())

    db = Database.from_url(sqlite.url)
    before_task_publish.connect(look)
    async with CeleryOnRedis(redis_url) as broker:
        async with db:
            after_commit(broker.send, 7)
        await db.dispose()

    [thread] = threads
    assert threading.main_thread() != thread
    assert [7] == broker.numbers()


async def test_redis_is_down(sqlite: Backend) -> None:
    """The work stays, the response is the same, the loss is reported."""
    events: list[Event] = []

    async def handler() -> None:
        await shop.insert(7)
        after_commit(broker.send, 7)

    await shop.create(sqlite)
    db = Database.from_url(sqlite.url)
    async with Taskiq(f"redis://{HOST}:{free_port()}/0") as broker:
        response = await handle(handler, db, status=201, observers=[events.append])
    await db.dispose()

    assert 201 == response.status
    assert [7] == await shop.items(sqlite)
    [failed] = [event for event in events if isinstance(event, HookFailed)]
    assert failed.hook.endswith("kiq")


async def test_celery_worker(sqlite: Backend, redis_url: str) -> None:
    """A worker, started as people start it, makes the call that the hook sent."""
    app = "tests.integration.handoff.celery_worker"
    command = [sys.executable, "-m", "celery", "-A", app]
    options = ["worker", "--pool=solo", "--without-mingle", "--without-gossip"]
    environment = {**os.environ, "REDIS_URL": redis_url}

    db = Database.from_url(sqlite.url)
    async with CeleryOnRedis(redis_url) as broker, db:
        after_commit(broker.send, 7)
    await db.dispose()
    worker = await anyio.open_process([*command, *options], env=environment)
    async with worker, Redis.from_url(redis_url, socket_timeout=None) as client:
        try:
            done = await client.blpop(["done"], timeout=60)
        finally:
            worker.terminate()
        await worker.wait()

    assert (b"done", b"7") == done
    assert 0 == worker.returncode
