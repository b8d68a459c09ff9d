"""A unit of work outside a request: how a block opens one, and what leaving it does."""

from __future__ import annotations

import asyncio
import os
import warnings
from contextlib import nullcontext
from typing import TYPE_CHECKING

from asgi_uow import _decision, errors
from asgi_uow._databases.configuration import check
from asgi_uow._databases.engines import check_databases
from asgi_uow._databases.keys import TABLE, Claim, table_of
from asgi_uow._decision import UNDECIDED, WRITABLE, Cause, Outcome, rollback
from asgi_uow._sessions.deadline import earlier
from asgi_uow._unit.claims import WAIT, claim_key, end_with
from asgi_uow._unit.finish import end_unit
from asgi_uow._unit.options import UnitOptions
from asgi_uow._unit.unit import UnitOfWork, current, make_unit

if TYPE_CHECKING:
    from contextlib import ExitStack

    from asgi_uow._databases.engines import Engines

DEFAULTS = UnitOptions()


class unit_of_work:  # noqa: N801  # used like a function: async with unit_of_work(db)
    """A unit of work outside a request: `async with unit_of_work(db) as uow:`.

    For several databases or, with `independent=True`, with connection and outcome of
    its own inside another unit of the same database. `deadline`: seconds from now on;
    a database call that has no answer then raises `DeadlineExceededError`, and nothing
    is committed any more.

    `key` names a job that is to be done once, on the first database: entering claims
    it, and waits for who has it. Where it was done before, `uow.replayed` is true and
    the write session refuses; rolled back before, it is done. Raises `KeyInUseError`
    after 10 seconds. Needs the table of `idempotency_table(metadata)`.

    Leaving the block commits; an exception rolls back and goes on. Raises
    `NestedUnitOfWorkError` inside an undecided unit of the same database.
    """

    unit: UnitOfWork
    independent: bool = False
    deadline: float | None = None
    key: str | None = None
    is_entered: bool = False
    turn: ExitStack | None = None

    def __init__(
        self,
        *databases: Engines,
        independent: bool = False,
        deadline: float | None = None,
        key: str | None = None,
    ) -> None:
        check_databases("unit_of_work(db)", databases)
        check({"deadline": deadline, "key": key})
        self.deadline, self.key = deadline, key
        self.databases = databases
        self.independent = independent

    async def __aenter__(self) -> UnitOfWork:
        """Open the unit; no session and no connection yet."""
        if self.is_entered:
            raise errors.BlockReusedError
        self.unit = open_unit(self.databases, independent=self.independent)
        self.unit.until = earlier(self.unit.until, self.deadline)
        self.is_entered, self._process = True, os.getpid()
        self._loop = asyncio.get_running_loop()
        if self.key is not None:
            try:
                await self._claim(self.key)
            except BaseException as error:
                self.is_entered = False  # nobody will leave it
                await self.__aexit__(type(error), error, None)
                raise
        return self.unit

    async def _claim(self, key: str) -> None:
        claim = Claim.of(table_of(TABLE), "job", key)
        self.turn, row = await claim_key(self.unit, claim, WAIT)
        if row is None:
            end_with(self.unit, claim, lambda: {"fingerprint": ""})
            return
        if row.fingerprint is None:
            part, why = Outcome.PARTIAL, Cause.COMMIT_FAILED
            detail = "of who had this key before; DDL keeps what came before it"
            raise errors.PartialCommitError(part, why, detail=detail)
        self.unit.set_rollback_only("its key was used before")
        self.unit.replayed = True

    async def __aexit__(
        self, exc_type: object, exc: BaseException | None, traceback: object
    ) -> None:
        """Commit or roll back, then close; raises if the work was not kept."""
        try:
            await leave_unit(self.unit, exc)
        finally:
            if self.turn is not None:
                self.turn.close()

    def __del__(self) -> None:
        """Roll back what nobody can leave any more."""
        if not self.is_entered or self.unit.state not in UNDECIDED:
            return
        if self._process != os.getpid():
            return  # that of the process that this one was forked from
        message = f"nobody has left the block of {self.unit!r}: it is rolled back"
        warnings.warn(message, ResourceWarning, stacklevel=2, source=self)
        if self._loop.is_running():
            end = _abandon(self.unit, self.turn)
            asyncio.run_coroutine_threadsafe(end, self._loop)


async def _abandon(unit: UnitOfWork, turn: ExitStack | None) -> None:
    with turn or nullcontext():
        await end_unit(unit, rollback(Cause.ABANDONED))


def open_unit(
    databases: tuple[Engines, ...], *, independent: bool = False
) -> UnitOfWork:
    """Make a unit the current one; no session and no connection yet."""
    around, unit = current.get(), make_unit(databases, DEFAULTS)
    unit.task = asyncio.current_task()
    if around is not None:
        unit.around, unit.options = around, around.options
        unit.must_see = around.must_see
        unit.is_nested = around.state in WRITABLE and not around.is_hook
        if unit.is_nested:
            unit.until, unit.attempt = around.until, around.attempt
        # Otherwise a hook that registers itself in such a block never ends.
        unit.quota = around.quota
        for db in databases:
            # A hook's own unit is in the way only once it is used.
            taken = around.holds(db) if around.is_hook else around.serves(db)
            inside = taken and around.state in WRITABLE and not independent
            if inside or unit.is_blocked_by_others(db):
                raise errors.NestedUnitOfWorkError(db)
    current.set(unit)
    return unit


async def leave_unit(unit: UnitOfWork, error: BaseException | None) -> None:
    decision = _decision.decide_exit(
        error,
        rollback_only=unit.state is _decision.ROLLBACK_ONLY,
        doomed=unit.doomed_by is not None,
        forced=unit.forced,
        commit_on_exit=all(db.commit_on_exit for db in unit.databases),
    )
    try:
        await end_unit(unit, decision)
    finally:
        # Not by a token: generators end in another order, or in another task.
        left = (each for each in unit.outwards() if each.state is not _decision.CLOSED)
        unit.around = next(left, None)  # a context may keep the unit, but not a chain
        if current.get() is unit:
            current.set(unit.around)


def _is_no_session(_: UnitOfWork) -> None:
    message = "`async with db` gives the unit of work; its session is uow.session()."
    raise AttributeError(message)


for _name in ("add", "commit", "execute", "flush", "get", "scalar", "scalars"):
    setattr(UnitOfWork, _name, property(_is_no_session))
