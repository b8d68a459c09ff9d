"""`commit_flushes=True`: code that commits by itself, in a request that decides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError

import asgi_uow as uow
from asgi_uow import Database, Session, after_commit, savepoint
from asgi_uow.errors import (
    ManagedTransactionError,
    ReadOnlySessionError,
    UnitOfWorkClosedError,
)
from tests.support import shop
from tests.support.asgi import handle
from tests.support.databases import DRIVERS, on, shop_database
from tests.support.shop import Item

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.servers.backend import Backend

pytestmark = on(*DRIVERS, commit_flushes=True)

COMMITS: list[Callable[[Session], Awaitable[object]]] = [
    lambda session: session.commit(),
    lambda session: session.run_sync(lambda sync: sync.commit()),
]
each_commit = pytest.mark.parametrize("commit", COMMITS, ids=["commit", "run_sync"])


async def create(session: Session, key: int = 1) -> Item:
    """Create an item as a library does that knows nothing of us."""
    item = Item(id=key)
    session.add(item)
    await session.commit()
    await session.refresh(item)
    return item


@pytest.mark.parametrize(("status", "expected"), [(201, [1]), (404, [])])
async def test_the_request_decides(
    db: Database, backend: Backend, status: int, expected: list[int]
) -> None:
    """The library's commit sends the changes; the response keeps them or does not."""
    hooks: list[str] = []

    async def handler() -> None:
        after_commit(hooks.append, "committed")
        assert 1 == (await create(uow.current_session())).id
        assert [] == await shop.items(backend)
        assert [] == hooks

    assert status == (await handle(handler, db, status=status)).status
    assert expected == await shop.items(backend)
    assert ["committed"] * len(expected) == hooks


async def test_an_exception_after_the_commit(db: Database, backend: Backend) -> None:
    """An exception that comes later rolls the library's work back too."""
    with pytest.raises(LookupError):
        async with db:
            await create(db.write)
            raise LookupError
    assert [] == await shop.items(backend)


@each_commit
async def test_objects_are_not_expired(
    db: Database, commit: Callable[[Session], Awaitable[object]]
) -> None:
    """They can be read after it without a statement, and go on to be changed."""
    async with db as unit:
        item = Item(id=1)
        db.write.add(item)
        await commit(db.write)
        assert not db.write.new
        assert 1 == item.id
        item.id = 2
        await commit(db.write)
        assert [2] == (await db.write.scalars(shop.SELECT)).all()
    assert uow.Outcome.COMMITTED is unit.outcome


async def test_a_failure_comes_at_the_commit(db: Database, backend: Backend) -> None:
    """What the database refuses is raised where the library commits."""
    with pytest.raises(IntegrityError):
        async with db:
            await create(db.write)
            db.write.expunge_all()
            await create(db.write)
    assert [] == await shop.items(backend)


async def test_a_savepoint_stays_open(db: Database, backend: Backend) -> None:
    """It goes on around the commit: what fails later in it is undone."""
    async with db:
        await create(db.write, 1)
        with pytest.raises(LookupError):
            async with savepoint():
                await create(db.write, 2)
                raise LookupError
    assert [1] == await shop.items(backend)


async def test_nothing_else_by_hand(db: Database, backend: Backend) -> None:
    """A rollback would undo what others did in the request: it stays refused."""
    async with db:
        await create(db.write)
        for end in (db.write.rollback, db.write.close, db.write.reset):
            with pytest.raises(ManagedTransactionError, match="by hand"):
                await end()
    assert [1] == await shop.items(backend)


async def test_the_read_session(db: Database) -> None:
    """There is nothing to commit; a change is refused as ever."""
    async with db:
        await db.read.commit()
        db.read.add(Item(id=1))
        with pytest.raises(ReadOnlySessionError):
            await db.read.commit()
        db.read.expunge_all()


async def test_after_the_decision(db: Database) -> None:
    """The library cannot commit when the unit of work has ended."""
    async with db:
        session = db.write
    with pytest.raises(UnitOfWorkClosedError):
        await session.commit()


@on("aiosqlite", commit_flushes=False)
async def test_without_the_option(db: Database) -> None:
    """The error names the option."""
    async with db:
        with pytest.raises(ManagedTransactionError, match="commit_flushes=True"):
            await db.write.commit()


async def test_the_read_session_with_a_replica(backend: Backend) -> None:
    """A library's commit there sends nothing, and connects to no server for it."""
    options: Any = {"read_urls": [backend.url], "commit_flushes": True}
    async with shop_database(backend, **options) as db, db:
        connected: list[object] = []
        engine = db.engine.sync_engine  # its listeners are the replica's too
        event.listen(engine, "checkout", lambda *_: connected.append(1))
        await db.read.commit()
        assert [] == connected
        assert 0 == await db.read.scalar(shop.COUNT)
        await db.read.commit()
        assert [1] == connected
