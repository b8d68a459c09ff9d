"""The units of work around one: what they wrote and what they hold concerns it too."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from asgi_uow._databases.engines import Engines
    from asgi_uow._unit.unit import UnitOfWork


class Kin:
    """Those around a unit of work.

    `parent`, in which it is nested; `hook_of`, of which it serves a hook; `previous`,
    which was the current one before. `inner` are those that are nested in it.
    """

    __slots__ = ("hook_of", "inner", "parent", "previous")

    def __init__(self, parent: UnitOfWork | None, hook_of: UnitOfWork | None) -> None:
        """Begin beside no other."""
        self.parent: UnitOfWork | None = parent
        self.hook_of: UnitOfWork | None = hook_of
        self.previous: UnitOfWork | None = None
        self.inner: list[UnitOfWork] = []

    def join(self, unit: UnitOfWork) -> None:
        """Have `unit`, whose kin this is, follow the savepoints of its parent."""
        if self.parent is not None:
            self.parent.kin.inner.append(unit)
            self.parent.hooks.inner.append(unit.hooks)

    def leave(self, unit: UnitOfWork) -> None:
        """End that."""
        if self.parent is not None:
            self.parent.kin.inner.remove(unit)
            self.parent.hooks.inner.remove(unit.hooks)

    def __iter__(self) -> Iterator[UnitOfWork]:
        """Give those it is inside of, each once."""
        around = (self.hook_of, self.parent, self.previous)
        return filter(None, dict.fromkeys(around))

    def databases(self) -> Iterator[Engines]:
        """Give the databases of those in which it is nested."""
        unit = self.parent
        while unit is not None:
            yield from unit.databases
            unit = unit.kin.parent

    def serve(self, db: Engines) -> bool:
        """Tell whether one in which it is nested serves `db`."""
        return db in self.databases()

    def have_written(self, db: Engines) -> bool:
        """Tell whether reads of `db` must see what one of them did."""
        return any(unit.has_written(db) for unit in self)

    def hold(self, db: Engines) -> bool:
        """Tell whether one of them holds a connection that another would wait for."""
        return any(held_by(unit, db) for unit in self)


def held_by(unit: UnitOfWork, db: Engines) -> bool:
    """Tell whether `unit` holds a connection that another waits for, or one around."""
    return unit.holds(db) or unit.kin.hold(db)
