"""What a unit of work is told from outside, and who is told of it."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

from asgi_uow._databases.driver_errors import stacktrace_of
from asgi_uow.observers import LoggingObserver, notify

if TYPE_CHECKING:
    from asgi_uow.observers import Event, Observer


@dataclasses.dataclass(frozen=True)
class UnitOptions:
    """Those of a middleware or a block; times in seconds, None is no limit."""

    observers: tuple[Observer, ...] = (LoggingObserver(),)
    commit_timeout: float | None = 30.0
    hook_timeout: float | None = 5.0

    @functools.cached_property
    def wants_details(self) -> bool:
        """Whether an observer wants beginnings and successes, which nobody logs."""
        return any(type(each) is not LoggingObserver for each in self.observers)

    @property
    def wants_outcomes(self) -> bool:
        for each in self.observers:
            if type(each) is not LoggingObserver or each.logs_outcomes:
                return True
        return False

    def tell(self, event: Event) -> None:
        if (error := getattr(event, "error", None)) is not None:
            show = functools.partial(stacktrace_of, error)
            event = dataclasses.replace(event, trace=show)
        notify(self.observers, event)
