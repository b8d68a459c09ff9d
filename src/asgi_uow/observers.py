"""What happened, for logs, metrics and error trackers.

An observer is any callable that takes one event; events are frozen and of the
types below. It is called in the event loop and should return soon. What it raises
is logged and changes nothing.

`UnitOfWorkMiddleware(app, db, observers=(LoggingObserver(), mine))` replaces the
default, which is one `LoggingObserver`.
"""

from __future__ import annotations

import dataclasses
import enum
import logging
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from ._events import (
    CommitFailed,
    ConnectionReleased,
    Event,
    HookFailed,
    HookFinished,
    HookStarted,
    ImplicitCommit,
    ReaderBehind,
    ReaderFailed,
    ReaderRestored,
    ReleaseFailed,
    RetryScheduled,
    UnitFinished,
    UnitStarted,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = [
    "CommitFailed",
    "ConnectionReleased",
    "Event",
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
    "UnitFinished",
    "UnitStarted",
]

logger: logging.Logger = logging.getLogger("asgi_uow")


class Observer(Protocol):
    """Anything that can be called with one event."""

    def __call__(self, event: Event, /) -> object:
        """Take note of the event."""


LINES: Mapping[type[object], tuple[int, str]] = MappingProxyType(
    {
        UnitFinished: (
            logging.DEBUG,
            (
                "unit of work %(outcome)s in %(seconds).4f s (cause: %(cause)s, "
                "reason: %(reason)s, databases: %(databases)s)"
            ),
        ),
        CommitFailed: (
            logging.ERROR,
            "unit of work not kept: %(outcome)s, cause %(cause)s, driver code %(code)s",
        ),
        HookFailed: (logging.ERROR, "%(phase)s hook %(hook)s failed"),
        ImplicitCommit: (
            logging.ERROR,
            "the database committed in the middle of a unit of work: %(statement)s",
        ),
        ReleaseFailed: (
            logging.ERROR,
            "%(operation)s failed; the connection was thrown away",
        ),
        ReaderFailed: (
            logging.WARNING,
            "reader %(database)s is left alone for %(seconds).1f s after %(error)s",
        ),
        ReaderRestored: (logging.INFO, "reader %(database)s is used again"),
        ReaderBehind: (
            logging.DEBUG,
            "reader %(database)s was behind for more than %(seconds).1f s",
        ),
        RetryScheduled: (
            logging.WARNING,
            "attempt %(attempt)d in %(seconds).3f s, after %(error)s",
        ),
    }
)
"""What is logged of an event; the others are beginnings, or what went well."""


class LoggingObserver:
    """Writes every event to the logger `asgi_uow`, or to another one.

    `UnitFinished` is logged at DEBUG, `RetryScheduled` at WARNING, failures at ERROR,
    with the traceback where there is one. What else is told is not logged.
    """

    def __init__(self, log: logging.Logger = logger) -> None:
        """Log to `log`."""
        self.log = log

    def __call__(self, event: Event, /) -> None:
        """Write one line, with a traceback for a failure."""
        level, line = LINES.get(type(event), (logging.NOTSET, ""))
        if line and self.log.isEnabledFor(level):
            error = getattr(event, "error", None) if level >= logging.ERROR else None
            fields = [each.name for each in dataclasses.fields(event) if each.repr]
            values = {name: _shown(getattr(event, name)) for name in fields}
            self.log.log(level, line, values, exc_info=error)


def _shown(value: object) -> object:
    match value:
        case enum.Enum():
            return value.value
        case tuple():
            return ", ".join(map(str, value)) or "none"
        case BaseException():
            return type(value).__qualname__  # a message may hold data
        case _:
            return value


def notify(observers: Iterable[Observer], event: Event) -> None:
    """Call every observer; one that raises is logged and stops nobody."""
    for observer in observers:
        try:
            observer(event)
        except Exception:
            logger.exception("observer %r failed on %s", observer, type(event).__name__)
