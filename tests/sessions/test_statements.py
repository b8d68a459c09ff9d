"""Statements that would end the transaction, or outlive the unit: refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from asgi_uow import Database, current_session
from asgi_uow.errors import ManagedTransactionError
from tests.support import shop
from tests.support.asgi import handle
from tests.support.databases import DRIVERS, on

if TYPE_CHECKING:
    from tests.servers import Backend


@on(*DRIVERS)
@pytest.mark.parametrize(
    "statement",
    [
        "COMMIT",
        "rollback",
        " /* why */ COMMIT",
        "-- why\nCOMMIT",
        "BEGIN",
        "START TRANSACTION",
    ],
)
@pytest.mark.parametrize("status", [200, 409])
async def test_transaction_control_as_text(
    db: Database, backend: Backend, statement: str, status: int
) -> None:
    """COMMIT, ROLLBACK or BEGIN as text is refused before it is sent."""

    async def handler() -> None:
        await shop.insert(1)
        with pytest.raises(ManagedTransactionError, match="set_rollback_only"):
            await current_session().execute(statement)

    response = await handle(handler, db, status=status, hooks=True)

    kept = status == 200
    assert ["commit" if kept else "rollback"] == response.hooks
    assert ([1] if kept else []) == await shop.items(backend)


@on("asyncpg", "psycopg")
async def test_a_lock_of_a_table(db: Database, backend: Backend) -> None:
    """PostgreSQL's LOCK TABLE is for the transaction, as any lock."""
    async with db:
        await db.write.execute("LOCK TABLE items IN EXCLUSIVE MODE")
        await shop.insert(1)
    assert [1] == await shop.items(backend)


@on("asyncmy")
@pytest.mark.parametrize("statement", ["SET autocommit = 1", "LOCK TABLES items WRITE"])
async def test_what_would_outlive_the_unit_on_mariadb(
    db: Database, backend: Backend, statement: str
) -> None:
    """AUTOCOMMIT and table locks would poison the pooled connection: refused."""

    async def handler() -> None:
        await shop.insert(1)
        with pytest.raises(ManagedTransactionError):
            await current_session().execute(statement)

    response = await handle(handler, db, status=409, hooks=True)

    assert ["rollback"] == response.hooks
    assert [] == await shop.items(backend)
