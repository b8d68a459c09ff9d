"""Units of several databases: one outcome for all, or an error that says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_uow import Database, Outcome, current_session, unit_of_work
from asgi_uow.errors import CommitFailedError, PartialCommitError
from tests.support import shop
from tests.support.asgi import handle
from tests.support.databases import checked_out, on

if TYPE_CHECKING:
    from tests.servers import Backend, MariaDBBackend

pytestmark = on("aiosqlite")


async def test_several_databases(
    db: Database, backend: Backend, other: Database, mariadb: MariaDBBackend
) -> None:
    """unit_of_work(a, b): one unit, both committed; at least one is needed."""
    async with unit_of_work(db, other):
        await shop.insert(1, db)
        await shop.insert(2, other)

    assert [1] == await shop.items(backend)
    assert [2] == await shop.items(mariadb)
    with pytest.raises(TypeError, match="at least one Database"):
        unit_of_work()


async def test_writer_opened_while_another_is_flushed(
    db: Database, backend: Backend, other: Database, mariadb: MariaDBBackend
) -> None:
    """What a second session adds during the flush of the first is flushed too."""

    def add_to_other(*_: object) -> None:
        current_session(other).add(shop.Item(id=2))

    async def handler() -> None:
        session = current_session(db)
        session.add(shop.Item(id=1))
        event.listen(session.sync_session, "before_flush", add_to_other)

    response = await handle(handler, db, other)

    assert 200 == response.status
    assert [1] == await shop.items(backend)
    assert [2] == await shop.items(mariadb)


async def test_first_database_failing_keeps_nothing(
    db: Database, backend: Backend, other: Database, mariadb: MariaDBBackend
) -> None:
    """The first COMMIT failed: the second is not sent, nothing is kept."""

    async def handler() -> None:
        await shop.insert_orphan()
        await shop.insert(2, other)

    response = await handle(handler, db, other)

    assert 500 == response.status
    assert isinstance(response.error, CommitFailedError)
    assert [] == await shop.items(backend)
    assert [] == await shop.items(mariadb)


async def test_second_database_failing_is_partial(
    db: Database, backend: Backend, other: Database, mariadb: MariaDBBackend
) -> None:
    """The first database committed, the second failed: PARTIAL, 500, no hook."""

    async def handler() -> None:
        await shop.insert(1)
        await current_session(db).execute("INSERT INTO items VALUES (2, 404)")

    response = await handle(handler, other, db, hooks=True)

    assert 500 == response.status
    assert isinstance(response.error, PartialCommitError)
    assert Outcome.PARTIAL is response.error.outcome
    assert [] == response.hooks
    assert [1] == await shop.items(mariadb)
    assert [] == await shop.items(backend)
    assert [0, 0, 0, 0] == checked_out(other, db)


# Prepared first


async def test_two_phase_commit(mariadb: MariaDBBackend) -> None:
    """twophase=True: prepared everywhere before the first COMMIT; all or nothing."""
    await shop.create(mariadb)
    await mariadb.execute("CREATE TABLE more (id INTEGER PRIMARY KEY)")
    first, second = (
        Database(create_async_engine(mariadb.url), twophase=True) for _ in range(2)
    )

    async def handler() -> None:
        await shop.insert(1)
        await current_session(second).execute("INSERT INTO more (id) VALUES (2)")

    async def lose_the_second() -> None:
        await shop.insert(3)
        session = current_session(second)
        thread = await session.scalar("SELECT connection_id()")
        await session.execute("INSERT INTO more (id) VALUES (4)")
        await mariadb.execute(f"KILL {thread}")

    response = await handle(handler, first, second)
    failed = await handle(lose_the_second, first, second)

    assert 200 == response.status
    assert 503 == failed.status
    assert isinstance(failed.error, CommitFailedError)
    assert [1] == await shop.items(mariadb)
    assert [(2,)] == await mariadb.fetch("SELECT id FROM more")
    assert [0, 0, 0, 0] == checked_out(first, second)
    for each in (first, second):
        await each.dispose()


async def test_two_phase_commit_beside_a_stream(mariadb: MariaDBBackend) -> None:
    """A stream that nobody has read to its end is closed before the preparation."""
    await shop.create(mariadb)
    db = Database(create_async_engine(mariadb.url), twophase=True)

    async def handler() -> None:
        await shop.insert(1)
        await current_session().stream("SELECT seq FROM seq_1_to_1000")

    response = await handle(handler, db)

    assert 200 == response.status
    assert [1] == await shop.items(mariadb)
    assert [0, 0] == checked_out(db)
    await db.dispose()
