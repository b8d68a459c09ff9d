"""One key, sent to different nodes at once: its work is done once on a Galera cluster.

Each node has a process of its own, and clients over HTTP.
`ASGI_UOW_RUNS=20 pytest tests/integration/galera/test_keys.py` kills so often.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from tests.integration.asgi_servers.child import Gate
from tests.integration.asgi_servers.workers import WORKS, Clients, create, serving
from tests.integration.galera.servers import SYNCED
from tests.support.databases import is_commit

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence
    from pathlib import Path

    from tests.integration.galera.servers import GaleraCluster

RUNS = int(os.environ.get("ASGI_UOW_RUNS", "1"))
KEYS = 8
ALL = range(3)
ATTEMPTS = 10
SECONDS = 120.0  # for what takes ten


@asynccontextmanager
async def serving_nodes(
    cluster: GaleraCluster,
    folder: Path,
    databases: Sequence[Sequence[str]],
    attempts: int,
) -> AsyncGenerator[Clients]:
    """A process on each node, and clients; nothing is lost, twice, or told wrong."""
    await create(cluster.backend)
    await cluster.create()
    async with (
        serving(folder, *databases, attempts=attempts) as workers,
        Clients(workers) as clients,
        asyncio.timeout(SECONDS),
    ):
        yield clients
        await clients.ask_everywhere()
        told = clients.told()
        for node in cluster.nodes:
            assert told == await cluster.at(node).fetch(SYNCED + WORKS)
        assert 1 == max(clients.firsts.values())
        assert 0 == clients.lost


@asynccontextmanager
async def committed_at_once(
    clients: Clients, keys: Sequence[str], nodes: Sequence[int]
) -> AsyncGenerator[asyncio.Event]:
    """Send each key to each of these nodes; none may COMMIT before all have worked.

    Then they go on. Leaving waits until all clients are answered; the event tells of
    the first.
    """
    answered = asyncio.Event()

    async def ask(key: str, node: int, hold: str) -> None:
        await clients.ask(key, node, hold=hold)
        answered.set()

    async with asyncio.TaskGroup() as group:
        async with Gate() as gate:
            places = list(itertools.product(keys, nodes))
            for key, node in places:
                group.create_task(ask(key, node, f"before {gate.port}"))
            for _ in places:
                await gate.reached()
        yield answered


@pytest.mark.parametrize(
    ("attempts", "refused"),
    [(0, [503]), (ATTEMPTS, [])],
    ids=["without retry", "with retry"],
)
async def test_conflict(
    cluster: GaleraCluster,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    attempts: int,
    refused: list[int],
) -> None:
    """Of COMMITs with one key on three nodes one is kept; the others repeat its answer.

    They meet a conflict: with `Retry` no client hears of that, without it is a 503.
    """
    keys = [f"key {number}" for number in range(KEYS)]
    urls = [cluster.at(node).url for node in cluster.nodes]
    databases = [[url] for url in urls]
    async with serving_nodes(cluster, tmp_path, databases, attempts) as clients:
        async with committed_at_once(clients, keys, ALL):
            pass
        assert dict.fromkeys(keys, 1) == clients.firsts
        assert 3 * KEYS == clients.statuses[201]
        assert {201, *refused} == set(clients.statuses)
    record_property("conflicts answered 503", clients.statuses[503])


@pytest.mark.parametrize("run", range(RUNS))
@pytest.mark.parametrize("addresses", [1, 3])
async def test_killed(
    cluster: GaleraCluster,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    addresses: int,
    run: int,
) -> None:
    """A node that is killed among COMMITs loses no work, and nothing is done twice.

    What it had committed, and had no time to say, its process answers: when the node is
    back, or at once if it has the addresses of the others. So nobody is told of an
    outcome that is not known.
    """
    node = cluster.nodes[1]
    urls = [cluster.at(each).url for each in cluster.nodes]
    async with cluster.at(node).proxy() as proxy:
        urls[1] = cluster.at(node).through(proxy.port)
        databases = [[*urls[at:], *urls[:at]][:addresses] for at in ALL]
        async with serving_nodes(cluster, tmp_path, databases, ATTEMPTS) as clients:
            alone = [f"alone {run} {number}" for number in range(KEYS)]
            keys = [f"key {run} {number}" for number in range(KEYS)]
            silent = [proxy.hold_answer(is_commit) for _ in (*alone, *keys)]
            async with (
                committed_at_once(clients, alone, [1]),
                committed_at_once(clients, keys, ALL) as answered,
            ):
                for hold in silent[:KEYS]:
                    await hold.answered.wait()
                await answered.wait()
                await cluster.kill(node)
                proxy.cut()
                for hold in silent:
                    hold.release()  # also what would have met none till now
                await cluster.rejoin(node)
            await cluster.mend()
            assert dict.fromkeys(alone, 1).items() <= clients.firsts.items()
            assert set(clients.statuses) <= {201, 503}
    record_property("COMMITs without an answer", sum(e.fired.is_set() for e in silent))
    record_property("answers 201", clients.statuses[201])
    record_property("answers 503", clients.statuses[503])
