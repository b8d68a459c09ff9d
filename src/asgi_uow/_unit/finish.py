"""The end of a unit of work, from outside: `finish()` is the one function that ends it.

It runs in the task of the request. Whatever it awaits from COMMIT or ROLLBACK on runs
under a `Shield`, so nothing interrupts it between two steps either.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import time
from collections import deque
from typing import TYPE_CHECKING

import anyio

from asgi_uow._concurrency import Shield, TimeLimit
from asgi_uow._databases.driver_errors import code_of, is_conflict
from asgi_uow._decision import (
    COMMIT,
    RETRY_AFTER,
    Cause,
    Decision,
    Outcome,
    State,
    exception_cause,
    rollback,
)
from asgi_uow._unit.completion import ROLLED_BACK, Completion, Ended
from asgi_uow._unit.hooks import call_hook, told
from asgi_uow._unit.unit import UnitOfWork, current
from asgi_uow.errors import (
    BeforeCommitError,
    CommitFailedError,
    DoomedError,
    PartialCommitError,
)
from asgi_uow.observers import CommitFailed, HookFailed, UnitFinished

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Mapping

    from asgi_uow._sessions.read_session import ReadSession
    from asgi_uow._unit.hooks import Hook
    from asgi_uow._unit.participant import Participant
    from asgi_uow.errors import UnitOfWorkFailedError
    from asgi_uow.observers import Event


class HookStoppedError(Exception):
    """Carries the name of the `before_commit` hook whose error is its cause."""


async def finish(
    unit: UnitOfWork, decision: Decision, error: Exception | None = None
) -> None:
    """Commit or roll back, release the write connections, run the hooks.

    Raises the failure if a commit was wanted, or claimed by the response, and the work
    was not kept. Until COMMIT is sent a cancellation rolls back; from then on it is
    delivered after the last hook. `error` is why the response has to be replaced.
    """
    if unit.shared is None and not decision.replace_response:
        unit.move(State.PREPARING if decision.commit else State.ROLLING_BACK)
        unit.conclude_unused(commit=decision.commit)
        unit.cause = decision.cause
        return
    ending = time.perf_counter()
    cancelled: BaseException | None = None
    ended = ROLLED_BACK
    if decision.commit:
        unit.move(State.PREPARING)
        try:
            await prepare(unit)
        except Exception as raised:  # noqa: BLE001  # raised below as the failure
            ended = _stopped_by(raised)
        except BaseException as raised:  # noqa: BLE001  # raised below as it is
            cancelled, ended = raised, _stopped_by(raised)
        if ended.cause is not None:
            decision = rollback(ended.cause)
        elif unit.doomed_by is not None:
            decision = rollback(Cause.DOOMED, replace_response=True)
    if decision.replace_response:
        kind = CommitFailedError if error is not None else DoomedError
        because = error or unit.doomed_by
        ended = Ended(Outcome.ROLLED_BACK, kind, decision.cause, because)
    unit.doom = unit.doomed_by
    unit.move(State.COMMITTING if decision.commit else State.ROLLING_BACK)
    shield = Shield()
    try:
        await _complete(unit, decision, ended, ending, shield)
    finally:
        tell(unit)
    if cancelled is not None:
        raise cancelled
    shield.deliver()
    if unit.failure is not None:
        raise unit.failure


async def _complete(
    unit: UnitOfWork, decision: Decision, ended: Ended, ending: float, shield: Shield
) -> None:
    shared = unit.share()
    timeout = unit.options.commit_timeout
    completion = Completion(unit.participants.values(), shared.events, shield, timeout)
    if decision.commit:
        ended = await completion.commit()  # <- here, and nowhere else
    if ended.outcome is Outcome.ROLLED_BACK:
        ended = _partial_for_ddl(unit, decision, ended)
    if ended.outcome is not Outcome.COMMITTED:
        await completion.roll_back(
            proven=ended.outcome is Outcome.ROLLED_BACK,
            after_failure=ended.cause is not None,
        )
    _conclude(unit, decision, ended, ending)
    if unit.hooks is not None and unit.hooks:
        # A hook that reads must not wait for the connection of its own request.
        for participant in unit.participants.values():
            if participant.reader is not None:
                await completion.release_reader(participant.reader)
        await _run_hooks_of(unit, ended.outcome, shield)


def _conclude(
    unit: UnitOfWork, decision: Decision, ended: Ended, ending: float
) -> None:
    """Record outcome and failure, and what the observers are told of them."""
    unit.cause = ended.cause or decision.cause
    unit.outcome = ended.outcome
    if ended.cause is not None:
        unit.failure = _failure_of(unit, ended, ended.cause)
    unit.move(State[ended.outcome.name])
    events = unit.share().events
    detailed = unit.options.wants_details
    for participant in unit.participants.values():
        writer = participant.writer
        if writer is not None:
            kept = writer.sync_session.journal.committed
            if kept or ended.outcome is Outcome.COMMITTED:
                participant.record_committed()
            if detailed:
                participant.report_release(writer, "write")
            participant.report_implicit_commit()
    if unit.failure is not None and not unit.is_hook:
        # That of a hook's own unit is the failure of the hook.
        code = code_of(unit.failure.__cause__)
        events.append(
            CommitFailed(unit.failure, ended.outcome, unit.failure.cause, code)
        )
    if unit.is_started and unit.options.wants_outcomes:
        now = time.perf_counter()
        names = tuple(
            db.name for db, each in unit.participants.items() if each.has_written
        )
        seconds = now - unit.opened, now - ending
        events.append(
            UnitFinished(ended.outcome, unit.cause, unit.reason, names, *seconds)
        )
    _stamp(unit, events)


def _partial_for_ddl(unit: UnitOfWork, decision: Decision, ended: Ended) -> Ended:
    """Tell whether DDL has kept a part of what is to be rolled back."""
    for participant in unit.participants.values():
        writer = participant.writer
        statement = writer and writer.sync_session.journal.implicit_commit
        if statement:
            cause = ended.cause or decision.cause or Cause.COMMIT_FAILED
            detail = f"MySQL committed by itself for {statement!r}"
            error = ended.error
            return Ended(Outcome.PARTIAL, PartialCommitError, cause, error, detail)
    return ended


def _stopped_by(error: BaseException) -> Ended:
    """Tell what it means that the preparation was stopped by `error`."""
    kind: type[UnitOfWorkFailedError] = CommitFailedError
    cause, detail = Cause.COMMIT_FAILED, ""
    if isinstance(error, HookStoppedError) and error.__cause__ is not None:
        kind, cause, detail = BeforeCommitError, Cause.BEFORE_COMMIT, str(error)
        error = error.__cause__
    if isinstance(error, TimeoutError):
        cause = Cause.TIMEOUT
    elif not isinstance(error, Exception):
        cause = Cause.CANCELLED
    return Ended(Outcome.ROLLED_BACK, kind, cause, error, detail)


def _failure_of(unit: UnitOfWork, ended: Ended, cause: Cause) -> UnitOfWorkFailedError:
    later = (
        ended.outcome is Outcome.ROLLED_BACK
        and ended.error is not None
        and (is_outage(unit, ended.error) or is_conflict(ended.error))
    )
    retry_after = RETRY_AFTER if later else None
    failure = ended.kind(
        ended.outcome, cause, detail=ended.detail, retry_after=retry_after
    )
    failure.__cause__ = ended.error
    return failure


def is_outage(unit: UnitOfWork, error: BaseException) -> bool:
    """Tell whether `error` is, or follows from, a database out of reach."""
    if unit.shared is None or not unit.shared.outages:
        return False
    seen: list[BaseException] = []
    ahead: list[BaseException | None] = [error]
    while ahead:
        cause = ahead.pop()
        # A task group's only error, raised again by Starlette, has the group as
        # its context, and is in the group.
        if cause is None or any(cause is each for each in seen):
            continue
        if any(cause is each for each in unit.shared.outages):
            return True
        seen.append(cause)
        ahead.append(cause.__cause__ or cause.__context__)
        if isinstance(cause, BaseExceptionGroup):
            ahead.extend(cause.exceptions)
    return False


# Before COMMIT


async def prepare(unit: UnitOfWork) -> None:
    """Run the `before_commit` hooks and flush, until neither adds to the other.

    Each has `hook_timeout` seconds. Raises `HookStoppedError` from what a hook has
    raised, and what the flush raises.
    """
    for participant in unit.participants.values():
        for reader in participant.readers():
            reader.refuse_changes()
    seconds = unit.options.hook_timeout
    done = 0
    while True:
        if unit.hooks is not None:
            unit.quota = unit.hooks.quota
            done = await _call_before_commit(unit, done)
        opened = len(unit.participants)
        for participant in list(unit.participants.values()):
            writer = participant.writer
            if writer is not None and writer.has_changes:
                with anyio.fail_after(seconds):
                    await writer.flush()
        waiting = unit.hooks is not None and unit.hooks.queue("before_commit")[done:]
        if not waiting and opened == len(unit.participants):
            return


async def _call_before_commit(unit: UnitOfWork, done: int) -> int:
    """Call those of a live list that were not called yet; give how many there are."""
    hooks = unit.hooks.queue("before_commit") if unit.hooks is not None else []
    if done == len(hooks):
        return done
    limit = TimeLimit(unit.options.hook_timeout)
    error: BaseException | None = None

    async def call_all() -> None:
        nonlocal done, error
        while done < len(hooks) and error is None:
            hook = hooks[done]
            done += 1
            if not hook.is_dropped:
                work = _watched(unit, "before_commit", hook, of=unit)
                error = await call_hook(work, contextvars.copy_context(), limit)

    shield = Shield(forwards=True)
    try:
        await shield.run(call_all(), limit, at_once=False)
    except TimeoutError as late:
        error = late
    finally:
        shield.deliver()
    if isinstance(error, Exception):
        raise HookStoppedError(hooks[done - 1].name) from error
    if error is not None:
        raise error
    return done


# Hooks with units of work of their own

FOLLOWS = {
    "after_commit": ("after_commit", "after_response"),
    "after_response": ("after_commit", "after_response"),
    "after_rollback": ("after_rollback",),
}
"""What a hook of a phase may register for the unit whose hook it is.

Anything else it registers is about the unit of its own.
"""


async def _run_hooks_of(unit: UnitOfWork, outcome: Outcome, shield: Shield) -> None:
    hooks = unit.hooks
    if hooks is None:
        return
    if outcome is Outcome.COMMITTED:
        await run_hooks(unit, "after_rollback", hooks.take_undone(), shield)
        await run_hooks(unit, "after_commit", hooks.take("after_commit"), shield)
    elif outcome is Outcome.ROLLED_BACK:
        await run_hooks(unit, "after_rollback", hooks.take_rolled_back(), shield)


async def run_hooks(
    unit: UnitOfWork, phase: str, hooks: Iterable[Hook], shield: Shield
) -> None:
    """Call every hook, also those registered meanwhile; none stops another.

    All run in one task, but for what comes after one that ignores its cancellation.
    """
    run = _HookRun(unit, phase, hooks)
    while run.waiting:
        limit = TimeLimit(unit.options.hook_timeout)
        try:
            await shield.run(run.call_all(limit), limit, at_once=False)
        except TimeoutError as error:
            await shield.run(run.leave_behind(error))


class _HookRun:
    """The hooks of one phase, called one after the other."""

    __slots__ = ("phase", "running", "unit", "waiting")

    def __init__(self, unit: UnitOfWork, phase: str, hooks: Iterable[Hook]) -> None:
        self.unit = unit
        self.phase = phase
        self.waiting = deque(hooks)
        self.running: tuple[Hook, UnitOfWork] | None = None

    async def call_all(self, limit: TimeLimit) -> None:
        """Call those that wait, until one comes back that was left behind."""
        while self.waiting:
            hook, own = self.running = self.waiting.popleft(), _unit_for_hook(self.unit)
            context = contextvars.copy_context()
            context.run(current.set, own)
            work = _watched(own, self.phase, hook, of=self.unit)
            error = await call_hook(work, context, limit)
            if not self.is_running(own):
                return
            await self.end(hook, own, error)

    def is_running(self, own: UnitOfWork) -> bool:
        """Tell whether the hook of that unit was not left behind."""
        return self.running is not None and self.running[1] is own

    async def leave_behind(self, error: TimeoutError) -> None:
        """Go on without the hook that is running."""
        if self.running is not None:
            running, self.running = self.running, None
            await self.end(*running, error)

    async def end(
        self, hook: Hook, own: UnitOfWork, error: BaseException | None
    ) -> None:
        """End the hook's own unit, and take what it has registered."""
        if own.hooks is not None:
            for follower in FOLLOWS[self.phase]:
                registered = own.hooks.take(follower)
                if self.phase == "after_commit" and follower == "after_response":
                    _queue(self.unit, follower).extend(registered)
                else:
                    self.waiting.extend(registered)
        try:
            await finish(own, _decide_hook(own, error))
        except BaseException as failure:  # noqa: BLE001  # hook isolation
            error = failure if error is None else error
        finally:
            await release(own)
        if error is not None:
            failed = HookFailed(self.phase, hook.name, error, unit=self.unit)
            self.unit.share().events.append(failed)


def _queue(unit: UnitOfWork, phase: str) -> list[Hook]:
    return unit.hooks.queue(phase) if unit.hooks is not None else []


def _watched(
    own: UnitOfWork, phase: str, hook: Hook, of: UnitOfWork
) -> Coroutine[object, object, None]:
    if own.options.wants_details:
        return told(own.options.tell, phase, hook, own, of)
    return hook.call()


def _unit_for_hook(unit: UnitOfWork) -> UnitOfWork:
    """Make the unit that one hook gets for itself; its parts come when it asks."""
    own = UnitOfWork()
    own.databases, own.options = unit.databases, unit.options
    own.around, own.is_hook = unit, True
    own.must_see = unit.must_see
    if unit.hooks is not None:
        own.quota = unit.hooks.quota
    if unit.is_nested:
        outer = [db for each in unit.outwards() for db in each.databases]
        own.databases = tuple(dict.fromkeys((*unit.databases, *outer)))
    return own


def _decide_hook(own: UnitOfWork, error: BaseException | None) -> Decision:
    """Commit what a hook did with its own unit if it returned and did not object."""
    if error is not None:
        return rollback(exception_cause(error))
    if own.state is State.ROLLBACK_ONLY:
        return rollback(Cause.EXPLICIT)
    if own.doomed_by is not None:
        return rollback(Cause.DOOMED, replace_response=True)
    return COMMIT


def register(
    unit: UnitOfWork,
    phase: str,
    fn: object,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
) -> None:
    """Register a hook; one of `after_rollback` is also called for its savepoint."""
    hook = unit.register(phase, fn, args, kwargs)
    if phase == "after_rollback" and hook.frame is not None:
        callback = functools.partial(_call_undone, unit, hook)
        unit.share().savepoints.call_if_undone(hook.frame, callback)


async def _call_undone(unit: UnitOfWork, hook: Hook) -> None:
    """Call the hook of a savepoint that was rolled back, unless the end has done so."""
    queue = _queue(unit, "after_rollback")
    if hook in queue:
        queue.remove(hook)
        shield = Shield()
        await run_hooks(unit, "after_rollback", [hook], shield)
        shield.deliver()


# After the end


async def release(unit: UnitOfWork) -> None:
    """Close what is left open, run the `after_response` hooks, tell what is left."""
    if unit.shared is None:
        unit.move(State.CLOSED)
        return
    shield = Shield()
    unit.move(State.CLOSED)
    try:
        for participant in unit.participants.values():
            for reader in participant.readers():
                await _close_reader(unit, participant, reader, shield)
        if unit.outcome is Outcome.COMMITTED and unit.hooks is not None:
            hooks = unit.hooks.take("after_response")
            await run_hooks(unit, "after_response", hooks, shield)
    finally:
        tell(unit)
        _forget(unit)
    shield.deliver()


async def _close_reader(
    unit: UnitOfWork, participant: Participant, session: ReadSession, shield: Shield
) -> None:
    events = participant.shared.events
    completion = Completion((), events, shield, unit.options.commit_timeout)
    await completion.close_reader(session)
    if unit.options.wants_details:
        participant.report_release(session, "read")


def _forget(unit: UnitOfWork) -> None:
    """Let go of what was closed: a leaked context may keep the unit alive."""
    shared = unit.share()
    for participant in unit.participants.values():
        shared.writers[:] = [
            each for each in shared.writers if each[1] is not participant.writer
        ]
        participant.parallel.clear()
    if unit.hooks is not None:
        unit.hooks.queues.clear()
    if not unit.is_nested:
        shared.savepoints.clear()
    unit.participants = {}


async def close_parallel(
    unit: UnitOfWork, participant: Participant, session: ReadSession
) -> None:
    """Give the connection of one read session back, unless the unit has done so."""
    if session in participant.parallel:
        participant.parallel.remove(session)
        shield = Shield()
        await _close_reader(unit, participant, session, shield)
        shield.deliver()


def tell(unit: UnitOfWork) -> None:
    """Tell the observers, in the task and context of the request.

    Sentry's own ASGI middleware drops what was reported in another context before.
    The events of a hook's unit are told with those of the unit whose hook it is.
    """
    shared = unit.shared
    if shared is None or not shared.events:
        return
    _stamp(unit, shared.events)
    if not unit.is_hook:
        events = list(shared.events)
        shared.events.clear()
        for each in events:
            unit.options.tell(each)


def _stamp(unit: UnitOfWork, events: list[Event]) -> None:
    """Say of events that their unit has not told yet whose they are."""
    events[:] = [
        each if each.unit is not None else dataclasses.replace(each, unit=unit)
        for each in events
    ]
