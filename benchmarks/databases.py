"""The databases of the benchmarks, on private servers."""

from __future__ import annotations

import asyncio
import signal
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tests import servers

if TYPE_CHECKING:
    from collections.abc import Collection

    from tests.servers import Backend, Server

    from .questions import Question

SERVERS: dict[str, type[Server]] = {
    "mariadb": servers.MariaDB,
    "postgresql": servers.PostgreSQL,
}
KEYS = {
    "sqlite": "INTEGER",
    "mariadb": "INTEGER AUTO_INCREMENT",
    "postgresql": "INTEGER GENERATED ALWAYS AS IDENTITY",
}


class Databases(AsyncExitStack):
    """Makes databases with the two tables; each server starts when first needed."""

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        # As an interrupt does: else the servers would outlive this process.
        if (task := asyncio.current_task()) is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        self._folder = Path(self.enter_context(tempfile.TemporaryDirectory()))
        self._ports: dict[str, int] = {}
        return self

    async def urls(self, asked: Collection[Question]) -> dict[Question, str]:
        """Give each question the URL of its database; leave out what has none."""
        urls = {"": ""}
        for place in dict.fromkeys(question.place for question in asked):
            name, _, driver = place.partition("-")
            if name not in SERVERS or SERVERS[name].is_installed():
                urls[place] = await self._make(name, driver) if place else ""
            else:
                print(f"{place} is left out: {SERVERS[name].binaries} are missing.")
        return {each: urls[each.place] for each in asked if each.place in urls}

    async def _make(self, name: str, driver: str) -> str:
        backend = await self.enter_async_context(self._backend(name, driver))
        await backend.execute(
            *(["PRAGMA journal_mode = WAL"] if name == "sqlite" else []),
            "CREATE TABLE thing (id INTEGER PRIMARY KEY, name VARCHAR(40))",
            "INSERT INTO thing (id, name) VALUES (1, 'something to find')",
            f"CREATE TABLE note (id {KEYS[name]} PRIMARY KEY, content VARCHAR(40))",
        )
        return backend.url

    def _backend(self, name: str, driver: str) -> Backend:
        if name == "sqlite":
            return servers.SQLiteBackend(self._folder)
        if name not in self._ports:
            self._ports[name] = self.enter_context(SERVERS[name]()).port
        if name == "mariadb":
            return servers.MariaDBBackend(self._ports[name], driver)
        return servers.PostgreSQLBackend(self._ports[name], driver)
