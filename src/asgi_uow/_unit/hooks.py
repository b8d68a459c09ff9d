"""Hooks: what was registered to happen around the end of a unit of work."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from contextlib import suppress
from operator import attrgetter
from typing import TYPE_CHECKING, TypeAlias

import anyio.to_thread

from asgi_uow.errors import TooManyHooksError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

PHASES = ("before_commit", "after_commit", "after_rollback", "after_response")

MOST_BY_HOOKS = 100
"""How many hooks the hooks of one unit of work may register."""


@dataclasses.dataclass(slots=True)
class Hook:
    """One registered call."""

    fn: Callable[..., object]
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    number: int = dataclasses.field(default=0, compare=False)
    """Its place among the hooks of the unit."""
    dropped: bool = dataclasses.field(default=False, compare=False)
    """Whether its savepoint was rolled back."""

    @property
    def name(self) -> str:
        """The qualified name of the callable; a partial shows what it wraps."""
        return name_of(self.fn)

    async def call(self) -> None:
        """Await an async callable, run any other in a worker thread.

        What a sync callable returns is awaited if it can be, so that
        `lambda: publish(event)` works. A thread that is still running when this is
        cancelled is left alone.
        """
        bound = functools.partial(self.fn, *self.args, **self.kwargs)
        if is_async(self.fn):
            result = bound()
        else:
            result = await anyio.to_thread.run_sync(bound, abandon_on_cancel=True)
        if inspect.isawaitable(result):
            await result


Queues: TypeAlias = "dict[str, list[Hook]]"


class Quota:
    """How many hooks the hooks of one unit may still register, at any depth."""

    __slots__ = ("left",)

    def __init__(self) -> None:
        """Start full."""
        self.left: int = MOST_BY_HOOKS

    def take(self, phase: str) -> None:
        """Take one; raises `TooManyHooksError` when there is none left."""
        if not self.left:
            raise TooManyHooksError(phase, MOST_BY_HOOKS)
        self.left -= 1


class Hooks:
    """The hooks of one unit of work: queues per phase, in frames per savepoint.

    A hook belongs to the innermost savepoint that is open, on whichever database.
    RELEASE hands it on to the savepoint around, keeping its place. Anything else
    drops it, together with what belongs to savepoints opened since; of those only
    the `after_rollback` hooks are left, to be called.
    """

    __slots__ = (
        "_count",
        "_frames",
        "_undone",
        "by_hook",
        "inner",
        "quota",
    )

    def __init__(self, quota: Quota | None = None) -> None:
        """Make empty queues; `quota` is that of the unit whose hook registers here."""
        self.by_hook: bool = quota is not None
        """Whether what registers now is a hook itself."""
        self.quota: Quota = quota or Quota()
        self.inner: list[Hooks] = []
        """Those of the open units inside, which follow the same savepoints."""
        self._undone: list[tuple[object, Hook]] = []
        self._count = 0
        self._frames: list[tuple[object, Queues]] = [(None, {})]

    def __bool__(self) -> bool:
        """Tell whether anything was registered."""
        return bool(self._undone) or any(queues for _, queues in self._frames)

    def register(
        self,
        phase: str,
        fn: object,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
    ) -> None:
        """Append a call to the queue of `phase`; `TypeError` if not callable."""
        if not callable(fn):
            message = (
                f"{phase}() takes a callable and its arguments, not {fn!r}. Did you "
                f"call the function? Write {phase}(fn, arg), not {phase}(fn(arg))."
            )
            if inspect.iscoroutine(fn):
                fn.close()  # or it warns that it was never awaited
            raise TypeError(message)
        if self.by_hook:
            self.quota.take(phase)
        self.extend(phase, [Hook(fn, args, kwargs)])

    def extend(self, phase: str, hooks: Iterable[Hook]) -> None:
        """Take what was registered, here or elsewhere, as the last."""
        _, queues = self._frames[-1]
        for hook in hooks:
            self._count += 1
            hook.number = self._count
            queues.setdefault(phase, []).append(hook)

    # Savepoints

    def open(self, savepoint: object) -> None:
        """Note that a savepoint was opened."""
        self._frames.append((savepoint, {}))
        for inner in self.inner:
            inner.open(savepoint)

    def keep(self, savepoint: object) -> None:
        """Note that a savepoint was released: its hooks belong to the one around."""
        place = self._find(savepoint)
        if place:
            _, queues = self._frames.pop(place)
            _, around = self._frames[place - 1]
            _add(queues, around)
        for inner in self.inner:
            inner.keep(savepoint)

    def undo(self, savepoint: object, owner: object = None) -> None:
        """Note that a savepoint of `owner` has ended in any other way."""
        place = self._find(savepoint)
        if place:
            for _, queues in self._frames[place:]:
                for hook in itertools.chain(*queues.values()):
                    hook.dropped = True
                undone = queues.get("after_rollback", ())
                self._undone += [(owner, hook) for hook in undone]
                queues.clear()
            del self._frames[place]
        for inner in self.inner:
            inner.undo(savepoint, owner)

    def leave_savepoints(self) -> None:
        """Note that the decision has ended all savepoints."""
        while len(self._frames) > 1:
            _, queues = self._frames.pop()
            _add(queues, self._frames[0][1])

    def _find(self, savepoint: object) -> int:
        """Give the place of its frame, 0 if it has none (any more)."""
        places = range(len(self._frames) - 1, 0, -1)
        return next((i for i in places if self._frames[i][0] == savepoint), 0)

    # The end

    def of(self, phase: str) -> list[Hook]:
        """Give the hooks of a phase in order of registration, dropped ones left out."""
        found = [hook for _, each in self._frames for hook in each.get(phase, ())]
        return sorted(found, key=attrgetter("number"))

    def take(self, phase: str) -> list[Hook]:
        """Give them and forget them."""
        found = self.of(phase)
        for _, queues in self._frames:
            queues.pop(phase, None)
        return found

    def take_rolled_back(self) -> list[Hook]:
        """Give what a rollback of the whole unit calls, last registered first."""
        found = [*self.take("after_rollback"), *self.take_undone()]
        return sorted(found, key=attrgetter("number"), reverse=True)

    def take_undone(self, owner: object = None) -> list[Hook]:
        """Give what the rollback of savepoints calls, last registered first.

        Of the savepoints of `owner`, or of all.
        """
        found = [hook for each, hook in self._undone if owner in {None, each}]
        self._undone = [each for each in self._undone if owner not in {None, each[0]}]
        return sorted(found, key=attrgetter("number"), reverse=True)

    def has_undone(self, owner: object) -> bool:
        """Tell whether savepoints of `owner` were rolled back that had such hooks.

        Here or in a unit inside.
        """
        return any(each is owner for each, _ in self._undone) or any(
            inner.has_undone(owner) for inner in self.inner
        )

    def clear(self) -> None:
        """Forget everything that was registered."""
        self._undone = []
        self._frames = [(None, {})]


def _add(queues: Queues, around: Queues) -> None:
    for phase, hooks in queues.items():
        around.setdefault(phase, []).extend(hooks)


def name_of(fn: Callable[..., object]) -> str:
    """Name any callable; never fails, whatever its attributes do."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    name: object = None
    with suppress(Exception):
        name = getattr(fn, "__qualname__", None)
    return name if isinstance(name, str) else type(fn).__qualname__


def is_async(fn: Callable[..., object]) -> bool:
    """Tell whether what it returns has to be awaited, as far as can be seen."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(
        getattr(fn, "__call__", None),  # noqa: B004  # the method, not a test for it
    )
