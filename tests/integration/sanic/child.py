"""Sanic's own server as a child process."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import httpx

from tests.servers import eventually
from tests.servers.process import HOST, free_port, is_free
from tests.support import ROOT, shop

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from tests.servers import Backend

SITE = "tests.integration.sanic.site"
BAD_SIGNS = re.compile(r"Exception ignored|was destroyed|never awaited|uncaught")


async def create(backend: Backend) -> None:
    """Make the tables of the site, empty."""
    await shop.create(backend)
    await backend.execute("CREATE TABLE notes (what VARCHAR(40), number INTEGER)")


async def kept(backend: Backend, number: int) -> bool:
    """Look through a fresh connection."""
    return number in await shop.items(backend)


async def notes(backend: Backend, number: int) -> list[str]:
    """Tell what hooks and tasks have written about a number."""
    rows = await backend.fetch(
        "SELECT what FROM notes WHERE number = :number", number=number
    )
    return [str(what) for [what] in rows]


class Child:
    """A running server."""

    def __init__(
        self, port: int, process: asyncio.subprocess.Process, *, has_workers: bool
    ) -> None:
        self.port = port
        self.process = process
        self.has_workers = has_workers

    @property
    def client(self) -> httpx.AsyncClient:
        """A client with connections of its own."""
        return httpx.AsyncClient(
            base_url=f"http://{HOST}:{self.port}", timeout=30, verify=False
        )

    async def stop(self) -> int:
        """Tell the server to stop, unless it has been told; give its exit code."""
        if self.process.returncode is None:
            if self.has_workers:
                # A signal may come while Sanic's main process asks how its workers
                # are; its handler asks again, and both get the wrong answer.
                # https://github.com/sanic-org/sanic/blob/v25.12.1/sanic/worker/manager.py#L366
                await self.get("/stop")
            else:
                self.process.send_signal(signal.SIGTERM)
        return await asyncio.wait_for(self.process.wait(), 30)

    async def get(self, path: str) -> httpx.Response:
        """Send one request on a connection of its own."""
        async with self.client as client:
            return await client.get(path)

    async def state(self, key: str) -> Any:
        """Ask the server for something that cannot be seen from outside."""
        return (await self.get("/state")).json()[key]

    async def send(self, *requests: str) -> Connection:
        """Open a connection and send requests, without waiting for answers."""
        reader, writer = await asyncio.open_connection(HOST, self.port)
        writer.write("".join(requests).encode())
        await writer.drain()
        return Connection(reader, writer)


class Connection:
    """A connection to the server, as bytes."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.reader = reader
        self.writer = writer

    async def read_to_end(self) -> str:
        """Read until the server closes the connection."""
        text = (await self.reader.read()).decode()
        await self.leave()
        return text

    async def leave(self) -> None:
        """Close the connection, whatever is under way."""
        self.writer.close()
        await self.writer.wait_closed()


def get(path: str, *headers: str) -> str:
    """Return a request as it is sent."""
    return "\r\n".join([f"GET {path} HTTP/1.1", "host: x", *headers, "", ""])


@asynccontextmanager
async def serving(url: str, folder: Path, **environment: str) -> AsyncGenerator[Child]:
    """Run the site in a single process."""
    port = free_port()
    command = [sys.executable, "-W", "error", "-m", SITE, str(port)]
    async with _running(command, port, url, folder, environment, 0) as child:
        yield child


@asynccontextmanager
async def serving_with_workers(
    workers: int, url: str, folder: Path, **environment: str
) -> AsyncGenerator[Child]:
    """Run the site as in production: a main process and so many that serve."""
    port = free_port()
    sanic = [sys.executable, "-m", "sanic", f"{SITE}:app", "--no-motd"]
    command = [*sanic, f"--host={HOST}", f"--port={port}", f"--workers={workers}"]
    async with _running(command, port, url, folder, environment, workers) as child:
        yield child


@asynccontextmanager
async def _running(
    command: list[str],
    port: int,
    url: str,
    folder: Path,
    environment: dict[str, str],
    workers: int,
) -> AsyncGenerator[Child]:
    """Run a server until it is told to stop; it stops in order, nothing is left."""
    log = folder / f"{port}.log"
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=ROOT,
            env={**os.environ, "SANIC_DATABASE_URL": url, **environment},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )

    async def is_over() -> bool:
        return process.returncode is not None or not is_free(port)

    try:
        await eventually(expected=True, probe=is_over, within=60)
        assert process.returncode is None, log.read_text()
        child = Child(port, process, has_workers=workers > 0)
        yield child
        assert 0 == await child.stop(), log.read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # where a test has failed
        await process.wait()
    assert not BAD_SIGNS.search(log.read_text()), log.read_text()
