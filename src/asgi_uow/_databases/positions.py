"""Where a writer stands after a commit, and waiting until a replica stands there."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from anyio import current_time, sleep
from sqlalchemy import exc as sa_exc
from sqlalchemy import text

from asgi_uow._databases.dialects import code_of

if TYPE_CHECKING:
    from sqlalchemy import Dialect
    from sqlalchemy.ext.asyncio import AsyncConnection

GTID_WRITTEN = "SELECT @@gtid_binlog_pos"
"""Not gtid_current_pos: that may name what is in no binary log of this server."""

GTID_REACHED = "SELECT @@gtid_current_pos"
"""What is visible here: what was applied, and what was written here as a primary."""

GTID_WAIT = "SELECT MASTER_GTID_WAIT(:position, :seconds)"
"""A statement of its own: what is read beside it may be older than its answer."""

GTID = r"[0-9]{1,10}-[0-9]{1,10}-[0-9]{1,20}"
GTID_LIST = re.compile(rf"{GTID}(?:,{GTID})*")

GTID_NEVER_CODES = frozenset({1941, 1969})
"""MariaDB: a number that is too large for a GTID; max_statement_time is over."""

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
"""Seconds between two questions to a PostgreSQL replica; each pause doubles."""


async def position(connection: AsyncConnection) -> str | None:
    """Tell how far a replica must be to have all commits the writer has answered.

    Asked after COMMIT, on an AUTOCOMMIT connection to the writer's server; one round
    trip. None where nothing can be waited for: SQLite, MySQL, a MariaDB without a
    binary log.
    """
    kind = _kind(connection.dialect)
    if kind == "mariadb":
        written: str | None = (await connection.execute(text(GTID_WRITTEN))).scalar()
        return written or None
    if kind == "postgresql":
        lsn, page, segment = (await connection.execute(text(LSN_WRITTEN))).one()
        return _before_header(lsn, page, segment)
    return None


async def wait_for(connection: AsyncConnection, position: str, seconds: float) -> bool:
    """Wait until the server has reached `position`; False if it has not in time.

    Asked on a connection to a replica before anything is read, in AUTOCOMMIT or in a
    transaction that ends with it; one round trip where the server is there already.
    A server that is a writer itself (a promoted replica) is there. False also for what
    is no position of this kind of database, and the connection can be used on.
    `seconds` bounds the waiting, not what the network takes. Raises what SQLAlchemy
    raises if the server fails.
    """
    kind = _kind(connection.dialect)
    if kind == "mariadb" and GTID_LIST.fullmatch(position):
        return await _mariadb_wait_for(connection, position, seconds)
    if kind == "postgresql" and LSN.fullmatch(position):
        return await _postgresql_wait_for(connection, position, seconds)
    return False


def _kind(dialect: Dialect) -> str:
    """Name the database; a connected dialect of SQLAlchemy knows its server."""
    return "mariadb" if getattr(dialect, "is_mariadb", False) else dialect.name


async def _mariadb_wait_for(
    connection: AsyncConnection, position: str, seconds: float
) -> bool:
    # Not the wait alone: it counts only what was replicated, and would let a
    # promoted server seem late for ever.
    end = current_time() + seconds
    reached = (await connection.execute(text(GTID_REACHED))).scalar()
    if _covers(str(reached), position):
        return True
    left = end - current_time()
    if left <= 0:  # less than 0 would wait for ever
        return False
    parameters = {"position": position, "seconds": left}
    try:
        result = await connection.execute(text(GTID_WAIT), parameters)
    except sa_exc.DBAPIError as error:
        if code_of(error) not in GTID_NEVER_CODES:
            raise
        return False
    return bool(result.scalar() == 0)


async def _postgresql_wait_for(
    connection: AsyncConnection, position: str, seconds: float
) -> bool:
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


def _covers(reached: str, position: str) -> bool:
    """Compare by sequence number in each domain; the server's id does not count."""
    numbers = dict(_gtids(reached))
    return all(numbers.get(domain, -1) >= number for domain, number in _gtids(position))


def _gtids(position: str) -> list[tuple[int, int]]:
    parts = [gtid.split("-") for gtid in position.split(",") if gtid]
    return [(int(domain), int(number)) for domain, _, number in parts]


def _before_header(lsn: str, page: int, segment: int) -> str:
    """Give the start of a page for a position that is just behind its header.

    A record that ends where its page ends puts the insert position behind the header
    of the next page, which is still empty. A replica that has replayed the record
    stands before that header, until somebody writes more. Nothing is lost: what a
    page holds of a record comes after the header.
    """
    high, low = (int(part, 16) for part in lsn.split("/"))
    header = SEGMENT_HEADER if low % segment < page else PAGE_HEADER
    return f"{high:X}/{low - header:X}" if low % page == header else lsn
