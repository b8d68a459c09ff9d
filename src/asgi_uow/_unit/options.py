"""What a unit of work is told from outside, and who is told of it."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, TypeAlias
from weakref import WeakMethod

from asgi_uow._databases.driver_errors import Redactor
from asgi_uow.observers import LoggingObserver, notify

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self

    from asgi_uow._databases.engines import Engines
    from asgi_uow.observers import Event, Observer

    Inspector: TypeAlias = Callable[[], Observer | None]

inspected: dict[Engines, list[Inspector]] = {}
"""Databases of whose units somebody is told, whatever the observers."""


def inspect(databases: Sequence[Engines], observe: Observer) -> None:
    """Have a method be told of all units of these databases, while its object lives."""

    def forget(inspector: Inspector, db: Engines) -> None:
        inspected[db].remove(inspector)
        if not inspected[db]:
            del inspected[db]

    for db in databases:
        inspector = WeakMethod(observe, functools.partial(forget, db=db))
        inspected.setdefault(db, []).append(inspector)


@dataclasses.dataclass(frozen=True, slots=True)
class UnitOptions:
    """Those of a middleware or a block; times in seconds, None is no limit."""

    observers: tuple[Observer, ...] = (LoggingObserver(),)
    commit_timeout: float | None = 30.0
    hook_timeout: float | None = 5.0
    held_idle: float | None = 1.0
    server_timing: bool = False
    inspectors: tuple[Observer, ...] = ()

    def with_inspectors(self, databases: Sequence[Engines]) -> Self:
        """Give the options of a unit of these databases, and not of one around it."""
        found = (each() for db in databases for each in inspected.get(db, ()))
        inspectors = tuple(dict.fromkeys(each for each in found if each is not None))
        if inspectors == self.inspectors:
            return self
        return dataclasses.replace(self, inspectors=inspectors)

    @property
    def wants_figures(self) -> bool:
        """Whether somebody asks for beginnings, successes and what a unit does."""
        if self.server_timing or self.inspectors:
            return True
        for each in self.observers:
            if type(each) is not LoggingObserver or each.logs_outcomes:
                return True
        return False

    def tell(self, event: Event) -> None:
        if (error := getattr(event, "error", None)) is not None:
            event = dataclasses.replace(
                event, trace=lambda: Redactor(error).stacktrace()
            )
        notify((*self.observers, *self.inspectors), event)
