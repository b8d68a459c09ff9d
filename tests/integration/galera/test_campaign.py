"""No false success on a cluster whose nodes die: counted, and shown with `-rP`.

`ASGI_UOW_SECONDS=30 pytest tests/integration/galera` runs for so many seconds.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from asgi_uow import Retry
from tests.integration.galera.campaign import TABLES, Campaign

if TYPE_CHECKING:
    from tests.integration.galera.servers import GaleraCluster

SECONDS = float(os.environ.get("ASGI_UOW_SECONDS", "10"))


@pytest.mark.parametrize(
    "retry",
    [None, Retry(attempts=5, methods=["POST"])],
    ids=["without retry", "with retry"],
)
async def test_no_false_success(cluster: GaleraCluster, retry: Retry | None) -> None:
    """What clients and hooks were told is so on each node; nothing is done twice."""
    await cluster.create(*TABLES)
    campaign = Campaign(cluster, retry)
    try:
        await campaign.run(SECONDS)
        await campaign.goes_on()
        await campaign.check()
        for name, number in campaign.figures().items():
            print(f"{name}: {number}")  # noqa: T201  # shown
    finally:
        await campaign.close()
