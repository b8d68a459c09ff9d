"""States, outcomes, causes, and the decision: commit or roll back. Pure, no I/O."""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from collections.abc import Set as AbstractSet
    from typing import TypeAlias

    Headers: TypeAlias = list[tuple[bytes, bytes]]
    CommitWhen: TypeAlias = Callable[[int, Headers], bool]

REDIRECT_STATUS, ERROR_STATUS, SERVER_ERROR = 300, 400, 500


class Outcome(enum.Enum):
    """What became of a unit of work."""

    COMMITTED = "committed"
    """The database acknowledged COMMIT, or there was nothing to commit."""
    ROLLED_BACK = "rolled back"
    """Nothing was kept, and that is proven."""
    UNKNOWN = "unknown"
    """COMMIT was not answered, or something else has ended the transaction."""
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


# An enum's own hash is a Python function, and these are looked up often.
State.__hash__ = Outcome.__hash__ = object.__hash__  # type: ignore[method-assign]

# A member is looked up by the enum's own class, which takes long.
NEW, ACTIVE, ROLLBACK_ONLY, PREPARING, COMMITTING, ROLLING_BACK = tuple(State)[:6]
RESPONDING, CLOSED = State.RESPONDING, State.CLOSED

UNDECIDED = frozenset({NEW, ACTIVE, ROLLBACK_ONLY})
WRITABLE = UNDECIDED | {PREPARING}
STATE_OF = {outcome: State[outcome.name] for outcome in Outcome}
SETTLED = frozenset(STATE_OF.values())

_ENDS = {PREPARING, ROLLING_BACK}
# Every permitted step; `UnitOfWork` refuses any other.
TRANSITIONS: Mapping[State, AbstractSet[State]] = {
    NEW: {ACTIVE, ROLLBACK_ONLY, *_ENDS},
    ACTIVE: {ROLLBACK_ONLY, *_ENDS},
    ROLLBACK_ONLY: {ROLLING_BACK},
    PREPARING: {COMMITTING, ROLLING_BACK},
    COMMITTING: SETTLED,
    ROLLING_BACK: {State.ROLLED_BACK, State.PARTIAL, State.UNKNOWN},
    **{settled: {RESPONDING, CLOSED} for settled in SETTLED},
    RESPONDING: {CLOSED},
    CLOSED: set(),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    commit: bool
    cause: Cause | None = None
    replace_response: bool = False  # it claims a success that is not so


COMMIT = Decision(commit=True)


def rollback(cause: Cause, *, replace_response: bool = False) -> Decision:
    return Decision(commit=False, cause=cause, replace_response=replace_response)


def commit_below_400(status: int, headers: Headers) -> bool:  # noqa: ARG001
    """Commit for a 1xx, 2xx or 3xx response: the default of `commit_when`."""
    return status < ERROR_STATUS


def decide_response(  # the whole rule in one place
    *,
    status: int,
    headers: Headers,
    rollback_only: bool,
    doomed: bool,
    forced: bool,
    commit_when: CommitWhen,
) -> Decision:
    """Decide at the first `http.response.start`; the first match wins.

    1. `set_rollback_only(reason)`: roll back, the response stays as it is.
    2. Doomed by the database: roll back; a response below 400 is replaced by an
       error, one at or above 400 stays as it is.
    3. `force_commit()`: commit, whatever the status.
    4. `commit_when(status, headers)`.
    """
    if rollback_only:
        return rollback(Cause.EXPLICIT)
    if doomed:
        return rollback(Cause.DOOMED, replace_response=status < ERROR_STATUS)
    if forced or commit_when(status, headers):
        return COMMIT
    return rollback(Cause.STATUS)


def decide_exit(
    error: BaseException | None,
    *,
    rollback_only: bool,
    doomed: bool,
    forced: bool,
    commit_on_exit: bool,
) -> Decision:
    """Decide at the end of `async with db:`; the first match wins.

    1. `set_rollback_only(reason)`: roll back.
    2. Doomed by the database: roll back, and raise unless a failure is raised anyway.
    3. An exception rolls back, unless it carries a `status_code` (or `status`) from
       300 to 399, as redirects do that frameworks raise.
    4. `force_commit()` or `commit_on_exit`: commit.
    """
    if rollback_only:
        return rollback(Cause.EXPLICIT)
    if doomed:
        claims_success = error is None or _is_redirect(error)
        return rollback(Cause.DOOMED, replace_response=claims_success)
    if error is not None and not _is_redirect(error):
        return rollback(exception_cause(error))
    if forced or commit_on_exit:
        return COMMIT
    return rollback(Cause.EXPLICIT)


def exception_cause(error: BaseException) -> Cause:
    """Tell a cancellation (and other non-`Exception`s) from a failure."""
    return Cause.EXCEPTION if isinstance(error, Exception) else Cause.CANCELLED


def _is_redirect(error: BaseException) -> bool:
    status: object = getattr(error, "status_code", getattr(error, "status", None))
    return isinstance(status, int) and REDIRECT_STATUS <= status < ERROR_STATUS
