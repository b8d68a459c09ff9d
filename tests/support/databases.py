"""A database in a test: on which drivers, with which options, and who holds it."""

from __future__ import annotations

import secrets
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import make_url
from sqlalchemy.exc import DBAPIError

from asgi_uow import Database
from tests.support import shop

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from sqlalchemy import URL

    from tests.servers import Backend, RecordingProxy, ServerBackend

SERVERS = ("asyncmy", "asyncpg")
DATABASES = ("aiosqlite", *SERVERS)
"""One driver for each database, for a test that says nothing else."""
DRIVERS = (*DATABASES, "psycopg")
SERVER_DRIVERS = (*SERVERS, "psycopg")
POOLED = ("asyncpg@1", "asyncpg@4", "psycopg@1", "psycopg@4")
"""PostgreSQL behind PgBouncer, which has so many connections to it."""


def on(*drivers: str, **options: Any) -> pytest.MarkDecorator:
    """Run a test, or those of a file, on `backend` with these drivers.

    The options are for the `Database` that the fixture `db` makes.
    """
    mark: pytest.MarkDecorator = pytest.mark.on(*drivers, **options)
    return mark


@asynccontextmanager
async def shop_database(
    backend: Backend, url: str | None = None, **options: Any
) -> AsyncGenerator[Database]:
    """A database with an empty shop; connect to it through another URL if need be."""
    await shop.create(backend)
    db = Database.from_url(url or backend.url, **{**backend.options, **options})
    try:
        yield db
    finally:
        await db.dispose()


@asynccontextmanager
async def behind_proxy(
    backend: ServerBackend, **options: Any
) -> AsyncGenerator[tuple[Database, RecordingProxy]]:
    """A database with an empty shop, and the proxy that its connections go through."""
    async with backend.proxy() as proxy:
        url = backend.through(proxy.port)
        async with shop_database(backend, url, **options) as db:
            try:
                yield db, proxy
            finally:  # otherwise what waits for a frozen server keeps a failed test
                proxy.thaw()
                proxy.cut()


@asynccontextmanager
async def login(backend: ServerBackend, limit: int = 99) -> AsyncGenerator[URL]:
    """A user with the password "right", who may have so many connections."""
    name = f"user_{secrets.token_hex(6)}"
    if backend.name == "mariadb":
        limited = f"WITH MAX_USER_CONNECTIONS {limit}"
        await backend.execute(
            f"CREATE USER {name} IDENTIFIED BY 'right'",
            f"GRANT ALL ON {backend.database}.* TO {name} {limited}",
        )
        end = (f"KILL USER {name}", f"DROP USER {name}")
    else:
        with suppress(DBAPIError):  # made before
            await backend.execute("CREATE ROLE with_password")
        await backend.execute(
            f"CREATE ROLE {name} LOGIN CONNECTION LIMIT {limit}"
            " PASSWORD 'right' IN ROLE with_password",
            f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {name}",
        )
        end = (f"DROP OWNED BY {name}", f"DROP ROLE {name}")
    url = make_url(backend.url).set(username=name, password="right")
    if "asyncpg" in url.drivername:
        # Asking for TLS, asyncpg leaves a future whose error nobody reads when it is
        # cancelled in the very moment it connects: the test's loop would report that.
        url = url.update_query_dict({"ssl": "disable"})
    try:
        yield url
    finally:
        await backend.execute(*end)


def is_commit(trip: str) -> bool:
    """Tell which of the trips through a proxy is COMMIT."""
    return trip == "COMMIT"


@asynccontextmanager
async def memory_database(**options: Any) -> AsyncGenerator[Database]:
    """An empty shop in memory, which is one connection."""
    db = Database.from_url("sqlite://", **options)
    async with db:
        await db.write.execute("CREATE TABLE items (id INTEGER PRIMARY KEY)")
    yield db
    await db.dispose()


def checked_out(*databases: Database) -> list[int]:
    """Count the connections in use, of writers and readers."""
    return [
        engine.sync_engine.pool.checkedout()  # type: ignore[attr-defined]
        for db in databases
        for engine in (db.engine, *db.readers)
    ]
