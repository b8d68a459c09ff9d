"""A sandbox: units of work behave as outside of it, and nothing is left behind."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import exc as sa_exc
from sqlalchemy import text

import asgi_uow as uow
from asgi_uow import Database, errors
from asgi_uow.testing import sandbox
from tests.support import shop
from tests.support.databases import DRIVERS, on

if TYPE_CHECKING:
    from tests.servers import Backend

pytestmark = on(*DRIVERS)

INSERT = "INSERT INTO items (id) VALUES (:id)"
SLOW = (  # SQLite is not interrupted: that would roll the sandbox back
    "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 3000000)"
    " SELECT count(*) FROM n"
)
IDS = "SELECT id FROM items ORDER BY id"


async def ids(db: Database) -> list[int]:
    """The rows as the next unit of work sees them."""
    async with db:
        return list(await db.read.scalars(IDS))


async def test_commit_is_seen_by_the_next_unit_and_left_nowhere(
    db: Database, backend: Backend
) -> None:
    """What a unit commits is there until the sandbox ends, and for nobody else."""
    async with sandbox(db):
        async with db as unit:
            await db.write.execute(INSERT, id=1)
        assert uow.Outcome.COMMITTED is unit.outcome
        assert [1] == await ids(db)
        assert [] == await shop.items(backend)

    assert [] == await ids(db)
    assert [] == await shop.items(backend)


async def test_rollback_undoes_its_unit_alone(db: Database) -> None:
    """An exception undoes the work of its unit, and what others have kept stays."""
    async with sandbox(db):
        async with db:
            await db.write.execute(INSERT, id=1)
        with pytest.raises(ZeroDivisionError):
            async with db:
                await db.write.execute(INSERT, id=2)
                raise ZeroDivisionError
        assert [1] == await ids(db)


async def test_failed_statement_dooms_its_unit(db: Database) -> None:
    """An error that the database answers with a rollback is that of the unit alone."""
    async with sandbox(db):
        async with db:
            await db.write.execute(INSERT, id=1)
        with pytest.raises(sa_exc.IntegrityError):
            async with db:
                await db.write.execute(INSERT, id=2)
                await db.write.execute(INSERT, id=1)
        async with db:
            await db.write.execute(INSERT, id=3)
        assert [1, 3] == await ids(db)


async def test_read_session_cannot_write(db: Database) -> None:
    """A write on the read session is refused, by text too."""
    async with sandbox(db):
        with pytest.raises(errors.ReadOnlySessionError):
            async with db:
                await db.read.execute(INSERT, id=1)
        async with db:
            await db.write.execute(INSERT, id=2)
            assert [2] == list(await db.read.scalars(IDS))


async def test_savepoints_are_undone_alone(db: Database) -> None:
    """A savepoint of a unit is one in the sandbox too."""
    async with sandbox(db):
        async with db:
            await db.write.execute(INSERT, id=1)
            with pytest.raises(sa_exc.IntegrityError):
                async with uow.savepoint():
                    await db.write.execute(INSERT, id=1)
            await db.write.execute(INSERT, id=2)
        assert [1, 2] == await ids(db)


async def test_concurrent_units_take_turns(db: Database) -> None:
    """Units of several tasks wait for each other, and all are kept."""

    async def work(number: int) -> None:
        async with db:
            await db.read.scalars(IDS)
            await db.write.execute(INSERT, id=number)
            await asyncio.sleep(0)
            await db.write.execute(INSERT, id=100 + number)

    async with sandbox(db):
        await asyncio.gather(*(work(each) for each in range(1, 9)))
        assert [*range(1, 9), *range(101, 109)] == await ids(db)


async def test_engine_itself_is_in_the_sandbox(db: Database, backend: Backend) -> None:
    """What fixtures do with the engine past units is seen, and undone too."""
    async with sandbox(db):
        async with db.engine.begin() as connection:
            await connection.execute(text(INSERT), {"id": 1})
        assert [1] == await ids(db)
    assert [] == await shop.items(backend)


async def test_stream(db: Database) -> None:
    """A stream gives its rows beside other statements."""
    async with sandbox(db), db:
        await db.write.execute(INSERT, id=1)
        rows = [row.id async for row in await db.read.stream(IDS)]
        assert [1] == rows


async def test_cancelled_statement_leaves_the_sandbox_whole(
    db: Database, backend: Backend
) -> None:
    """A statement that is cancelled is stopped; what was kept before is still there."""
    async with sandbox(db):
        async with db:
            await db.write.execute(INSERT, id=1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3), db:
                await db.write.execute(INSERT, id=2)
                await db.write.execute(getattr(backend, "slow", SLOW))
        assert [1] == await ids(db)
