"""Facts of PostgreSQL, and of asyncpg and psycopg."""

from __future__ import annotations

import re
import select
from operator import methodcaller
from typing import TYPE_CHECKING, Any

from anyio import current_time, move_on_after, sleep
from sqlalchemy import exc as sa_exc
from sqlalchemy import text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

DEFAULT_DRIVER: str = "asyncpg"
EXTRAS: Mapping[str, str] = {"asyncpg": "postgresql"}
PACKAGES = frozenset({"asyncpg", "psycopg"})
URL_QUERY: Mapping[str, str] = {}
ENGINE_OPTIONS: Mapping[str, object] = {}
SINGLE_WRITER: bool = False
COMMITS_FOR_DDL: bool = False
READ_ONLY_STATEMENT: str = "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"
IS_READ_ONLY: str = "SELECT pg_is_in_recovery()"
LAG: str | None = (
    "SELECT CASE WHEN pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn()"
    " AND EXISTS (SELECT FROM pg_stat_wal_receiver WHERE status = 'streaming')"
    " THEN 0"
    " ELSE EXTRACT(EPOCH FROM clock_timestamp() - pg_last_xact_replay_timestamp())"
    ' END AS "Seconds_Behind_Master"'
)
QUESTION_BEFORE_COMMIT: str | None = "SELECT 1"
"""Asked where the driver was used past SQLAlchemy: an error aborts the transaction."""
ENDS_TRANSACTIONS: bool = False
TELLS_AUTOCOMMIT: bool = True
BEGIN_WRITE: str | None = None
BEGIN_SNAPSHOT: str | None = None

# https://www.postgresql.org/docs/current/errcodes-appendix.html
CODES: Mapping[str, frozenset[int | str]] = {
    "read_only": frozenset({"25006"}),
    # Classes: connection exception, insufficient resources, shutting down or starting.
    "unavailable": frozenset({"08", "53", "57P"}),
    "conflict": frozenset({"40001", "40P01", "55P03"}),
    "in_doubt": frozenset({"40003"}),  # statement_completion_unknown
}

RECOVERY_CONFLICT = "40001"
"""A replica has stopped a read that was in the way of its replication."""

TRANSACTION_CONTROL: str = r"END\b|ABORT\b"
IMPLICIT_COMMIT: str | None = None

LSN_WRITTEN = (
    "SELECT CAST(pg_current_wal_insert_lsn() AS text),"
    " CAST(current_setting('wal_block_size') AS integer),"
    " pg_size_bytes(current_setting('wal_segment_size'))"
)
"""Not pg_current_wal_lsn(): with synchronous_commit=off a commit is beyond that."""

LSN_REACHED = (
    "SELECT NOT pg_is_in_recovery() OR"
    " pg_last_wal_replay_lsn() >= CAST(CAST(:position AS text) AS pg_lsn)"
)
"""On a server that was promoted pg_last_wal_replay_lsn() stands still."""

LSN = re.compile(r"[0-9A-F]{1,8}/[0-9A-F]{1,8}")

PAGE_HEADER, SEGMENT_HEADER = 0x18, 0x28
"""Bytes at the start of each page of WAL, and of the first page of a segment."""

FIRST_PAUSE, LONGEST_PAUSE = 0.001, 0.05
"""Seconds between two questions to a replica; each pause doubles."""

TRANSACTION_ID: str | None = (
    "SELECT CAST(pg_current_xact_id_if_assigned() AS text)"
    " || '@' || CAST((SELECT stats_reset FROM pg_stat_bgwriter) AS text)"
)
"""NULL if nothing was written. The statistics are reset by every crash, also of a
single backend, and by no restart."""

STATUS = (
    "SELECT pg_xact_status(CAST(CAST(:id AS text) AS xid8)),"
    " CAST((SELECT stats_reset FROM pg_stat_bgwriter) AS text)"
)

ANSWERS: Mapping[object, bool] = {"committed": True, "aborted": False, "22023": False}
"""22023: the server has not given the id to anybody (since it crashed)."""

STATUS_PAUSE = 0.05
"""Seconds between two questions to a server that cannot tell yet."""

PSYCOPG_IN_ERROR = 3
"""psycopg.pq.TransactionStatus.INERROR: until ROLLBACK nothing else is accepted."""


class _Driver:
    is_known = True
    savepoints_survive = True
    cursor_needs_begin = True
    exclusive_streams = False
    cancels_on_server = True


class Asyncpg(_Driver):
    in_transaction = methodcaller("is_in_transaction")
    is_dead = methodcaller("is_closed")

    def aborts_transaction(self, _: object, error: BaseException) -> bool:
        # Only what the server sent has a severity; a wrong parameter never got there.
        # SQLAlchemy passes on what the fetch of a stream raises as it is.
        sent = (error, error.__cause__)
        return any(getattr(each, "severity", None) is not None for each in sent)

    def reports_writable(self, raw: Any) -> bool:
        # PostgreSQL 14 and later report the setting with every change.
        settings = raw.get_settings()
        return getattr(settings, "default_transaction_read_only", "on") == "off"

    def cancel_sql(self, raw: Any) -> str:
        return f"SELECT pg_cancel_backend({raw.get_server_pid()})"


class Psycopg(_Driver):
    def in_transaction(self, raw: Any) -> bool:
        return bool(raw.info.transaction_status)

    def is_dead(self, raw: Any) -> bool:
        if raw.closed:
            return True
        # A readable socket on an idle connection means the server has closed it.
        poll = select.poll()
        poll.register(raw.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def aborts_transaction(self, raw: Any, _: object) -> bool:
        return bool(raw.info.transaction_status == PSYCOPG_IN_ERROR)

    def reports_writable(self, raw: Any) -> bool:
        setting = raw.info.parameter_status("default_transaction_read_only")
        return bool(setting == "off")

    def cancel_sql(self, raw: Any) -> str:
        return f"SELECT pg_cancel_backend({raw.info.backend_pid})"


DRIVERS: Mapping[str, Asyncpg | Psycopg] = {"asyncpg": Asyncpg(), "psycopg": Psycopg()}


def code_of(error: BaseException) -> str | None:
    """Return the SQLSTATE."""
    code: object = getattr(getattr(error, "orig", None) or error, "sqlstate", None)
    return code if isinstance(code, str) else None


def set_up(*_: object, **__: object) -> Mapping[str, object]:
    """Do nothing."""
    return {}


async def position(connection: AsyncConnection) -> str | None:
    """Return the LSN up to which the server has written its log."""
    lsn, page, segment = (await connection.execute(text(LSN_WRITTEN))).one()
    return _before_header(lsn, page, segment)


async def wait_for(connection: AsyncConnection, position: str, seconds: float) -> bool:
    """Ask until the LSN is reached."""
    if not LSN.fullmatch(position):
        return False
    end = current_time() + seconds
    pause = FIRST_PAUSE
    while True:
        result = await connection.execute(text(LSN_REACHED), {"position": position})
        if result.scalar():
            return True
        left = end - current_time()
        if left <= 0:
            return False
        await sleep(min(pause, left))
        pause = min(2 * pause, LONGEST_PAUSE)


def _before_header(lsn: str, page: int, segment: int) -> str:
    """Return the start of a page for a position that is just behind its header.

    A record that ends where its page ends puts the insert position behind the header
    of the next page, which is still empty. A replica that has replayed the record
    stands before that header, until somebody writes more. Nothing is lost: what a
    page holds of a record comes after the header.
    """
    high, low = (int(part, 16) for part in lsn.split("/"))
    header = SEGMENT_HEADER if low % segment < page else PAGE_HEADER
    return f"{high:X}/{low - header:X}" if low % page == header else lsn


async def was_committed(
    engine: AsyncEngine, transaction: str, seconds: float
) -> bool | None:
    """Ask for the status of a transaction until the server can tell it.

    After a crash the id of a lost transaction may be another's: then "committed"
    proves nothing, but "aborted", or an id that is not given out yet, still proves
    the loss.
    """
    transaction_id, _, epoch = transaction.partition("@")
    answer: bool | None = None
    epoch_now: str | None = None
    with move_on_after(seconds):
        while answer is None:
            await sleep(STATUS_PAUSE)
            try:
                async with engine.connect() as connection:
                    parameters = {"id": transaction_id}
                    result = await connection.execute(text(STATUS), parameters)
                    status, epoch_now = result.one()
            except (sa_exc.DBAPIError, OSError) as error:
                status = code_of(error)
            if status == "committed" and epoch_now != epoch:
                break
            answer = ANSWERS.get(status)
    return answer
