"""Private servers, and the tools that look at them from outside."""

from __future__ import annotations

from tests.servers.backend import (
    Backend,
    MariaDBBackend,
    PostgreSQLBackend,
    ServerBackend,
    SQLiteBackend,
    eventually,
)
from tests.servers.process import MariaDB, PostgreSQL, Server, ServerError
from tests.servers.proxy import Hold, RecordingProxy, Rule
from tests.servers.redis import Redis

__all__ = [
    "Backend",
    "Hold",
    "MariaDB",
    "MariaDBBackend",
    "PostgreSQL",
    "PostgreSQLBackend",
    "RecordingProxy",
    "Redis",
    "Rule",
    "SQLiteBackend",
    "Server",
    "ServerBackend",
    "ServerError",
    "eventually",
]
