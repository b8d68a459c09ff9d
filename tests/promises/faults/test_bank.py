"""No false success: random faults against a bank, seeded and counted.

`ASGI_UOW_RUNS=500 pytest tests/promises/faults/test_bank.py` runs as many; the number
at the end of a test's name is the seed of its run. What happened is counted in the
properties of a report: `--junitxml=report.xml -o junit_family=xunit1`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from asgi_uow import Outcome
from asgi_uow.errors import CommitFailedError, OutcomeUnknownError
from tests.promises.faults.bank import (
    PROCEDURES,
    TABLES,
    Attempt,
    Bank,
    Order,
    Plan,
    lies,
)
from tests.support.asgi import START
from tests.support.private import Cause, make_unit

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.promises.faults.mortal import Mortal

RUNS = int(os.environ.get("ASGI_UOW_RUNS", "8"))
DRIVERS = ("asyncmy", "asyncpg", "asyncmy", "psycopg")
POOLED = ("asyncpg@4", "psycopg@4")
CASES = [
    *((DRIVERS[seed % len(DRIVERS)], seed) for seed in range(RUNS)),
    *((POOLED[seed % len(POOLED)], seed) for seed in range(RUNS // 4)),
]


@pytest.mark.parametrize(("driver", "seed"), sorted(CASES))
async def test_no_false_success(
    mortal: Mortal, seed: int, record_property: Callable[[str, object], None]
) -> None:
    """Money is neither made nor lost, and what clients and hooks were told is so."""
    await mortal.backend.execute(*TABLES, *PROCEDURES[mortal.server.name])
    async with mortal.backend.proxy() as proxy:
        bank = Bank(mortal, proxy, Plan(seed))
        try:
            await bank.run()
            await bank.check()
            await bank.goes_on()
            await bank.check()
            for name, number in (await bank.figures()).items():
                record_property(name, number)
        finally:
            await bank.db.dispose()


COMMIT, ROLLBACK = ["after_commit"], ["after_rollback"]
COMMITTED, ROLLED_BACK = Outcome.COMMITTED, Outcome.ROLLED_BACK
UNKNOWN = Outcome.UNKNOWN


def attempt(
    status: int | None,
    outcome: Outcome | None,
    hooks: list[str],
    *,
    is_cancelled: bool = False,
) -> Attempt:
    """Make what a transfer came to."""
    unit = make_unit()
    unit.outcome = outcome
    kind = OutcomeUnknownError if outcome is UNKNOWN else CommitFailedError
    return Attempt(
        Order("1-0", source=0, target=1, amount=5),
        hooks=hooks,
        messages=[{"type": START, "status": status}] * (status is not None),
        unit=unit,
        error=kind(UNKNOWN, Cause.COMMIT_FAILED) if status == 500 else None,
        is_cancelled=is_cancelled,
    )


@pytest.mark.parametrize(
    ("attempt", "is_kept"),
    [
        (attempt(200, COMMITTED, COMMIT), True),
        (attempt(409, ROLLED_BACK, ROLLBACK), False),
        (attempt(503, ROLLED_BACK, ROLLBACK), False),
        (attempt(500, UNKNOWN, []), True),
        (attempt(500, UNKNOWN, []), False),
        (attempt(None, COMMITTED, COMMIT, is_cancelled=True), True),
        (attempt(None, UNKNOWN, [], is_cancelled=True), True),
    ],
)
def test_truth(attempt: Attempt, is_kept: bool) -> None:
    """What the library promises is no lie."""
    assert [] == lies(attempt, is_kept=is_kept)


@pytest.mark.parametrize(
    ("attempt", "is_kept", "lie"),
    [
        (attempt(200, UNKNOWN, []), False, "a success that was not kept"),
        (attempt(200, UNKNOWN, []), True, "a success that is not known to be one"),
        (attempt(500, UNKNOWN, COMMIT), False, "after_commit for what was not kept"),
        (attempt(500, UNKNOWN, ROLLBACK), True, "after_rollback for what was kept"),
        (attempt(200, COMMITTED, COMMIT), False, "COMMITTED, but not kept"),
        (attempt(409, ROLLED_BACK, []), True, "not COMMITTED nor UNKNOWN, but kept"),
        (
            attempt(500, COMMITTED, COMMIT),
            True,
            "COMMITTED, but neither a success nor cancelled",
        ),
        (
            attempt(503, UNKNOWN, []),
            True,
            "UNKNOWN, but neither a plain 500 nor cancelled",
        ),
        (attempt(503, UNKNOWN, []), True, "503 for what may be kept"),
        (attempt(None, None, []), False, "a unit of work without an outcome"),
        (attempt(200, COMMITTED, []), True, "not the hooks of the outcome"),
        (attempt(200, COMMITTED, COMMIT * 2), True, "not the hooks of the outcome"),
    ],
)
def test_lie(attempt: Attempt, is_kept: bool, lie: str) -> None:
    """A lie is noticed: the runs above are not green because nobody looks."""
    assert f"1-0: {lie}" in lies(attempt, is_kept=is_kept)


def test_reproducible() -> None:
    """The same seed is the same plan, another one is not."""
    one, same, other = Plan(1), Plan(1), Plan(2)
    assert one.clients == same.clients
    assert one.faults == same.faults
    assert one.clients != other.clients
