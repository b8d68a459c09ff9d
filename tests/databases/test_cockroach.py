"""CockroachDB: what is read of a URL, and what is done unlike on PostgreSQL.

The server is PostgreSQL; `tests.support.cockroach` says which dialects these are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from asgi_uow import Database, Outcome, current_session, errors
from asgi_uow._databases.configuration import create_engine
from tests.support import shop
from tests.support.cockroach import cockroach
from tests.support.databases import behind_proxy, on

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.servers import ServerBackend

pytestmark = on("asyncpg", "psycopg")


@pytest.mark.parametrize(
    ("url", "driver", "query"),
    [
        ("cockroachdb://root@node:26257/bank", "asyncpg", {}),
        (
            "cockroachdb+asyncpg://root@node:26257/bank?sslmode=verify-full",
            "asyncpg",
            {"dsn": "postgresql://?sslmode=verify-full"},
        ),
        (
            "cockroachdb+psycopg://root@node:26257/bank?sslmode=disable",
            "psycopg",
            {"sslmode": "disable"},
        ),
    ],
)
def test_urls(url: str, driver: str, query: Mapping[str, str]) -> None:
    """It has the drivers of PostgreSQL, which understand what a URL says."""
    engine = create_engine(url, {})
    found = engine.dialect.name, engine.dialect.driver
    assert ("cockroachdb", driver) == found
    assert query == engine.url.query


def test_a_dialect_that_is_missing() -> None:
    """Where SQLAlchemy does not find the dialect, its package is named."""
    with pytest.raises(errors.ConfigurationError, match=r"sqlalchemy-cockroachdb\.$"):
        Database.from_url("cockroachdb+unheard_of://node/bank")


async def test_a_unit(backend: ServerBackend) -> None:
    """It reads and writes; its read connections are read-only."""
    async with behind_proxy(backend) as (_, proxy):
        db = Database.from_url(cockroach(backend.through(proxy.port)))
        async with db as unit:
            await shop.insert(1)
            assert 1 == await db.read.scalar(shop.COUNT)
        assert Outcome.COMMITTED is unit.outcome
        async with db:
            assert 1 == await db.read.scalar(shop.COUNT)
            with pytest.raises(errors.ReadOnlySessionError):
                await db.read.execute("DELETE FROM items")
            with pytest.raises(errors.ReadOnlySessionError):
                await db.read.execute("WITH d AS (DELETE FROM items) SELECT 1")
        with pytest.raises(ZeroDivisionError):
            async with db:
                await current_session().execute("DELETE FROM items")
                raise ZeroDivisionError
        health = await db.check()
        assert (True, None) == (health.ok, health.writer.lag)
        await db.dispose()
        sent = " ".join(proxy.trips)
    assert [1] == await shop.items(backend)
    assert "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY" in sent
    assert "pg_backend_pid" not in sent
    assert "pg_is_in_recovery" not in sent


@pytest.mark.parametrize(
    "options", [{"read_isolation": "REPEATABLE READ"}, {"pooler": "transaction"}]
)
async def test_reads(backend: ServerBackend, options: dict[str, Any]) -> None:
    """Reads may be of one snapshot, or transactions of their own behind a pooler."""
    await shop.create(backend)
    db = Database.from_url(cockroach(backend.url), **options)
    async with db:
        assert 0 == await db.read.scalar(shop.COUNT)
        with pytest.raises(errors.ReadOnlySessionError):
            await db.read.execute("WITH d AS (DELETE FROM items) SELECT 1")
        await shop.insert(1)
        assert 1 == await db.read.scalar(shop.COUNT)
    await db.dispose()
    assert [1] == await shop.items(backend)
