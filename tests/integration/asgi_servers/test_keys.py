"""Two processes on one database, and many clients that send the same keys to both.

`ASGI_UOW_RUNS=20 pytest tests/integration/asgi_servers/test_keys.py` kills so often.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from tests.integration.asgi_servers.child import Gate, Held
from tests.integration.asgi_servers.workers import WORKS, Clients, create, serving
from tests.servers import eventually
from tests.support.databases import SERVERS, is_commit, on

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from pathlib import Path

    from tests.servers import RecordingProxy, ServerBackend

pytestmark = on(*SERVERS)

RUNS = int(os.environ.get("ASGI_UOW_RUNS", "1"))
KEYS = 12
CLIENTS = 6  # of each key
SECONDS = 60.0  # for what takes two


@asynccontextmanager
async def two_workers(
    backend: ServerBackend, folder: Path, *proxies: RecordingProxy
) -> AsyncGenerator[Clients]:
    """Two processes, and clients of theirs; nothing is lost, twice, or told wrong.

    The first may have a proxy between it and the database.
    """
    await create(backend)
    first = [*(backend.through(proxy.port) for proxy in proxies), backend.url][:1]
    async with (
        serving(folder, first, [backend.url]) as workers,
        Clients(workers) as clients,
    ):
        yield clients
        await clients.ask_everywhere()
        assert await backend.fetch(WORKS) == clients.told()
        assert 1 == max(clients.firsts.values())


async def ask_at_once(
    clients: Clients,
    keys: list[str],
    moment: str,
    then: Callable[[Held], Awaitable[None]],
) -> None:
    """Hold the first key in the first worker at a moment, send all to both workers.

    When one is answered, do what is to be done `then`.
    """
    async with asyncio.timeout(SECONDS), Gate() as gate, asyncio.TaskGroup() as group:
        group.create_task(clients.ask(keys[0], 0, hold=f"{moment} {gate.port}"))
        held = await gate.reached()
        asked = [
            group.create_task(clients.ask(key, (place + number) % 2))
            for number in range(CLIENTS)
            for place, key in enumerate(keys)
        ]
        await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        await then(held)


async def test_at_once(
    backend: ServerBackend,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """The work of each key is done once; all its clients have one answer."""
    keys = [f"key {number}" for number in range(KEYS)]
    async with two_workers(backend, tmp_path) as clients:
        await ask_at_once(clients, keys, "before", Held.let_go)
        assert dict.fromkeys(keys, 1) == clients.firsts
        assert 0 == clients.lost
        assert {201} == set(clients.statuses)
    record_property("answers", clients.statuses.total())


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_killed(
    backend: ServerBackend,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    moment: str,
) -> None:
    """A process is killed before or after a COMMIT: its clients get the answer, too.

    What was committed is not done again; what was not, the other process does.
    """
    async with two_workers(backend, tmp_path) as clients:
        worker = clients.workers[0]

        async def kill(held: Held) -> None:
            kept = [name for name, _ in await backend.fetch(WORKS)]
            assert (moment == "after") == (keys[0] in kept)
            await worker.kill()
            await held.left()

        for run in range(RUNS):
            keys = [f"key {run} {number}" for number in range(KEYS)]
            await ask_at_once(clients, keys, moment, kill)
            assert (moment == "before") == clients.firsts[keys[0]]
            await worker.start()
            await worker.answers()
        assert {201} == set(clients.statuses)
    record_property("kills", RUNS)
    record_property("answers", clients.statuses.total())
    record_property("requests without an answer", clients.lost)


async def test_lost_commit(backend: ServerBackend, tmp_path: Path) -> None:
    """A COMMIT that never arrives is a rollback, though its key is used meanwhile.

    Another process has waited for the key, and its work is the one that there is.
    """
    async with (
        backend.proxy() as proxy,
        two_workers(backend, tmp_path, proxy) as clients,
    ):
        async with (
            asyncio.timeout(SECONDS),
            asyncio.TaskGroup() as group,
            Gate() as gate,
        ):
            group.create_task(clients.ask("key", 0, hold=f"before {gate.port}"))
            held = await gate.reached()
            group.create_task(clients.ask("key", 1))
            await eventually(2, backend.open_transactions)
            lost = proxy.cut_before(is_commit)
            await held.let_go()
            await lost.fired.wait()
        assert {201: 2, 503: 1} == clients.statuses
