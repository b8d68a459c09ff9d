"""What a unit of work is by itself: decided once, fit for logs, missed when dropped."""

from __future__ import annotations

import gc
import sys

import pytest

from asgi_uow import Database, UnitOfWork
from asgi_uow.errors import UnitOfWorkClosedError
from tests.support.databases import on
from tests.support.private import COMMIT, Hook, finish, make_unit, release

pytestmark = on("aiosqlite")


async def test_finishing_twice_is_refused(db: Database) -> None:
    """A unit that has been decided cannot be decided again."""
    unit = make_unit(db)
    await finish(unit, COMMIT)
    with pytest.raises(UnitOfWorkClosedError, match="becoming preparing"):
        await finish(unit, COMMIT)
    await release(unit)


async def test_repr_shows_state_and_no_password() -> None:
    """The repr of a unit is fit for logs."""
    db = Database.from_url("mysql://user:secret@127.0.0.1/app")

    async with db as uow:
        shown = repr(uow)

    assert "<UnitOfWork new on mysql+asyncmy://user:***@127.0.0.1/app" in shown


async def test_dropped_unit_with_hooks_warns(db: Database) -> None:
    """A unit collected with hooks that never ran warns; one without does not."""
    make_unit(db)
    gc.collect()
    unit: UnitOfWork | None = make_unit(db)
    assert unit is not None
    unit.register("after_commit", Hook(print, (), {}))
    unit.register("after_response", Hook(gc.collect, (), {}))
    with pytest.warns(ResourceWarning, match=r"never ran: print, collect$"):
        unit = None
        gc.collect()


async def test_long_chain(db: Database) -> None:
    """A job that starts the next one inside its block may do so for ever."""
    first = unit = make_unit(db)
    for _ in range(3 * sys.getrecursionlimit()):
        inner = make_unit(db)
        inner.around, inner.is_nested = unit, True
        unit = inner
    *_, last = unit.outwards()
    assert first is last
    assert unit.serves(db)
