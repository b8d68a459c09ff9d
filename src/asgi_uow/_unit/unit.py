"""The unit of work: what it serves, what was asked of it, where in its life it is."""

from __future__ import annotations

import dataclasses
import functools
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from asgi_uow import _decision, errors
from asgi_uow._concurrency import register_at_fork
from asgi_uow._databases.engines import check_databases
from asgi_uow._decision import CLOSED, UNDECIDED, WRITABLE, Cause, Outcome, State
from asgi_uow._reading.causal import MustSee
from asgi_uow._sessions.deadline import Deadline
from asgi_uow._sessions.managed import Shared
from asgi_uow._sessions.record import Recorder
from asgi_uow._unit.held import Watch
from asgi_uow._unit.hooks import MOST_BY_HOOKS, NO_HOOKS, Hooks
from asgi_uow._unit.options import inspected
from asgi_uow._unit.participant import Participant
from asgi_uow.observers import UnitStarted

if TYPE_CHECKING:
    from asyncio import Task
    from collections.abc import Awaitable, Callable, Iterator, Mapping

    from asgi_uow._asgi import Response, Scope
    from asgi_uow._databases.engines import Engines
    from asgi_uow._sessions.session import Session
    from asgi_uow._unit.hooks import Hook
    from asgi_uow._unit.options import UnitOptions
    from asgi_uow.observers import Event

# Python 3.11 takes long for each member of an enum.
COMMITTED = State.COMMITTED, Outcome.COMMITTED
ROLLED_BACK = State.ROLLED_BACK, Outcome.ROLLED_BACK
NONE: Mapping[Engines, Participant] = {}


class UnitOfWork:
    """What one request, or one `async with db:`, does to its databases.

    Sessions open on first use. The end is decided once: everything is committed or
    nothing is, and what was registered for that end happens then.
    """

    # Set by who makes one: __init__ costs a call; a default makes asking slow, too.
    databases: tuple[Engines, ...]
    options: UnitOptions
    state: State  # where in its life the unit is; `NEW` at first
    outcome: Outcome | None  # once it is decided
    scope: Scope  # of its request
    task: Task[Any] | None  # of its request or block
    shared: Shared | None
    participants: Mapping[Engines, Participant]
    writers: tuple[Session, ...]
    """The write sessions of its participants, in the order of first use."""
    # Set by share(), if it is used: an unused unit is not asked for them.
    hooks: Hooks
    doom: BaseException | None  # what was found at its end, for which nothing is kept
    again: Event | None  # what tells that its work is done again
    failure: errors.UnitOfWorkFailedError | None
    """What is raised because a commit was wanted and the work was not kept."""
    last: Callable[[], Awaitable[object]] | None  # sends what COMMIT follows
    opened: float | None  # when it was first asked for something
    watch: Watch | None  # tells of connections held while nothing is executed

    cause: Cause | None = None  # why it was not committed
    reason: str | None = None  # what `set_rollback_only` was given
    attempt: int = 1
    attempts: Any = None  # asked, once it is rolled back, whether there is another
    response: Response | None = None  # when it left, if somebody asks
    until: float | None = None  # its deadline, by the event loop's clock
    around: UnitOfWork | None = None  # the unit that was current before
    entered_by_hand: Engines | None = None
    is_nested: bool = False
    """Whether it is inside `around`, whose savepoints and databases it shares."""
    is_hook: bool = False
    is_replayed: bool = False  # what this attempt has left behind keeps nothing
    replayed: bool = False
    """Whether its idempotency key was used before: what it is for has been done."""

    forced: bool = False
    must_see: MustSee = MustSee()
    quota: Iterator[int] | None = None  # how many hooks its hooks may register

    @property
    def is_last_attempt(self) -> bool:
        """Whether a conflict in this attempt reaches the client; see `Retry`."""
        units = (self, *self.outwards())
        return all(each.attempts is None or each.attempts.is_used_up for each in units)

    @property
    def doomed_by(self) -> BaseException | None:
        """The first error for which the database rolled the work back, if it did.

        Until the decision a ROLLBACK TO SAVEPOINT can still undo it.
        """
        if self.shared is None:
            return None
        for writer in self.writers if self.doom is None else ():
            if writer.doomed_by is not None:
                return writer.doomed_by
        return self.doom

    def session(self, db: Engines | None = None) -> Session:
        """Give the write session of `db`, of the first database by default.

        Raises `UnitOfWorkClosedError` once the unit is decided and
        `UnknownDatabaseError` for a database that it does not serve.
        """
        db = self.databases[0] if db is None else db
        if db not in self.databases:
            return self._around("session()", db).session(db)
        if self.replayed:
            self._check("session() for a key that was used before", frozenset())
        if self.state not in WRITABLE:
            self._check("session()", WRITABLE)
        participant = self.participants.get(db) or self._enlist(db)
        if participant.writer is not None:
            return participant.writer
        if (self.around or self.databases[1:]) and self.is_blocked_by_others(db):
            raise errors.NestedUnitOfWorkError(db)
        self.start()
        writer = participant.open_writer()
        self.writers = (*self.writers, writer)
        self._look_after(writer)
        return writer

    def read_session(self, db: Engines | None = None) -> Session:
        """Give the read-only session of `db`; open until the unit is closed."""
        participant = self.reading("read_session()", db)
        if participant.reader is None:
            participant.reader = participant.open_reader()
            if participant.db.read_isolation:
                self._look_after(participant.reader)
        return participant.reader

    def _look_after(self, session: Session) -> None:
        if (seconds := self.options.held_idle) is not None:
            if self.watch is None:
                self.watch = Watch(seconds, self._tell_idle, self.task)
            self.watch.sessions.append(session)

    def reading(self, operation: str, db: Engines | None) -> Participant:
        """Give the participant that opens read sessions of `db`."""
        db = self.databases[0] if db is None else db
        if db not in self.databases:
            return self._around(operation, db).reading(operation, db)
        if self.state is CLOSED:
            raise errors.UnitOfWorkClosedError(operation, self.state)
        if db.is_memory and self.state in WRITABLE:
            self.session(db)  # there is one connection for both
        self.start()
        return self.participants.get(db) or self._enlist(db)

    def set_rollback_only(self, reason: str) -> None:
        """Have nothing kept, whatever the response; `reason` is for observers."""
        self._check("set_rollback_only()", UNDECIDED)
        self.reason = reason
        self.share()  # its end is more than a word
        if self.state is not _decision.ROLLBACK_ONLY:
            self.move(_decision.ROLLBACK_ONLY)

    def force_commit(self) -> None:
        """Have everything committed whatever the status of the response."""
        self._check("force_commit()", UNDECIDED)
        self.forced = True
        self.share()

    def register(self, phase: str, hook: Hook) -> None:
        """Register a hook; raises as `after_commit` says."""
        if self.state not in WRITABLE:
            self._check(f"{phase}()", WRITABLE)
        if self.quota is not None and next(self.quota, None) is None:
            raise errors.TooManyHooksError(phase, MOST_BY_HOOKS)
        savepoints = (self.shared or self.share()).savepoints
        if self.hooks is NO_HOOKS:
            self.hooks = Hooks(self.quota)
        hook.frame = savepoints.innermost if savepoints.opened else None
        self.hooks.queue(phase).append(hook)
        if self.opened is None:
            self.start()  # observers that are told may register hooks, too

    def share(self) -> Shared:
        """Give what its sessions have in common; made at first use."""
        if self.shared is None:
            self.hooks, self.last, self.opened, self.watch = NO_HOOKS, None, None, None
            self.again = self.doom = self.failure = None
            around = None if self.around is None else self.around.share()
            self.shared = Shared(around, nested=self.is_nested, hook=self.is_hook)
            self.shared.state = self.state
            if self.until is not None:
                self.shared.deadline = Deadline(self.until, self.shared.outages)
            if inspected:
                self.options = self.options.with_inspectors(self.databases)
            if self.options.wants_figures:
                self.shared.recorder = Recorder(timeline=bool(self.options.inspectors))
        return self.shared

    def start(self) -> None:
        """Tell, once and at once, that the unit was asked for something."""
        if self.state is _decision.NEW:
            self.move(_decision.ACTIVE)
        shared = self.shared or self.share()
        if self.opened is None:
            self.opened = time.perf_counter()
            if shared.recorder is not None:
                self.options.tell(UnitStarted(unit=self))

    def _tell_idle(self, event: Event) -> None:
        self.options.tell(dataclasses.replace(event, unit=self))

    def _enlist(self, db: Engines) -> Participant:
        participant = Participant(db, self.share(), self.must_see)
        self.participants = {**self.participants, db: participant}
        return participant

    def _around(self, operation: str, db: Engines) -> UnitOfWork:
        if self.around is None or not self.is_nested:
            check_databases(operation, (db,))
            raise errors.UnknownDatabaseError(operation, db)
        return self.around

    def move(self, state: State) -> None:
        """Take a step; raises `UnitOfWorkClosedError` for one that does not exist."""
        if state not in _decision.TRANSITIONS[self.state]:
            operation = f"becoming {state.value}"
            raise errors.UnitOfWorkClosedError(operation, self.state)
        self.state = state
        if self.shared is not None:
            self.shared.state = state

    def conclude_unused(self, cause: Cause | None) -> None:
        """End a unit of which nothing was asked: no statement, nothing to tell."""
        self.state, self.outcome = COMMITTED if cause is None else ROLLED_BACK
        self.cause, self.again, self.failure = cause, None, None

    def _check(self, operation: str, states: frozenset[State]) -> None:
        if self.state not in states:
            raise errors.UnitOfWorkClosedError(operation, self.state)

    def outwards(self) -> Iterator[UnitOfWork]:
        unit = self.around
        while unit is not None:  # a job that starts the next one makes a long chain
            yield unit
            unit = unit.around

    def serves(self, db: Engines) -> bool:
        """Tell whether this unit, or one it is nested in, serves `db`."""
        unit: UnitOfWork | None = self
        while unit is not None and db not in unit.databases:
            unit = unit.around if unit.is_nested else None
        return unit is not None

    def holds(self, db: Engines) -> bool:
        """Tell whether this unit holds a connection that another would wait for."""
        held = (each for each in self.participants.values() if each.holds_connection)
        return any(each.db.writes_to == db.writes_to for each in held)

    def is_blocked_by_others(self, db: Engines) -> bool:
        """Tell whether it, or a unit around that ends later, holds the one writer."""
        unit: UnitOfWork | None = self if db.facts.SINGLE_WRITER else None
        while unit is not None and not (unit.participants and unit.holds(db)):
            unit = unit.around
        return unit is not None

    def __repr__(self) -> str:
        names = [db.name for db in self.databases]
        return f"<UnitOfWork {self.state.value} on {', '.join(names)}>"


def make_unit(databases: tuple[Engines, ...], options: UnitOptions) -> UnitOfWork:
    """Make a unit of which nothing was asked yet; the middleware makes its own."""
    unit = UnitOfWork()
    unit.databases, unit.options, unit.state = databases, options, _decision.NEW
    unit.participants, unit.writers = NONE, ()
    unit.scope = unit.task = unit.outcome = unit.shared = None
    return unit


current: ContextVar[UnitOfWork | None] = ContextVar("asgi_uow.current", default=None)
"""The unit of work of this request, block or hook; never one of its parts.

A child task or a thread has a copy of the context: changes inside an object arrive.
"""
register_at_fork(after_in_child=functools.partial(current.set, None))


def require(operation: str) -> UnitOfWork:
    """Give the current unit of work; raises where there is none or it has ended."""
    if (unit := current.get()) is None:
        raise errors.NoUnitOfWorkError(operation)
    if unit.state is CLOSED:
        raise errors.UnitOfWorkClosedError(operation, unit.state)
    return unit
