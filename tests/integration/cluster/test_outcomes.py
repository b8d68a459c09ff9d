"""What became of a COMMIT without an answer, asked of a server that may not know."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event

from asgi_uow import Database, Outcome
from asgi_uow.errors import OutcomeUnknownError
from tests.servers import eventually
from tests.support import shop
from tests.support.asgi import handle
from tests.support.databases import is_commit

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from tests.integration.cluster.servers import Cluster

each_driver = pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])


@each_driver
async def test_a_standby_that_is_behind(
    postgresql_cluster: Cluster, driver: str
) -> None:
    """It does not know the transaction yet, which is no proof of a rollback."""
    cluster = postgresql_cluster
    await shop.create(cluster.backend)
    await cluster.wait_until_applied()
    await cluster.stop_applier(0)
    async with cluster.backend.proxy() as proxy:
        rule = proxy.cut_after(is_commit)
        url = cluster.at(cluster.primary, driver).through(proxy.port)
        db = Database.from_url(url, resolve_unknown=True)

        def fail_over(*args: Any) -> None:
            if rule.fired.is_set():
                args[-1]["port"] = cluster.replicas[0].port

        event.listen(db.engine.sync_engine, "do_connect", fail_over)
        response = await handle(lambda: shop.insert(1), db, commit_timeout=1)
        await db.dispose()
    assert rule.fired.is_set()
    assert 500 == response.status
    assert isinstance(response.error, OutcomeUnknownError)
    assert [1] == await shop.items(cluster.backend)


@asynccontextmanager
async def synchronous(cluster: Cluster) -> AsyncGenerator[None]:
    """The primary answers a COMMIT once a replica has applied it."""

    async def set_names(names: str) -> None:
        setting = "synchronous_standby_names"
        await cluster._query(cluster.primary, f"ALTER SYSTEM SET {setting} = '{names}'")
        await cluster._query(cluster.primary, "SELECT pg_reload_conf()")

        async def shown() -> object:
            return await cluster._query(cluster.primary, f"SHOW {setting}")

        expected: object = [(names,)]
        await eventually(expected, shown)

    name = cluster.backend.database
    await set_names("*")
    try:
        alter = f"ALTER DATABASE {name} SET synchronous_commit = remote_apply"
        await cluster.backend.execute(alter)
        yield
    finally:
        await cluster.start_applier(0)
        await set_names("")


@each_driver
async def test_a_commit_that_no_standby_has(
    postgresql_cluster: Cluster, driver: str
) -> None:
    """What a failover would lose is no success, though the primary has it."""
    cluster = postgresql_cluster
    await shop.create(cluster.backend)
    url = cluster.at(cluster.primary, driver).url
    db = Database.from_url(url, resolve_unknown=True)
    options: dict[str, Any] = {"commit_timeout": 1, "hooks": True}
    async with synchronous(cluster):
        kept = await handle(lambda: shop.insert(1), db, **options)
        await cluster.stop_applier(0)
        response = await handle(lambda: shop.insert(2), db, **options)
        assert [1, 2] == await shop.items(cluster.backend)
        assert [1] == await shop.items(cluster.at(cluster.replicas[0]))
    await db.dispose()
    assert (200, ["commit"]) == (kept.status, kept.hooks)
    assert (500, Outcome.UNKNOWN) == (response.status, response.unit.outcome)
    assert [] == response.hooks
