"""Claiming an idempotency key as the first thing that a unit of work does."""

from __future__ import annotations

import asyncio
import math
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import anyio

from asgi_uow._databases.driver_errors import means
from asgi_uow._decision import Outcome
from asgi_uow._unit.completion import Completion
from asgi_uow.errors import KeyInUseError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import sqlalchemy as sa

    from asgi_uow._databases.keys import Claim
    from asgi_uow._unit.unit import UnitOfWork

    Found = sa.Row[*tuple[Any, ...]] | None

LEAST = 1.0  # seconds for the database, however long the turn took
PAUSE = 0.01  # seconds, after a conflict
WAIT = 10.0  # seconds for who has the key; then it is in use

# Who waits in this process holds no connection.
_turns: WeakValueDictionary[tuple[object, ...], asyncio.Lock] = WeakValueDictionary()


async def claim_key(
    unit: UnitOfWork, claim: Claim, wait: float
) -> tuple[ExitStack, Found]:
    """Claim a key for the unit; give its turn in this loop, to be closed, and the row.

    That is of who had the key before, if it was kept. Raises `KeyInUseError` after
    `wait` seconds, of which the database gets one at least.
    """
    here = asyncio.get_running_loop(), unit.databases[0], claim.table.fullname, claim.id
    lock = _turns.setdefault(here, asyncio.Lock())
    until = min(anyio.current_time() + wait, unit.until or math.inf)
    with anyio.CancelScope(deadline=until) as waiting:
        await lock.acquire()
    if waiting.cancelled_caught:
        raise KeyInUseError
    with ExitStack() as turn:
        turn.callback(lock.release)
        row = await _claim(unit, claim, max(until, anyio.current_time() + LEAST))
        return turn.pop_all(), row


async def _claim(unit: UnitOfWork, claim: Claim, until: float) -> Found:
    """Wait in the database for those elsewhere who have the key.

    What conflicts there is begun anew, as nothing else was done yet.
    """
    first = not unit.writers
    with anyio.CancelScope(deadline=until):
        while True:
            session: Any = unit.session()
            try:
                is_claimed, row = await _take(session, claim)
                if is_claimed:
                    # It proves nothing of what went before, or if it is undone.
                    session.journal.claim = claim if first else None
                    return None
            except Exception as error:
                claim.explain(error)
                if not first or not means(error, "conflict"):
                    raise
                row = None
            if first:
                await _begin_anew(unit)
            if row is not None:
                return row
            await anyio.sleep(PAUSE)
    raise KeyInUseError


async def _take(session: Any, claim: Claim) -> tuple[bool, Found]:
    """Claim a key; give the row of who has done what it is for."""
    database = session.sync_session.database.facts
    made, row = await session.execute(claim.insert(database)), None
    if made.rowcount != 1:
        row = (await session.execute(claim.select())).one_or_none()
        if row is not None and row.created < 0:  # nobody's
            made, row = await session.execute(claim.take_over()), None
    return made.rowcount == 1, row


def end_with(
    unit: UnitOfWork, claim: Claim, values: Callable[[], Mapping[str, object]]
) -> None:
    """Have the unit say, as the last thing before COMMIT, that all is done."""

    async def send() -> None:
        await unit.session().execute(claim.update(**values()))

    unit.last = send


async def _begin_anew(unit: UnitOfWork) -> None:
    """Roll the claim back and return the connection: nothing else was done there."""
    completion, shared = Completion(unit.options.commit_timeout), unit.share()
    for writer in unit.writers:
        await completion.roll_back(writer, Outcome.ROLLED_BACK)
        shared.writers.remove(writer.sync_session)
    for participant in unit.participants.values():
        participant.writer = None
    unit.writers = ()
    shared.outages.clear()
    completion.shield.deliver()
