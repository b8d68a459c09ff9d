"""Facts of SQLite, and of aiosqlite."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from sqlalchemy.dialects import sqlite

if TYPE_CHECKING:
    from sqlalchemy import URL, Insert, Table

EXTRAS = {"aiosqlite": "sqlite"}
PACKAGES = frozenset({"aiosqlite", "sqlite3"})
SINGLE_WRITER = True
READ_ONLY_STATEMENT = "PRAGMA query_only = ON"
# The write lock at once: an upgrade later can fail without waiting. A SAVEPOINT opened
# before any DML needs the explicit BEGIN too, or its RELEASE commits.
# https://www.sqlite.org/lang_savepoint.html
SET_LOCAL_LASTS = True  # there is none
BEGIN_WRITE = BEGIN_AT_LEVEL = "BEGIN IMMEDIATE"  # which is serializable

BUSY_TIMEOUT = 5000  # milliseconds a statement waits for a lock
WAL_PAUSE = 50  # between two attempts to have a file keep a write-ahead log

# https://www.sqlite.org/rescode.html
CODES = {
    "read_only": frozenset({"SQLITE_READONLY"}),
    "absent": frozenset({"SQLITE_CANTOPEN"}),
    # Not SQLITE_LOCKED: that is a conflict with the same connection, again and again.
    "conflict": frozenset(
        {"SQLITE_BUSY", "SQLITE_BUSY_SNAPSHOT", "SQLITE_LOCKED_SHAREDCACHE"}
    ),
}
# Of a constraint that fails at COMMIT, and of a conflict, for tests.
REFUSED, CONFLICT = "SQLITE_CONSTRAINT_FOREIGNKEY", "SQLITE_BUSY"


class Aiosqlite:
    is_known, exclusive_streams = True, False
    connect_args = (
        ("async_creator_fn", f"{__package__}.sqlite_connection:Connection"),
    )
    in_transaction = attrgetter("in_transaction")

    def stop(self, raw: Any) -> None:
        (raw.abandon if hasattr(raw, "abandon") else raw.stop)()  # one of ours has it

    def hurry(self, raw: Any) -> None:
        raw.is_hurried = True

    def aborts_transaction(self, raw: Any, _: object) -> bool:
        return not raw.in_transaction  # SQLite says so when asked


DRIVERS = {"aiosqlite": Aiosqlite()}


def code_of(error: BaseException) -> str | None:
    """Return the name of the result code, such as SQLITE_BUSY."""
    return getattr(getattr(error, "orig", None) or error, "sqlite_errorname", None)


def is_memory(url: URL) -> bool:
    database = url.database or ":memory:"
    by_name = database.startswith((":memory:", "file::memory:"))
    by_mode = "mode=memory" in database or url.query.get("mode") == "memory"
    return url.get_backend_name() == "sqlite" and (by_name or by_mode)


def insert_if_new(table: Table, row: dict[str, Any]) -> Insert:
    return sqlite.insert(table).values(row).on_conflict_do_nothing()


def set_up(dbapi_connection: Any, *, read_only: bool) -> frozenset[int | str]:  # noqa: ARG001
    """Wait for locks, keep foreign keys, and leave BEGIN to asgi-uow."""
    dbapi_connection.isolation_level = None
    with closing(dbapi_connection.cursor()) as cursor:
        cursor.execute("PRAGMA foreign_keys = ON")
        # Other connections may be at it as well. The change from another journal takes
        # an exclusive lock and does not wait for it; BEGIN EXCLUSIVE does, in its
        # place. Once the file has changed, nothing is locked.
        attempts = BUSY_TIMEOUT // WAL_PAUSE
        cursor.execute(f"PRAGMA busy_timeout = {WAL_PAUSE}")
        while _is_busy(cursor, "PRAGMA journal_mode = WAL", raises=not attempts):
            attempts -= 1
            if not _is_busy(cursor, "BEGIN EXCLUSIVE"):
                dbapi_connection.rollback()
        cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT}")
    return frozenset()


def _is_busy(cursor: Any, statement: str, *, raises: bool = False) -> bool:
    try:
        cursor.execute(statement)
    except sqlite3.OperationalError as error:
        if error.sqlite_errorname == "SQLITE_READONLY":
            return False  # it keeps the journal it has
        if raises or not error.sqlite_errorname.startswith("SQLITE_BUSY"):
            raise
        return True
    return False
