"""gunicorn with `--preload`: the module has used the database; then workers begin."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.integration.asgi_servers.child import LIMIT_SECONDS
from tests.servers import eventually
from tests.servers.process import HOST, free_port
from tests.support import ROOT, shop
from tests.support.databases import DRIVERS, on

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from tests.servers import Backend

WORKERS = {"uvicorn": "uvicorn.workers.UvicornWorker", "gunicorn": "asgi"}
REQUESTS = 30


@asynccontextmanager
async def preloaded(url: str, worker: str, log: Path) -> AsyncGenerator[str]:
    """Run gunicorn with two workers, give its URL; its processes end without fault."""
    address = f"{HOST}:{free_port()}"
    app = "tests.integration.asgi_servers.preloaded:app"
    options = [
        "--preload",
        "--workers=2",
        f"--bind={address}",
        f"--worker-class={worker}",
    ]
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gunicorn", app, *options),
            cwd=ROOT,
            env={**os.environ, "SITE_DATABASE_URL": url},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )

    async def is_ready() -> bool:
        try:
            _, writer = await asyncio.open_connection(*address.split(":"))
        except OSError:
            return False
        writer.close()
        return True

    try:
        await eventually(True, is_ready, within=LIMIT_SECONDS)
        yield f"http://{address}"
        process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(process.wait(), LIMIT_SECONDS)
    finally:
        with suppress(ProcessLookupError):  # it has ended, and its workers
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


@on(*DRIVERS)
@pytest.mark.parametrize("worker", WORKERS)
async def test_preload(backend: Backend, worker: str, tmp_path: Path) -> None:
    """Workers of a module that has used its database serve, in two loops at once."""
    await shop.create(backend)
    log = tmp_path / "log"
    async with (
        preloaded(backend.url, WORKERS[worker], log) as url,
        httpx.AsyncClient(base_url=url, timeout=LIMIT_SECONDS) as client,
    ):
        numbers = range(1, REQUESTS + 1)
        answers = await asyncio.gather(*(client.get(f"/{each}") for each in numbers))
    assert {200} == {answer.status_code for answer in answers}, log.read_text()
    assert [0, *numbers, *(1000 + each for each in numbers)] == await shop.items(
        backend
    )
    assert "Traceback" not in log.read_text(), log.read_text()
