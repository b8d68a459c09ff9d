"""The unit of work: its sessions, its states, and `finish()`, which ends it."""

from __future__ import annotations

import dataclasses
import time
import warnings
from typing import TYPE_CHECKING

from . import _dialects
from ._after import call_all
from ._before import HookStoppedError, prepare
from ._causal import NOTHING, MustSee
from ._end import End, Outages, Settings
from ._hooks import Hooks
from ._policy import Decision, rollback
from ._sessions import Sessions
from ._shield import run_to_completion
from ._states import TRANSITIONS, UNDECIDED, WRITABLE, Cause, Outcome, State
from .errors import (
    BeforeCommitError,
    CommitFailedError,
    DoomedError,
    UnitOfWorkClosedError,
    UnitOfWorkFailedError,
    UnknownDatabaseError,
)
from .observers import (
    CommitFailed,
    ImplicitCommit,
    UnitFinished,
    UnitStarted,
    notify,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ._engines import Engines
    from ._hooks import Quota
    from ._read_session import ReadSession
    from ._session import Session
    from .observers import Event


class UnitOfWork:
    """What one request, or one `async with db:`, does to its databases.

    Sessions open on first use. The end is decided once: everything is committed or
    nothing is, and what was registered for that end happens then.
    """

    def __init__(
        self,
        databases: Sequence[Engines],
        settings: Settings,
        *,
        parent: UnitOfWork | None = None,
        hook_of: UnitOfWork | None = None,
        attempt: int = 1,
        must_see: MustSee = NOTHING,
        quota: Quota | None = None,
    ) -> None:
        """Serve `databases`, the first being the default; opens nothing."""
        self.databases: tuple[Engines, ...] = tuple(databases)
        self.parent = parent
        self.hook_of = hook_of
        self.attempt = attempt
        self.must_see = must_see
        self.hooks: Hooks = Hooks(quota)
        if parent is not None:
            parent.hooks.inner.append(self.hooks)
        self.outcome: Outcome | None = None
        self.cause: Cause | None = None
        self.reason: str | None = None
        self.forced: bool = False
        self.kept: set[Engines] = set()
        self.previous: UnitOfWork | None = None
        self.settings = settings
        self._state = State.NEW
        self._sessions = Sessions(self)
        self._outages = Outages()
        self.events: list[Event] = [] if hook_of is None else hook_of.events
        self._end = End(self, self._sessions.writers, self._outages)
        self._doomed_by: BaseException | None = None
        self._started = False
        self._opened = self._ended = time.perf_counter()

    # What handlers use

    @property
    def state(self) -> State:
        """Where in its life the unit is."""
        return self._state

    @property
    def doomed_by(self) -> BaseException | None:
        """The first error for which the database gave the work up, if it did.

        Until the decision a ROLLBACK TO SAVEPOINT can still undo it.
        """
        if self._doomed_by is not None:
            return self._doomed_by
        return self._sessions.doomed_by

    @property
    def failure(self) -> UnitOfWorkFailedError | None:
        """What is raised because a commit was wanted and the work was not kept."""
        return self._end.failure

    @property
    def is_open(self) -> bool:
        """Whether the end is not decided yet."""
        return self._state in UNDECIDED

    @property
    def is_writable(self) -> bool:
        """Whether the write sessions may still execute something."""
        return self._state in WRITABLE

    @property
    def is_decided(self) -> bool:
        """Whether COMMIT or ROLLBACK is being sent or lies behind."""
        return not self.is_writable

    def session(self, db: Engines | None = None) -> Session:
        """Give the write session of `db`, of the first database by default.

        Raises `UnitOfWorkClosedError` once the unit is decided and
        `UnknownDatabaseError` for a database that it does not serve.
        """
        db = self.databases[0] if db is None else db
        if db not in self.databases:
            return self._around("session()", db).session(db)
        self.check_writable("session()")
        session = self._sessions.writer(db)
        self._activate()
        return session

    def read_session(self, db: Engines | None = None) -> Session:
        """Give the read-only session of `db`; open until the unit is closed."""
        db = self.databases[0] if db is None else db
        if db not in self.databases:
            return self._around("read_session()", db).read_session(db)
        self.check_readable("read_session()")
        session = self._sessions.reader(db)
        self._activate()
        return session

    async def open_parallel(self, db: Engines | None = None) -> ReadSession:
        """Give one more read session, for one task; see `parallel_read`."""
        db = self.databases[0] if db is None else db
        if db not in self.databases:
            return await self._around("parallel_read()", db).open_parallel(db)
        self.check_readable("parallel_read()")
        session = await self._sessions.one_more_reader(db)
        self._activate()
        return session

    async def close_parallel(self, session: ReadSession) -> None:
        """Give its connection back, whatever happens."""
        db = self._sessions.parallel.pop(session, None)
        if db is not None:
            await run_to_completion(self._end.close_reader(db, session))
        elif self.parent is not None:
            await self.parent.close_parallel(session)

    def set_rollback_only(self, reason: str) -> None:
        """Have nothing kept, whatever the response; `reason` is for observers."""
        self.check_undecided("set_rollback_only()")
        self.reason = reason
        if self._state is not State.ROLLBACK_ONLY:
            self._move(State.ROLLBACK_ONLY)

    def force_commit(self) -> None:
        """Have everything committed whatever the status of the response."""
        self.check_undecided("force_commit()")
        self.forced = True

    # What the shells use

    def register(
        self,
        phase: str,
        fn: object,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
    ) -> None:
        """Register a hook; raises as `after_commit` says."""
        self.check_writable(f"{phase}()")
        self.hooks.register(phase, fn, args, kwargs)
        self._start()

    def for_hook(self) -> UnitOfWork:
        """Make the unit that one hook of this one gets for itself."""
        databases = dict.fromkeys(self.databases)
        around = self.parent
        while around is not None:
            databases |= dict.fromkeys(around.databases)
            around = around.parent
        return UnitOfWork(
            tuple(databases),
            self.settings,
            hook_of=self,
            must_see=self.must_see,
            quota=self.hooks.quota,
        )

    def has_written(self, db: Engines) -> bool:
        """Tell whether reads of `db` must see what this unit did, or one around it."""
        if db in self.kept or self._sessions.has_written(db):
            return True
        return any(unit.has_written(db) for unit in self._around_me())

    async def positions(self, seconds: float) -> dict[str, str]:
        """Tell how far replicas must be to have what was committed in this unit.

        By itself, its hooks and the units of work inside.
        """
        found = {db.key: await db.position(seconds) for db in list(self.kept)}
        return {key: each for key, each in found.items() if each is not None}

    def note_kept(self, db: Engines) -> None:
        """Note that something was committed here, or in a unit inside."""
        self.kept.add(db)
        for unit in self._around_me():
            unit.note_kept(db)

    def serves(self, db: Engines) -> bool:
        """Tell whether this unit, or one around it, serves `db`."""
        if db in self.databases:
            return True
        return self.parent is not None and self.parent.serves(db)

    def holds(self, db: Engines) -> bool:
        """Tell whether this unit holds a connection that another would wait for."""
        return self._sessions.holds(db)

    def is_inside_holder_of(self, db: Engines) -> bool:
        """Tell whether a unit around this one holds what this one would wait for."""
        return any(held_by(each, db) for each in self._around_me())

    def _around_me(self) -> Iterator[UnitOfWork]:
        around = (self.hook_of, self.parent, self.previous)
        return filter(None, dict.fromkeys(around))

    def note(self, error: Exception) -> None:
        """Note what a session ran into."""
        self._outages.note(error)

    def unavailable(self, error: BaseException) -> bool:
        """Tell whether `error` is, or follows from, a database out of reach."""
        return self._outages.behind(error)

    async def finish(
        self,
        decision: Decision,
        because: Exception | None = None,
    ) -> None:
        """Commit or roll back, release the write connections, run the hooks.

        The only place that does. Raises the failure if a commit was wanted, or
        claimed by the response, and the work was not kept. Until COMMIT is sent a
        cancellation rolls back; from then on it is delivered after the last hook.
        `because` is the error behind a decision that refuses the response.
        """
        cancelled: BaseException | None = None
        self._ended = time.perf_counter()
        if decision.commit:
            self._move(State.PREPARING)
            try:
                await prepare(self, self._sessions)
            except Exception as error:  # noqa: BLE001  # raised below as the failure
                decision = self._give_up(error)
            except BaseException as error:  # noqa: BLE001  # raised below as it is
                cancelled = error
                decision = self._give_up(error)
            else:
                if self.doomed_by is not None:
                    decision = rollback(Cause.DOOMED, refuse=True)
        self._doomed_by = self.doomed_by
        self._move(State.COMMITTING if decision.commit else State.ROLLING_BACK)
        self.cause = decision.cause
        if decision.refuse and decision.cause is not None:
            kind = CommitFailedError if because else DoomedError
            self._end.failure = self._end.fail(
                kind, decision.cause, because or self.doomed_by
            )
        try:
            if self._sessions.writers or self.hooks:
                await run_to_completion(self._settle(decision))
            else:
                kept = decision.commit
                self._conclude(Outcome.COMMITTED if kept else Outcome.ROLLED_BACK)
        finally:
            self._tell()
        if cancelled is not None:
            raise cancelled
        if self.failure is not None:
            raise self.failure

    async def release(self) -> None:
        """Close what is left open and run the `after_response` hooks."""
        committed = self.outcome is Outcome.COMMITTED
        self._move(State.CLOSED)
        try:
            hooks = committed and self.hooks.of("after_response")
            if self._sessions or hooks:
                await run_to_completion(self._release())
        finally:
            self.hooks.clear()
            if self.parent is not None:
                self.parent.hooks.inner.remove(self.hooks)
            self._tell()
            self._sessions.forget()

    def responding(self) -> None:
        """Note that the start of the response has been forwarded."""
        self._move(State.RESPONDING)

    def report(self, event: Event) -> None:
        """Have the observers told once the end is over, in the caller's task."""
        self.events.append(dataclasses.replace(event, unit=self))

    # Checks

    def check_undecided(self, operation: str) -> None:
        """Raise `UnitOfWorkClosedError` once the end has been decided."""
        if self._state not in UNDECIDED:
            raise UnitOfWorkClosedError(operation, self._state)

    def check_writable(self, operation: str) -> None:
        """Raise `UnitOfWorkClosedError` once the flush before COMMIT is over."""
        if not self.is_writable:
            raise UnitOfWorkClosedError(operation, self._state)

    def check_readable(self, operation: str) -> None:
        """Raise `UnitOfWorkClosedError` once the response is over."""
        if self._state is State.CLOSED:
            raise UnitOfWorkClosedError(operation, self._state)

    def _move(self, state: State) -> None:
        if state not in TRANSITIONS[self._state]:
            operation = f"becoming {state.value}"
            raise UnitOfWorkClosedError(operation, self._state)
        self._state = state

    # Sessions

    def _around(self, operation: str, db: Engines) -> UnitOfWork:
        if self.parent is None:
            raise UnknownDatabaseError(operation, db)
        return self.parent

    def _activate(self) -> None:
        if self._state is State.NEW:
            self._move(State.ACTIVE)
        self._start()

    def _start(self) -> None:
        if not self._started:
            self._started = True
            notify(self.settings.observers, UnitStarted(unit=self))

    async def call_undone(self, owner: object) -> None:
        """Call the `after_rollback` hooks of savepoints that were rolled back."""
        hooks = self.hooks.take_undone(owner)
        await run_to_completion(call_all(self, "after_rollback", hooks))

    # The end

    def _give_up(self, error: BaseException) -> Decision:
        """Turn what stopped the preparation into a rollback and the failure."""
        kind: type[UnitOfWorkFailedError] = CommitFailedError
        cause, detail = Cause.COMMIT_FAILED, ""
        if isinstance(error, HookStoppedError) and error.__cause__ is not None:
            kind, cause, detail = BeforeCommitError, Cause.BEFORE_COMMIT, str(error)
            error = error.__cause__
        if isinstance(error, TimeoutError):
            cause = Cause.TIMEOUT
        elif not isinstance(error, Exception):
            cause = Cause.CANCELLED
        self._end.failure = self._end.fail(kind, cause, error, detail=detail)
        return rollback(cause)

    async def _settle(self, decision: Decision) -> None:
        """Commit or roll back, then run the hooks of the outcome."""
        outcome = await self._end.run(commit=decision.commit, cause=decision.cause)
        if self.failure is not None:
            self.cause = self.failure.cause
        self._conclude(outcome)
        if self.hooks:
            # A hook that reads must not wait for the connection of its own request.
            for session in self._sessions.readers.values():
                await self._end.rest(session)
        if outcome is Outcome.COMMITTED:
            await call_all(self, "after_rollback", self.hooks.take_undone())
            await call_all(self, "after_commit", self.hooks.take("after_commit"))
        elif outcome is Outcome.ROLLED_BACK:
            await call_all(self, "after_rollback", self.hooks.take_rolled_back())

    def _conclude(self, outcome: Outcome) -> None:
        """Record the outcome and tell the observers."""
        self.outcome = outcome
        self._move(State[outcome.name])
        self.hooks.leave_savepoints()
        for db, session in self._sessions.writers.items():
            if session.sync_session.committed and self._sessions.has_written(db):
                self.note_kept(db)
            statement = session.sync_session.journal.committed_by
            if statement is not None:
                self.report(ImplicitCommit(statement))
        if self.failure is not None and self.hook_of is None:
            self.report(
                CommitFailed(
                    self.failure,
                    outcome,
                    self.failure.cause,
                    _dialects.code_of(self.failure.__cause__),
                ),
            )
        if self._started:
            used = filter(self._sessions.has_written, self._sessions.writers)
            now = time.perf_counter()
            self.report(
                UnitFinished(
                    outcome,
                    self.cause,
                    self.reason,
                    tuple(db.name for db in used),
                    now - self._opened,
                    now - self._ended,
                ),
            )

    async def _release(self) -> None:
        """Close the read sessions, then run the `after_response` hooks."""
        for db, session in self._sessions.all_readers():
            await self._end.close_reader(db, session)
        if self.outcome is Outcome.COMMITTED:
            hooks = self.hooks.take("after_response")
            await call_all(self, "after_response", hooks)

    def _tell(self) -> None:
        """Tell the observers, in the task and context of the request.

        Sentry's own ASGI middleware drops what was reported in that context before.
        """
        while self.events and self.hook_of is None:
            notify(self.settings.observers, self.events.pop(0))

    def __del__(self) -> None:
        """Warn of hooks that never ran: the unit was dropped without an end."""
        if self._state is not State.CLOSED and self.hooks:
            warnings.warn(
                f"{self!r} was collected with hooks that never ran",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )

    def __repr__(self) -> str:
        """Show state and databases, without passwords."""
        names = ", ".join(db.name for db in self.databases)
        return f"<UnitOfWork {self._state.value} on {names}>"


def held_by(unit: UnitOfWork | None, db: Engines) -> bool:
    """Tell whether `unit`, or one around it, holds a connection that another waits for.

    Around it are the unit that it is nested in, the one whose hook it is for, and
    the one that was current before.
    """
    if unit is None:
        return False
    return unit.holds(db) or unit.is_inside_holder_of(db)
