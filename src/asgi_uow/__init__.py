"""One SQLAlchemy unit of work per request, committed before the response leaves."""

from __future__ import annotations

from asgi_uow._databases.health import Health, ServerHealth
from asgi_uow._databases.keys import idempotency_table
from asgi_uow._decision import Outcome
from asgi_uow._entrypoints.accessors import (
    after_commit,
    after_response,
    after_rollback,
    before_commit,
    current_read_session,
    current_session,
    current_unit_of_work,
    deferred,
    force_commit,
    in_unit_of_work,
    isolation_level,
    parallel_read,
    read_session_dependency,
    savepoint,
    session_dependency,
    set_rollback_only,
)
from asgi_uow._entrypoints.idempotency import Idempotency
from asgi_uow._entrypoints.middleware import UnitOfWorkMiddleware
from asgi_uow._entrypoints.replay import Retry
from asgi_uow._reading.causal import CausalReads
from asgi_uow._sessions.session import Session
from asgi_uow._unit.block import unit_of_work
from asgi_uow._unit.unit import UnitOfWork
from asgi_uow.database import Database

__all__ = [
    "CausalReads",
    "Database",
    "Health",
    "Idempotency",
    "Outcome",
    "Retry",
    "ServerHealth",
    "Session",
    "UnitOfWork",
    "UnitOfWorkMiddleware",
    "after_commit",
    "after_response",
    "after_rollback",
    "before_commit",
    "current_read_session",
    "current_session",
    "current_unit_of_work",
    "deferred",
    "force_commit",
    "idempotency_table",
    "in_unit_of_work",
    "isolation_level",
    "parallel_read",
    "read_session_dependency",
    "savepoint",
    "session_dependency",
    "set_rollback_only",
    "unit_of_work",
]
