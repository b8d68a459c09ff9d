"""What happened, for logs, metrics and error trackers.

An observer is any callable that takes one event; events are frozen and of the
types below. It is called in the event loop and should return soon. What it raises
is logged and changes nothing.

`UnitOfWorkMiddleware(app, db, observers=(LoggingObserver(), mine))` replaces the
default, which is one `LoggingObserver`.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ._states import Cause, Outcome

__all__ = [
    "CommitFailed",
    "Event",
    "HookFailed",
    "ImplicitCommit",
    "LoggingObserver",
    "Observer",
    "ReleaseFailed",
    "UnitFinished",
]

logger: logging.Logger = logging.getLogger("asgi_uow")


@dataclasses.dataclass(frozen=True, slots=True)
class UnitFinished:
    """A unit of work that opened a session or registered a hook was decided."""

    outcome: Outcome
    cause: Cause | None
    """None when committed."""
    reason: str | None
    """What `set_rollback_only(reason)` was given."""
    databases: tuple[str, ...]
    """The databases whose write session executed something, without passwords."""
    seconds: float
    """From opening the unit to its outcome."""


@dataclasses.dataclass(frozen=True, slots=True)
class CommitFailed:
    """A commit was wanted and the work was not kept, or may not have been."""

    error: Exception
    """An `asgi_uow.errors.UnitOfWorkFailedError`."""
    outcome: Outcome
    cause: Cause
    code: str | int | None
    """The driver's code of the error underneath: SQLSTATE, errno or SQLite name."""


@dataclasses.dataclass(frozen=True, slots=True)
class HookFailed:
    """A hook raised or took longer than `hook_timeout`; the others still ran."""

    phase: str
    """`after_commit`, `after_rollback` or `after_response`."""
    hook: str
    """The qualified name of the callable."""
    error: BaseException
    """What it raised; a `TimeoutError` when it took too long."""


@dataclasses.dataclass(frozen=True, slots=True)
class ReleaseFailed:
    """A connection could not be rolled back or closed; it was thrown away."""

    operation: str
    error: BaseException


@dataclasses.dataclass(frozen=True, slots=True)
class ImplicitCommit:
    """MySQL committed in the middle of a unit because of DDL; it cannot be undone."""

    statement: str
    """The statement, without its parameters."""


Event: TypeAlias = (
    UnitFinished | CommitFailed | HookFailed | ReleaseFailed | ImplicitCommit
)


class Observer(Protocol):
    """Anything that can be called with one event."""

    def __call__(self, event: Event, /) -> object:
        """Take note of the event."""


class LoggingObserver:
    """Writes every event to the logger `asgi_uow`, or to another one.

    `UnitFinished` is logged at DEBUG, everything else at ERROR, with the traceback
    where there is one.
    """

    def __init__(self, log: logging.Logger = logger) -> None:
        """Log to `log`."""
        self.log = log

    def __call__(self, event: Event, /) -> None:
        """Write one line, with a traceback for a failure."""
        match event:
            case UnitFinished():
                self.log.debug(
                    "unit of work %s in %.4f s (cause: %s, reason: %s, databases: %s)",
                    event.outcome.value,
                    event.seconds,
                    event.cause and event.cause.value,
                    event.reason,
                    ", ".join(event.databases) or "none",
                )
            case CommitFailed():
                self.log.error(
                    "unit of work not kept: %s, cause %s, driver code %s",
                    event.outcome.value,
                    event.cause.value,
                    event.code,
                    exc_info=event.error,
                )
            case HookFailed():
                self.log.error(
                    "%s hook %s failed",
                    event.phase,
                    event.hook,
                    exc_info=event.error,
                )
            case ImplicitCommit():
                self.log.error(
                    "the database committed in the middle of a unit of work: %s",
                    event.statement,
                )
            case _:
                self.log.error(
                    "%s failed; the connection was thrown away",
                    event.operation,
                    exc_info=event.error,
                )


def notify(observers: Iterable[Observer], event: Event) -> None:
    """Call every observer; one that raises is logged and stops nobody."""
    for observer in observers:
        try:
            observer(event)
        except Exception:
            logger.exception("observer %r failed on %s", observer, type(event).__name__)
