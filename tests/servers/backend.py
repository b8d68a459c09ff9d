"""One empty database per test, and ways to look at it from outside."""

from __future__ import annotations

import asyncio
import functools
import re
import secrets
import sqlite3
import time
from abc import ABC, abstractmethod
from contextlib import closing, suppress
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from sqlalchemy import make_url, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from tests.servers.process import HOST, POLL_SECONDS
from tests.servers.proxy import RecordingProxy

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from pathlib import Path

Row = tuple[object, ...]
T = TypeVar("T")
OURS = "asgi-uow tests"


async def eventually(
    expected: T, probe: Callable[[], Awaitable[T]], *, within: float = 5.0
) -> None:
    """Ask again until the answer is the expected one; fail when time is up."""
    deadline = time.monotonic() + within
    while (actual := await probe()) != expected and time.monotonic() < deadline:
        await asyncio.sleep(POLL_SECONDS)
    assert expected == actual


@functools.lru_cache(maxsize=16)
def _unpooled(url: str) -> AsyncEngine:
    mark = {"server_settings": {"application_name": OURS}}
    return create_async_engine(
        url,
        poolclass=NullPool,
        isolation_level="AUTOCOMMIT",
        connect_args=mark if "+asyncpg:" in url else {},
    )


async def _query(url: str, sql: str, **params: object) -> list[Row]:
    async with _unpooled(url).connect() as connection:
        result = await connection.execute(text(sql), params)
        return [tuple(row) for row in result] if result.returns_rows else []


class Backend(ABC):
    """An empty database, dropped at the end with whatever is connected to it.

    Every method opens a connection of its own, in autocommit mode, and closes
    it: what it sees is what the database has, and it holds nothing.
    """

    name: ClassVar[str]
    driver: str
    url: str
    options: Mapping[str, Any] = MappingProxyType({})
    """What a `Database` at that URL needs to be told."""
    _own_url: str

    @abstractmethod
    async def __aenter__(self) -> Self:
        """Create the database."""

    @abstractmethod
    async def __aexit__(self, *exc_info: object) -> None:
        """Drop the database."""

    async def execute(self, *statements: str) -> None:
        """Run statements, each in a transaction of its own."""
        for statement in statements:
            await _query(self._own_url, statement)

    async def fetch(self, sql: str, **params: object) -> list[Row]:
        """Return all rows of a query with `:name` parameters."""
        return await _query(self._own_url, sql, **params)

    async def scalar(self, sql: str, **params: object) -> object:
        """Return the first column of the only row."""
        [row] = await self.fetch(sql, **params)
        return row[0]

    @abstractmethod
    async def open_transactions(self) -> int:
        """Count the transactions that others have open in this database."""

    @abstractmethod
    def through(self, port: int) -> str:
        """Return the URL with the port of a proxy."""


class SQLiteBackend(Backend):
    """A database file."""

    name = "sqlite"

    def __init__(self, folder: Path) -> None:
        self.driver = "aiosqlite"
        self.path = folder / f"{_fresh_name()}.sqlite"
        self.url = self._own_url = f"sqlite+aiosqlite:///{self.path}"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for path in self.path.parent.glob(f"{self.path.name}*"):
            path.unlink()

    async def open_transactions(self) -> int:
        """Return 1 if others hold the write lock, else 0: readers do not count."""
        with closing(sqlite3.connect(self.path, timeout=0)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                return 1
            connection.execute("ROLLBACK")
            return 0

    def through(self, port: int) -> str:
        message = f"SQLite has no server to reach through port {port}"
        raise ValueError(message)


class ServerBackend(Backend):
    """A database of its own on a server.

    `connections()`, `kill_connections()` and `open_transactions()` see the
    connections made with `url`, never those of this object.
    """

    scheme: ClassVar[str]
    user: ClassVar[str]
    default_driver: ClassVar[str]

    def __init__(self, port: int, driver: str | None = None) -> None:
        self.driver = driver or self.default_driver
        self.port = port
        self.database = _fresh_name()
        self.url = f"{self._at(self.driver, self.user)}/{self.database}"

    def _at(self, driver: str, user: str) -> str:
        return f"{self.scheme}+{driver}://{user}@{HOST}:{self.port}"

    def through(self, port: int) -> str:
        url = make_url(self.url).set(port=port)
        return url.render_as_string(hide_password=False)

    def proxy(self, *, delay_ms: float = 0) -> RecordingProxy:
        """Return a proxy to the server, not yet listening."""
        return RecordingProxy(self.name, self.port, delay_ms=delay_ms)

    slow: ClassVar[str]
    """A statement that takes an hour."""

    @abstractmethod
    async def running(self, statement: str) -> int:
        """Count the connections that are executing a statement."""

    @abstractmethod
    async def connections(self) -> int:
        """Count the connections that others have to this database."""

    @abstractmethod
    async def kill_connections(self) -> None:
        """End the connections that others have, return when they are gone."""


class MariaDBBackend(ServerBackend):
    """A database on MariaDB: tests are the user `app`, this object is `root`."""

    name = "mariadb"
    scheme = "mysql"
    user = "app"
    default_driver = "asyncmy"
    slow = "SELECT sleep(3600)"

    def __init__(self, port: int, driver: str | None = None) -> None:
        super().__init__(port, driver)
        self.admin_url = f"{self._at('asyncmy', 'root')}/"
        self._own_url = self.admin_url + self.database

    async def __aenter__(self) -> Self:
        await _query(self.admin_url, f"CREATE DATABASE {self.database}")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.kill_connections()  # an open transaction would block DROP
        await _query(self.admin_url, f"DROP DATABASE {self.database}")

    async def open_transactions(self) -> int:
        """Read SHOW ENGINE INNODB STATUS, transactions that only read included.

        information_schema.innodb_trx answers from a cache that is not renewed
        while anybody asks more often than every 0.1 s.
        """
        [[_, _, status]] = await _query(self.admin_url, "SHOW ENGINE INNODB STATUS")
        _, _, listed = str(status).partition("LIST OF TRANSACTIONS")
        open_in = {
            int(thread)
            for entry in listed.split("---TRANSACTION")
            if ", ACTIVE" in entry
            for thread in re.findall(r"MariaDB thread id (\d+)", entry)
        }
        return len(open_in.intersection(await self._threads()))

    async def running(self, statement: str) -> int:
        query = (
            "SELECT count(*) FROM information_schema.processlist"
            " WHERE info = :info AND db = database()"
        )
        return int(str(await self.scalar(query, info=statement)))

    async def connections(self) -> int:
        return len(await self._threads())

    async def kill_connections(self) -> None:
        threads = await self._threads()
        for thread in threads:
            with suppress(OperationalError):  # 1094: it has just gone by itself
                await _query(self.admin_url, f"KILL {thread}")

        async def left() -> set[int]:
            return threads & await self._threads()

        await eventually(set[int](), left)

    async def _threads(self) -> set[int]:
        rows = await _query(
            self.admin_url,
            "SELECT id FROM information_schema.processlist"
            " WHERE db = :database AND user = 'app'",
            database=self.database,
        )
        return {int(str(thread)) for [thread] in rows}


class PostgreSQLBackend(ServerBackend):
    """A database on PostgreSQL: this object's connections bear a name."""

    name = "postgresql"
    scheme = "postgresql"
    user = "postgres"
    default_driver = "asyncpg"
    slow = "SELECT pg_sleep(3600)"

    def __init__(self, port: int, driver: str | None = None) -> None:
        super().__init__(port, driver)
        server = self._at("asyncpg", self.user)
        self.admin_url = f"{server}/postgres"
        self._own_url = f"{server}/{self.database}"

    async def __aenter__(self) -> Self:
        # Copying the template's files takes half the time of logging them.
        await _query(
            self.admin_url,
            f"CREATE DATABASE {self.database} TEMPLATE template0 STRATEGY file_copy",
        )
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await _query(self.admin_url, f"DROP DATABASE {self.database} WITH (FORCE)")

    async def open_transactions(self) -> int:
        """Count by state: an aborted transaction has no xact_start any more."""
        return await self._count(
            "state LIKE 'idle in transaction%' OR xact_start IS NOT NULL"
        )

    async def running(self, statement: str) -> int:
        query = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND query = :query AND state = 'active'"
        )
        return int(str(await self.scalar(query, query=statement)))

    async def connections(self) -> int:
        return await self._count("true")

    async def kill_connections(self) -> None:
        await self._select("pg_terminate_backend(pid, 5000)")

    async def _count(self, condition: str) -> int:
        return len(await self._select("pid", condition))

    async def _select(self, column: str, condition: str = "true") -> list[Row]:
        return await _query(
            self.admin_url,
            f"SELECT {column} FROM pg_stat_activity WHERE datname = :database"
            f" AND backend_type = 'client backend' AND application_name <> :ours"
            f" AND ({condition})",
            database=self.database,
            ours=OURS,
        )


def _fresh_name() -> str:
    return f"test_{secrets.token_hex(6)}"
