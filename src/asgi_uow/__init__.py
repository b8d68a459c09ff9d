"""One SQLAlchemy unit of work per request, committed before the response leaves."""

from __future__ import annotations

from ._block import unit_of_work
from ._causal import CausalReads
from ._context import (
    after_commit,
    after_response,
    after_rollback,
    before_commit,
    current_read_session,
    current_session,
    current_unit_of_work,
    deferred,
    force_commit,
    parallel_read,
    read_session_dependency,
    savepoint,
    session_dependency,
    set_rollback_only,
)
from ._health import Health, ServerHealth
from ._middleware import UnitOfWorkMiddleware
from ._session import Session
from ._states import Outcome
from ._unit import UnitOfWork
from .database import Database

__all__ = [
    "CausalReads",
    "Database",
    "Health",
    "Outcome",
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
    "parallel_read",
    "read_session_dependency",
    "savepoint",
    "session_dependency",
    "set_rollback_only",
    "unit_of_work",
]
