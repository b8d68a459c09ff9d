"""See what a test has the application do: hooks, statements, connections."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Self

from sqlalchemy import event
from sqlalchemy.engine.base import OptionEngine

from asgi_uow._concurrency import Shield
from asgi_uow._databases import loops
from asgi_uow._databases.engines import check_databases
from asgi_uow._testing.sandbox import here
from asgi_uow._unit import hook_units
from asgi_uow._unit.finish import end_unit
from asgi_uow._unit.hook_units import HookRun
from asgi_uow.observers import HookFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

    from asgi_uow._databases.engines import Engines
    from asgi_uow._unit.hooks import Hook
    from asgi_uow._unit.unit import UnitOfWork


@dataclasses.dataclass(frozen=True)
class CapturedHook:
    """A hook that would have been called: in which phase, and with what."""

    phase: str
    fn: Callable[..., object]
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    _unit: UnitOfWork = dataclasses.field(repr=False, compare=False)
    _hook: Hook = dataclasses.field(repr=False, compare=False)

    async def execute(self) -> None:
        """Call it as its unit would have; raises what it raises."""
        shared = self._unit.share()
        told = len(shared.events)
        run = HookRun(self._unit, self.phase, [self._hook], end_unit)
        await run.run(Shield())
        for each in shared.events[told:]:
            if isinstance(each, HookFailed):
                raise each.error


class capture_hooks(list[CapturedHook]):  # noqa: N801  # used like a function
    """The hooks that would be called, in place of their calls: a list of them.

    `with capture_hooks() as hooks:`, or `async with capture_hooks(execute=True)`, which
    calls at its end those of commits. Concerns this sandbox, or what is in none.
    `before_commit` hooks are part of the transaction and called as ever.
    """

    _active: ClassVar[list[capture_hooks]] = []

    def __init__(self, *, execute: bool = False) -> None:
        super().__init__()
        self._execute, self._of = execute, here()

    def of(self, phase: str) -> list[CapturedHook]:
        """Give those of one phase, such as "after_commit"."""
        return [each for each in self if each.phase == phase]

    def __enter__(self) -> Self:
        """Capture from now on."""
        if self._execute:
            message = "execute=True needs `async with`: hooks are called in a loop."
            raise TypeError(message)
        return self._begin()

    def __exit__(self, *_: object) -> None:
        """Have hooks called again."""
        self._active[:] = [each for each in self._active if each is not self]

    async def __aenter__(self) -> Self:
        """Capture from now on."""
        return self._begin()

    async def __aexit__(self, exc_type: object, *_: object) -> None:
        """Have hooks called again; with `execute`, call those captured."""
        self.__exit__()
        for each in self if self._execute and exc_type is None else ():
            await each.execute()

    def _begin(self) -> Self:
        hook_units.capture = self._capture
        self._active.append(self)
        return self

    @classmethod
    def _capture(cls, phase: str, unit: UnitOfWork, hook: Hook) -> bool:
        mine = [each for each in cls._active if each._of is here()]  # noqa: SLF001
        if not mine or phase == "before_commit":
            return False
        told = phase, hook.fn, hook.args, hook.kwargs, unit, hook
        mine[-1].append(CapturedHook(*told))
        return True


class Statements(list[str]):
    """What was sent through SQLAlchemy, in order; `len()` is how many statements."""

    def __repr__(self) -> str:
        lines = (f"{number:3}. {text}" for number, text in enumerate(self, 1))
        return "\n".join((f"{len(self)} statements", *lines))


@contextmanager
def count_statements(db: Engines, expected: int | None = None) -> Generator[Statements]:
    """Count what is executed inside the `with` block; gives the list.

    Of writer and readers, in this sandbox or outside of any; BEGIN and COMMIT are none.
    With `expected`, the end of the block raises `AssertionError` with the list.
    """
    check_databases("count_statements(db)", (db,))
    found, mine = Statements(), here()

    def note(_: Any, __: Any, statement: str, *___: Any) -> None:
        if here() is mine:
            found.append(statement)

    readers = (each.sync_engine for each in db.readers)
    # Those derived from the writer's engine have its listeners.
    own = (each for each in readers if not isinstance(each, OptionEngine))
    engines = (db.engine.sync_engine, *own)
    for each in engines:
        event.listen(each, "before_cursor_execute", note)
    try:
        yield found
    finally:
        for each in engines:
            event.remove(each, "before_cursor_execute", note)
    if expected is not None and len(found) != expected:
        message = f"{expected} statements expected, but there were {found}"
        raise AssertionError(message)


def assert_no_connection_held(db: Engines) -> None:
    """Raise `AssertionError` if a connection of `db` is in use, in whatever loop."""
    check_databases("assert_no_connection_held(db)", (db,))
    pools: list[Any] = []
    for root in (loops.attach(each.sync_engine) for each in db.engines):
        pools += root.pools.values() if here() is None else (root.pool,)
    if held := sum(getattr(pool, "checkedout", int)() for pool in pools):
        message = f"{held} of the connections to {db.name} are in use: leave the "
        message += "blocks and close the streams that are open before."
        raise AssertionError(message)
