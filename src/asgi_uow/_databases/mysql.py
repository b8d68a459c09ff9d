"""Facts of MySQL and MariaDB, and of asyncmy."""

from __future__ import annotations

import re
from contextlib import closing
from operator import attrgetter
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from anyio import current_time, fail_after
from sqlalchemy import exc as sa_exc
from sqlalchemy.dialects import mysql

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

EXTRAS = {"asyncmy": "mysql"}
PACKAGES = frozenset({"asyncmy", "aiomysql", "pymysql", "MySQLdb"})
# The server closes a connection that is idle for wait_timeout, 28800 seconds.
ENGINE_OPTIONS = {"pool_recycle": 1800}
READ_ONLY_STATEMENT = "SET SESSION TRANSACTION READ ONLY"
BEGIN_READ_ONLY = "START TRANSACTION READ ONLY"
# From a table: a Galera node without its cluster refuses that, not variables alone.
IS_READ_ONLY = "SELECT @@global.read_only FROM (SELECT 1) AS here"
LAG = "SHOW SLAVE STATUS"
BEGIN_AT_LEVEL = "SET TRANSACTION ISOLATION LEVEL {}"  # of the next one alone
QUESTION_BEFORE_COMMIT = "SELECT 1"

# https://mariadb.com/kb/en/mariadb-error-code-reference/
# https://dev.mysql.com/doc/mysql-errors/8.4/en/server-error-reference.html
# Conflicts that roll everything back: 1213 deadlock, or Galera; 149 the same, where an
# engine is quoted; 1020 snapshot; 1613, 1614 XA; 3101 Group Replication; 8002 ... TiDB:
# https://docs.pingcap.com/tidb/stable/error-codes
ROLLED_BACK = {149, 1020, 1213, 1613, 1614, 3101, 8002, 8005, 8022, 8028, 9007}
CODES = {
    "read_only": frozenset({1290, 1792, 1836}),
    # 1047 refuses COMMIT and ROLLBACK too, and leaves the transaction open: a later
    # COMMIT on that connection would keep it.
    "demoted": frozenset({1047, 1290, 1836}),
    "unavailable": frozenset(
        {1040, 1203, 1226}  # too many connections
        | {1047, 1053, 1129}  # node not ready, shutting down, host blocked
        | {2002, 2003, 2006, 2013}  # not reached, lost
    ),
    "conflict": frozenset({*ROLLED_BACK, 1205, 3572}),  # a lock was not granted
    # asyncmy refuses with `InterfaceError(0, ...)` after a statement was cancelled.
    "disconnect": frozenset({0, 1047}),
    # Of the driver, not of the server; 1180 is Galera's where it has lost the others,
    # which may have committed.
    "in_doubt": frozenset({0, 1180, *range(2000, 3000)}),
    # Also commit or rollback error, full lock table, XA.
    "aborting": frozenset({*ROLLED_BACK, 1180, 1181, 1206, 1402}),
    "syntax": frozenset({1064}),
    "unsupported": frozenset({1235}),
}
# Of a constraint that fails at COMMIT, and of a conflict, for tests.
REFUSED, CONFLICT = 1452, 1213

SET_LOCAL_LASTS = True  # it is SET SESSION
TRANSACTION_CONTROL = (
    r"(?:UN)?LOCK\s+TABLES?\b|"
    r"SET\s+(?:SESSION\s+|GLOBAL\s+|@@(?:\w+\.)?)?AUTOCOMMIT\b"
)
# https://mariadb.com/kb/en/sql-statements-that-cause-an-implicit-commit/
IMPLICIT_COMMIT = (
    r"(?:CREATE(?:\s+OR\s+REPLACE)?|DROP)\s+(?!TEMP(?:ORARY)?\b|OR\b)|ALTER\b|"
    r"TRUNCATE\b|RENAME\b|GRANT\b|REVOKE\b|ANALYZE\b|OPTIMIZE\b|REPAIR\b|CHECK\b|"
    r"FLUSH\b|INSTALL\b|UNINSTALL\b|CACHE\s+INDEX\b|LOAD\s+INDEX\b|SET\s+PASSWORD\b"
)
KEPT_AT_ONCE = ("CREATE", "DROP", "ALTER", "TRUNCATE", "RENAME", "GRANT", "REVOKE")

SSL = re.compile("ssl(?:[-_]?mode)?")
NO_SSL = {"FALSE", "DISABLE", "DISABLED"}
SSL_MODES = {"TRUE", "REQUIRED", "VERIFY_CA", "VERIFY_IDENTITY"}
IN_TRANSACTION = 1  # SERVER_STATUS_IN_TRANS
QUOTED = re.compile(r"Got error (149)\b")
GTID = re.compile(r"([0-9]{1,10})-([0-9]{1,10})-([0-9]{1,20})")
GTID_LIST = re.compile(rf"{GTID.pattern}(?:,{GTID.pattern})*")


async def connect(**options: Any) -> Any:
    """Bound the handshake too; what asyncmy bounds itself is over before."""
    with fail_after(options["connect_timeout"]):
        return await resolve_name("asyncmy:connect")(**options)


class Asyncmy:
    is_known = True
    connect_args = (("async_creator_fn", connect), ("connect_timeout", 10))
    errors_hide_state = True  # an error packet has no status
    is_dead = attrgetter("_stream_broken")  # the pool of asyncmy looks there
    connects_with = "asyncmy:connect"
    last_result = attrgetter("_result")

    def cancel_sql(self, raw: Any) -> str:
        return f"KILL QUERY {raw.thread_id()}"

    def is_busy(self, raw: Any) -> bool:
        # What has come of an answer and is not read yet is in the buffer.
        proto = raw._proto  # noqa: SLF001
        unread = raw._result is None and proto.length > proto.pos  # noqa: SLF001
        return unread or proto._read_waiter is not None  # noqa: SLF001

    def in_transaction(self, raw: Any) -> bool:
        # It keeps the old status where a result's is 0; a stream's comes at its end.
        result = raw._result  # noqa: SLF001  # no other way
        is_open = result is None or (
            result.server_status & IN_TRANSACTION or result.unbuffered_active
        )
        return bool(is_open and raw.get_transaction_status())

    def socket(self, raw: Any) -> Any:
        return raw._transport and raw._transport.get_extra_info("socket")  # noqa: SLF001

    def cut_off(self, raw: Any) -> None:
        if raw._transport is not None:  # noqa: SLF001  # close() would wait
            raw._transport.abort()  # noqa: SLF001


DRIVERS = {"asyncmy": Asyncmy()}


def url_query(query: Any, _: str) -> dict[str, Any]:
    kept = {"charset": "utf8mb4"}
    kept |= {key: query[key] for key in query if not SSL.fullmatch(key)}
    for key in query.keys() - kept.keys():
        if (mode := query[key].upper()) in NO_SSL:
            continue
        # Without a certificate the driver would verify nothing.
        if mode not in SSL_MODES or (mode[0] == "V" and "ssl_ca" not in query):
            message = (
                "ssl_mode is DISABLED, REQUIRED, or VERIFY_CA or VERIFY_IDENTITY with "
                "ssl_ca."
            )
            raise ValueError(message)
        kept["ssl_check_hostname"] = str(mode == "VERIFY_IDENTITY")
    return kept


def code_of(error: BaseException) -> int | None:
    """Return the number of the server, of the client library, or of a quoted 149."""
    origin = getattr(error, "orig", None) or error
    number: object = origin.args[0] if origin.args else None
    package = type(origin).__module__.partition(".")[0]
    if not isinstance(number, int) or package not in PACKAGES:
        return None
    quoted = QUOTED.match(str(origin.args[-1]))
    return int(quoted[1]) if quoted else number


def set_up(dbapi_connection: Any, *, read_only: bool) -> frozenset[int | str]:
    """Ask, on a writer, whether a lock timeout undoes the whole transaction."""
    if read_only:
        return frozenset()
    with closing(dbapi_connection.cursor()) as cursor:
        cursor.execute("SELECT @@innodb_rollback_on_timeout")
        [value] = cursor.fetchone() or [0]
    return frozenset({1205} if value else ())


def insert_if_new(table: sa.Table, row: dict[str, Any]) -> sa.Insert:
    """Count 2 for a row that is there; IGNORE has those who wait for it deadlock."""
    # With equal values it would count 1, as for a new one.
    changed = {"created": table.c.created + 1}
    return mysql.insert(table).values(row).on_duplicate_key_update(changed)


async def position(connection: AsyncConnection) -> str | None:
    """Return the last GTID in MariaDB's binary log; None on MySQL or without a log."""
    if not _is_mariadb(connection.dialect):
        return None  # pragma: no cover  # no MySQL server to test with
    # Not gtid_current_pos: that may name what is in no binary log of this server.
    written: str | None = await connection.scalar(sa.text("SELECT @@gtid_binlog_pos"))
    return written or None


async def wait_for(connection: AsyncConnection, position: str, seconds: float) -> bool:
    if not (_is_mariadb(connection.dialect) and GTID_LIST.fullmatch(position)):
        return False
    # Not MASTER_GTID_WAIT alone: it counts only what was replicated, so a promoted
    # server would seem late for ever. In a statement of its own: what is read beside it
    # may be older than its answer.
    end = current_time() + seconds
    reached = await connection.scalar(sa.text("SELECT @@gtid_current_pos"))
    if _covers(str(reached), position):
        return True
    left = end - current_time()
    if left <= 0:  # less than 0 would wait for ever
        return False
    waiting = sa.text("SELECT MASTER_GTID_WAIT(:position, :left)")
    try:
        parameters = {"position": position, "left": left}
        return bool(await connection.scalar(waiting, parameters) == 0)
    except sa_exc.DBAPIError as error:
        # A number that is too large for a GTID; max_statement_time is over.
        if code_of(error) not in {1941, 1969}:
            raise
        return False


def _is_mariadb(dialect: sa.Dialect) -> bool:
    return bool(getattr(dialect, "is_mariadb", False))  # says the server, not the URL


def _covers(reached: str, position: str) -> bool:
    # By sequence number in each domain; the server's id does not count.
    have = {int(domain): int(number) for domain, _, number in GTID.findall(reached)}
    need = GTID.findall(position)
    return all(have.get(int(domain), -1) >= int(number) for domain, _, number in need)
