"""A server in a child process, and a client that sees bytes."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import os
import re
import signal
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Self

import httpx

from tests.servers import eventually
from tests.servers.process import HOST, free_port
from tests.support import ROOT, shop

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from tests.integration.asgi_servers.servers import ASGIServer
    from tests.servers import SQLiteBackend

LIMIT_SECONDS = 30
BAD_SIGNS = re.compile(r"Exception ignored|was destroyed|never awaited|ResourceWarn")


class Gate:
    """A place in the application where a test holds it, as a port to connect to."""

    port: int

    async def __aenter__(self) -> Self:
        self._arrived = asyncio.Queue[tuple[asyncio.StreamReader, Any]]()
        self._writers: list[asyncio.StreamWriter] = []
        self._server = await asyncio.start_server(self._arrive, HOST, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        for writer in self._writers:
            writer.close()  # who still waits here goes on: no test is held up
            await writer.wait_closed()

    async def reached(self) -> Held:
        """Wait until the application is there."""
        return Held(*await asyncio.wait_for(self._arrived.get(), LIMIT_SECONDS))

    def _arrive(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._writers.append(writer)
        self._arrived.put_nowait((reader, writer))


@dataclasses.dataclass(frozen=True)
class Held:
    """The application, held at a gate."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def let_go(self) -> None:
        """Let it go on, wait until it has left."""
        self.writer.write_eof()
        await self.left()

    async def left(self) -> None:
        """Wait until it has gone on, or has been cancelled or killed."""
        await asyncio.wait_for(self.reader.read(), LIMIT_SECONDS)


@dataclasses.dataclass(frozen=True)
class Answer:
    """A response, as it came."""

    status: int
    headers: dict[str, str]
    text: str

    @classmethod
    def parse(cls, received: str) -> Self:
        """Read one response: what follows it would be part of its body."""
        head, _, body = received.partition("\r\n\r\n")
        first, *lines = head.split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        if headers.get("transfer-encoding") == "chunked":
            body = "".join(_chunks(body))
        else:
            assert headers.get("content-length", str(len(body))) == str(len(body))
        return cls(int(first.split()[1]), headers, body)


def _chunks(body: str) -> Iterator[str]:
    size = -1
    while size != 0:
        line, _, body = body.partition("\r\n")
        size = int(line, 16)
        assert "\r\n" == body[size : size + 2]
        yield body[:size]
        body = body[size + 2 :]
    assert "" == body


@dataclasses.dataclass(frozen=True)
class Connection:
    """A connection to the server, as bytes."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def read_status(self) -> int:
        """Read the status line and no more."""
        line = await asyncio.wait_for(self.reader.readline(), LIMIT_SECONDS)
        return int(line.split()[1])

    async def read_to_end(self) -> str:
        """Read until the server closes the connection."""
        text = (await asyncio.wait_for(self.reader.read(), LIMIT_SECONDS)).decode()
        await self.leave()
        return text

    async def leave(self) -> None:
        """Close the connection, whatever is under way."""
        self.writer.close()
        await self.writer.wait_closed()


def get(path: str, *, close: bool = True) -> str:
    """Return a request as it is sent."""
    connection = "close" if close else "keep-alive"
    return f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: {connection}\r\n\r\n"


@dataclasses.dataclass(frozen=True)
class Child:
    """A running server, and the database of what it serves."""

    server: ASGIServer
    backend: SQLiteBackend
    port: int
    process: asyncio.subprocess.Process
    numbers: Iterator[int] = dataclasses.field(default_factory=itertools.count)
    """Items that no other fact has used."""

    @property
    def client(self) -> httpx.AsyncClient:
        """A client with connections of its own."""
        url = f"http://{HOST}:{self.port}"
        return httpx.AsyncClient(base_url=url, timeout=LIMIT_SECONDS, verify=False)

    async def get(self, path: str) -> httpx.Response:
        """Send one request on a connection of its own."""
        async with self.client as client:
            return await client.get(path)

    async def send(self, *requests: str) -> Connection:
        """Open a connection and send requests, without waiting for answers."""
        reader, writer = await asyncio.open_connection(HOST, self.port)
        writer.write("".join(requests).encode())
        await writer.drain()
        return Connection(reader, writer)

    async def ask(self, path: str) -> str:
        """Send one request, read all that comes."""
        return await (await self.send(get(path))).read_to_end()

    async def kept(self, number: int) -> bool:
        """Look through a fresh connection."""
        return number in await shop.items(self.backend)

    async def state(self, key: str) -> Any:
        """Ask the application for what cannot be seen from outside."""
        return (await self.get("/state")).json()[key]

    async def told(self, number: int) -> str:
        """Tell which hook has run for an item."""
        return str((await self.state("told")).get(str(number)))

    async def check_no_leak(self) -> None:
        """Every connection to the database is back."""
        await eventually(0, lambda: self.state("checked_out"))

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    async def end(self) -> int:
        """Wait until the process has ended."""
        return await asyncio.wait_for(self.process.wait(), LIMIT_SECONDS)

    async def is_ready(self) -> bool:
        """Tell whether it answers, or has ended without."""
        try:
            answer = await self.ask("/ready")
        except OSError:
            return self.process.returncode is not None
        return "HTTP/1.1 200" in answer


@asynccontextmanager
async def running(
    server: ASGIServer, backend: SQLiteBackend
) -> AsyncGenerator[Child, None]:
    """Run the site on a server; stop it, unless that has been done; nothing is left."""
    port = free_port()
    log = backend.path.with_name(f"{backend.path.name}-{port}.log")
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            *server.command(port),
            cwd=ROOT,
            env={**os.environ, "SITE_DATABASE_URL": backend.url},
            stdout=file,
            stderr=file,
            start_new_session=True,  # Ctrl-C is for the tests alone
        )
    child = Child(server, backend, port, process)
    try:
        await eventually(expected=True, probe=child.is_ready, within=LIMIT_SECONDS)
        assert process.returncode is None, log.read_text()
        yield child
        if process.returncode is None:
            child.terminate()
        assert await child.end() in server.exit_codes, log.read_text()
    except BaseException:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        raise
    assert not BAD_SIGNS.search(log.read_text()), log.read_text()
