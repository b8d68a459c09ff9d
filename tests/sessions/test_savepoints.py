"""Savepoints: what the database keeps; for their hooks see `unit`."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from sqlalchemy.exc import IntegrityError

from asgi_uow import Database, current_session, savepoint
from asgi_uow.errors import ConcurrentUseError, DoomedError
from tests.support import shop
from tests.support.asgi import handle
from tests.support.databases import DRIVERS, on

if TYPE_CHECKING:
    from tests.servers import Backend

pytestmark = on(*DRIVERS)


async def test_savepoint_undoes_only_what_is_inside(
    db: Database, backend: Backend
) -> None:
    """What fails inside is undone, also as the first of a unit; the rest is kept."""

    async def handler() -> None:
        with pytest.raises(ZeroDivisionError):
            async with savepoint():
                await shop.insert(1)
                raise ZeroDivisionError
        async with savepoint():
            await shop.insert(2)
        async with current_session().begin_nested():
            await shop.insert(3)
        assert [] == await shop.items(backend)
        await shop.insert(4)

    response = await handle(handler, db)

    assert 200 == response.status
    assert [2, 3, 4] == await shop.items(backend)


async def test_rollback_of_a_released_savepoint(db: Database, backend: Backend) -> None:
    """RELEASE keeps nothing of a unit that is rolled back."""
    with suppress(ZeroDivisionError):
        async with db:
            async with savepoint():
                await shop.insert(1)
            raise ZeroDivisionError
    assert [] == await shop.items(backend)


async def test_ended_by_hand(db: Database, backend: Backend) -> None:
    """`begin_nested()` is SQLAlchemy's, with its own commit and rollback."""
    async with db:
        kept = await db.write.begin_nested()
        await shop.insert(1)
        await kept.commit()
        undone = await db.write.begin_nested()
        await shop.insert(2)
        await undone.rollback()
        with suppress(IntegrityError):
            async with db.write.begin_nested():
                await shop.insert(1)
    assert [1] == await shop.items(backend)


async def test_ended_by_hand_inside_its_block(db: Database, backend: Backend) -> None:
    """Ending a savepoint inside its own block is SQLAlchemy's way, and allowed."""

    async def handler() -> None:
        async with savepoint() as undone:
            await shop.insert(1)
            await undone.rollback()
        async with savepoint() as kept:
            await shop.insert(2)
            await kept.commit()

    response = await handle(handler, db)

    assert 200 == response.status
    assert [2] == await shop.items(backend)


async def test_rollback_to_a_savepoint_as_text(db: Database, backend: Backend) -> None:
    """ROLLBACK TO names a savepoint and ends nothing."""

    async def handler() -> None:
        await shop.insert(1)
        await current_session().execute("SAVEPOINT mine")
        await shop.insert(2)
        await current_session().execute("ROLLBACK TO SAVEPOINT mine")

    response = await handle(handler, db)

    assert 200 == response.status
    assert [1] == await shop.items(backend)


@pytest.mark.parametrize("outer_fails", [True, False])
async def test_overlapping_savepoints(
    db: Database, backend: Backend, outer_fails: bool
) -> None:
    """Of two tasks' savepoints, one that was ended by the other's dooms the unit."""
    inside, ended = asyncio.Event(), asyncio.Event()

    async def outer() -> None:
        with suppress(ZeroDivisionError):
            async with savepoint():
                await inside.wait()
                if outer_fails:
                    raise ZeroDivisionError
        ended.set()

    async def inner() -> None:
        async with savepoint():
            await shop.insert(2)
            inside.set()
            await ended.wait()
            if not outer_fails:
                raise ZeroDivisionError

    async def handler() -> None:
        await shop.insert(1)
        first = asyncio.ensure_future(outer())
        await asyncio.wait((first,), timeout=0.01)
        expected = ConcurrentUseError if outer_fails else ZeroDivisionError
        with pytest.raises(expected):
            await inner()
        await first

    response = await handle(handler, db, hooks=True)

    assert 500 == response.status
    assert isinstance(response.error, DoomedError)
    assert isinstance(response.error.__cause__, ConcurrentUseError)
    assert ["rollback"] == response.hooks
    assert [] == await shop.items(backend)
