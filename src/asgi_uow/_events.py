"""The events that observers are told; `asgi_uow.observers` is where they are public."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

    from asgi_uow._decision import Cause, Outcome


@dataclasses.dataclass(frozen=True, slots=True)
class Statements:
    """How many there were, and their seconds: of all, and of the slowest."""

    count: int = 0
    seconds: float = 0.0
    slowest: float = 0.0

    def __add__(self, other: Statements) -> Statements:
        """Give what both are together."""
        slowest = max(self.slowest, other.slowest)
        return Statements(
            self.count + other.count, self.seconds + other.seconds, slowest
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """What a unit did to one database with its write session, or its read sessions."""

    database: str
    """The URL of the writer, without its password."""
    access: Literal["read", "write"]
    statements: Statements
    """What SQLAlchemy was asked to execute, failed ones and savepoints too; not BEGIN,
    COMMIT, what `on_begin` executes, or what is asgi-uow's own."""
    waited: float
    """Seconds for which connections were waited for, up to BEGIN."""
    held: float
    """Seconds for which connections were held."""
    idle: float
    """Seconds of `held` in which no call was made."""


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One thing in the timeline of a unit."""

    kind: Literal["connection", "statement", "commit", "rollback"]
    """`connection`: the wait for it, up to BEGIN."""
    database: str
    access: Literal["read", "write"]
    start: float
    """Seconds after the unit was opened."""
    seconds: float
    text: str
    """SQL of a statement, with placeholders and without literals; else empty."""
    failed: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What every event has."""

    unit: object = dataclasses.field(default=None, compare=False, repr=False)
    """The unit of work it is about: the same object in all events of one unit."""
    at: int = dataclasses.field(default_factory=time.time_ns, compare=False, repr=False)
    """When it happened, as `time.time_ns()` counts; it may be told later."""
    trace: Callable[[], str] = dataclasses.field(default=str, compare=False, repr=False)
    """Shows the traceback of its error, if there is one, without people's data."""


@dataclasses.dataclass(frozen=True, slots=True)
class UnitStarted(Event):
    """A unit was asked for its first session or hook; told at once, in that task."""


@dataclasses.dataclass(frozen=True, slots=True)
class UnitFinished(Event):
    """A unit that opened a session or registered a hook was decided, or a hook's."""

    outcome: Outcome
    cause: Cause | None
    """None when committed."""
    reason: str | None
    """What `set_rollback_only(reason)` was given."""
    databases: tuple[str, ...]
    """The databases whose write session executed something, without passwords."""
    seconds: float
    """From opening the unit to its outcome."""
    ending: float = 0.0
    """The last part of `seconds`: `before_commit` hooks, flush, COMMIT or ROLLBACK."""
    method: str | None = None
    """Of the request; None outside of requests."""
    path: str | None = None
    """Of the request: the template where the framework tells it; without the query."""
    attempt: int = 1
    replayed: bool = False
    """Whether its idempotency key was used before."""
    usage: tuple[Usage, ...] = ()
    """What was done to each database, by write session and read sessions, so far."""
    hooks: int = 0
    """How many were called until the response could leave, `before_commit` included."""
    hook_seconds: float = 0.0

    @property
    def statements(self) -> Statements:
        """All statements of the unit; see `Usage`."""
        return sum((each.statements for each in self.usage), Statements())

    @property
    def waited(self) -> float:
        """Seconds for which connections were waited for."""
        return sum(each.waited for each in self.usage)

    @property
    def held(self) -> float:
        """Seconds for which connections were held, each counted by itself."""
        return sum(each.held for each in self.usage)

    @property
    def idle(self) -> float:
        """Seconds of `held` in which no call was made."""
        return sum(each.idle for each in self.usage)


@dataclasses.dataclass(frozen=True, slots=True)
class UnitClosed(Event):
    """A unit is over, its response too; told last, and only where an inspector runs."""

    status: int | None
    """Of the response that left; None where none did."""
    response: tuple[float, float] | None
    """When its start left and when its end: seconds after the unit was opened."""
    timeline: tuple[Step, ...]
    """What took time, in the order of its end."""


@dataclasses.dataclass(frozen=True, slots=True)
class HeldIdle(Event):
    """A connection with a transaction is held while nothing is executed; once per unit.

    Told at once, in the context in which the session was asked for.
    """

    seconds: float
    """Since the last call on its session."""
    place: str
    """Where the code that holds it is waiting: file, line and function."""
    database: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class CommitFailed(Event):
    """A commit was wanted and the work was not kept, or may not have been."""

    error: Exception
    """An `asgi_uow.errors.UnitOfWorkFailedError`."""
    outcome: Outcome
    cause: Cause
    code: str | int | None
    """The driver's code of the error underneath: SQLSTATE, errno or SQLite name."""
    method: str | None = None
    path: str | None = None
    """Of the request, as in `UnitFinished`."""


@dataclasses.dataclass(frozen=True, slots=True)
class RetryScheduled(Event):
    """A unit was rolled back for a conflict, and its work is done again; see `Retry`.

    In place of `CommitFailed`, and told for each attempt that is followed by another.
    """

    attempt: int
    """The one that comes; the first of all was 1."""
    seconds: float
    """The pause before it."""
    error: BaseException
    """The first error of the database in the attempt that has failed."""
    code: str | int | None
    """Its code of the driver."""


@dataclasses.dataclass(frozen=True, slots=True)
class HookStarted(Event):
    """A hook is about to be called; told at once, in its own task and context."""

    phase: str
    """`before_commit`, `after_commit`, `after_rollback` or `after_response`."""
    hook: str
    """The qualified name of the callable."""
    of: object = dataclasses.field(default=None, compare=False, repr=False)
    """The unit of work that it was registered for; `unit` is the one it runs in."""


@dataclasses.dataclass(frozen=True, slots=True)
class HookFinished(Event):
    """A hook has returned or raised; told where `HookStarted` was."""

    phase: str
    hook: str
    seconds: float
    error: BaseException | None
    """What it raised; a `CancelledError` when it took too long."""
    of: object = dataclasses.field(default=None, compare=False, repr=False)


@dataclasses.dataclass(frozen=True, slots=True)
class HookFailed(Event):
    """A hook, or the commit of its own session, failed or took too long; once per hook.

    The others still ran. A `before_commit` hook that fails is a `CommitFailed`.
    """

    phase: str
    hook: str
    error: BaseException
    """What it raised; a `TimeoutError` when it took too long."""


@dataclasses.dataclass(frozen=True, slots=True)
class ConnectionReleased(Event):
    """A session gave its connection back after `seconds`, or it was thrown away."""

    database: str
    """The URL of the writer, without its password."""
    access: Literal["read", "write"]
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class ReleaseFailed(Event):
    """A connection could not be rolled back or closed; it was thrown away."""

    operation: str
    error: BaseException


@dataclasses.dataclass(frozen=True, slots=True)
class ImplicitCommit(Event):
    """MySQL committed in the middle of a unit because of DDL; it cannot be undone."""

    statement: str
    """What it was, such as CREATE TABLE; the rest may hold a password."""


@dataclasses.dataclass(frozen=True, slots=True)
class ReaderFailed(Event):
    """A replica failed and is left alone for `seconds`; another server was read."""

    database: str
    """The URL of the replica, without its password."""
    error: Exception
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class ReaderRestored(Event):
    """A read replica that had failed is used again."""

    database: str


@dataclasses.dataclass(frozen=True, slots=True)
class ReaderBehind(Event):
    """A replica did not have in time what the client wrote; another server was read."""

    database: str
    seconds: float
    """How long it was waited for, at most."""
