"""P10: a request cancelled at every point at which it can be."""

from __future__ import annotations

import asyncio
import functools
import logging
import types
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import anyio
import anyio.lowlevel
import pytest

from asgi_uow import (
    Outcome,
    UnitOfWork,
    UnitOfWorkMiddleware,
    after_commit,
    after_rollback,
    current_read_session,
    current_unit_of_work,
)
from tests import shop
from tests.asgi import BODY, START, request
from tests.servers import eventually
from tests.test_promises import checked_out, shop_database

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator, Iterator

    from asgi_uow import Database
    from asgi_uow._asgi import Receive, Scope, Send
    from tests.servers import Backend

logger = logging.getLogger(__name__)

Kind = Literal["task", "task again and again", "scope"]


class Steps:
    """Counts how often the tasks made inside of it are suspended; acts at one."""

    def __init__(self, number: int, act: Callable[[], object], *, again: bool) -> None:
        self.number = number
        self.act = act
        self.again = again
        self.count = 0
        self.tasks: list[asyncio.Task[Any]] = []

    @contextmanager
    def counted(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        loop.set_task_factory(self._make_task)
        try:
            yield
        finally:
            loop.set_task_factory(None)

    def _make_task(
        self, loop: asyncio.AbstractEventLoop, work: Any, **options: Any
    ) -> asyncio.Task[Any]:
        task = asyncio.Task(self._run(work), loop=loop, **options)
        self.tasks.append(task)
        return task

    async def _run(self, work: Coroutine[object, None, object]) -> object:
        return await self._drive(work)

    @types.coroutine
    def _drive(
        self, work: Coroutine[object, None, object]
    ) -> Generator[object, None, object]:
        step = functools.partial(work.send, None)
        while True:
            try:
                awaited = step()
            except StopIteration as stop:
                return stop.value
            self._suspended()
            step = functools.partial(work.send, None)
            try:
                yield awaited
            except BaseException as error:  # noqa: BLE001  # handed on
                step = functools.partial(work.throw, error)

    def _suspended(self) -> None:
        self.count += 1
        if self.count == self.number or (self.again and self.count > self.number):
            self.act()


class Sent:
    """A request that writes one row, and what became of it."""

    def __init__(self, db: Database, row: int) -> None:
        self.row = row
        self.fired: list[str] = []
        self.unit: UnitOfWork | None = None
        self.app = UnitOfWorkMiddleware(self._app, db)

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.unit = current_unit_of_work()
        after_commit(self._hook, "commit")
        after_rollback(self._hook, "rollback")
        await current_read_session().execute("SELECT id FROM items")
        await shop.insert(self.row)
        await send({"type": START, "status": 200, "headers": []})
        await anyio.lowlevel.checkpoint()
        await send({"type": BODY, "body": b""})

    async def _hook(self, phase: str) -> None:
        await anyio.lowlevel.checkpoint()
        self.fired.append(phase)

    async def run(self) -> None:
        response = await request(self.app, probe=anyio.lowlevel.checkpoint)
        assert response.error is None
        assert 200 == response.status

    async def cancelled_at(self, number: int, kind: Kind) -> Steps:
        """Run the request, cancel it at a point, give what was counted."""
        with anyio.CancelScope() as scope:
            pass
        steps = Steps(number, lambda: task.cancel(), again="again" in kind)

        async def inside() -> None:
            nonlocal scope
            with anyio.CancelScope() as scope:
                await self.run()

        with steps.counted():
            if kind == "scope":
                steps.act = lambda: scope.cancel()
                task = asyncio.create_task(inside())
            else:
                task = asyncio.create_task(self.run())
            await asyncio.wait((task,))
        if kind == "scope":
            assert task.exception() is None
        else:
            assert (steps.count >= number) == task.cancelled()
        return steps


@pytest.mark.parametrize("kind", ["task", "task again and again", "scope"])
@pytest.mark.parametrize("pool", ["cold", "warm"])
async def test_cancelled_at_every_point(
    any_driver: Backend, pool: str, kind: Kind
) -> None:
    """P10: wherever it hits, the row is there exactly when the outcome says so.

    `--log-cli-level=INFO` shows how many points there were.
    """
    kept = []
    number = 0
    async with shop_database(any_driver) as db:
        while True:
            number += 1
            if pool == "cold":
                await db.dispose()
            sent = Sent(db, 2 * number)
            steps = await sent.cancelled_at(number, kind)
            assert [0, 0] == checked_out(db)
            assert sent.unit is not None
            await eventually(0, any_driver.open_transactions)
            await Sent(db, 2 * number + 1).run()
            committed = sent.unit.outcome is Outcome.COMMITTED
            assert committed or sent.unit.outcome is Outcome.ROLLED_BACK
            assert ["commit" if committed else "rollback"] == sent.fired, number
            kept += [sent.row] * committed + [sent.row + 1]
            assert kept == await shop.items(any_driver)
            if steps.count < number:
                break
    points = number - 1
    logger.info("%s, %s pool, %s: %d points", any_driver.driver, pool, kind, points)
    assert points > 10
