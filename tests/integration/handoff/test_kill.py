"""What is left when a process dies between COMMIT and its `after_commit` hooks."""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import asynccontextmanager, suppress
from subprocess import PIPE
from typing import TYPE_CHECKING

import pytest

from tests.integration.handoff.queues import PgQueuer, Taskiq
from tests.support import shop

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import AsyncGenerator

    from tests.integration.handoff.queues import JobTable
    from tests.servers import PostgreSQLBackend


@asynccontextmanager
async def committed(*arguments: str) -> AsyncGenerator[Process, None]:
    """A process in which COMMIT was acknowledged and the first hook waits."""
    command = [sys.executable, "-m", "tests.integration.handoff.child", *arguments]
    child = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
    try:
        assert child.stdout is not None
        async with asyncio.timeout(120):
            assert b"committed\n" == await child.stdout.readline()
        yield child
    finally:
        with suppress(ProcessLookupError):  # it has ended by itself
            child.kill()
        await child.communicate()


async def test_kill(
    job_backend: PostgreSQLBackend, job_table: JobTable, redis_url: str
) -> None:
    """The work and its job are there, once; the message to Redis never is."""
    kind = type(job_table).__name__
    await shop.create(job_backend)
    async with committed(kind, job_backend.url, redis_url) as child:
        child.kill()
        assert -signal.SIGKILL == await child.wait()

    assert [7] == await shop.items(job_backend)
    assert [7] == await job_table.numbers(job_backend)
    assert [] == Taskiq(redis_url).numbers()


@pytest.mark.parametrize("job_table", [PgQueuer], indirect=True)
async def test_no_kill(
    job_backend: PostgreSQLBackend, job_table: JobTable, redis_url: str
) -> None:
    """The same process, left alone, sends the message too."""
    kind = type(job_table).__name__
    await shop.create(job_backend)
    async with committed(kind, job_backend.url, redis_url) as child:
        assert [] == Taskiq(redis_url).numbers()
        await child.communicate(b"go on\n")
        assert 0 == child.returncode

    assert [7] == await shop.items(job_backend)
    assert [7] == await job_table.numbers(job_backend)
    assert [7] == Taskiq(redis_url).numbers()
