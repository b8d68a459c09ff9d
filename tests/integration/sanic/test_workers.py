"""Sanic's worker processes: each has connections of its own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tests.integration.sanic.child import create, serving_with_workers
from tests.servers import eventually
from tests.support import shop

if TYPE_CHECKING:
    from pathlib import Path

    from tests.servers import PostgreSQLBackend

CONNECTIONS = """SELECT pid FROM pg_stat_activity WHERE datname = current_database()
    AND backend_type = 'client backend' AND pid <> pg_backend_pid()"""


@pytest.mark.parametrize("start_method", ["spawn", "fork"])
async def test_two_workers(
    start_method: str, postgresql: PostgreSQLBackend, tmp_path: Path
) -> None:
    """Both serve, also where the process they were forked from was connected before.

    They neither use nor close its connection; none is left when the server has stopped.
    """
    await create(postgresql)
    environment = {"START_METHOD": start_method}
    url = postgresql.url
    async with serving_with_workers(2, url, tmp_path, **environment) as server:
        pids: set[int] = set()

        async def count() -> int:
            paths = ["/state"] * 8
            answers = await asyncio.gather(*map(server.get, paths))
            pids.update(answer.json()["pid"] for answer in answers)
            return len(pids)

        await eventually(2, count, within=20)
        [parents] = await postgresql.fetch(CONNECTIONS)
        paths = [f"/answer/text/{number}" for number in range(20)]
        answers = await asyncio.gather(*map(server.get, paths))
        assert [200] * 20 == [answer.status_code for answer in answers]
        connections = await postgresql.fetch(CONNECTIONS)
        assert parents in connections
        assert len(connections) > 1
        assert set(range(20)) <= set(await shop.items(postgresql))
    await eventually(0, postgresql.connections)
