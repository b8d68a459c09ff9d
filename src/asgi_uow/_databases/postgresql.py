"""Facts of PostgreSQL, and of asyncpg and psycopg."""

from __future__ import annotations

import gc
import re
import select
from asyncio import Future
from operator import attrgetter, itemgetter, methodcaller
from pkgutil import resolve_name
from types import NoneType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import sqlalchemy as sa
from anyio import current_time, sleep
from sqlalchemy import exc as sa_exc
from sqlalchemy.dialects import postgresql

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.ext.asyncio import AsyncConnection

EXTRAS = {"asyncpg": "postgresql"}
PACKAGES = frozenset({"asyncpg", "psycopg"})
READ_ONLY_STATEMENT = "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"
IS_READ_ONLY = "SELECT pg_is_in_recovery()"
LAG = (
    "SELECT CASE WHEN pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn()"
    " AND EXISTS (SELECT FROM pg_stat_wal_receiver WHERE status = 'streaming')"
    " THEN 0"
    " ELSE EXTRACT(EPOCH FROM clock_timestamp() - pg_last_xact_replay_timestamp())"
    ' END AS "Seconds_Behind_Master"'
)
# As a simple query; its answer tells of the number of rows.
HAS_PROCESS_ID = "SELECT FROM pg_backend_pid() AS id WHERE id = {}"
# Asked where the driver was used past SQLAlchemy: an error aborts the transaction.
QUESTION_BEFORE_COMMIT = "SELECT 1"

# https://www.postgresql.org/docs/current/errcodes-appendix.html
# https://www.postgresql.org/docs/current/mvcc-serialization-failure-handling.html
CODES = {
    "read_only": frozenset({"25006"}),
    "demoted": frozenset({"25006"}),
    # Classes: connection exception, insufficient resources, shutting down or starting.
    "unavailable": frozenset({"08", "53", "57P"}),
    # Serialization, deadlock, a lock that was not granted; a 40001 that YugabyteDB does
    # not translate: https://github.com/yugabyte/yugabyte-db/issues/31736
    "conflict": frozenset({"40001", "40P01", "55P03", "YB003"}),
    "recovery_conflict": frozenset({"40001"}),
    # Connection exceptions, also of drivers, and statement_completion_unknown.
    "in_doubt": frozenset({"08", "40003"}),
    "unsupported": frozenset({"0A000"}),
}
# Of a constraint that fails at COMMIT, and of a conflict, for tests.
REFUSED, CONFLICT = "23503", "40001"

# Not pg_current_wal_lsn(): with synchronous_commit=off a commit is beyond that.
LSN_WRITTEN = (
    "SELECT CAST(pg_current_wal_insert_lsn() AS text),"
    " CAST(current_setting('wal_block_size') AS integer),"
    " pg_size_bytes(current_setting('wal_segment_size'))"
)
# On a server that was promoted pg_last_wal_replay_lsn() stands still.
LSN_REACHED = (
    "SELECT NOT pg_is_in_recovery() OR"
    " pg_last_wal_replay_lsn() >= CAST(CAST(:position AS text) AS pg_lsn)"
)
LSN = re.compile(r"[0-9A-F]{1,8}/[0-9A-F]{1,8}")
# Bytes at the start of each page of WAL, and of the first page of a segment.
PAGE_HEADER, SEGMENT_HEADER = 0x18, 0x28
LONGEST_PAUSE = 0.05  # seconds between two questions to a server

# The statistics are reset by every crash, also of a single backend, and by no restart.
EPOCH = "CAST((SELECT stats_reset FROM pg_stat_bgwriter) AS text)"
TRANSACTION_ID = (  # NULL if nothing was written
    f"SELECT CAST(pg_current_xact_id_if_assigned() AS text) || '@' || {EPOCH}"
)
STATUS = (  # NULL on a standby: what it does not know of may be on its way
    "SELECT CASE WHEN NOT pg_is_in_recovery() THEN"
    f" pg_xact_status(CAST(CAST(:id AS text) AS xid8)) END, {EPOCH}"
)
# Its COMMIT waits for synchronous standbys; who cancels such a wait has it committed on
# this server alone, and a failover loses that.
AWAIT_STANDBYS = "SELECT pg_logical_emit_message(true, '', '')"
# 22023: the server has not given the id to anybody (since it crashed).
ANSWERS: dict[object, bool] = {"committed": True, "aborted": False, "22023": False}
LIBPQ = re.compile("ssl(?!password).+|application_name|options")
PSYCOPG_IN_ERROR = 3  # pq.TransactionStatus.INERROR: only ROLLBACK is accepted


class _Driver:
    is_known = savepoints_survive = cursor_needs_begin = True
    exclusive_streams = False


class Asyncpg(_Driver):
    connect_args = (("timeout", 10),)  # not 60 seconds
    pooled_args = (
        ("statement_cache_size", 0),
        ("prepared_statement_cache_size", 0),
        ("prepared_statement_name_func", str),  # the name is ""
    )
    in_transaction = methodcaller("is_in_transaction")
    is_dead = methodcaller("is_closed")
    cut_off = methodcaller("terminate")
    connects_with = "asyncpg:connect"
    cancellations = attrgetter("_cancellations")
    # Where, among so many objects that a protocol refers to, a future may be.
    futures: tuple[int, Callable[[list[Any]], Any]] = (0, tuple)

    async def is_pooled(self, raw: Any) -> bool:
        # A pooler gives numbers of its own, with which it finds whom to cancel.
        asked = HAS_PROCESS_ID.format(raw.get_server_pid())
        return bool(await raw.execute(asked) == "SELECT 0")

    def socket(self, raw: Any) -> Any:
        return raw._transport.get_extra_info("socket")  # noqa: SLF001

    def is_busy(self, raw: Any) -> bool:
        # Its protocol shows nobody the future for the answer that it waits for; that
        # of a request to cancel stays undone when the connection is lost.
        held = gc.get_referents(raw._protocol)  # noqa: SLF001
        length, places = self.futures
        # Mostly there is None in each of them, which is found in one step.
        if length == len(held) and (found := places(held)).count(None) == len(found):
            return False
        at = [at for at, each in enumerate(held) if type(each) in (Future, NoneType)]
        if at:  # a connection that was closed has no protocol
            self.futures = len(held), itemgetter(*at)
        waits = any(type(each) is Future and not each.done() for each in held)
        return waits and not raw.is_closed()

    def aborts_transaction(self, _: object, error: BaseException) -> bool:
        # Only what the server sent has a severity; a wrong parameter never got there.
        # SQLAlchemy passes on what the fetch of a stream raises as it is.
        sent = (error, error.__cause__)
        return any(getattr(each, "severity", None) is not None for each in sent)

    def reports_writable(self, raw: Any) -> bool:
        # PostgreSQL 14 and later report the setting with every change.
        settings = raw.get_settings()
        return getattr(settings, "default_transaction_read_only", "on") == "off"


class Psycopg(_Driver):
    # For each host, not 130 seconds.
    connect_args = (
        ("async_creator_fn", f"{__package__}.psycopg_connection:Connection.connect"),
        ("connect_timeout", 10),
    )
    pooled_args = (("prepare_threshold", None),)
    connects_with = "psycopg:AsyncConnection.connect"
    # Past `info`, which makes an object for each question.
    in_transaction = attrgetter("pgconn.transaction_status")  # 0 is IDLE

    def connects_also(self) -> list[str]:
        options = resolve_name("psycopg.pq:Conninfo").get_defaults()
        return [each.keyword.decode() for each in options]

    async def is_pooled(self, raw: Any) -> bool:
        autocommit, asked = raw.autocommit, HAS_PROCESS_ID.format(raw.info.backend_pid)
        is_idle = not self.in_transaction(raw)  # a listener may have begun one
        if is_idle:
            await raw.set_autocommit(True)
        cursor = await raw.execute(asked)
        if is_idle:
            await raw.set_autocommit(autocommit)
        return bool(cursor.rowcount == 0)

    def is_dead(self, raw: Any) -> bool:
        if raw.closed:
            return True
        # A readable socket on an idle connection means the server has closed it.
        poll = select.poll()
        poll.register(raw.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def is_busy(self, raw: Any) -> bool:
        return bool(raw.lock._locked or raw.lock._waiters)  # noqa: SLF001

    def socket(self, raw: Any) -> Any:
        return None if raw.closed else raw

    def aborts_transaction(self, raw: Any, _: object) -> bool:
        return bool(raw.pgconn.transaction_status == PSYCOPG_IN_ERROR)

    def reports_writable(self, raw: Any) -> bool:
        setting = raw.pgconn.parameter_status(b"default_transaction_read_only")
        return bool(setting == b"off")


DRIVERS = {"asyncpg": Asyncpg(), "psycopg": Psycopg()}


def url_query(query: Any, driver: str) -> dict[str, Any]:
    said = {"sslmode" if key == "ssl" else key: query[key] for key in query}
    words = {"true": "require", "1": "require", "false": "disable", "0": "disable"}
    if (mode := said.get("sslmode")) in words:
        said["sslmode"] = words[mode]
    # asyncpg takes libpq's words for TLS, and settings, in a DSN alone.
    moved = {key: said[key] for key in said if LIBPQ.fullmatch(key)}
    if driver != "asyncpg" or not moved:
        return said
    kept = {key: said[key] for key in said if key not in moved}
    return {**kept, "dsn": f"postgresql://?{urlencode(moved)}"}


def code_of(error: BaseException) -> str | None:
    """Return the SQLSTATE; its class alone where psycopg could not connect."""
    origin: Any = getattr(error, "orig", None) or error
    code: object = getattr(origin, "sqlstate", None)
    unsent = isinstance(error, sa_exc.OperationalError) and error.statement is None
    if code is None and unsent and hasattr(origin, "pgconn"):
        conn = origin.pgconn
        code = "28000" if conn and _is_refused(conn, str(origin)) else "08000"
    return code if isinstance(code, str) else None


def _is_refused(conn: Any, text: str) -> bool:
    # The server's words, in its language, come after two spaces, unlike libpq's own.
    # They quote the user or database that is refused; of others only a limit does.
    name = b"|".join(map(re.escape, (conn.user, conn.db))).decode()
    refused = rf"authentication failed|[^\w\s]\s?(?:{name})\s?(?:[^\w\s]|$)"
    answer = rf"(?ms):  (?!.*too many connections).*(?:{refused})"
    return bool(conn.needs_password or re.search(answer, text))


def insert_if_new(table: sa.Table, row: dict[str, Any]) -> sa.Insert:
    return postgresql.insert(table).values(row).on_conflict_do_nothing()


async def position(connection: AsyncConnection) -> str | None:
    """Return the LSN up to which the server has written its log."""
    return _before_header(*(await connection.execute(sa.text(LSN_WRITTEN))).one())


async def wait_for(connection: AsyncConnection, position: str, seconds: float) -> bool:
    if not LSN.fullmatch(position):
        return False
    end, pause = current_time() + seconds, 0.001
    while not await connection.scalar(sa.text(LSN_REACHED), {"position": position}):
        left = end - current_time()
        if left <= 0:
            return False
        await sleep(min(pause, left))
        pause = min(2 * pause, LONGEST_PAUSE)
    return True


def _before_header(lsn: str, page: int, segment: int) -> str:
    # A record that ends with its page puts the insert position behind the header of the
    # next, empty page; a replica that has replayed it stands before that header until
    # more is written. Nothing is lost: a page holds of records what follows its header.
    high, low = (int(part, 16) for part in lsn.split("/"))
    header = SEGMENT_HEADER if low % segment < page else PAGE_HEADER
    return f"{high:X}/{low - header:X}" if low % page == header else lsn


async def was_committed(connection: AsyncConnection, transaction: str) -> bool | None:
    # After a crash another may have the id of a lost transaction: then "committed"
    # proves nothing; "aborted", or an id that is not given out, still proves the loss.
    number, _, epoch = transaction.partition("@")
    try:
        result = await connection.execute(sa.text(STATUS), {"id": number})
        status, epoch_now = result.one()
        is_another = status == "committed" and epoch_now != epoch
        return None if is_another else ANSWERS[status]
    except (KeyError, sa_exc.DBAPIError) as error:
        return ANSWERS[code_of(error)]  # or it is asked again
