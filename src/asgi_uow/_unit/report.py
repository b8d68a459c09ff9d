"""What the observers are told of one unit of work, and when."""

from __future__ import annotations

import dataclasses
import time
import weakref
from typing import TYPE_CHECKING

from asgi_uow._databases import driver_errors as _driver_errors
from asgi_uow.observers import CommitFailed, UnitFinished, UnitStarted, notify

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from asgi_uow._databases.engines import Engines
    from asgi_uow._decision import Cause, Outcome
    from asgi_uow._unit.unit import UnitOfWork
    from asgi_uow.errors import UnitOfWorkFailedError
    from asgi_uow.observers import Event, Observer


class Report:
    """Collects the events of a unit until the task of its request can tell them.

    Sentry's own ASGI middleware drops what was reported in another context before.
    The events of a hook's unit are among those of the unit that it is a hook of.
    """

    __slots__ = (
        "_ending",
        "_is_of_hook",
        "_observers",
        "_opened",
        "_started",
        "_unit",
        "events",
    )

    def __init__(
        self,
        unit: UnitOfWork,
        observers: Sequence[Observer],
    ) -> None:
        """Start with nothing to tell."""
        hook_of = unit.kin.hook_of
        self._unit = weakref.ref(unit)
        self._observers = observers
        self._is_of_hook = hook_of is not None
        self.events: list[Event] = [] if hook_of is None else hook_of.report.events
        self._started = False
        self._opened = self._ending = time.perf_counter()

    def start(self) -> None:
        """Tell, once and at once, that the unit was asked for something."""
        if not self._started:
            self._started = True
            notify(self._observers, UnitStarted(unit=self._unit()))

    def end(self) -> None:
        """Note that the end of the unit begins."""
        self._ending = time.perf_counter()

    def add(self, event: Event) -> None:
        """Have an event told once the end is over."""
        self.events.append(dataclasses.replace(event, unit=self._unit()))

    def failed(self, failure: UnitOfWorkFailedError, outcome: Outcome) -> None:
        """Add a failed commit; that of a hook's own unit is the failure of the hook."""
        if not self._is_of_hook:
            code = _driver_errors.code_of(failure.__cause__)
            self.add(CommitFailed(failure, outcome, failure.cause, code))

    def finished(
        self,
        outcome: Outcome,
        cause: Cause | None,
        reason: str | None,
        databases: Iterable[Engines],
    ) -> None:
        """Add the outcome of a unit that was asked for something."""
        if self._started:
            now = time.perf_counter()
            seconds, ending = now - self._opened, now - self._ending
            names = tuple(db.name for db in databases)
            self.add(UnitFinished(outcome, cause, reason, names, seconds, ending))

    def tell(self) -> None:
        """Tell the observers, in the task and context of the request."""
        while self.events and not self._is_of_hook:
            notify(self._observers, self.events.pop(0))
