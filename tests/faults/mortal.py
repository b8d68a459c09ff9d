"""A database on a server that a test may kill."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self

from tests.servers import MariaDB, MariaDBBackend, PostgreSQL, PostgreSQLBackend

if TYPE_CHECKING:
    from asgi_uow import Database
    from tests.servers import Server, ServerBackend

KINDS = {"asyncmy": "mariadb", "asyncpg": "postgresql", "psycopg": "postgresql"}


def make_server(kind: str) -> Server:
    """Return a server, not yet started, that finds deadlocks without delay."""
    if kind == "mariadb":
        return MariaDB()
    return PostgreSQL("--deadlock_timeout=20ms")


class Mortal:
    """An empty database, and the server it is on; up when entered."""

    def __init__(self, server: Server, driver: str) -> None:
        self.server = server
        backend = MariaDBBackend if server.name == "mariadb" else PostgreSQLBackend
        self.backend: ServerBackend = backend(server.port, driver)

    async def __aenter__(self) -> Self:
        await self.start()
        await self.backend.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.start()
        await self.backend.__aexit__(*exc_info)

    async def start(self) -> None:
        """Start the server unless it is running."""
        if self.server.pid is None:
            await asyncio.to_thread(self.server.start)

    async def stop(self) -> None:
        """Shut the server down in order."""
        await asyncio.to_thread(self.server.stop)

    async def kill(self) -> None:
        """End the server with SIGKILL."""
        await asyncio.to_thread(self.server.kill)

    async def crash(self) -> None:
        """Kill the server and start it again: when it is back, nobody is left.

        A PostgreSQL that is starting waits for the backends of the killed one.
        """
        await self.kill()
        await self.start()

    async def restart(self) -> None:
        """Stop the server in order and start it again."""
        await self.stop()
        await self.start()


def checked_out(db: Database) -> int:
    """Count the connections in use, of the writer and the readers."""
    pools = [engine.sync_engine.pool for engine in (db.engine, *db.readers)]
    return sum(pool.checkedout() for pool in pools)  # type: ignore[attr-defined]
