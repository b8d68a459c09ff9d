"""Ask every question once and print the table; takes less than a minute."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests import servers

from .measure import TITLES
from .questions import empty_hook, one_insert, one_select, request_without_database

if TYPE_CHECKING:
    from .measure import Result

TABLES = (
    "CREATE TABLE thing (id INTEGER PRIMARY KEY, name VARCHAR(40))",
    "INSERT INTO thing (id, name) VALUES (1, 'something to find')",
)
NOTE = "CREATE TABLE note (id {key} PRIMARY KEY, content VARCHAR(40))"
KEYS = {
    "sqlite": "INTEGER",
    "mariadb": "INTEGER AUTO_INCREMENT",
    "postgresql": "INTEGER GENERATED ALWAYS AS IDENTITY",
}


async def main() -> None:
    """Measure, then print: a table is read as a whole."""
    results = await request_without_database()
    results += await empty_hook()
    with tempfile.TemporaryDirectory() as folder:
        results += await _on(servers.SQLiteBackend(Path(folder)))
    for server, backend in (
        (servers.MariaDB, servers.MariaDBBackend),
        (servers.PostgreSQL, servers.PostgreSQLBackend),
    ):
        if server.is_installed():
            with server() as running:
                results += await _on(backend(running.port))
        else:
            print(f"{server.name} is left out: {server.binaries} are not installed.")
    _print(results)


async def _on(backend: servers.Backend) -> list[Result]:
    print(f"measuring on {backend.name} ...", file=sys.stderr)
    async with backend:
        await backend.execute(*TABLES, NOTE.format(key=KEYS[backend.name]))
        return [
            *await one_select(backend.name, backend.url),
            *await one_insert(backend.name, backend.url),
        ]


def _print(results: list[Result]) -> None:
    rows = [TITLES, *(result.cells() for result in results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    previous = ""
    for question, contestant, *numbers in rows:
        cells = ["" if question == previous else question, contestant]
        texts = map(str.ljust, cells, widths[:2])
        aligned = map(str.rjust, numbers, widths[2:])
        print("  ".join([*texts, *aligned]))
        previous = question


if __name__ == "__main__":
    asyncio.run(main())
