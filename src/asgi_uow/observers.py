"""What happened, for logs, metrics and error trackers.

An observer is any callable that takes one event. It is called in the event loop and
should return soon; what it raises is logged and changes nothing. The default is one
`LoggingObserver`: `UnitOfWorkMiddleware(app, db, observers=(LoggingObserver(), mine))`.
"""

from __future__ import annotations

import dataclasses
import enum
import logging
from typing import TYPE_CHECKING, Protocol

from asgi_uow._events import (
    CommitFailed,
    ConnectionReleased,
    Event,
    HeldIdle,
    HookFailed,
    HookFinished,
    HookStarted,
    ImplicitCommit,
    ReaderBehind,
    ReaderFailed,
    ReaderRestored,
    ReleaseFailed,
    RetryScheduled,
    Statements,
    Step,
    UnitClosed,
    UnitFinished,
    UnitStarted,
    Usage,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = [
    "CommitFailed",
    "ConnectionReleased",
    "Event",
    "HeldIdle",
    "HookFailed",
    "HookFinished",
    "HookStarted",
    "ImplicitCommit",
    "LoggingObserver",
    "Observer",
    "ReaderBehind",
    "ReaderFailed",
    "ReaderRestored",
    "ReleaseFailed",
    "RetryScheduled",
    "Statements",
    "Step",
    "UnitClosed",
    "UnitFinished",
    "UnitStarted",
    "Usage",
]

logger: logging.Logger = logging.getLogger("asgi_uow")


class Observer(Protocol):
    """Anything that can be called with one event."""

    def __call__(self, event: Event, /) -> object: ...


_UNIT = (
    "unit of work %(outcome)s in %(seconds).4f s (%(request)s, cause: %(cause)s, "
    "reason: %(reason)s, databases: %(databases)s)"
)
_COMMIT = (
    "unit of work not kept: %(request)s, %(outcome)s, cause %(cause)s, driver code "
    "%(code)s"
)
_IDLE = (
    "a connection to %(database)s was held for %(seconds).1f s while nothing was "
    "executed; waiting at %(place)s. Others may be waiting for it: finish slow calls "
    "before the first statement, or do them after the commit, as the how-to `Slow "
    "calls` shows"
)
_AGAIN = (
    "attempt %(attempt)d begins in %(seconds).3f s, after %(error)s, "
    "driver code %(code)s"
)
_FAILED = "reader %(database)s is left alone for %(seconds).1f s after %(error)s"
# What is logged of an event; the others are beginnings, or what went well.
LINES: Mapping[type[Event], tuple[int, str]] = {
    UnitFinished: (logging.DEBUG, _UNIT),
    CommitFailed: (logging.ERROR, _COMMIT),
    HeldIdle: (logging.WARNING, _IDLE),
    RetryScheduled: (logging.INFO, _AGAIN),
    HookFailed: (logging.ERROR, "%(phase)s hook %(hook)s failed"),
    ImplicitCommit: (logging.ERROR, "committed in the middle of a unit: %(statement)s"),
    ReleaseFailed: (logging.ERROR, "%(operation)s failed; the connection was dropped"),
    ReaderFailed: (logging.WARNING, _FAILED),
    ReaderRestored: (logging.INFO, "reader %(database)s is used again"),
    ReaderBehind: (logging.DEBUG, "reader %(database)s was behind for %(seconds).1f s"),
}


class LoggingObserver:
    """Logs failures at ERROR to `asgi_uow` or another logger, with the traceback.

    Of a `CommitFailed` the traceback is logged at DEBUG alone: its error is raised, and
    the server, or whoever handles it, logs that. `HeldIdle` and
    `ReaderFailed` are logged at WARNING, `ReaderRestored` and `RetryScheduled` at INFO,
    `UnitFinished` and `ReaderBehind` at DEBUG, and nothing else.
    """

    def __init__(self, log: logging.Logger = logger) -> None:
        self.log = log

    @property
    def logs_outcomes(self) -> bool:
        """Whether `UnitFinished` is logged at all."""
        return self.log.isEnabledFor(logging.DEBUG)

    def __call__(self, event: Event, /) -> None:
        level, line = LINES.get(type(event), (logging.NOTSET, ""))
        if line and self.log.isEnabledFor(level):
            error = getattr(event, "error", None) if level >= logging.ERROR else None
            names = [each.name for each in dataclasses.fields(event) if each.repr]
            values = {name: _shown(getattr(event, name)) for name in names}
            if isinstance(event, CommitFailed | UnitFinished):
                request = f"{values['method']} {values['path']}"
                is_none = event.path is None
                values["request"] = "outside of requests" if is_none else request
            info = None if error is None else (type(error), error, error.__traceback__)
            about = self.log.name, level, __file__, 0, line, (values,), info
            record = self.log.makeRecord(*about)
            # What handlers write: of an error that is raised as well, what it says.
            is_raised = isinstance(event, CommitFailed) and not self.logs_outcomes
            record.exc_text = str(error) if is_raised else event.trace()
            self.log.handle(record)


def _shown(value: object) -> object:
    if isinstance(value, BaseException):
        return type(value).__qualname__  # a message may hold data
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, str) and not value.isprintable():
        return ascii(value)  # it may not end a line
    return value.value if isinstance(value, enum.Enum) else value


def notify(observers: Iterable[Observer], event: Event) -> None:
    """Call every observer; one that raises is logged and stops nobody."""
    for observer in observers:
        try:
            observer(event)
        except Exception:
            logger.exception("observer %r failed on %s", observer, type(event).__name__)
