"""The page about Galera."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from tests.test_docs import GALERA, run_blocks

if TYPE_CHECKING:
    import pytest

    from tests.integration.galera.servers import GaleraCluster


async def test_page(cluster: GaleraCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page shows does what the page says."""
    await cluster.create(
        "CREATE TABLE stock (name VARCHAR(9) PRIMARY KEY, amount INT, version INT)",
        "INSERT INTO stock VALUES ('tea', 0, 0), ('cake', 0, 0)",
    )
    first, second, _ = (cluster.at(node).url for node in cluster.nodes)
    monkeypatch.setenv("DATABASE_URL", first)

    def run() -> None:
        run_blocks(GALERA, other=second)

    await anyio.to_thread.run_sync(run)
