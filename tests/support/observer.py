"""An observer that keeps what it is told."""

from __future__ import annotations

from typing import TypeVar

from asgi_uow.observers import (
    CommitFailed,
    Event,
    HookFailed,
    ImplicitCommit,
    ReleaseFailed,
    UnitFinished,
)

T = TypeVar("T")
RESULTS = (CommitFailed, HookFailed, ImplicitCommit, ReleaseFailed, UnitFinished)


class Events(list[Event]):
    """What was told, in order; to be called with the next event."""

    def __call__(self, event: Event, /) -> None:
        self.append(event)

    @property
    def kinds(self) -> list[str]:
        return [type(each).__name__ for each in self]

    @property
    def results(self) -> list[Event]:
        """What came out, without beginnings, hooks and connections."""
        return [each for each in self if isinstance(each, RESULTS)]

    def of(self, kind: type[T]) -> list[T]:
        return [each for each in self if isinstance(each, kind)]

    def only(self, kind: type[T]) -> T:
        """Give the only event of a kind."""
        [event] = self.of(kind)
        return event
