"""What becomes of ORM objects when their unit of work ends."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import exc as sa_exc
from sqlalchemy import inspect

import asgi_uow as uow
from asgi_uow import current_session
from tests.support import shop
from tests.support.asgi import handle
from tests.support.databases import DRIVERS, checked_out, on
from tests.support.shop import Item

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import TypeAlias

    from asgi_uow import Database
    from tests.servers import Backend

    End: TypeAlias = Callable[[Backend], Awaitable[None]]

pytestmark = on(*DRIVERS)


async def go_on(_: Backend) -> None:
    """End as the status says."""


async def raise_an_error(_: Backend) -> None:
    raise LookupError


async def fail_to_commit(backend: Backend) -> None:
    await shop.insert_then_break_commit(backend, 9)


async def fail_before_commit(_: Backend) -> None:
    def fail() -> None:
        raise LookupError

    uow.before_commit(fail)


async def fail_to_flush(_: Backend) -> None:
    current_session().add(Item(id=1))
    await current_session().flush()


async def fail_to_flush_at_the_end(_: Backend) -> None:
    current_session().add(Item(id=1))


async def swallow_a_failed_flush(backend: Backend) -> None:
    with suppress(sa_exc.IntegrityError):
        await fail_to_flush(backend)


async def lose_the_connection(backend: Backend) -> None:
    await backend.kill_connections()  # type: ignore[attr-defined]


async def answer_inside_a_savepoint(_: Backend) -> None:
    await current_session().begin_nested().start()


ENDS = [
    (go_on, 404),
    (raise_an_error, 200),
    (fail_to_commit, 200),
    (fail_before_commit, 200),
    (fail_to_flush, 200),
    (fail_to_flush_at_the_end, 200),
    (swallow_a_failed_flush, 200),
    (answer_inside_a_savepoint, 404),
]


async def check(db: Database, backend: Backend, end: End, status: int) -> None:
    """Have four objects loaded, and read by a hook after the end of their unit."""
    await backend.execute("INSERT INTO items (id) VALUES (1), (2), (3)")
    objects: list[Item] = []
    seen: list[object] = []

    def read() -> None:
        seen.extend(each.id for each in objects)
        seen.extend(inspect(each).session for each in objects)

    async def handler() -> None:
        session = current_session()
        objects.extend([await session.get_one(Item, number) for number in (1, 2, 3)])
        objects.extend((Item(id=4), Item(id=5)))
        session.add(objects[3])
        await session.delete(objects[1])
        objects[2].id = 6
        await session.flush()
        session.add(objects[4])
        uow.after_rollback(read)
        await end(backend)

    await handle(handler, db, status=status)

    assert [1, 2, 6, 4, 5, *[None] * 5] == seen
    assert [0, 0] == checked_out(db)
    assert [1, 2, 3] == await shop.items(backend)
    async with db:
        # What was new is so again, and can be written by another unit.
        db.write.add_all(objects[3:])
    assert [1, 2, 3, 4, 5] == await shop.items(backend)


@pytest.mark.parametrize(("end", "status"), ENDS)
async def test_objects_stay_loaded_after_a_rollback(
    db: Database, backend: Backend, end: End, status: int
) -> None:
    """Whatever rolls back, a hook reads the objects that it was given."""
    await check(db, backend, end, status)


@on("asyncmy", "asyncpg", "psycopg")
async def test_objects_stay_loaded_after_a_lost_connection(
    db: Database, backend: Backend
) -> None:
    """A ROLLBACK that cannot be sent expires nothing either."""
    await check(db, backend, lose_the_connection, 404)


async def test_objects_stay_loaded_for_an_error_page(db: Database) -> None:
    """After a failed flush the page for the error reads what the handler has loaded."""
    async with db:
        await shop.insert(1)
    async with db:
        item, new = await db.write.get_one(Item, 1), Item(id=2)
        with pytest.raises(sa_exc.IntegrityError):
            await db.write.run_sync(lambda sync: sync.bulk_save_objects([Item(id=1)]))
        db.write.add(new)
        uow.set_rollback_only("the flush has failed")
        assert [1, 2] == [item.id, new.id]


async def test_rollback_to_a_savepoint_expires_what_it_undoes(
    db: Database, backend: Backend
) -> None:
    """That is SQLAlchemy's own way: the session reads the object again."""
    async with db:
        db.write.add(item := Item(id=1))
        await db.write.flush()
        with pytest.raises(LookupError):
            async with uow.savepoint():
                item.id = 2
                await db.write.flush()
                raise LookupError
        assert inspect(item).expired
        await db.write.refresh(item)
    assert [1] == [item.id] == await shop.items(backend)
