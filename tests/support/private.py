"""The private names that tests use, in one place: to rename one is a change here."""

from __future__ import annotations

from asgi_uow import Database, UnitOfWork
from asgi_uow import _concurrency as concurrency
from asgi_uow._concurrency import Turn, bounded, run_to_completion
from asgi_uow._databases import dialects
from asgi_uow._databases.configuration import read as read_configuration
from asgi_uow._databases.dialects import (
    READ_ONLY_CODES,
    code_of,
    engine_defaults,
    is_conflict,
    is_driver_disconnect,
    is_lost,
    is_memory,
    is_unavailable,
)
from asgi_uow._databases.drivers import DRIVERS as KNOWN_DRIVERS
from asgi_uow._databases.drivers import UNKNOWN_DRIVER, driver_of
from asgi_uow._databases.pool import IDLE_SINCE
from asgi_uow._databases.positions import (
    _before_header,
    _covers,
    _kind,
    position,
    wait_for,
)
from asgi_uow._decision import (
    COMMIT,
    TRANSITIONS,
    Cause,
    Decision,
    State,
    commit_below_400,
    decide_exit,
    decide_response,
    exception_cause,
    rollback,
)
from asgi_uow._reading.causal import LONGEST_TOKEN, READ_FROM_WRITER
from asgi_uow._reading.route import LONGEST_PAUSE, Replica, by_free_connections
from asgi_uow._sessions.managed import ManagedSession
from asgi_uow._sessions.read_session import ReadSession
from asgi_uow._sessions.savepoint import Savepoint
from asgi_uow._unit.current import current
from asgi_uow._unit.end import Settings
from asgi_uow._unit.hooks import MOST_BY_HOOKS, PHASES, Hook, Hooks, name_of

__all__ = [
    "COMMIT",
    "IDLE_SINCE",
    "KNOWN_DRIVERS",
    "LONGEST_PAUSE",
    "LONGEST_TOKEN",
    "MOST_BY_HOOKS",
    "PHASES",
    "READ_FROM_WRITER",
    "READ_ONLY_CODES",
    "SQLITE_CONNECTION",
    "TRANSITIONS",
    "UNKNOWN_DRIVER",
    "Cause",
    "Decision",
    "Hook",
    "Hooks",
    "ManagedSession",
    "ReadSession",
    "Replica",
    "Savepoint",
    "State",
    "Turn",
    "_before_header",
    "_covers",
    "_kind",
    "bounded",
    "by_free_connections",
    "code_of",
    "commit_below_400",
    "concurrency",
    "current",
    "decide_exit",
    "decide_response",
    "dialects",
    "driver_of",
    "engine_defaults",
    "exception_cause",
    "is_conflict",
    "is_driver_disconnect",
    "is_lost",
    "is_memory",
    "is_unavailable",
    "make_unit",
    "name_of",
    "position",
    "read_configuration",
    "rollback",
    "run_to_completion",
    "wait_for",
]


def make_unit(*databases: Database) -> UnitOfWork:
    """Make a unit of work that no request and no block has entered."""
    return UnitOfWork(databases, Settings())


SQLITE_CONNECTION = "asgi_uow._databases.sqlite_connection"
"""The module that imports aiosqlite."""
