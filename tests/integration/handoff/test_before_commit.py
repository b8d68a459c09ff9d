"""Jobs in the database of the work, added by `before_commit` hooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import asgi_uow as uow
from asgi_uow import Database
from asgi_uow.errors import BeforeCommitError
from tests.integration.handoff.queues import JobTable, PgQueuer
from tests.support import shop
from tests.support.asgi import handle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from typing import TypeAlias

    from tests.servers import PostgreSQLBackend

    Step: TypeAlias = Callable[[PostgreSQLBackend], Awaitable[None]]


@pytest.fixture
async def db(job_backend: PostgreSQLBackend) -> AsyncIterator[Database]:
    """The shop, in the database that has the queue."""
    await shop.create(job_backend)
    db = Database.from_url(job_backend.url)
    yield db
    await db.dispose()


async def fail() -> None:
    message = "out of stock"
    raise LookupError(message)


async def test_commit(
    db: Database, job_backend: PostgreSQLBackend, job_table: JobTable
) -> None:
    """The job is there once, with the work and not before."""
    seen: list[object] = []

    async def look() -> object:
        return await shop.items(job_backend), await job_table.numbers(job_backend)

    async def look_in_between() -> None:
        seen.append(await look())

    async def handler() -> None:
        await shop.insert(7)
        uow.before_commit(job_table.enqueue, 7)
        uow.before_commit(look_in_between)

    response = await handle(handler, db, status=201, probe=look)

    assert [([], [])] == seen
    assert [([7], [7])] == response.seen
    assert ([7], [7]) == await look()


async def go_on(_: PostgreSQLBackend) -> None:
    """Leave it to the status."""


async def refuse(_: PostgreSQLBackend) -> None:
    uow.set_rollback_only("a dry run")


async def fail_in_handler(_: PostgreSQLBackend) -> None:
    await fail()


async def fail_in_hook(_: PostgreSQLBackend) -> None:
    uow.before_commit(fail)


async def break_commit(backend: PostgreSQLBackend) -> None:
    await shop.insert_then_break_commit(backend, 8)


@pytest.mark.parametrize(
    ("step", "status"),
    [
        (go_on, 404),
        (refuse, 200),
        (fail_in_handler, 200),
        (fail_in_hook, 200),
        (break_commit, 200),
    ],
)
async def test_rollback(
    db: Database,
    job_backend: PostgreSQLBackend,
    job_table: JobTable,
    step: Step,
    status: int,
) -> None:
    """Work that is not kept leaves no job."""

    async def handler() -> None:
        await shop.insert(7)
        uow.before_commit(job_table.enqueue, 7)
        await step(job_backend)

    await handle(handler, db, status=status)

    assert [] == await shop.items(job_backend)
    assert [] == await job_table.numbers(job_backend)


async def test_hooks_come_before_the_flush(
    db: Database, job_backend: PostgreSQLBackend, job_table: JobTable
) -> None:
    """What was only added to the session has sent nothing yet when a hook runs.

    The job is part of the transaction all the same, and so is what comes after it.
    """
    new: list[int] = []

    async def enqueue() -> None:
        new.append(len(uow.current_session().new))
        await job_table.enqueue(7)

    async with db:
        uow.current_session().add(shop.Item(id=7))
        uow.before_commit(enqueue)

    assert [1] == new
    assert [7] == await shop.items(job_backend)
    assert [7] == await job_table.numbers(job_backend)


async def test_first_statement(
    db: Database, job_backend: PostgreSQLBackend, job_table: JobTable
) -> None:
    """A job that is all a unit of work does is rolled back with it."""
    with pytest.raises(BeforeCommitError):
        async with db:
            uow.before_commit(job_table.enqueue, 7)
            uow.before_commit(fail)
    assert [] == await job_table.numbers(job_backend)

    async with db:
        uow.before_commit(job_table.enqueue, 8)
    assert [8] == await job_table.numbers(job_backend)


@pytest.mark.parametrize("job_table", [PgQueuer], indirect=True)
async def test_asyncpg_is_used_first(
    db: Database, job_backend: PostgreSQLBackend, job_table: PgQueuer
) -> None:
    """What goes to asyncpg before SQLAlchemy's first statement is inside, too."""
    with pytest.raises(BeforeCommitError):
        async with db:
            uow.before_commit(job_table.enqueue, 7)
            uow.before_commit(fail)
    assert [] == await job_table.numbers(job_backend)


async def test_refused_job(
    db: Database, job_backend: PostgreSQLBackend, job_table: JobTable
) -> None:
    """An error of the queue that leaves the hook has nothing kept."""
    async with db:
        uow.before_commit(job_table.enqueue, 7, only_once="the one")
    with pytest.raises(BeforeCommitError) as caught:
        async with db:
            await shop.insert(8)
            uow.before_commit(job_table.enqueue, 8, only_once="the one")

    assert isinstance(caught.value.__cause__, job_table.duplicate)
    assert [] == await shop.items(job_backend)
    assert [7] == await job_table.numbers(job_backend)


async def test_refused_job_in_a_savepoint(
    db: Database, job_backend: PostgreSQLBackend, job_table: JobTable
) -> None:
    """An error of the queue that leaves a savepoint only is undone with it."""

    async def enqueue_unless_there(number: int) -> None:
        with pytest.raises(job_table.duplicate):
            async with uow.savepoint():
                await job_table.enqueue(number, only_once="the one")

    async with db:
        uow.before_commit(job_table.enqueue, 7, only_once="the one")
    async with db as unit:
        await shop.insert(8)
        uow.before_commit(enqueue_unless_there, 8)

    assert uow.Outcome.COMMITTED is unit.outcome
    assert [8] == await shop.items(job_backend)
    assert [7] == await job_table.numbers(job_backend)
