"""Processes that serve the keyed application, and clients that repeat their requests.

The application is in `keyed.py`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
import sys
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Self

import httpx

from tests.integration.asgi_servers.child import LIMIT_SECONDS
from tests.servers import eventually
from tests.servers.process import HOST, PORTS, is_free
from tests.support import ROOT
from tests.support.keys import create_table

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence
    from pathlib import Path

    from tests.servers import ServerBackend

APP = "tests.integration.asgi_servers.keyed:app"
WORKS = "SELECT name, token FROM works ORDER BY name, token"
CREATED = 201

free_ports = filter(is_free, random.sample(PORTS, len(PORTS)))  # no two alike


async def create(backend: ServerBackend) -> None:
    """Make an empty table `works`, in which a name may be twice, and that of keys."""
    await create_table(backend)
    await backend.execute(
        "CREATE TABLE works (token VARCHAR(16) PRIMARY KEY, name VARCHAR(40))"
    )


class Worker:
    """A uvicorn on a port of its own, which may be killed and started again."""

    process: asyncio.subprocess.Process

    def __init__(self, folder: Path, urls: Sequence[str], attempts: int) -> None:
        self.port = next(free_ports)
        self.url = f"http://{HOST}:{self.port}"
        self.log = folder / f"{self.port}.log"
        self._environment = {
            **os.environ,
            "SITE_DATABASE_URL": " ".join(urls),
            "SITE_ATTEMPTS": str(attempts),
        }

    async def start(self) -> None:
        """Start it; it answers a moment later."""
        address = f"--host={HOST}", f"--port={self.port}"
        with self.log.open("ab") as file:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "uvicorn", APP, *address),
                cwd=ROOT,
                env=self._environment,
                stdout=file,
                stderr=file,
                start_new_session=True,  # Ctrl-C is for the tests alone
            )

    async def kill(self) -> None:
        """End it with SIGKILL."""
        with suppress(ProcessLookupError):  # it has ended
            self.process.kill()
        await self.process.wait()

    async def end(self) -> int:
        """Shut it down in order; give what it ends with."""
        self.process.send_signal(signal.SIGINT)
        return await asyncio.wait_for(self.process.wait(), LIMIT_SECONDS)

    async def answers(self) -> None:
        """Wait until it answers."""

        async def is_ready() -> bool:
            async with httpx.AsyncClient(base_url=self.url, verify=False) as client:
                with suppress(httpx.TransportError):
                    return (await client.get("/ready")).is_success
            return False

        await eventually(True, is_ready, within=LIMIT_SECONDS)


@asynccontextmanager
async def serving(
    folder: Path, *databases: Sequence[str], attempts: int = 0
) -> AsyncGenerator[list[Worker]]:
    """Run a worker on each database, told by its addresses; none is left.

    With `attempts`, requests are replayed.
    """
    workers = [Worker(folder, urls, attempts) for urls in databases]
    async with AsyncExitStack() as stack:
        for worker in workers:
            await worker.start()
            stack.push_async_callback(worker.kill)
        for worker in workers:
            await worker.answers()
        yield workers
        assert [0] * len(workers) == [await worker.end() for worker in workers]


class Clients:
    """They send a request to one worker, and again to the next until it is done."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = workers
        self.lost = 0
        """Requests that had no answer."""
        self.statuses = Counter[int]()
        self.answers: dict[str, list[httpx.Response]] = {}
        """What was done in the end, by key."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._http = httpx.AsyncClient(
            limits=limits, timeout=2 * LIMIT_SECONDS, verify=False
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._http.aclose()

    async def ask(self, key: str, first: int, *, hold: str = "") -> None:
        """Send a key until its work is done; `hold` it in the first worker."""
        turns = itertools.cycle([*self.workers[first:], *self.workers[:first]])
        headers, status = {"idempotency-key": key, "x-hold": hold}, 0
        while status != CREATED:
            url, body = f"{next(turns).url}/works", {"name": key}
            try:
                answer = await self._http.post(url, json=body, headers=headers)
            except httpx.TransportError:
                self.lost += 1
            else:
                status = answer.status_code
                self.statuses[status] += 1
                if status == CREATED:
                    self.answers.setdefault(key, []).append(answer)
            headers["x-hold"] = ""

    async def ask_everywhere(self) -> None:
        """Send each key once more, to each worker."""
        turns = range(len(self.workers))
        asked = [self.ask(key, first) for key in self.answers for first in turns]
        await asyncio.gather(*asked)

    def told(self) -> list[tuple[str, str]]:
        """Give each key with its work's token; all its clients were told the same."""
        works = []
        for key, answers in sorted(self.answers.items()):
            [text] = {each.text for each in answers}
            work = json.loads(text)
            assert key == work["name"]
            works.append((key, work["token"]))
        return works

    @property
    def firsts(self) -> Counter[str]:
        """Count for each key the answers that were no replay."""
        return Counter(
            key
            for key, answers in self.answers.items()
            for each in answers
            if "idempotency-replayed" not in each.headers
        )
