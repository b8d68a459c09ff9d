"""Hooks after the end: each has a unit of work of its own, if it asks for one."""

from __future__ import annotations

import contextvars
import functools
from collections import deque
from typing import TYPE_CHECKING

from asgi_uow._concurrency import Shield
from asgi_uow._decision import COMMIT, Cause, State, exception_cause, rollback
from asgi_uow._unit.hooks import HookRun, told
from asgi_uow._unit.unit import CLOSED, UnitOfWork, current
from asgi_uow.observers import HookFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from asgi_uow._decision import Decision
    from asgi_uow._unit.hooks import Hook, Work

    EndUnit = Callable[[UnitOfWork, Decision], Work]

FOLLOWS = {
    "after_commit": ("after_commit", "after_response"),
    "after_response": ("after_commit", "after_response"),
    "after_rollback": ("after_rollback",),
}
"""What a hook of a phase may register for the unit whose hook it is.

Anything else it registers is about the unit of its own.
"""


async def run_hooks(
    unit: UnitOfWork, phase: str, hooks: Iterable[Hook], shield: Shield, end: EndUnit
) -> None:
    """Call every hook, also those registered meanwhile; `end` ends their own units."""

    def begin(hook: Hook) -> tuple[contextvars.Context, Work, UnitOfWork]:
        own = _unit_for_hook(unit)
        context = contextvars.copy_context()
        context.run(current.set, own)
        return context, watched(own, phase, hook, of=unit), own

    def end_hook(
        hook: Hook, own: UnitOfWork, error: BaseException | None
    ) -> Work | None:
        if own.is_used or error is not None:
            return end_used(hook, own, error)
        own.state = CLOSED
        return None

    async def end_used(
        hook: Hook, own: UnitOfWork, error: BaseException | None
    ) -> None:
        for follower in FOLLOWS[phase]:
            registered = [] if own.hooks is None else own.hooks.take(follower)
            later = phase == "after_commit" and follower == "after_response"
            (queue(unit, follower) if later else waiting).extend(registered)
        try:
            await end(own, _decide(own, error))
        except BaseException as failure:  # noqa: BLE001  # hook isolation
            error = failure if error is None else error
        if error is not None:
            failed = HookFailed(phase, hook.name, error, unit=unit)
            unit.share().events.append(failed)

    waiting = deque(hooks)
    await HookRun(waiting, begin, end_hook).run(shield, unit.options.hook_timeout)


def queue(unit: UnitOfWork, phase: str) -> list[Hook]:
    """Give the queue of a phase."""
    return unit.hooks.queue(phase) if unit.hooks is not None else []


def watched(own: UnitOfWork, phase: str, hook: Hook, of: UnitOfWork) -> Work:
    """Give the call of a hook, with its events if somebody wants them."""
    if own.options.wants_details:
        return told(own.options.tell, phase, hook, own, of)
    return hook.call()


def _unit_for_hook(unit: UnitOfWork) -> UnitOfWork:
    """Make the unit that one hook gets for itself; its parts come when it asks."""
    own = UnitOfWork()
    own.databases, own.options = unit.databases, unit.options
    own.around, own.is_hook = unit, True
    own.must_see = unit.must_see
    own.quota = None if unit.hooks is None else unit.hooks.quota
    if unit.is_nested:
        outer = [db for each in unit.outwards() for db in each.databases]
        own.databases = tuple(dict.fromkeys((*unit.databases, *outer)))
    return own


def _decide(own: UnitOfWork, error: BaseException | None) -> Decision:
    """Commit what a hook did with its own unit if it returned and did not object."""
    if error is not None:
        return rollback(exception_cause(error))
    if own.state is State.ROLLBACK_ONLY:
        return rollback(Cause.EXPLICIT)
    if own.doomed_by is not None:
        return rollback(Cause.DOOMED, replace_response=True)
    return COMMIT


def call_when_undone(unit: UnitOfWork, hook: Hook, end: EndUnit) -> None:
    """Have an `after_rollback` hook called once its savepoint is rolled back."""
    if hook.frame is not None:
        callback = functools.partial(_call_undone, unit, hook, end)
        unit.share().savepoints.call_if_undone(hook.frame, callback)


async def _call_undone(unit: UnitOfWork, hook: Hook, end: EndUnit) -> None:
    hooks = queue(unit, "after_rollback")
    # The end of the unit may have called it.
    if hook in hooks:  # pragma: no branch
        hooks.remove(hook)
        shield = Shield()
        await run_hooks(unit, "after_rollback", [hook], shield, end)
        shield.deliver()
