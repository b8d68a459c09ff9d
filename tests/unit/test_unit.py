"""Units of work outside requests, nesting, states, and dropped units."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING

import pytest

from asgi_uow import (
    Database,
    Outcome,
    UnitOfWork,
    after_commit,
    before_commit,
    current_read_session,
    current_session,
    current_unit_of_work,
    force_commit,
    savepoint,
    set_rollback_only,
    unit_of_work,
)
from asgi_uow.errors import (
    CommitFailedError,
    NestedUnitOfWorkError,
    NoUnitOfWorkError,
    UnitOfWorkClosedError,
)
from asgi_uow.observers import HookFailed, UnitFinished
from tests.support import shop
from tests.support.asgi import handle
from tests.support.databases import SERVERS, checked_out, on, shop_database
from tests.support.private import COMMIT, TRANSITIONS, Cause, Settings, State

if TYPE_CHECKING:
    from collections.abc import Callable

    from asgi_uow.observers import Event
    from tests.servers.backend import Backend, MariaDBBackend


async def test_leaving_the_block_commits(db: Database, backend: Backend) -> None:
    """Outside a request `async with db:` commits, then runs the hooks."""
    fired: list[str] = []

    async with db as uow:
        await db.write.execute("INSERT INTO items (id) VALUES (1)")
        after_commit(fired.append, "hook")
        assert [] == fired
        states = [uow.state]
        assert 1 == uow.attempt
        assert uow.doomed_by is None

    assert [1] == await shop.items(backend)
    assert ["hook"] == fired
    assert Outcome.COMMITTED is uow.outcome
    assert [State.ACTIVE, State.CLOSED] == [*states, uow.state]
    assert [0, 0] == checked_out(db)


async def test_exception_rolls_back(db: Database, backend: Backend) -> None:
    """An exception that leaves the block rolls back and goes on as it is."""
    failure = LookupError("mine")

    block = unit_of_work(db)
    with pytest.raises(LookupError) as caught:
        async with block:
            await shop.insert(1)
            raise failure

    uow = block.unit
    assert failure is caught.value
    assert (Outcome.ROLLED_BACK, Cause.EXCEPTION) == (uow.outcome, uow.cause)
    assert [] == await shop.items(backend)


async def test_failed_commit_raises(db: Database, backend: Backend) -> None:
    """A COMMIT that fails is raised out of the block; the connection is clean."""
    with pytest.raises(CommitFailedError) as caught:
        async with db:
            await shop.insert_then_break_commit(backend, 1)

    assert Outcome.ROLLED_BACK is caught.value.outcome
    assert [] == await shop.items(backend)
    async with db:
        await shop.insert(2)
    assert [2] == await shop.items(backend)


async def test_rollback_only_and_force(db: Database, backend: Backend) -> None:
    """set_rollback_only keeps nothing without raising; asked twice, it is the same."""
    async with db as uow:
        await shop.insert(1)
        set_rollback_only("first reason")
        set_rollback_only("second reason")
        force_commit()

    assert "second reason" == uow.reason
    assert (Outcome.ROLLED_BACK, Cause.EXPLICIT) == (uow.outcome, uow.cause)
    assert [] == await shop.items(backend)


async def test_database_without_commit_on_exit(sqlite: Backend) -> None:
    """One database of several that says no has nothing committed on exit."""
    async with shop_database(sqlite, commit_on_exit=False) as db:
        async with db as uow:
            await shop.insert(1)
        assert (Outcome.ROLLED_BACK, Cause.EXPLICIT) == (uow.outcome, uow.cause)
        async with db:
            await shop.insert(2)
            force_commit()
        assert [2] == await shop.items(sqlite)


@pytest.mark.parametrize(
    "use",
    [
        current_unit_of_work,
        current_session,
        current_read_session,
        savepoint,
        force_commit,
        lambda: set_rollback_only("why"),
        lambda: after_commit(print),
        lambda: before_commit(print),
    ],
)
def test_outside_a_unit(use: Callable[[], object]) -> None:
    """Without a unit of work everything says what is missing and what to do."""
    with pytest.raises(NoUnitOfWorkError, match="add UnitOfWorkMiddleware"):
        use()


# Nesting


async def test_nested_unit_of_the_same_database_is_refused(
    db: Database, backend: Backend
) -> None:
    """A unit inside a unit of the same database names the two ways out."""
    async with db:
        await shop.insert(1)
        with pytest.raises(NestedUnitOfWorkError, match=r"savepoint\(\)"):
            await db.__aenter__()
        await shop.insert(2)

    assert [1, 2] == await shop.items(backend)


@on(*SERVERS)
async def test_independent_unit_has_its_own_outcome(
    backend: Backend,
) -> None:
    """independent=True: a connection and an outcome of its own."""
    async with shop_database(backend) as db:
        with pytest.raises(ZeroDivisionError):
            async with db:
                await shop.insert(1)
                async with unit_of_work(db, independent=True):
                    await shop.insert(2)
                assert [2] == await shop.items(backend)
                raise ZeroDivisionError

        assert [2] == await shop.items(backend)


async def test_independent_unit_on_sqlite(sqlite: Backend) -> None:
    """On SQLite a second writer would wait for the first forever: refused."""
    async with shop_database(sqlite) as db:
        async with db:
            async with unit_of_work(db, independent=True):
                await shop.insert(1)
            await shop.insert(2)
            with pytest.raises(NestedUnitOfWorkError):
                await unit_of_work(db, independent=True).__aenter__()

        assert [1, 2] == await shop.items(sqlite)


async def test_independent_unit_in_memory() -> None:
    """In memory also a read holds the only connection: refused after one."""
    db = Database.from_url("sqlite://")
    async with db:
        await db.read.execute("SELECT 1")
        with pytest.raises(NestedUnitOfWorkError):
            await unit_of_work(db, independent=True).__aenter__()
    await db.dispose()


async def test_unit_of_another_database_inside(
    sqlite: Backend, mariadb: MariaDBBackend
) -> None:
    """A unit of another database is no nesting; both databases are reached."""
    async with shop_database(sqlite) as outer, shop_database(mariadb) as inner:
        async with outer:
            await shop.insert(1)
            async with inner:
                await shop.insert(2)
                await outer.write.execute("INSERT INTO items (id) VALUES (3)")
                with pytest.raises(NestedUnitOfWorkError):
                    await outer.__aenter__()
                with pytest.raises(NestedUnitOfWorkError):
                    await unit_of_work(outer, independent=True).__aenter__()
                result = await outer.read.execute("SELECT id FROM items ORDER BY id")
                assert [1, 3] == [row[0] for row in result]
            assert [2] == await shop.items(mariadb)

        assert [1, 3] == await shop.items(sqlite)


async def test_several_databases(sqlite: Backend, mariadb: MariaDBBackend) -> None:
    """unit_of_work(a, b): one unit, both committed; at least one is needed."""
    async with shop_database(sqlite) as first, shop_database(mariadb) as second:
        async with unit_of_work(first, second):
            await current_session(first).execute("INSERT INTO items (id) VALUES (1)")
            await current_session(second).execute("INSERT INTO items (id) VALUES (2)")

        assert [1] == await shop.items(sqlite)
        assert [2] == await shop.items(mariadb)

    with pytest.raises(TypeError, match="at least one Database"):
        unit_of_work()


async def test_unit_inside_a_request_uses_its_observers(sqlite: Backend) -> None:
    """A unit opened by a hook or background task reports where the request does."""
    events: list[Event] = []

    async def broken() -> None:
        raise ZeroDivisionError

    async with shop_database(sqlite) as db:

        async def hook() -> None:
            async with db:
                after_commit(broken)

        async def handler() -> None:
            after_commit(hook)

        await handle(handler, db, observers=[events.append])

    # Those of the hook's unit first: the request tells when its hooks have run.
    kinds = [type(event) for event in events]
    expected = [UnitFinished, HookFailed, UnitFinished]
    assert expected == [each for each in kinds if each in expected]


async def test_leaving_what_was_not_entered(sqlite: Backend) -> None:
    """Leaving without having entered is an error, not a commit of something else."""
    async with shop_database(sqlite) as db:
        with pytest.raises(NoUnitOfWorkError, match="leaving"):
            await db.__aexit__(None, None, None)


async def test_units_of_parallel_tasks_are_apart(
    db: Database, backend: Backend
) -> None:
    """Tasks that open a unit each on the same Database do not meet."""
    units: set[UnitOfWork] = set()

    async def work(number: int) -> None:
        async with db as uow:
            units.add(uow)
            await shop.insert(number)

    await asyncio.gather(*(work(number) for number in range(4)))

    assert 4 == len(units)
    assert [0, 1, 2, 3] == await shop.items(backend)


async def test_cancelled_block_rolls_back(db: Database, backend: Backend) -> None:
    """A cancellation inside the block rolls back, cause cancelled."""
    units: list[UnitOfWork] = []
    inserted = asyncio.Event()

    async def work() -> None:
        async with db as uow:
            units.append(uow)
            await shop.insert(1)
            inserted.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await inserted.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert (Outcome.ROLLED_BACK, Cause.CANCELLED) == (units[0].outcome, units[0].cause)
    assert [] == await shop.items(backend)


# States


def test_every_state_leads_to_the_end() -> None:
    """From every state the end can be reached, and from the end nothing."""
    assert frozenset() == TRANSITIONS[State.CLOSED]
    for state in State:
        reached = {state}
        while new := {n for s in reached for n in TRANSITIONS[s]} - reached:
            reached |= new
        assert State.CLOSED in reached


async def test_finishing_twice_is_refused(sqlite: Backend) -> None:
    """A unit that has been decided cannot be decided again."""
    async with shop_database(sqlite) as db:
        unit = UnitOfWork([db], Settings())
        await unit.finish(COMMIT)
        with pytest.raises(UnitOfWorkClosedError, match="becoming preparing"):
            await unit.finish(COMMIT)
        await unit.release()


async def test_repr_shows_state_and_no_password() -> None:
    """The repr of a unit is fit for logs."""
    db = Database.from_url("mysql://user:secret@127.0.0.1/app")

    async with db as uow:
        shown = repr(uow)

    assert "<UnitOfWork new on mysql+asyncmy://user:***@127.0.0.1/app" in shown


# Dropped units


async def test_dropped_unit_with_hooks_warns(sqlite: Backend) -> None:
    """A unit collected with hooks that never ran warns; one without does not."""
    async with shop_database(sqlite) as db:
        UnitOfWork([db], Settings())
        gc.collect()
        unit = UnitOfWork([db], Settings())
        unit.hooks.register("after_commit", print, (), {})
        with pytest.warns(ResourceWarning, match="hooks that never ran"):
            del unit
            gc.collect()


# Releasing
