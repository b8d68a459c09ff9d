"""Calling hooks: one after the other, each watched, isolated, in a unit of its own."""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from asgi_uow._concurrency import bounded
from asgi_uow._decision import COMMIT, Cause, Decision, State, exception_cause, rollback
from asgi_uow._unit.current import use
from asgi_uow.observers import HookFailed, HookFinished, HookStarted, notify

if TYPE_CHECKING:
    from collections.abc import Generator

    from asgi_uow._unit.hooks import Hook
    from asgi_uow._unit.unit import UnitOfWork

FOLLOWS = {
    "after_commit": ("after_commit", "after_response"),
    "after_response": ("after_commit", "after_response"),
    "after_rollback": ("after_rollback",),
}
"""What a hook of a phase may register for the unit whose hook it is.

Anything else it registers is about the unit of its own.
"""


async def call_all(unit: UnitOfWork, phase: str, hooks: list[Hook]) -> None:
    """Call every hook, also those registered meanwhile; none stops another."""
    for hook in hooks:
        own = unit.for_hook()
        try:
            with use(own):
                error = await attempt(own, phase, hook)
        except asyncio.CancelledError as raised:  # by the hook: this task is shielded
            error = raised
        for follower in FOLLOWS[phase]:
            registered = own.hooks.take(follower)
            if phase == "after_commit" and follower == "after_response":
                unit.hooks.extend(follower, registered)
            else:
                hooks += registered
        try:
            await own.finish(_decide(own, error))
        except BaseException as failure:  # noqa: BLE001  # hook isolation
            error = error or failure
        finally:
            await own.release()
        if error is not None:
            unit.report.add(HookFailed(phase, hook.name, error))


async def attempt(unit: UnitOfWork, phase: str, hook: Hook) -> BaseException | None:
    """Call one hook, for as long as it may take; give what it raised.

    It has a task of its own, which is left behind if it ignores its cancellation.
    """

    async def call() -> BaseException | None:
        # A SystemExit would leave the task through the event loop, and end that.
        try:
            with _watched(unit, phase, hook):
                await hook.call()
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001  # hook isolation
            return error
        task = asyncio.current_task()
        late = task is not None and task.cancelling()
        return TimeoutError("it went on after its time") if late else None

    try:
        return await bounded(call(), unit.settings.hook_timeout)
    except TimeoutError as error:
        return error


def _decide(own: UnitOfWork, error: BaseException | None) -> Decision:
    """Commit what a hook did with its own unit if it returned and did not object."""
    if error is not None:
        return rollback(exception_cause(error))
    if own.state is State.ROLLBACK_ONLY:
        return rollback(Cause.EXPLICIT)
    if own.doomed_by is not None:
        return rollback(Cause.DOOMED, refuse=True)
    return COMMIT


@contextmanager
def _watched(unit: UnitOfWork, phase: str, hook: Hook) -> Generator[None]:
    """Tell the observers of the beginning and the end of a hook, where it runs."""
    observers = unit.settings.observers
    of = unit.kin.hook_of or unit
    notify(observers, HookStarted(phase, hook.name, of, unit=unit))
    started = time.perf_counter()
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        seconds = time.perf_counter() - started
        finished = HookFinished(phase, hook.name, seconds, error, of, unit=unit)
        notify(observers, finished)
