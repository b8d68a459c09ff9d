"""Hooks after the end: each has a unit of work of its own, if it asks for one."""

from __future__ import annotations

import contextvars
import dataclasses
import time
from typing import TYPE_CHECKING

from asgi_uow._decision import CLOSED, COMMIT, Cause, State, exception_cause, rollback
from asgi_uow._unit.hooks import call_hook
from asgi_uow._unit.unit import UnitOfWork, current, make_unit
from asgi_uow.observers import HookFailed, HookFinished, HookStarted

if TYPE_CHECKING:
    from collections.abc import Callable

    from asgi_uow._concurrency import Shield
    from asgi_uow._decision import Decision
    from asgi_uow._sessions.record import Recorder
    from asgi_uow._unit.hooks import Hook, Work

    EndUnit = Callable[[UnitOfWork, Decision], Work]

capture: Callable[[str, UnitOfWork, Hook], bool] | None = None
"""Set by `asgi_uow.testing`: tells whether a hook is not to be called."""


@dataclasses.dataclass(slots=True, eq=False)
class HookRun:
    """Calls hooks one after the other, also those added to `waiting` meanwhile.

    All run in one task, but for what follows a hook that ignores its cancellation:
    that one is left behind. `end` ends the unit of work of a hook.
    """

    unit: UnitOfWork
    phase: str
    waiting: list[Hook]
    end: EndUnit
    failed: tuple[Hook, BaseException] | None = None
    running: tuple[Hook, UnitOfWork] | None = None

    async def run(self, shield: Shield) -> tuple[Hook, BaseException] | None:
        """Call all, each for `hook_timeout` seconds; give what stops the commit."""
        seconds = self.unit.options.hook_timeout
        while self.waiting:
            try:
                await shield.run(self._call_all(shield), seconds, at_once=False)
            except TimeoutError as error:
                if self.running is not None:  # pragma: no branch  # it is set at once
                    (hook, own), self.running = self.running, None
                    await shield.run(self._conclude(hook, own, error), at_once=False)
        failed, self.failed = self.failed, None  # its traceback refers to this object
        return failed

    async def _call_all(self, shield: Shield) -> None:
        phase, unit = self.phase, self.unit
        recorder = unit.share().recorder
        while self.waiting:
            hook = self.waiting.pop(0)
            if phase != "after_rollback" and hook.is_dropped:
                continue
            if capture is not None and capture(phase, unit, hook):
                continue
            own = unit if phase == "before_commit" else _unit_for_hook(unit)
            context = contextvars.copy_context()
            context.run(current.set, own)
            running = self.running = hook, own
            work = hook.call(shield)
            if recorder is not None:
                work = self._call(own, hook, work, recorder)
            error = await call_hook(work, context, shield)
            try:
                if self.running is not running:
                    return  # it was left behind, and comes back now
                if error is not None or own.shared is not None:
                    shield.pause()
                    await self._conclude(hook, own, error)
                else:  # a unit of the hook's own: one that has hooks is used
                    own.state = CLOSED
            finally:
                del error  # its traceback refers to this frame

    async def _call(
        self, own: UnitOfWork, hook: Hook, work: Work, recorder: Recorder
    ) -> None:
        """Call a hook; tell the observers, where it runs, of its beginning and end."""
        tell, phase, of = own.options.tell, self.phase, self.unit
        tell(HookStarted(phase, hook.name, unit=own, of=of))
        started = time.perf_counter()
        error: BaseException | None = None
        try:
            await work
        except BaseException as raised:
            error = raised
            raise
        finally:
            seconds = time.perf_counter() - started
            recorder.hooks += 1
            recorder.hook_seconds += seconds
            tell(HookFinished(phase, hook.name, seconds, error, unit=own, of=of))
            del error  # its traceback refers to this frame

    async def _conclude(
        self, hook: Hook, own: UnitOfWork, error: BaseException | None
    ) -> None:
        """End the unit of a hook; tell if it failed, or have that stop the commit."""
        if self.phase == "before_commit":
            if error is not None:
                self.failed = hook, error
                self.waiting.clear()
            return
        phase = self.phase
        committed = ("after_commit", "after_response")
        # What else it registered is about the unit of its own.
        for follower in (phase,) if phase == "after_rollback" else committed:
            later = phase == "after_commit" and follower == "after_response"
            waiting = self.unit.hooks.queue(follower) if later else self.waiting
            waiting.extend(own.hooks.take(follower) if own.shared is not None else ())
        try:
            await self.end(own, _decide(own, error))
        except BaseException as failure:  # noqa: BLE001  # hook isolation
            error = failure if error is None else error
        if error is not None:
            failed = HookFailed(phase, hook.name, error, unit=self.unit)
            self.unit.share().events.append(failed)


def _unit_for_hook(unit: UnitOfWork) -> UnitOfWork:
    """Make the unit that one hook gets for itself; its parts come when it asks."""
    own = make_unit(unit.databases, unit.options)
    own.around, own.is_hook = unit, True
    own.must_see, own.attempt = unit.must_see, unit.attempt
    own.quota = unit.hooks.quota
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
