"""The private names that tests use, in one place: to rename one is a change here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asgi_uow import _concurrency as concurrency
from asgi_uow._concurrency import Shield, TaskLock, bounded, run_to_completion
from asgi_uow._databases.configuration import read as read_configuration
from asgi_uow._databases.driver_errors import code_of, means
from asgi_uow._databases.fair_queue import FairQueue, make_fair
from asgi_uow._databases.health import LONGEST_PAUSE, Replica, by_free_connections
from asgi_uow._databases.known import driver_of
from asgi_uow._databases.loops import SetUpLock, derive_engine, pool_states
from asgi_uow._databases.pool import IDLE_SINCE
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
from asgi_uow._reading.causal import LONGEST_TOKEN, READ_FROM_WRITER, MustSee
from asgi_uow._sessions.managed import ManagedSession
from asgi_uow._sessions.read_session import ReadSession
from asgi_uow._sessions.session import Savepoint
from asgi_uow._unit.finish import finish, release
from asgi_uow._unit.hooks import (
    MOST_BY_HOOKS,
    Hook,
    Hooks,
    check_callable,
    name_of,
)
from asgi_uow._unit.hooks import _call_in_thread as call_in_thread
from asgi_uow._unit.hooks import _threads as threads_of_hooks
from asgi_uow._unit.options import UnitOptions, inspected
from asgi_uow._unit.unit import current
from asgi_uow._unit.unit import make_unit as make

if TYPE_CHECKING:
    from asgi_uow import Database, UnitOfWork

PHASES = ("before_commit", "after_commit", "after_rollback", "after_response")

__all__ = [
    "COMMIT",
    "IDLE_SINCE",
    "LONGEST_PAUSE",
    "LONGEST_TOKEN",
    "MOST_BY_HOOKS",
    "PHASES",
    "READ_FROM_WRITER",
    "SQLITE_CONNECTION",
    "TRANSITIONS",
    "Cause",
    "Decision",
    "FairQueue",
    "Hook",
    "Hooks",
    "ManagedSession",
    "MustSee",
    "ReadSession",
    "Replica",
    "Savepoint",
    "SetUpLock",
    "Shield",
    "State",
    "TaskLock",
    "bounded",
    "by_free_connections",
    "call_in_thread",
    "check_callable",
    "code_of",
    "commit_below_400",
    "concurrency",
    "current",
    "decide_exit",
    "decide_response",
    "derive_engine",
    "driver_of",
    "exception_cause",
    "finish",
    "inspected",
    "make_fair",
    "make_unit",
    "means",
    "name_of",
    "pool_states",
    "read_configuration",
    "release",
    "rollback",
    "run_to_completion",
    "threads_of_hooks",
]

SQLITE_CONNECTION = "asgi_uow._databases.sqlite_connection"
"""The module that imports aiosqlite."""


def make_unit(*databases: Database) -> UnitOfWork:
    """Make a unit of work that nobody has entered."""
    return make(databases, UnitOptions())
