"""Faults at COMMIT: what a test asks for is what the library sees."""

from __future__ import annotations

from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import exc as sa_exc

import asgi_uow as uow
from asgi_uow import Database, errors
from asgi_uow.testing import (
    drop_connection,
    fail_commit,
    lose_commit_answer,
    sandbox,
    serialization_failure,
)
from tests.support import shop
from tests.support.asgi import handle
from tests.support.databases import DRIVERS, on
from tests.support.keys import create_table

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.servers import Backend

pytestmark = on(*DRIVERS)


@pytest.fixture(params=["inside", "outside"])
async def boxed(
    db: Database, backend: Backend, request: pytest.FixtureRequest
) -> AsyncIterator[Database]:
    """The database, in a sandbox and outside of any."""
    await create_table(backend)
    async with AsyncExitStack() as stack:
        if request.param == "inside":
            await stack.enter_async_context(sandbox(db))
        yield db


async def kept(db: Database) -> list[int]:
    """The rows that a later unit finds."""
    async with db:
        return list(await db.read.scalars(shop.SELECT))


async def test_refused_commit(boxed: Database) -> None:
    """The work is rolled back with a 500, and the next COMMIT is none of it."""
    async with fail_commit(boxed):
        response = await handle(partial(shop.insert, 1), boxed)
        assert 500 == response.status
        assert 200 == (await handle(partial(shop.insert, 2), boxed)).status
    assert uow.Outcome.ROLLED_BACK is response.units[0].outcome
    assert [2] == await kept(boxed)


async def test_refused_with_an_error_of_the_test(boxed: Database) -> None:
    """An error that is not the server's leaves the outcome unknown."""
    async with fail_commit(boxed, error=RuntimeError("what")):
        with pytest.raises(errors.OutcomeUnknownError):
            async with boxed:
                await shop.insert(1)


async def test_lost_answer(boxed: Database) -> None:
    """COMMIT is carried out, and nobody knows."""
    async with lose_commit_answer(boxed):
        response = await handle(partial(shop.insert, 1), boxed)
    assert 500 == response.status
    assert uow.Outcome.UNKNOWN is response.units[0].outcome
    assert [1] == await kept(boxed)


async def test_lost_answer_is_settled_by_a_key(boxed: Database) -> None:
    """With an idempotency key the work is found, and the unit is committed."""
    async with lose_commit_answer(boxed), uow.unit_of_work(boxed, key="job") as unit:
        await shop.insert(1)
    assert uow.Outcome.COMMITTED is unit.outcome
    assert [1] == await kept(boxed)


async def test_lost_connection(boxed: Database) -> None:
    """A connection that is lost before COMMIT is a rollback that is proven: 503."""
    async with drop_connection(boxed):
        response = await handle(partial(shop.insert, 1), boxed)
        assert 503 == response.status
        assert 200 == (await handle(partial(shop.insert, 2), boxed)).status
    assert uow.Outcome.ROLLED_BACK is response.units[0].outcome
    assert [2] == await kept(boxed)


async def test_conflicts_are_replayed(boxed: Database) -> None:
    """So many COMMITs meet a conflict, and the next attempt succeeds."""
    attempts: list[int] = []

    async def work() -> None:
        async with uow.savepoint():
            await shop.insert(1)
        attempts.append(uow.current_unit_of_work().attempt)

    async with serialization_failure(boxed, times=2):
        await uow.Retry(attempts=3).run(boxed, work)
    assert [1, 2, 3] == attempts
    assert [1] == await kept(boxed)


async def test_unused_fault_is_gone_with_its_block(boxed: Database) -> None:
    """What was not needed in its block concerns nobody after it."""
    async with fail_commit(boxed), drop_connection(boxed):
        pass
    async with boxed:
        await shop.insert(1)
    assert [1] == await kept(boxed)


async def test_error_can_be_of_sqlalchemy(boxed: Database) -> None:
    """An error of the driver inside SQLAlchemy's is taken as the server's word."""
    with pytest.raises(errors.CommitFailedError) as raised:
        async with fail_commit(boxed), boxed:
            await shop.insert(1)
    assert isinstance(raised.value.__cause__, sa_exc.IntegrityError)
