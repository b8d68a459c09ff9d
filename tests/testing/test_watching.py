"""What a test sees: captured hooks, counted statements, connections in use."""

from __future__ import annotations

from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING

import pytest

import asgi_uow as uow
from asgi_uow import Database
from asgi_uow.testing import (
    assert_no_connection_held,
    capture_hooks,
    count_statements,
    sandbox,
)
from tests.support import shop
from tests.support.asgi import handle
from tests.support.databases import DRIVERS, on
from tests.support.site import site_with

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.servers import Backend


@pytest.fixture(params=["inside", "outside"])
async def boxed(
    db: Database, request: pytest.FixtureRequest
) -> AsyncIterator[Database]:
    """The database, in a sandbox and outside of any."""
    async with AsyncExitStack() as stack:
        if request.param == "inside":
            await stack.enter_async_context(sandbox(db))
        yield db


# Hooks


async def work(called: list[str]) -> None:
    """A handler that registers a hook of each phase."""
    await shop.insert(1)
    uow.before_commit(called.append, "before")
    uow.after_commit(called.append, "commit")
    uow.after_response(called.append, "response")
    uow.after_rollback(called.append, "rollback")


async def register(called: list[str]) -> None:
    """A handler that does nothing else."""
    uow.after_commit(called.append, "again")


async def test_hooks_are_captured(boxed: Database) -> None:
    """Those that would be called are told with phase and arguments, and are not."""
    called: list[str] = []
    with capture_hooks() as hooks:
        await handle(partial(work, called), boxed)

    assert ["before"] == called
    assert ["after_commit", "after_response"] == [each.phase for each in hooks]
    [hook] = hooks.of("after_commit")
    assert called.append == hook.fn
    assert (("commit",), {}) == (hook.args, dict(hook.kwargs))

    await hook.execute()
    assert ["before", "commit"] == called


async def test_hooks_of_a_rollback_are_captured(boxed: Database) -> None:
    """After a 409 only those of a rollback would be called."""
    called: list[str] = []
    with capture_hooks() as hooks:
        await handle(partial(work, called), boxed, status=409)
    assert ["after_rollback"] == [each.phase for each in hooks]
    assert [] == called


async def test_hooks_are_executed_at_the_end(boxed: Database) -> None:
    """With execute=True they are called when the block is left, with a unit each."""
    called: list[str] = []

    async def insert_later() -> None:
        await shop.insert(2)
        called.append("hook")

    async def work() -> None:
        await shop.insert(1)
        uow.after_commit(insert_later)

    async with capture_hooks(execute=True):
        await handle(work, boxed)
        assert [] == called
    assert ["hook"] == called
    async with boxed:
        assert [1, 2] == list(await boxed.read.scalars(shop.SELECT))


async def test_hook_that_fails_fails_the_test(boxed: Database) -> None:
    """What an executed hook raises is raised, unlike in production."""

    async def fail() -> None:
        raise ZeroDivisionError

    async def register() -> None:
        uow.after_commit(fail)

    with pytest.raises(ZeroDivisionError):
        async with capture_hooks(execute=True):
            await handle(register, boxed)


async def test_hooks_are_left_alone_after_an_error(boxed: Database) -> None:
    """A block that is left by an exception executes nothing."""
    called: list[str] = []
    with pytest.raises(ZeroDivisionError):
        async with capture_hooks(execute=True):
            await handle(partial(work, called), boxed)
            raise ZeroDivisionError
    assert ["before"] == called
    await handle(partial(register, called), boxed)
    assert ["before", "again"] == called


def test_execution_needs_a_loop() -> None:
    """`with capture_hooks(execute=True)` is refused at once."""
    with pytest.raises(TypeError, match="async with"):
        capture_hooks(execute=True).__enter__()


async def test_inner_capture_has_the_hooks(db: Database) -> None:
    """Of two blocks the inner one captures; the outer one goes on after it."""
    called: list[str] = []
    with capture_hooks() as outer:
        with capture_hooks() as inner:
            await handle(partial(work, called), db)
        await handle(partial(register, called), db)
    assert 2 == len(inner)
    assert [("again",)] == [each.args for each in outer]
    assert ["before"] == called


async def test_sandbox_does_not_hear_of_others(db: Database) -> None:
    """What is captured in a sandbox is what happens in it."""
    called: list[str] = []
    async with sandbox(db):
        with capture_hooks() as hooks:
            pass
    with hooks:
        await handle(partial(work, called), db)
    assert [] == hooks
    assert ["before", "commit", "response"] == called


# Statements


@on(*DRIVERS)
async def test_statements_are_counted(boxed: Database) -> None:
    """Those of both sessions are listed, in order, as the database got them."""
    with count_statements(boxed) as statements:
        async with boxed:
            await boxed.read.execute(shop.SELECT)
            await shop.insert(1)
    assert 2 == len(statements)
    assert statements[0] == shop.SELECT
    assert "INSERT" in statements[1]
    async with boxed:
        await boxed.read.execute(shop.SELECT)
    assert 2 == len(statements)


async def test_wrong_number_is_an_error_with_the_list(boxed: Database) -> None:
    """A number that was expected and is not met is shown with what was executed."""
    with pytest.raises(AssertionError, match="1 statements expected") as raised:
        async with boxed:
            with count_statements(boxed, 1):
                await boxed.read.execute(shop.SELECT)
                await boxed.read.execute(shop.COUNT)
    assert f"  1. {shop.SELECT}\n  2. {shop.COUNT}" in str(raised.value)


async def test_right_number(boxed: Database) -> None:
    """The number that was expected is no error."""
    with count_statements(boxed, 1):
        async with boxed:
            await boxed.read.execute(shop.SELECT)


async def test_readers_are_counted(backend: Backend) -> None:
    """What a reader of the user's own executes counts too, once."""
    async with site_with(backend, backend.url) as site:
        with count_statements(site.db, 1):
            async with site.db:
                await site.db.read.execute(shop.SELECT)


# Connections


@on(*DRIVERS)
async def test_connections_in_use_are_named(boxed: Database) -> None:
    """A unit that has written holds one; afterwards there is none."""
    assert_no_connection_held(boxed)
    async with boxed:
        await shop.insert(1)
        with pytest.raises(AssertionError, match="1 of the connections to"):
            assert_no_connection_held(boxed)
    assert_no_connection_held(boxed)


@on(*DRIVERS)
async def test_disposing_leaves_the_sandbox_alone(db: Database) -> None:
    """An application that closes its engines at its end does not end the test's."""
    async with sandbox(db):
        async with db:
            await shop.insert(1)
        await db.dispose()
        async with db:
            assert [1] == (await db.read.scalars(shop.SELECT)).all()
