"""Sandboxes at once: each sees its own work alone, and nothing of any is left behind.

With `ASGI_UOW_ROUNDS=100` as many rounds are played; the number at the end of a test's
name is the seed of its round.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING

import pytest

import asgi_uow as uow
from asgi_uow import Database, Retry, errors
from asgi_uow.testing import (
    assert_no_connection_held,
    capture_hooks,
    count_statements,
    drop_connection,
    fail_commit,
    lose_commit_answer,
    sandbox,
    serialization_failure,
)
from tests.support import shop
from tests.support.asgi import handle
from tests.support.databases import SERVER_DRIVERS, memory_database, on, shop_database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

    from tests.servers import Backend, ServerBackend, SQLiteBackend

ROUNDS = int(os.environ.get("ASGI_UOW_ROUNDS", "3"))
BOXES = 8
TIMES = 6  # that each sandbox is used in a round
APART = 1000  # row locks block across sandboxes: each has ids of its own


class Visitor:
    """Works in a sandbox of its own, and knows what has to be in there."""

    def __init__(self, number: int, backend: ServerBackend, db: Database) -> None:
        self.backend, self.db = backend, db
        self.dice = random.Random(number)
        self.next = number * APART
        self.kept: list[int] = []

    async def visit(self, times: int = TIMES) -> None:
        """Do so many things at random; look after each of them."""
        async with sandbox(self.db):
            for _ in range(times):
                self.next += 1
                step = self.dice.choice(STEPS)
                if await step(self, self.next):
                    self.kept.append(self.next)
                assert self.kept == await ids(self.db), step

    async def keeps(self, number: int) -> bool:
        """Succeed; the hook that is captured is that of this sandbox."""

        async def work() -> None:
            await shop.insert(number)
            uow.after_commit(print, number)

        with capture_hooks() as hooks:
            assert 200 == (await handle(work, self.db)).status
        assert [(number,)] == [each.args for each in hooks]
        return True

    async def answers_409(self, number: int) -> bool:
        """Insert, and answer with an error."""
        insert = partial(shop.insert, number)
        assert 409 == (await handle(insert, self.db, status=409)).status
        return False

    async def raises(self, number: int) -> bool:
        """Insert, and leave the block with an exception."""
        with pytest.raises(ZeroDivisionError):
            async with self.db:
                await shop.insert(number)
                raise ZeroDivisionError
        return False

    async def is_cancelled(self, number: int) -> bool:
        """Be cancelled while a statement runs, or just before or after it starts."""
        inserted = asyncio.Event()

        async def work() -> None:
            async with self.db:
                await shop.insert(number)
                inserted.set()
                await self.db.write.execute(self.backend.slow)

        task = asyncio.create_task(work())
        await inserted.wait()
        for _ in range(self.dice.randrange(300)):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return False

    async def fails_to_commit(self, number: int) -> bool:
        """Have COMMIT refused."""
        async with fail_commit(self.db):
            assert 500 == (await handle(partial(shop.insert, number), self.db)).status
        return False

    async def loses_the_answer(self, number: int) -> bool:
        """Have COMMIT carried out without an answer."""
        async with lose_commit_answer(self.db):
            assert 500 == (await handle(partial(shop.insert, number), self.db)).status
        return True

    async def loses_the_connection(self, number: int) -> bool:
        """Have the connection lost before COMMIT."""
        async with drop_connection(self.db):
            assert 503 == (await handle(partial(shop.insert, number), self.db)).status
        return False

    async def meets_conflicts(self, number: int) -> bool:
        """Have two COMMITs refused, and the third one carried out."""
        async with serialization_failure(self.db, times=2):
            await Retry(attempts=3, backoff=0).run(self.db, shop.insert, number)
        return True

    async def counts(self, number: int) -> bool:
        """See the statements of this sandbox alone."""
        with count_statements(self.db, expected=1):
            async with self.db:
                await shop.insert(number)
        return True


STEPS = (
    Visitor.keeps,
    Visitor.answers_409,
    Visitor.raises,
    Visitor.is_cancelled,
    Visitor.fails_to_commit,
    Visitor.loses_the_answer,
    Visitor.loses_the_connection,
    Visitor.meets_conflicts,
    Visitor.counts,
)


async def ids(db: Database) -> list[int]:
    """The rows as the next unit of work sees them."""
    async with db:
        return list(await db.read.scalars(shop.SELECT))


async def assert_nothing_left(db: Database, backend: Backend) -> None:
    assert [] == await shop.items(backend)
    assert 0 == await backend.open_transactions()
    assert_no_connection_held(db)


@on(*SERVER_DRIVERS)
@pytest.mark.parametrize("seed", range(ROUNDS))
async def test_tasks_do_not_interfere(
    db: Database, backend: ServerBackend, seed: int
) -> None:
    """Eight sandboxes of one database fail, commit and are cancelled, all at once."""
    visitors = [Visitor(seed * BOXES + each, backend, db) for each in range(BOXES)]
    await asyncio.gather(*(each.visit() for each in visitors))
    await assert_nothing_left(db, backend)


@on(*SERVER_DRIVERS)
async def test_threads_do_not_interfere(db: Database, backend: ServerBackend) -> None:
    """Sandboxes of two threads, each with a loop of its own, are open at once."""
    both = threading.Barrier(2)

    async def visit(number: int) -> None:
        async with sandbox(db):
            both.wait()
            async with db:
                await shop.insert(number)
            assert [number] == await ids(db)
            both.wait()

    await asyncio.gather(*(asyncio.to_thread(asyncio.run, visit(n)) for n in (1, 2)))
    await assert_nothing_left(db, backend)


@on(*SERVER_DRIVERS)
async def test_threads_without_a_loop(db: Database, backend: ServerBackend) -> None:
    """Those entered by `with` in two threads are for these threads' requests alone."""
    both = threading.Barrier(2)

    async def visit(number: int) -> None:
        async with db:
            await shop.insert(number)
        assert [number] == await ids(db)

    def run(number: int) -> None:
        with sandbox(db):
            both.wait()
            asyncio.run(visit(number))
            both.wait()

    await asyncio.gather(*(asyncio.to_thread(run, number) for number in (1, 2)))
    await assert_nothing_left(db, backend)


@on(*SERVER_DRIVERS)
@pytest.mark.parametrize(
    ("fault", "status"), [(fail_commit, 500), (drop_connection, 503)]
)
async def test_faults_end_in_any_order(
    db: Database, fault: Callable[..., AbstractAsyncContextManager[None]], status: int
) -> None:
    """The fault of a sandbox is its own, also when the block of another ends first."""
    both, first_has_left = asyncio.Barrier(2), asyncio.Event()

    async def insert(number: int) -> int:
        return (await handle(partial(shop.insert, number), db)).status

    async def first() -> None:
        async with sandbox(db), fault(db):
            await both.wait()
            assert status == await insert(1)
        first_has_left.set()

    async def second() -> None:
        async with sandbox(db), fault(db):
            await both.wait()
            await first_has_left.wait()
            assert [status, 200] == [await insert(2), await insert(2)]

    await asyncio.gather(first(), second())
    assert 200 == await insert(3)


@on(*SERVER_DRIVERS)
async def test_several_databases_at_once(
    db: Database, other: Database, backend: ServerBackend, mariadb: ServerBackend
) -> None:
    """Each sandbox has its own transaction on each database, and ends all of them."""

    async def visit(number: int) -> None:
        async with sandbox(db, other):
            async with uow.unit_of_work(db, other):
                await shop.insert(number, db)
                await shop.insert(number, other)
            with pytest.raises(ZeroDivisionError):
                async with uow.unit_of_work(db, other):
                    await shop.insert(number + 1, db)
                    await shop.insert(number + 1, other)
                    raise ZeroDivisionError
            async with fail_commit(other):
                with pytest.raises(errors.PartialCommitError):
                    async with uow.unit_of_work(db, other):
                        await shop.insert(number + 2, db)
                        await shop.insert(number + 2, other)
            assert [number, number + 2] == await ids(db)
            assert [number] == await ids(other)

    await asyncio.gather(*(visit(APART * each) for each in range(BOXES)))
    await assert_nothing_left(db, backend)
    await assert_nothing_left(other, mariadb)


@pytest.fixture(params=["file", "memory"])
async def single(
    sqlite: SQLiteBackend, request: pytest.FixtureRequest
) -> AsyncIterator[Database]:
    """SQLite, where one sandbox is open at a time."""
    is_file = request.param == "file"
    async with shop_database(sqlite) if is_file else memory_database() as db:
        yield db


async def test_second_sandbox_waits_on_sqlite(single: Database) -> None:
    """It gets through when the first one ends, and finds nothing of it."""
    entered: list[str] = []
    order, outside = asyncio.Event(), copy_context()

    async def second() -> None:
        order.set()
        async with sandbox(single):
            entered.append("second")
            assert [] == await ids(single)
            async with single:
                await shop.insert(1)
            assert [1] == await ids(single)

    async with asyncio.TaskGroup() as tasks, sandbox(single):
        entered.append("first")
        tasks.create_task(second(), context=outside)
        await order.wait()
        # Handed over after the second one's BEGIN.
        async with single:
            await shop.insert(1)
        assert [1] == await ids(single)
        assert ["first"] == entered
    assert ["first", "second"] == entered
    assert [] == await ids(single)
