"""The end of a unit of work, from outside: `finish()` is the one function that ends it.

It runs in the task of the request. Whatever it awaits from COMMIT or ROLLBACK on runs
under a `Shield`, so nothing interrupts it between two steps either.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import anyio

from asgi_uow import _decision, errors
from asgi_uow._asgi import RETRY_AFTER
from asgi_uow._concurrency import Shield
from asgi_uow._databases.driver_errors import to_retry
from asgi_uow._decision import CLOSED, STATE_OF, Cause, Outcome, rollback
from asgi_uow._sessions.deadline import lift
from asgi_uow._unit.completion import Completion, failed
from asgi_uow._unit.events import add_hooks, note_close, note_end, tell
from asgi_uow._unit.hook_units import HookRun
from asgi_uow._unit.hooks import NO_HOOKS, check_callable

if TYPE_CHECKING:
    from asgi_uow._decision import Decision
    from asgi_uow._sessions.managed import Shared
    from asgi_uow._unit.hooks import Hook
    from asgi_uow._unit.unit import UnitOfWork
    from asgi_uow.errors import UnitOfWorkFailedError as Failure


async def finish(
    unit: UnitOfWork, decision: Decision, error: BaseException | None = None
) -> None:
    """Commit or roll back, release the write connections, run the hooks.

    Raises the failure if a commit was wanted, or claimed by the response, and the work
    was not kept, unless it is done again. Until COMMIT is sent a cancellation rolls
    back; from then on it is delivered after the last hook. `error` is why the response
    has to be replaced.
    """
    if unit.shared is None and not decision.replace_response:
        unit.move(_decision.PREPARING if decision.commit else _decision.ROLLING_BACK)
        unit.conclude_unused(decision.cause)
        return
    shared = unit.shared or unit.share()
    completion = Completion(unit.options.commit_timeout)
    if decision.commit:
        unit.move(_decision.PREPARING)
        unit.failure = await prepare(unit)
        if unit.around is not None or unit.last is not None:
            unit.failure = await _go_last(unit)
        if unit.failure is not None:
            decision = rollback(unit.failure.cause)
    stopped = error or (unit.failure and unit.failure.__cause__)
    unit.doom = unit.doomed_by
    if decision.commit and unit.doom is not None:
        decision = rollback(Cause.DOOMED, replace_response=True)
    if decision.replace_response:
        kind = errors.CommitFailedError if error is not None else errors.DoomedError
        unit.failure = failed(kind, decision.cause or Cause.DOOMED, error or unit.doom)
    unit.move(_decision.COMMITTING if decision.commit else _decision.ROLLING_BACK)
    try:
        await _complete(unit, decision, completion)
    finally:
        if shared.events:
            tell(unit)
    if stopped is not None and not isinstance(stopped, Exception):
        raise stopped
    completion.shield.deliver()
    if unit.failure is not None and unit.again is None:
        raise unit.failure


async def _complete(
    unit: UnitOfWork, decision: Decision, completion: Completion
) -> None:
    """Commit or roll back, and run the hooks."""
    writers, cause, outcome = unit.writers, decision.cause, Outcome.COMMITTED
    if decision.commit and writers:  # in name, if nobody asked for a write session
        unit.failure = await completion.commit(writers)  # <- here, and nowhere else
        cause = None if unit.failure is None else unit.failure.cause
    if cause is not None:
        failure = await completion.prove(unit.failure, cause, writers)
        outcome = Outcome.ROLLED_BACK if failure is None else failure.outcome
        for writer in writers:
            await completion.roll_back(writer, outcome)
        unit.cause = cause if failure is None else failure.cause
        unit.failure = failure
        if outcome is Outcome.ROLLED_BACK:
            _ask_for_another(unit)
    unit.outcome = outcome
    unit.move(STATE_OF[outcome])
    note_end(unit, outcome, completion.began)
    if unit.hooks is not NO_HOOKS and any(unit.hooks.queues.values()):
        await _run_hooks(unit, completion)
        if (recorder := unit.share().recorder) is not None:
            add_hooks(unit, recorder)


def conflict_of(unit: UnitOfWork, error: BaseException | None) -> BaseException | None:
    """Give what the work of a unit failed for, if the same may succeed now."""
    outages = [] if unit.shared is None else unit.shared.outages
    # What went past the session was seen by the journal alone.
    last = (each.journal.last for each in unit.writers)
    return to_retry(next(filter(None, (error, *outages, *last)), None), outages)


def _ask_for_another(unit: UnitOfWork) -> None:
    """Have its work done again, or tell what is around why it was rolled back."""
    failure, error = unit.failure, unit.doom
    if failure is not None:
        if unit.share().may_repeat(failure.__cause__):
            failure.retry_after = RETRY_AFTER
        if failure.cause is not Cause.BEFORE_COMMIT:
            # A hook may have raised what it has made of the first error.
            error = error or failure.__cause__
    if unit.attempts is not None:
        unit.again = unit.attempts.schedule(unit, conflict_of(unit, error))
        unit.is_replayed = unit.again is not None
    nested = unit.is_nested and unit.again is None and unit.cause is not Cause.EXPLICIT
    if nested and unit.around is not None:
        first, outages = conflict_of(unit, error), unit.around.share().outages
        outages += [first] if isinstance(first, Exception) and not outages else []


async def _run_hooks(unit: UnitOfWork, completion: Completion) -> None:
    """Run what the outcome allows; what is not certain calls none."""
    hooks, shield = unit.hooks, completion.shield
    for participant in unit.participants.values():
        # A hook that reads must not wait for the connection of its own request.
        if (reader := participant.reader) and reader.sync_session.connections:
            await completion.release_reader(reader)
    undone = hooks.take("after_rollback")[::-1]
    if unit.outcome is Outcome.COMMITTED:
        undone = [hook for hook in undone if hook.is_dropped]
    if unit.outcome in {Outcome.COMMITTED, Outcome.ROLLED_BACK}:
        await HookRun(unit, "after_rollback", undone, end_unit).run(shield)
    if unit.outcome is Outcome.COMMITTED:
        committed = hooks.take("after_commit")
        unit.share().kept[0] += len(committed)
        await HookRun(unit, "after_commit", committed, end_unit).run(shield)


async def end_unit(unit: UnitOfWork, decision: Decision) -> None:
    """Finish and release a unit: the end of a block, or of a hook's own unit."""
    try:
        await finish(unit, decision)
    finally:
        await release(unit)


async def prepare(unit: UnitOfWork) -> Failure | None:
    """Run the `before_commit` hooks and flush, until neither adds to the other.

    Each has `hook_timeout` seconds, and may doom what was whole when this end was
    decided. Gives what stopped it, which is raised later.
    """
    try:
        for participant in unit.participants.values():
            for reader in participant.readers:
                reader.refuse_changes()
        while True:
            if unit.hooks is not NO_HOOKS:
                unit.quota = unit.hooks.quota
                waiting = unit.hooks.queue("before_commit")
                hooks = HookRun(unit, "before_commit", waiting, end_unit)
                shield = Shield(forwards=True)
                stop = await hooks.run(shield)
                shield.deliver()
                if stop is not None:
                    return _stopped_by(stop[1], stop[0].name)
            participants = unit.participants
            for writer in unit.writers:
                if not writer.sync_session._is_clean():  # noqa: SLF001  # no other way
                    with anyio.fail_after(unit.options.hook_timeout):
                        await writer.flush()
            more = unit.hooks.queues.get("before_commit")
            is_all = participants is unit.participants and not more
            if is_all and (unit.until is None or lift(unit.writers)):
                return None
    except BaseException as error:  # noqa: BLE001  # raised by finish()
        return _stopped_by(error)


async def _go_last(unit: UnitOfWork) -> Failure | None:
    """Send what COMMIT follows at once; stop what a replayed attempt has left.

    The hooks of such an attempt are none.
    """
    for each in (unit, *unit.outwards()):
        if each.is_replayed:
            operation = "COMMIT of a unit that an attempt before has left"
            return _stopped_by(errors.UnitOfWorkClosedError(operation, each.state))
        if each.is_hook:
            break
    if unit.failure is None and unit.last is not None:
        try:
            with anyio.fail_after(unit.options.hook_timeout):
                await unit.last()
        except BaseException as error:  # noqa: BLE001  # raised by finish()
            return _stopped_by(error)
    return unit.failure


def _stopped_by(error: BaseException, hook: str | None = None) -> Failure:
    """Tell what an error of the flush means, or of a `before_commit` hook."""
    kind: type[Failure] = errors.CommitFailedError
    cause = Cause.COMMIT_FAILED if isinstance(error, Exception) else Cause.CANCELLED
    if hook is not None and isinstance(error, Exception):
        kind, cause = errors.BeforeCommitError, Cause.BEFORE_COMMIT
    if isinstance(error, TimeoutError):
        cause = Cause.TIMEOUT
    return failed(kind, cause, error, hook or "")


def register(unit: UnitOfWork, phase: str, hook: Hook) -> None:
    """Register a hook; one of `after_rollback` is also called for its savepoint."""
    check_callable(phase, hook.fn)
    unit.register(phase, hook)
    if phase == "after_rollback" and hook.frame is not None:
        callback = functools.partial(_call_undone, unit, hook)
        unit.share().savepoints.call_if_undone(hook.frame, callback)


async def _call_undone(unit: UnitOfWork, hook: Hook) -> None:
    hooks = unit.hooks.queue("after_rollback")
    if hook in hooks:  # pragma: no branch  # the end of the unit may have called it
        hooks.remove(hook)
        shield = Shield()
        await HookRun(unit, "after_rollback", [hook], end_unit).run(shield)
        shield.deliver()


async def release(unit: UnitOfWork) -> None:
    """Close what is left open, run the `after_response` hooks, tell what is left."""
    unit.move(CLOSED)
    shared = unit.shared
    if shared is None:
        return
    completion: Completion | None = None
    try:
        for participant in unit.participants.values():
            while participant.readers:
                completion = completion or Completion(unit.options.commit_timeout)
                await completion.close_reader(participant.readers.pop())
        if unit.hooks is not NO_HOOKS and unit.outcome is Outcome.COMMITTED:
            completion = completion or Completion(unit.options.commit_timeout)
            hooks = unit.hooks.take("after_response")
            shared.kept[0] += len(hooks)
            run = HookRun(unit, "after_response", hooks, end_unit)
            await run.run(completion.shield)
    finally:
        if shared.recorder is not None:
            note_close(unit, shared.recorder)
        if shared.events:
            tell(unit)
        if unit.hooks is not NO_HOOKS:
            _drop_hooks(unit, shared)
        # A leaked context may keep the unit alive, but not what was closed.
        watch = unit.watch
        others: dict[Any, None] = {} if watch is None else watch.others
        others.pop(watch and watch.own, None)
        for writer in unit.writers:
            shared.writers.remove(writer.sync_session)
        unit.participants, unit.writers = {}, ()
        unit.again = unit.attempts = unit.failure = unit.last = unit.watch = None
        unit.scope = unit.task = None
    if completion is not None:
        completion.shield.deliver()


def _drop_hooks(unit: UnitOfWork, shared: Shared) -> None:
    unit.hooks.queues.clear()
    if not unit.is_nested:
        shared.savepoints.clear()
