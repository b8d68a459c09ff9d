"""Facts per database: defaults, and what its error codes mean."""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import TYPE_CHECKING

from sqlalchemy import exc as sa_exc

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import URL

ASYNC_DRIVERS = MappingProxyType(
    {
        "sqlite": "aiosqlite",
        "mysql": "asyncmy",
        "mariadb": "asyncmy",
        "postgresql": "asyncpg",
    },
)
"""The driver a URL gets that names none."""

MYSQL_DRIVERS = frozenset({"asyncmy", "aiomysql", "pymysql", "MySQLdb"})
"""The packages whose errors carry MySQL's number first."""

EXTRAS = MappingProxyType(
    {"asyncmy": "mysql", "asyncpg": "postgresql", "aiosqlite": "sqlite"},
)

READ_ONLY_STATEMENT = MappingProxyType(
    {
        "sqlite": "PRAGMA query_only = ON",
        "mysql": "SET SESSION TRANSACTION READ ONLY",
        "mariadb": "SET SESSION TRANSACTION READ ONLY",
        "postgresql": "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
    },
)
"""Sent once per connection of a read engine, so it costs no request anything."""

READ_ONLY_CODES = frozenset({1792, 1290, 1836, "25006", "SQLITE_READONLY"})
"""MySQL: read-only transaction, server or mode. PostgreSQL: 25006."""

UNREACHABLE_CODES = frozenset(
    {1040, 1047, 1053, 1129, 1203, 1226, 2002, 2003, 2006, 2013}
)
"""MySQL: too many connections (1040, 1203, 1226), node not ready, shutting down, host
blocked, not reached, lost."""

FATAL_CODES = frozenset({1020, 1180, 1181, 1206, 1213, 1402, 1613, 1614, 3101})
"""MySQL has rolled the whole transaction back, whatever the savepoints: snapshot
conflict, commit and rollback errors, lock table full, deadlock, XA, replication."""

LOCK_WAIT_TIMEOUT = 1205
"""MySQL: only the statement is undone, unless innodb_rollback_on_timeout is on."""

RETRYABLE_CODES = frozenset(
    {1020, 1205, 1213, 3101, "40001", "40P01", "55P03", "SQLITE_BUSY"},
)
"""Conflicts with other transactions; the same work may well succeed a moment later."""

IN_DOUBT_CODES = frozenset({"40003"})
"""PostgreSQL: statement_completion_unknown."""

_COMMENTS = r"(?:\s|/\*.*?\*/|--[^\n]*\n|\#[^\n]*\n)*"

IMPLICIT_COMMIT = re.compile(
    _COMMENTS
    + r"(?:(?:CREATE(?:\s+OR\s+REPLACE)?|DROP)\s+(?!TEMPORARY\b|OR\b)|ALTER\b|"
    r"TRUNCATE\b|RENAME\b|GRANT\b|REVOKE\b|ANALYZE\b|OPTIMIZE\b|REPAIR\b|CHECK\b|"
    r"FLUSH\b|INSTALL\b|UNINSTALL\b|CACHE\s+INDEX\b|LOAD\s+INDEX\b|SET\s+PASSWORD\b)",
    re.IGNORECASE | re.DOTALL,
)
"""Statements for which MySQL and MariaDB commit first, as their manuals list them.

What a stored procedure does stays unseen.
"""

TRANSACTION_CONTROL = re.compile(
    _COMMENTS + r"(?:COMMIT\b|END\b|ABORT\b|BEGIN\b|START\s+TRANSACTION\b|"
    r"ROLLBACK\b(?!(?:\s+(?:WORK|TRANSACTION))?\s+TO\b)|(?:UN)?LOCK\s+TABLES\b|"
    r"SET\s+(?:SESSION\s+|GLOBAL\s+|@@(?:\w+\.)?)?AUTOCOMMIT\b)",
    re.IGNORECASE | re.DOTALL,
)
"""Statements that begin or end a transaction behind the back of the unit of work."""

RECOVERY_CONFLICT = "40001"
"""What a PostgreSQL replica says to a read that is in the way of its replication."""

CHANGES_SETTINGS = re.compile(
    r"\b(?:CALL|SET|RESET|DISCARD|PRAGMA|set_config)\b", re.IGNORECASE
)
"""Statements after which a connection may no longer be what its pool made it."""

CHANGING_OPTIONS = frozenset(
    {"isolation_level", "postgresql_readonly", "postgresql_deferrable"}
)
"""Execution options after which the same holds."""

MYSQL_SYNTAX_ERROR = 1064
"""Not understood, so nothing was committed for it."""

POOL_TIMEOUT = 10.0
"""Seconds to wait for a free connection. SQLAlchemy's 30 are long for a client, and a
pool does not wake those who wait when the server is back."""

MYSQL_RECYCLE = 1800
"""Seconds after which a MySQL connection is replaced; wait_timeout is 28800 there."""

SQLITE_BUSY_TIMEOUT = 5000
"""Milliseconds a SQLite statement waits for a lock."""


def shown(url: URL) -> str:
    """Show a URL without its passwords."""
    hidden = {key: "hidden" for key in url.query if "pass" in key.lower()}
    return url.update_query_dict(hidden).render_as_string(hide_password=True)


def is_memory(url: URL) -> bool:
    """Tell whether `url` is a SQLite database that lives in one connection."""
    database = url.database or ":memory:"
    return url.get_backend_name() == "sqlite" and (
        database.startswith((":memory:", "file::memory:"))
        or "mode=memory" in database
        or url.query.get("mode") == "memory"
    )


def engine_defaults(url: URL) -> dict[str, object]:
    """Give the engine options that suit the database; the caller's own win."""
    options: dict[str, object] = {
        # A listener sends ROLLBACK only where it is needed, see `_care`.
        "pool_reset_on_return": None,
        # Errors go to logs and error trackers, parameters are people's data.
        "hide_parameters": True,
    }
    if url.get_backend_name() in {"mysql", "mariadb"}:
        options["pool_recycle"] = MYSQL_RECYCLE
    return options


def code_of(error: BaseException | None) -> str | int | None:
    """Find the driver's code: MySQL errno, SQLSTATE, or SQLite's error name.

    MySQL's number comes first: asyncmy errors carry a SQLSTATE too, and 40000 or
    HY000 says less than 1213.
    """
    for cause in causes(error):
        origin = getattr(cause, "orig", None) or cause
        first: object = origin.args[0] if origin.args else None
        if isinstance(first, int) and _is_of_mysql(origin):
            return first
        for attribute in ("sqlstate", "sqlite_errorname"):
            code: object = getattr(origin, attribute, None)
            if isinstance(code, str):
                return code
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Give `error` and what it was raised from, and so on; each once."""
    seen: list[BaseException] = []
    while error is not None and not any(error is each for each in seen):
        seen.append(error)
        yield error
        error = error.__cause__


def _is_of_mysql(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in MYSQL_DRIVERS


def is_lost(error: BaseException) -> bool:
    """Tell whether the connection is gone."""
    return isinstance(error, OSError) or (
        isinstance(error, sa_exc.DBAPIError) and error.connection_invalidated
    )


def is_in_doubt(error: BaseException) -> bool:
    """Tell whether a COMMIT that ended with `error` may have been carried out."""
    return is_lost(error) or code_of(error) in IN_DOUBT_CODES


def is_unavailable(error: BaseException) -> bool:
    """Tell whether the database could not be reached; trying again may help."""
    if isinstance(error, sa_exc.TimeoutError) or is_lost(error):
        return True
    code = code_of(error)
    if code is None:
        # psycopg that could not connect: no server, so no SQLSTATE and no statement.
        return isinstance(error, sa_exc.OperationalError) and error.statement is None
    return code in UNREACHABLE_CODES or (
        isinstance(code, str) and code.startswith(("08", "53", "57P"))
    )


def is_conflict(error: BaseException) -> bool:
    """Tell whether another transaction was in the way; trying again may help."""
    return code_of(error) in RETRYABLE_CODES


def is_driver_disconnect(error: BaseException) -> bool:
    """Tell what SQLAlchemy does not know to be a disconnect.

    asyncmy: `InterfaceError (0, 'Cancelled during execution')` on every use of a
    connection whose statement was cancelled.
    """
    return type(error).__name__ == "InterfaceError" and error.args[:1] == (0,)
