"""The functions of the root, where there is no unit, or not the database."""

from __future__ import annotations

import contextvars
from typing import TYPE_CHECKING

import pytest

import asgi_uow as uow
from asgi_uow import Database
from asgi_uow.errors import NoUnitOfWorkError, UnknownDatabaseError
from tests.support.asgi import handle
from tests.support.databases import on

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize(
    "use",
    [
        uow.current_unit_of_work,
        uow.current_session,
        uow.current_read_session,
        uow.savepoint,
        uow.force_commit,
        lambda: uow.set_rollback_only("why"),
        lambda: uow.after_commit(print),
        lambda: uow.before_commit(print),
        lambda: Database(None).write,
        lambda: Database(None).read,
    ],
)
def test_outside_a_unit(use: Callable[[], object]) -> None:
    """Without a unit of work everything says what is missing and what to do."""
    with pytest.raises(
        NoUnitOfWorkError, match=r"needs a unit of work.* UnitOfWorkMiddleware"
    ):
        use()


@on("aiosqlite")
async def test_unknown_database_is_named(db: Database) -> None:
    """A database that nobody told the middleware of is named in the error."""
    stranger = Database.from_url("sqlite:///stranger.db")

    async def handler() -> None:
        for accessor in (uow.current_session, uow.current_unit_of_work().read_session):
            with pytest.raises(UnknownDatabaseError, match=r"stranger\.db"):
                accessor(stranger)

    assert 200 == (await handle(handler, db)).status


@on("aiosqlite")
async def test_in_unit_of_work(db: Database) -> None:
    """It tells whether there is a unit that can be asked for something."""
    assert not uow.in_unit_of_work()
    async with db:
        assert uow.in_unit_of_work()
        late = contextvars.copy_context()
    assert not uow.in_unit_of_work()
    assert not late.run(uow.in_unit_of_work)
