"""What a unit of work is told from outside, and who is told of it."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, TypeAlias

from asgi_uow._databases.driver_errors import stacktrace_of
from asgi_uow.observers import LoggingObserver, notify

if TYPE_CHECKING:
    from collections.abc import Callable

    from asgi_uow.observers import Event, Observer

    Inspector: TypeAlias = Callable[[], Observer | None]

inspectors: list[Inspector] = []
"""Set by `asgi_uow.inspector`: references to what is told of every unit."""


@dataclasses.dataclass(frozen=True)
class UnitOptions:
    """Those of a middleware or a block; times in seconds, None is no limit."""

    observers: tuple[Observer, ...] = (LoggingObserver(),)
    commit_timeout: float | None = 30.0
    hook_timeout: float | None = 5.0
    held_idle: float | None = 1.0
    server_timing: bool = False

    @property
    def wants_figures(self) -> bool:
        """Whether somebody asks for beginnings, successes and what a unit does."""
        if self.server_timing or inspectors:
            return True
        for each in self.observers:
            if type(each) is not LoggingObserver or each.logs_outcomes:
                return True
        return False

    def tell(self, event: Event) -> None:
        if (error := getattr(event, "error", None)) is not None:
            show = functools.partial(stacktrace_of, error)
            event = dataclasses.replace(event, trace=show)
        watching = [inspector() for inspector in inspectors]
        notify((*self.observers, *(it for it in watching if it is not None)), event)
