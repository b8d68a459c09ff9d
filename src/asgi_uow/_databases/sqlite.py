"""Facts of SQLite, and of aiosqlite."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import URL

DEFAULT_DRIVER: str = "aiosqlite"
EXTRAS: Mapping[str, str] = {"aiosqlite": "sqlite"}
PACKAGES = frozenset({"aiosqlite", "sqlite3"})
URL_QUERY: Mapping[str, str] = {}
ENGINE_OPTIONS: Mapping[str, object] = {}
SINGLE_WRITER: bool = True
COMMITS_FOR_DDL: bool = False
READ_ONLY_STATEMENT: str = "PRAGMA query_only = ON"
IS_READ_ONLY: str = "SELECT 0"
LAG: str | None = None
ROLLBACK_ON_TIMEOUT: str | None = None
TRANSACTION_ID: str | None = None

BUSY_TIMEOUT = 5000
"""Milliseconds a statement waits for a lock."""

# https://www.sqlite.org/rescode.html
CODES: Mapping[str, frozenset[int | str]] = {
    "read_only": frozenset({"SQLITE_READONLY"}),
    "conflict": frozenset({"SQLITE_BUSY"}),
}

TRANSACTION_CONTROL: str = r"END\b"
IMPLICIT_COMMIT: str | None = None


class Aiosqlite:
    is_known = True
    savepoints_survive = False
    cursor_needs_begin = False
    exclusive_streams = False
    cancels_on_server = False
    cancel_sql = None
    in_transaction = attrgetter("in_transaction")

    def is_dead(self, _: object) -> bool:
        return False

    def aborts_transaction(self, raw: Any, _: object) -> bool:
        # SQLite rolls back by itself after some errors, and says so when asked.
        return not raw.in_transaction

    def reports_writable(self, _: object) -> bool:
        return False


DRIVERS = {"aiosqlite": Aiosqlite()}


def code_of(error: BaseException) -> str | None:
    """Return the name of the result code, such as SQLITE_BUSY."""
    origin = getattr(error, "orig", None) or error
    code: object = getattr(origin, "sqlite_errorname", None)
    return code if isinstance(code, str) else None


def is_memory(url: URL) -> bool:
    """Tell whether the database lives in one connection."""
    database = url.database or ":memory:"
    return (
        database.startswith((":memory:", "file::memory:"))
        or "mode=memory" in database
        or url.query.get("mode") == "memory"
    )


async def position(_: object) -> str | None:
    """Return None: there are no replicas."""
    return None


async def wait_for(*_: object) -> bool:
    """Return False: there are no replicas."""
    return False


async def was_committed(*_: object) -> bool | None:
    """Return None: no outcome of a transaction is kept."""
    return None
