"""What observers are told of the end of a unit, in its own task and context."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

from asgi_uow._asgi import path_of
from asgi_uow._databases.driver_errors import code_of
from asgi_uow.observers import CommitFailed, UnitClosed, UnitFinished

if TYPE_CHECKING:
    from asgi_uow._decision import Outcome
    from asgi_uow._sessions.record import Recorder
    from asgi_uow._unit.unit import UnitOfWork


def tell(unit: UnitOfWork) -> None:
    """Tell the observers, in the task and context of the request.

    Sentry's own ASGI middleware drops what was reported in another context before.
    The events of a hook's unit are told with those of the unit whose hook it is.
    """
    stamp(unit)
    if not unit.is_hook:
        events = unit.share().events
        while events:
            unit.options.tell(events.pop(0))


def stamp(unit: UnitOfWork) -> None:
    """Say of events that their unit has not told yet whose they are."""
    events = unit.share().events
    for index, each in enumerate(events):
        if each.unit is None:
            events[index] = dataclasses.replace(each, unit=unit)


def note_end(unit: UnitOfWork, outcome: Outcome, ending_since: float) -> None:
    """Record what later reads must see, and what the observers are told."""
    shared, failure = unit.shared or unit.share(), unit.failure
    events, recorder = shared.events, shared.recorder
    for participant in unit.participants.values():
        participant.conclude(outcome)
    if unit.again is not None:
        events.append(unit.again)
    elif failure is not None and not unit.is_hook:
        # That of a hook's own unit is the failure of the hook.
        about = failure, outcome, failure.cause, code_of(failure.__cause__)
        events.append(CommitFailed(*about, *_request(unit)))
    if unit.opened is not None and recorder is not None:
        now = time.perf_counter()
        used = [db for db, each in unit.participants.items() if each.has_written]
        what = outcome, unit.cause, unit.reason, tuple(db.name for db in used)
        times = now - unit.opened, now - ending_since
        values = *what, *times, *_request(unit), unit.attempt, unit.replayed
        figures = recorder.usage(), recorder.hooks, recorder.hook_seconds
        events.append(UnitFinished(*values, *figures))
    if events:
        stamp(unit)


def add_hooks(unit: UnitOfWork, recorder: Recorder) -> None:
    """Note in what is to be told which hooks there were, once they have run."""
    events = unit.share().events
    for index, each in enumerate(events):
        if isinstance(each, UnitFinished) and each.unit is unit:
            hooks, seconds = recorder.hooks, recorder.hook_seconds
            events[index] = dataclasses.replace(each, hooks=hooks, hook_seconds=seconds)


def note_close(unit: UnitOfWork, recorder: Recorder) -> None:
    """Note, for an inspector, what took time until the response had left."""
    response, opened, timeline = unit.response, unit.opened, recorder.timeline
    if opened is None or timeline is None:
        return
    left: tuple[float, float] | None = None
    if response is not None and response.started is not None:
        left = response.started - opened, response.ended - opened
    steps = [dataclasses.replace(each, start=each.start - opened) for each in timeline]
    steps.sort(key=lambda each: each.start + each.seconds)
    status = None if response is None else response.status
    unit.share().events.append(UnitClosed(status, left, tuple(steps)))


def _request(unit: UnitOfWork) -> tuple[str | None, str | None]:
    """Give method and path of the request that a unit is for, or inside of."""
    for each in (unit, *unit.outwards()):
        if each.scope is not None:
            return each.scope.get("method"), path_of(each.scope)
    return None, None
