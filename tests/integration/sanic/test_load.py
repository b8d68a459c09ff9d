"""Sanic's own server: many requests at once, some in vain, some abandoned."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from tests.integration.sanic.child import create, get, serving_with_workers
from tests.servers import eventually
from tests.support import shop

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.sanic.child import Child
    from tests.servers import PostgreSQLBackend

REQUESTS = 2000
CLIENTS = 50


class Client:
    """Sends requests over one connection, which it sometimes leaves early."""

    def __init__(self, site: Child, seed: int) -> None:
        self.site = site
        self.dice = random.Random(seed)
        self.answers: dict[int, int] = {}

    async def run(self, numbers: range) -> None:
        connection = await self.site.send()
        for number in numbers:
            query = "?broken=1" if number % 3 == 0 else ""
            kind = self.dice.choice(["answer/text", "answer/old-stream", "stream"])
            connection.writer.write(get(f"/{kind}/{number}{query}").encode())
            if number % 10 == 0:
                await asyncio.sleep(self.dice.random() / 100)
                await connection.leave()
                connection = await self.site.send()
            else:
                self.answers[number] = await _read_response(connection.reader)
        await connection.leave()


async def _read_response(reader: asyncio.StreamReader) -> int:
    """Read a response to its end; give its status."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    _, found, length = head.partition("content-length: ")
    if found:
        await reader.readexactly(int(length.split()[0]))
    else:
        await reader.readuntil(b"\r\n0\r\n\r\n")
    return int(head.split()[1])


async def test_success_is_kept_and_nothing_leaks(
    postgresql: PostgreSQLBackend, tmp_path: Path
) -> None:
    """Every 2xx has its row and its hook's row; no failure has one; all comes back.

    2,000 requests of 50 clients: a third fails at COMMIT, a tenth of the clients goes
    away at some moment, without waiting.
    """
    await create(postgresql)
    environment = {
        "SANIC_DATABASE_POOL_SIZE": str(CLIENTS),
        "COVERAGE_PROCESS_CONFIG": "",  # once is enough; it takes time
    }
    url = f"{postgresql.url}?ssl=disable"
    async with serving_with_workers(1, url, tmp_path, **environment) as site:
        clients = [Client(site, seed) for seed in range(CLIENTS)]
        shares = [range(seed, REQUESTS, CLIENTS) for seed in range(CLIENTS)]
        await asyncio.gather(*map(Client.run, clients, shares))
        await eventually(0, postgresql.open_transactions)
        await eventually(0, lambda: site.state("checked_out"))

        answers = {number: s for each in clients for number, s in each.answers.items()}
        rows = set(await shop.items(postgresql))
        committed, rolled_back = [
            await postgresql.fetch("SELECT number FROM notes WHERE what = :w", w=what)
            for what in ("committed", "rolled back")
        ]
        assert {200, 500} == set(answers.values())
        assert {n for n, s in answers.items() if s == 200} <= rows
        assert {n for n, s in answers.items() if s == 500}.isdisjoint(rows)
        assert {(number,) for number in rows} == set(committed)
        assert len(rows) == len(committed)
        assert set(committed).isdisjoint(rolled_back)
        assert (await site.get("/unit")).json()
