"""P3: in every case in which the work is not known to be kept, no hook says it is."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

import asgi_uow as uow
from asgi_uow.errors import ManagedTransactionError
from tests.support import shop
from tests.support.asgi import handle
from tests.support.databases import SERVERS, behind_proxy, is_commit, on

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.servers import ServerBackend


async def nothing() -> None:
    pass


async def fail() -> None:
    raise LookupError


async def rollback_only() -> None:
    uow.set_rollback_only("a dry run")


async def doom() -> None:
    """What gives the transaction up on every database, swallowed."""
    connection = await uow.current_session().connection()
    with suppress(ManagedTransactionError):
        await connection.commit()


async def refuse() -> None:
    uow.before_commit(fail)


@dataclasses.dataclass(frozen=True)
class Case:
    """How a request ends."""

    status: int
    handler: Callable[[], Awaitable[None]] = nothing
    cut: bool = False
    outcome: uow.Outcome = uow.Outcome.ROLLED_BACK


CASES = {
    "redirect": Case(303, outcome=uow.Outcome.COMMITTED),
    "4xx": Case(404),
    "5xx": Case(503),
    "exception": Case(200, fail),
    "rollback-only": Case(200, rollback_only),
    "doomed": Case(200, doom),
    "before_commit hook fails": Case(200, refuse),
    "answer to COMMIT lost": Case(200, cut=True, outcome=uow.Outcome.UNKNOWN),
}


@on(*SERVERS)
@pytest.mark.parametrize("case", CASES)
async def test_p3_no_hook_without_a_commit(case: str, backend: ServerBackend) -> None:
    """P3: after_commit and after_response are called after a proven COMMIT alone.

    After a proven rollback after_rollback is, and while nobody knows none of them.
    """
    end = CASES[case]
    called: list[str] = []

    async def handler() -> None:
        await shop.insert(1)
        for register in (uow.after_commit, uow.after_response, uow.after_rollback):
            register(called.append, register.__name__)
        await end.handler()

    async with behind_proxy(backend) as (db, proxy):
        if end.cut:
            proxy.cut_after(is_commit)
        response = await handle(handler, db, status=end.status)

    expected = {
        uow.Outcome.COMMITTED: ["after_commit", "after_response"],
        uow.Outcome.ROLLED_BACK: ["after_rollback"],
        uow.Outcome.UNKNOWN: [],
    }
    assert end.outcome is response.unit.outcome
    assert expected[end.outcome] == called
