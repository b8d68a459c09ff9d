"""Must the application be restarted, and is anything lost or done twice? No."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio.to_thread
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from asgi_uow.observers import RetryScheduled
from tests.integration.patroni.load import (
    COUNTS,
    DRIVERS,
    HASTY,
    IN_DOUBT,
    TABLES,
    Writers,
    load,
    wait_for_service,
)
from tests.servers import PostgreSQLBackend, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    import pytest

    from tests.integration.patroni.servers import Patroni


KILLS = int(os.environ.get("ASGI_UOW_RUNS", "2"))


async def judge(
    everybody: Sequence[Writers],
    backend: PostgreSQLBackend,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Compare what was said with what the leader has now, and print the figures."""
    kept = {int(str(n)): int(str(count)) for n, count in await backend.fetch(COUNTS)}
    with capsys.disabled():
        for each in everybody:
            print(f"\n  {each.figures(kept)}", end="")  # noqa: T201  # asked for
    writes = [write for each in everybody for write in each.writes]
    assert [] == [lie for each in writes for lie in each.lies(kept.get(each.number, 0))]
    assert {*kept} <= {each.number for each in writes}


@asynccontextmanager
async def gate(patroni: Patroni, database: PostgreSQLBackend) -> AsyncGenerator[None]:
    """Something on the synchronous standby that replication has to wait for."""
    await patroni.wait_until_applied()
    standby = await patroni.sync_standby()
    url = database.through(standby.postgresql_port)
    engine = create_async_engine(url, poolclass=NullPool)
    async with engine.connect() as connection:
        for driver in DRIVERS:
            await connection.execute(text(f"SELECT FROM gate_{driver}"))
        yield


async def test_the_primary_is_killed(
    patroni: Patroni, database: PostgreSQLBackend, capsys: pytest.CaptureFixture[str]
) -> None:
    """No acknowledged write is lost, none is done twice, a 503 changed nothing.

    What COMMIT was sent for and not answered is a plain 500, and not replayed.
    """

    async def waiting() -> int:
        sql = (
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE application_name = :name AND wait_event = 'SyncRep'"
        )
        return int(str(await database.scalar(sql, name=IN_DOUBT)))

    async with load(database) as everybody:
        begun = time.monotonic()
        for _ in range(KILLS):
            await wait_for_service(everybody, since=begun)
            leader = await patroni.leader()
            async with gate(patroni, database):
                writing = [
                    asyncio.create_task(each.write(is_held=True))
                    for each in everybody[: len(DRIVERS)]
                ]
                await eventually(len(DRIVERS), waiting)
                await anyio.to_thread.run_sync(leader.kill)
            begun = time.monotonic()
            await wait_for_service(everybody, since=begun)
            assert leader is not await patroni.leader()
            held = await asyncio.gather(*writing)
            assert [500] * len(DRIVERS) == [response.status for response in held]
            await patroni.start()
    await judge(everybody, database, capsys)


async def test_switchover(
    patroni: Patroni, database: PostgreSQLBackend, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same for a leader that is made a standby, as for maintenance."""
    async with load(database) as everybody:
        await wait_for_service(everybody)
        begun = time.monotonic()
        await patroni.switch_over()
        await wait_for_service(everybody, since=begun)
    await judge(everybody, database, capsys)


async def test_led_to_a_standby(patroni: Patroni, database: PostgreSQLBackend) -> None:
    """Until a balancer notices, a write is a 503, and never a 500; then it succeeds."""
    await database.execute(*TABLES)
    leader = await patroni.leader()
    port = leader.postgresql_port

    def balance(*args: Any) -> None:
        args[-1]["port"] = port

    everybody = [Writers(database.url, driver, HASTY) for driver in DRIVERS]
    for each in everybody:
        event.listen(each.db.engine.sync_engine, "do_connect", balance)
        assert 200 == (await each.write()).status
    await patroni.switch_over()
    await patroni.start()
    for each in everybody:
        response = await each.write()
        assert (503, "1") == (response.status, response.headers["retry-after"])
        replays = each.events.of(RetryScheduled)
        assert ["25006"] * 2 == [event.code for event in replays]
    port = (await patroni.leader()).postgresql_port
    for each in everybody:
        assert 200 == (await each.write()).status
        await each.db.dispose()
