"""Queues to hand work to, each empty."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from redis import Redis

from tests.integration.handoff.queues import (
    Broker,
    CeleryOnRedis,
    JobTable,
    PgQueuer,
    Procrastinate,
    Taskiq,
)
from tests.servers import PostgreSQLBackend
from tests.servers.plugin import server_port
from tests.servers.process import HOST

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
def redis_url(pytestconfig: pytest.Config) -> str:
    """A database on Redis that nobody has used; the first one counts them."""
    port = server_port(pytestconfig, "redis")
    with Redis(HOST, port) as client:
        return f"redis://{HOST}:{port}/{client.incr('databases')}"


@pytest.fixture(params=[Taskiq, CeleryOnRedis])
async def broker(
    request: pytest.FixtureRequest, redis_url: str
) -> AsyncIterator[Broker]:
    """An open queue on Redis, of either kind."""
    kind: type[Broker] = request.param
    async with kind(redis_url) as broker:
        yield broker


@pytest.fixture(params=[Procrastinate, PgQueuer])
def job_table(request: pytest.FixtureRequest) -> JobTable:
    """A queue in PostgreSQL, of either kind; `job_backend` has its tables."""
    kind: type[JobTable] = request.param
    return kind()


@pytest.fixture
async def job_backend(
    pytestconfig: pytest.Config, job_table: JobTable
) -> AsyncIterator[PostgreSQLBackend]:
    """A database with the tables of the queue, for the driver that it needs."""
    port = server_port(pytestconfig, "postgresql")
    async with PostgreSQLBackend(port, job_table.driver) as backend:
        await job_table.install(backend)
        yield backend
