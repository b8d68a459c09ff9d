"""Facts per driver: what its connection tells without a round trip."""

from __future__ import annotations

import dataclasses
import select
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from asgi_uow._databases.dialects import FATAL_CODES, code_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sqlalchemy import Dialect

PSYCOPG_IN_ERROR = 3
"""psycopg.pq.TransactionStatus.INERROR: until ROLLBACK nothing else is accepted."""


class _Asyncmy(Protocol):
    _stream_broken: bool

    def get_transaction_status(self) -> bool: ...
    def thread_id(self) -> int: ...


class _Asyncpg(Protocol):
    def is_closed(self) -> bool: ...
    def is_in_transaction(self) -> bool: ...
    def get_server_pid(self) -> int: ...
    def get_settings(self) -> object: ...


class _PsycopgInfo(Protocol):
    transaction_status: int
    backend_pid: int

    def parameter_status(self, name: str) -> str | None: ...


class _Psycopg(Protocol):
    closed: bool
    info: _PsycopgInfo

    def fileno(self) -> int: ...


class _Aiosqlite(Protocol):
    in_transaction: bool


def _asyncmy_open(connection: _Asyncmy) -> bool:
    return connection.get_transaction_status()


def _asyncmy_dead(connection: _Asyncmy) -> bool:
    return connection._stream_broken  # noqa: SLF001  # the pool of asyncmy looks there


def _asyncmy_kill(connection: _Asyncmy) -> str:
    return f"KILL QUERY {connection.thread_id()}"


def _asyncpg_kill(connection: _Asyncpg) -> str:
    return f"SELECT pg_cancel_backend({connection.get_server_pid()})"


def _psycopg_kill(connection: _Psycopg) -> str:
    return f"SELECT pg_cancel_backend({connection.info.backend_pid})"


def _asyncpg_open(connection: _Asyncpg) -> bool:
    return connection.is_in_transaction()


def _asyncpg_dead(connection: _Asyncpg) -> bool:
    return connection.is_closed()


def _psycopg_open(connection: _Psycopg) -> bool:
    return connection.info.transaction_status != 0


def _asyncpg_may_write(connection: _Asyncpg) -> bool:
    # PostgreSQL 14 and later report it with every change.
    settings = connection.get_settings()
    return getattr(settings, "default_transaction_read_only", "on") == "off"


def _psycopg_may_write(connection: _Psycopg) -> bool:
    return connection.info.parameter_status("default_transaction_read_only") == "off"


def _psycopg_dead(connection: _Psycopg) -> bool:
    """An idle connection with something to read has been told good-bye."""
    if connection.closed:
        return True
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def _aiosqlite_open(connection: _Aiosqlite) -> bool:
    return connection.in_transaction


def _mysql_gave_up(connection: object, error: BaseException) -> bool:  # noqa: ARG001
    return code_of(error) in FATAL_CODES


def _asyncpg_gave_up(connection: object, error: BaseException) -> bool:  # noqa: ARG001
    """Only what the server sent has a severity; a wrong parameter never got there.

    SQLAlchemy passes on what the fetch of a stream raises as it is.
    """
    sent = (error, error.__cause__)
    return any(getattr(each, "severity", None) is not None for each in sent)


def _psycopg_gave_up(connection: _Psycopg, error: BaseException) -> bool:  # noqa: ARG001
    return connection.info.transaction_status == PSYCOPG_IN_ERROR


def _aiosqlite_gave_up(connection: _Aiosqlite, error: BaseException) -> bool:  # noqa: ARG001
    """SQLite rolls back by itself after some errors, and says so when asked."""
    return not connection.in_transaction


def _never(connection: object) -> bool:  # noqa: ARG001
    return False


def _always(connection: object) -> bool:  # noqa: ARG001
    return True


@dataclasses.dataclass(frozen=True, slots=True)
class Driver:
    """What can be asked of a driver's connection without a round trip."""

    in_transaction: Callable[..., bool]
    is_dead: Callable[..., bool]
    gave_up: Callable[..., bool] = _mysql_gave_up
    """Given connection and driver error: has the server given work up?"""
    savepoints_survive: bool = False
    """What was given up is at most what the innermost open savepoint covers."""
    cursor_needs_begin: bool = False
    """A cursor can be declared only inside a transaction."""
    streams_alone: bool = True
    """While a stream is being read the connection can do nothing else."""
    may_write: Callable[..., bool] = _never
    """Has the server reported that the connection is not read-only (any more)?"""
    kill: Callable[..., str] | None = None
    """Given a connection: what stops its statement, sent from another connection."""
    tells_the_server: bool = False
    """The driver tells the server of a cancellation, if nothing cancels that too."""


_PSYCOPG = Driver(
    _psycopg_open,
    _psycopg_dead,
    _psycopg_gave_up,
    savepoints_survive=True,
    cursor_needs_begin=True,
    streams_alone=False,
    may_write=_psycopg_may_write,
    kill=_psycopg_kill,
    tells_the_server=True,
)
DRIVERS: Mapping[str, Driver] = MappingProxyType(
    {
        "asyncmy": Driver(_asyncmy_open, _asyncmy_dead, kill=_asyncmy_kill),
        "asyncpg": Driver(
            _asyncpg_open,
            _asyncpg_dead,
            _asyncpg_gave_up,
            savepoints_survive=True,
            cursor_needs_begin=True,
            streams_alone=False,
            may_write=_asyncpg_may_write,
            kill=_asyncpg_kill,
            tells_the_server=True,
        ),
        "psycopg": _PSYCOPG,
        "aiosqlite": Driver(
            _aiosqlite_open,
            _never,
            _aiosqlite_gave_up,
            streams_alone=False,
        ),
    },
)
UNKNOWN_DRIVER = Driver(_always, _never)


def driver_of(dialect: Dialect) -> Driver:
    """Look the driver up; an unknown one is always rolled back to be safe."""
    return DRIVERS.get(dialect.driver, UNKNOWN_DRIVER)
