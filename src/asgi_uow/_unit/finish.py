"""The end of a unit of work, from outside: `finish()` is the one function that ends it.

It runs in the task of the request. Whatever it awaits from COMMIT or ROLLBACK on runs
under a `Shield`, so nothing interrupts it between two steps either.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import time
from typing import TYPE_CHECKING

import anyio

from asgi_uow import errors
from asgi_uow._concurrency import Shield
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
from asgi_uow._unit.hooks import HookRun, call_hook, told
from asgi_uow._unit.unit import CLOSED, UnitOfWork, current
from asgi_uow.observers import CommitFailed, HookFailed, UnitFinished

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from asgi_uow._sessions.read_session import ReadSession
    from asgi_uow._unit.hooks import Hook, Work
    from asgi_uow._unit.participant import Participant
    from asgi_uow.observers import Event

STATE_OF = {outcome: State[outcome.name] for outcome in Outcome}


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
    unit.doom = unit.doomed_by
    if decision.commit and unit.doom is not None:
        decision = rollback(Cause.DOOMED, replace_response=True)
    if decision.replace_response:
        kind = errors.CommitFailedError if error is not None else errors.DoomedError
        ended = Ended(Outcome.ROLLED_BACK, kind, decision.cause, error or unit.doom)
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
    """Commit or roll back, and run the hooks of the outcome."""
    events, timeout = unit.share().events, unit.options.commit_timeout
    completion = Completion(events, shield, timeout)
    participants = unit.participants.values()
    if decision.commit:
        ended = await completion.commit(participants)  # <- here, and nowhere else
    writers = [each.writer for each in participants if each.writer is not None]
    if ended.outcome is not Outcome.COMMITTED:
        ended = _partial_for_ddl(unit, decision, ended)
        for writer in writers:
            await completion.roll_back(writer, ended)
    _conclude(unit, decision, ended, ending)
    hooks = unit.hooks
    if hooks is None or not hooks:
        return
    for participant in participants:
        # A hook that reads must not wait for the connection of its own request.
        if participant.reader is not None:
            await completion.release_reader(participant.reader)
    if ended.outcome is Outcome.COMMITTED:
        await run_hooks(unit, "after_rollback", hooks.take_undone(), shield)
        await run_hooks(unit, "after_commit", hooks.take("after_commit"), shield)
    elif ended.outcome is Outcome.ROLLED_BACK:
        await run_hooks(unit, "after_rollback", hooks.take_rolled_back(), shield)


def _conclude(
    unit: UnitOfWork, decision: Decision, ended: Ended, ending: float
) -> None:
    """Record outcome and failure, and what the observers are told of them."""
    unit.cause = ended.cause or decision.cause
    unit.outcome = ended.outcome
    if ended.cause is not None:
        unit.failure = _failure_of(unit, ended, ended.cause)
    unit.move(STATE_OF[ended.outcome])
    events = unit.share().events
    for participant in unit.participants.values():
        participant.conclude(
            committed=ended.outcome is Outcome.COMMITTED,
            wants_details=unit.options.wants_details,
        )
    if unit.failure is not None and not unit.is_hook:
        # That of a hook's own unit is the failure of the hook.
        failure = unit.failure
        code = code_of(failure.__cause__)
        events.append(CommitFailed(failure, ended.outcome, failure.cause, code))
    if unit.is_started and unit.options.wants_outcomes:
        now = time.perf_counter()
        seconds = now - unit.opened, now - ending
        used = {db: each for db, each in unit.participants.items() if each.has_written}
        what = ended.outcome, unit.cause, unit.reason, tuple(db.name for db in used)
        events.append(UnitFinished(*what, *seconds))
    if events:
        _stamp(unit, events)


def _partial_for_ddl(unit: UnitOfWork, decision: Decision, ended: Ended) -> Ended:
    """Tell whether DDL has kept a part of what is to be rolled back."""
    for each in unit.participants.values():
        statement = each.writer and each.writer.sync_session.journal.implicit_commit
        if statement and ended.outcome is Outcome.ROLLED_BACK:
            cause = ended.cause or decision.cause or Cause.COMMIT_FAILED
            kind, error = errors.PartialCommitError, ended.error
            detail = f"MySQL committed by itself for {statement!r}"
            return Ended(Outcome.PARTIAL, kind, cause, error, detail)
    return ended


def _stopped_by(error: BaseException) -> Ended:
    """Tell what it means that the preparation was stopped by `error`."""
    kind: type[errors.UnitOfWorkFailedError] = errors.CommitFailedError
    cause, detail = Cause.COMMIT_FAILED, ""
    if isinstance(error, HookStoppedError) and error.__cause__ is not None:
        kind, cause, detail = errors.BeforeCommitError, Cause.BEFORE_COMMIT, str(error)
        error = error.__cause__
    if isinstance(error, TimeoutError):
        cause = Cause.TIMEOUT
    elif not isinstance(error, Exception):
        cause = Cause.CANCELLED
    return Ended(Outcome.ROLLED_BACK, kind, cause, error, detail)


def _failure_of(
    unit: UnitOfWork, ended: Ended, cause: Cause
) -> errors.UnitOfWorkFailedError:
    outcome, error = ended.outcome, ended.error
    later = False
    if outcome is Outcome.ROLLED_BACK and error is not None:
        later = is_outage(unit, error) or is_conflict(error)
    retry_after = RETRY_AFTER if later else None
    failure = ended.kind(outcome, cause, detail=ended.detail, retry_after=retry_after)
    failure.__cause__ = error
    return failure


def is_outage(unit: UnitOfWork, error: BaseException) -> bool:
    """Tell whether `error` is, or follows from, a database out of reach."""
    outages = () if unit.shared is None else unit.shared.outages
    seen: list[BaseException] = []
    ahead: list[BaseException | None] = [error] if outages else []
    while ahead:
        cause = ahead.pop()
        # A task group's only error, raised again by Starlette, has the group as
        # its context, and is in the group.
        if cause is None or any(cause is each for each in seen):
            continue
        if any(cause is each for each in outages):
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
        if participant.reader is not None:
            for reader in participant.readers():
                reader.refuse_changes()
    done = 0
    while True:
        if unit.hooks is not None:
            unit.quota = unit.hooks.quota
            done = await _call_before_commit(unit, done)
        participants = unit.participants
        for participant in participants.values():
            writer = participant.writer
            if writer is not None and writer.has_changes:
                with anyio.fail_after(unit.options.hook_timeout):
                    await writer.flush()
        waiting = unit.hooks is not None and unit.hooks.queue("before_commit")[done:]
        if not waiting and participants is unit.participants:
            return


async def _call_before_commit(unit: UnitOfWork, done: int) -> int:
    """Call those of a live list that were not called yet; give how many there are."""
    hooks = unit.hooks.queue("before_commit") if unit.hooks is not None else []
    if done == len(hooks):
        return done
    shield = Shield(forwards=True)
    error: BaseException | None = None

    async def call_all() -> None:
        nonlocal done, error
        while done < len(hooks) and error is None:
            hook = hooks[done]
            done += 1
            if not hook.is_dropped:
                work = _watched(unit, "before_commit", hook, of=unit)
                error = await call_hook(work, contextvars.copy_context(), shield)

    try:
        await shield.run(call_all(), unit.options.hook_timeout, at_once=False)
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


async def run_hooks(
    unit: UnitOfWork, phase: str, hooks: Iterable[Hook], shield: Shield
) -> None:
    """Call every hook, also those registered meanwhile; none stops another."""

    def begin(hook: Hook) -> tuple[contextvars.Context, Work, UnitOfWork]:
        own = _unit_for_hook(unit)
        context = contextvars.copy_context()
        context.run(current.set, own)
        return context, _watched(own, phase, hook, of=unit), own

    async def end(hook: Hook, own: UnitOfWork, error: BaseException | None) -> None:
        if own.is_used:
            error = await _end_hook_unit(unit, own, phase, run, error)
        else:
            own.state = CLOSED
        if error is not None:
            failed = HookFailed(phase, hook.name, error, unit=unit)
            unit.share().events.append(failed)

    run = HookRun(hooks, begin, end)
    await run.run(shield, unit.options.hook_timeout)


async def _end_hook_unit(
    unit: UnitOfWork,
    own: UnitOfWork,
    phase: str,
    run: HookRun[UnitOfWork],
    error: BaseException | None,
) -> BaseException | None:
    """End the unit of a hook, and take what it has registered for the one around."""
    for follower in FOLLOWS[phase]:
        registered = [] if own.hooks is None else own.hooks.take(follower)
        if phase == "after_commit" and follower == "after_response":
            _queue(unit, follower).extend(registered)
        else:
            run.waiting.extend(registered)
    try:
        await finish(own, _decide_hook(own, error))
    except BaseException as failure:  # noqa: BLE001  # hook isolation
        error = failure if error is None else error
    finally:
        await release(own)
    return error


def _queue(unit: UnitOfWork, phase: str) -> list[Hook]:
    return unit.hooks.queue(phase) if unit.hooks is not None else []


def _watched(own: UnitOfWork, phase: str, hook: Hook, of: UnitOfWork) -> Work:
    if own.options.wants_details:
        return told(own.options.tell, phase, hook, own, of)
    return hook.call()


def _unit_for_hook(unit: UnitOfWork) -> UnitOfWork:
    """Make the unit that one hook gets for itself; its parts come when it asks."""
    own = UnitOfWork()
    own.databases, own.options, own.must_see = (
        unit.databases,
        unit.options,
        unit.must_see,
    )
    own.around, own.is_hook = unit, True
    own.quota = None if unit.hooks is None else unit.hooks.quota
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
    unit.move(State.CLOSED)
    shared = unit.shared
    if shared is None:
        return
    shield = Shield()
    try:
        for participant in unit.participants.values():
            for reader in participant.readers():
                await _close_reader(unit, participant, reader, shield)
        if unit.outcome is Outcome.COMMITTED and unit.hooks is not None:
            hooks = unit.hooks.take("after_response")
            await run_hooks(unit, "after_response", hooks, shield)
    finally:
        tell(unit)
        # A leaked context may keep the unit alive.
        for participant in unit.participants.values():
            participant.parallel.clear()
            if participant.writer is not None:
                shared.writers.remove(participant.writer.sync_session)
        if unit.hooks is not None:
            unit.hooks.queues.clear()
            if not unit.is_nested:
                shared.savepoints.clear()
        unit.participants, unit.failure = {}, None
    shield.deliver()


async def close_parallel(
    unit: UnitOfWork, participant: Participant, session: ReadSession
) -> None:
    """Give the connection of one read session back, unless the unit has done so."""
    if session in participant.parallel:
        participant.parallel.remove(session)
        shield = Shield()
        await _close_reader(unit, participant, session, shield)
        shield.deliver()


async def _close_reader(
    unit: UnitOfWork, participant: Participant, session: ReadSession, shield: Shield
) -> None:
    events, timeout = participant.shared.events, unit.options.commit_timeout
    await Completion(events, shield, timeout).close_reader(session)
    if unit.options.wants_details:
        participant.report_release(session, "read")


def tell(unit: UnitOfWork) -> None:
    """Tell the observers, in the task and context of the request.

    Sentry's own ASGI middleware drops what was reported in another context before.
    The events of a hook's unit are told with those of the unit whose hook it is.
    """
    events = [] if unit.shared is None else unit.shared.events
    if not events:
        return
    _stamp(unit, events)
    if not unit.is_hook:
        told_now = list(events)
        events.clear()
        for each in told_now:
            unit.options.tell(each)


def _stamp(unit: UnitOfWork, events: list[Event]) -> None:
    """Say of events that their unit has not told yet whose they are."""
    events[:] = [
        each if each.unit is not None else dataclasses.replace(each, unit=unit)
        for each in events
    ]
