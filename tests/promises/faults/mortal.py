"""A database on a server that a test may kill."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Self

from tests.servers import MariaDB, MariaDBBackend, PostgreSQL, PostgreSQLBackend
from tests.servers.pgbouncer import PgBouncerBackend

if TYPE_CHECKING:
    from collections.abc import Callable

    from asgi_uow import Database
    from tests.servers import Server, ServerBackend

KINDS = {"asyncmy": "mariadb", "asyncpg": "postgresql", "psycopg": "postgresql"}


def make_server(kind: str) -> Server:
    """Return a server, not yet started, that finds deadlocks without delay.

    One that does not stop in order, since somebody is just connecting, is killed.
    """
    options = () if kind == "mariadb" else ("--deadlock_timeout=20ms",)
    server = (MariaDB if kind == "mariadb" else PostgreSQL)(*options)
    server.stop_seconds = 5.0
    return server


class Mortal:
    """An empty database, and the server it is on; up when entered."""

    def __init__(
        self, server: Server, driver: str, pooler: Server | None = None
    ) -> None:
        self.server = server
        self.pooler = pooler
        self._one_at_a_time = threading.Lock()  # also when a waiting task is cancelled
        backend = MariaDBBackend if server.name == "mariadb" else PostgreSQLBackend
        self.backend: ServerBackend = backend(server.port, driver)
        if pooler is not None:
            self.backend = PgBouncerBackend(server.port, pooler.port, driver)

    async def __aenter__(self) -> Self:
        await self.start()
        await self.backend.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.start()
        await self.backend.__aexit__(*exc_info)

    async def start(self) -> list[str]:
        """Start the server, and the pooler, unless they run; tell what was started."""
        return await asyncio.to_thread(self._start)

    async def stop(self) -> None:
        """Shut the server down in order."""
        await asyncio.to_thread(self._end, self.server.stop)

    async def kill(self) -> None:
        """End the server with SIGKILL."""
        await asyncio.to_thread(self._end, self.server.kill)

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

    def _start(self) -> list[str]:
        with self._one_at_a_time:
            ended = [e for e in (self.server, self.pooler) if e and e.pid is None]
            for each in ended:
                each.start()
        return [f"{each.name} was started" for each in ended]

    def _end(self, end: Callable[[], None]) -> None:
        with self._one_at_a_time:
            end()


def checked_out(db: Database) -> int:
    """Count the connections in use, of the writer and the readers."""
    pools = [engine.sync_engine.pool for engine in (db.engine, *db.readers)]
    return sum(pool.checkedout() for pool in pools)  # type: ignore[attr-defined]
