"""The words of a unit of work: its states, its outcome and the cause of a rollback."""

from __future__ import annotations

import enum
from types import MappingProxyType


class Outcome(enum.Enum):
    """What became of a unit of work."""

    COMMITTED = "committed"
    """The database acknowledged COMMIT, or there was nothing to commit."""

    ROLLED_BACK = "rolled back"
    """Nothing was kept, and that is proven."""

    UNKNOWN = "unknown"
    """The connection died between sending COMMIT and its answer."""

    PARTIAL = "partial"
    """One database committed, a later one of the same unit did not."""


class Cause(enum.Enum):
    """Why a unit of work was not committed."""

    EXCEPTION = "exception"
    STATUS = "status"
    EXPLICIT = "explicit"
    DOOMED = "doomed"
    BEFORE_COMMIT = "before_commit"
    COMMIT_FAILED = "commit_failed"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"
    ABANDONED = "abandoned"


class State(enum.Enum):
    """Where in its life a unit of work is."""

    NEW = "new"
    ACTIVE = "active"
    ROLLBACK_ONLY = "rollback-only"
    PREPARING = "preparing"
    COMMITTING = "committing"
    ROLLING_BACK = "rolling back"
    COMMITTED = "committed"
    ROLLED_BACK = "rolled back"
    UNKNOWN = "unknown"
    PARTIAL = "partial"
    RESPONDING = "responding"
    CLOSED = "closed"


UNDECIDED = frozenset({State.NEW, State.ACTIVE, State.ROLLBACK_ONLY})
WRITABLE = UNDECIDED | {State.PREPARING}
SETTLED = frozenset(
    {State.COMMITTED, State.ROLLED_BACK, State.UNKNOWN, State.PARTIAL},
)

TRANSITIONS = MappingProxyType(
    {
        State.NEW: {
            State.ACTIVE,
            State.ROLLBACK_ONLY,
            State.PREPARING,
            State.ROLLING_BACK,
        },
        State.ACTIVE: {State.ROLLBACK_ONLY, State.PREPARING, State.ROLLING_BACK},
        State.ROLLBACK_ONLY: {State.ROLLING_BACK},
        State.PREPARING: {State.COMMITTING, State.ROLLING_BACK},
        State.COMMITTING: SETTLED,
        State.ROLLING_BACK: {State.ROLLED_BACK, State.PARTIAL},
        State.COMMITTED: {State.RESPONDING, State.CLOSED},
        State.ROLLED_BACK: {State.RESPONDING, State.CLOSED},
        State.UNKNOWN: {State.RESPONDING, State.CLOSED},
        State.PARTIAL: {State.RESPONDING, State.CLOSED},
        State.RESPONDING: {State.CLOSED},
        State.CLOSED: frozenset(),
    },
)
"""Every permitted step; `UnitOfWork` refuses any other."""
