"""Units of work outside a request: what `async with` does at both ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asgi_uow._decision import State, decide_exit
from asgi_uow._reading.causal import NOTHING
from asgi_uow._unit.current import current
from asgi_uow._unit.end import Settings
from asgi_uow._unit.kin import held_by
from asgi_uow._unit.unit import UnitOfWork
from asgi_uow.errors import NestedUnitOfWorkError

if TYPE_CHECKING:
    from types import TracebackType

    from asgi_uow._databases.engines import Engines


class unit_of_work:  # noqa: N801  # used like a function: async with unit_of_work(db)
    """A unit of work outside a request: `async with unit_of_work(db) as uow:`.

    The general form of `async with db:`, for several databases or, with
    `independent=True`, for one with connection and outcome of its own inside
    another unit of the same database.

    Leaving the block commits; an exception rolls back and goes on. Raises
    `NestedUnitOfWorkError` inside an undecided unit of the same database.
    """

    def __init__(self, *databases: Engines, independent: bool = False) -> None:
        """Serve `databases`, the first being the default."""
        if not databases:
            message = "unit_of_work() needs at least one Database."
            raise TypeError(message)
        self.databases = databases
        self.independent = independent
        self.unit: UnitOfWork

    async def __aenter__(self) -> UnitOfWork:
        """Open the unit; no session and no connection yet."""
        around = current.get()
        settings = around.settings if around is not None else Settings()
        for db in self.databases:
            self._refuse_nested(around, db)
        in_hook = around is not None and around.kin.hook_of is not None
        nested = around is not None and around.life.is_writable and not in_hook
        self.unit = UnitOfWork(
            self.databases,
            settings,
            parent=around if nested else None,
            must_see=around.must_see if around is not None else NOTHING,
            # Or a hook that registers itself in a block of its own never ends.
            quota=around.hooks.quota if around and around.hooks.by_hook else None,
        )
        self.unit.kin.previous = around
        current.set(self.unit)
        return self.unit

    def _refuse_nested(self, around: UnitOfWork | None, db: Engines) -> None:
        if around is None:
            return
        if db.one_writer and held_by(around, db):
            raise NestedUnitOfWorkError(db)  # it would wait for the outer forever
        if self.independent or not around.life.is_writable:
            return
        # A hook has a unit of its own, which is in the way only once it is used.
        if around.holds(db) if around.kin.hook_of is not None else around.serves(db):
            raise NestedUnitOfWorkError(db)

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Commit or roll back, then close; raises if the work was not kept."""
        await leave(self.unit, exc)


async def leave(unit: UnitOfWork, error: BaseException | None) -> None:
    """End the unit of work of an `async with` block."""
    try:
        await unit.finish(
            decide_exit(
                error,
                rollback_only=unit.state is State.ROLLBACK_ONLY,
                doomed=unit.doomed_by is not None,
                forced=unit.forced,
                commit_on_exit=all(db.commit_on_exit for db in unit.databases),
            ),
        )
    finally:
        try:
            await unit.release()
        finally:
            _step_back_from(unit)


def _step_back_from(unit: UnitOfWork) -> None:
    """Make the unit around current again, unless another one is current by now.

    Two blocks need not end in the order of their nesting (generators), nor in the
    task they began in; a token would insist on both.
    """
    if current.get() is unit:
        previous = unit.kin.previous
        while previous is not None and previous.state is State.CLOSED:
            previous = previous.kin.previous
        current.set(previous)
