"""The unit of work: its sessions, its states, and `finish()`, which ends it."""

from __future__ import annotations

import functools
import time
import warnings
from typing import TYPE_CHECKING

import anyio

from . import _dialects
from ._end import End, Outages, Settings
from ._hooks import Hooks
from ._policy import Decision, rollback
from ._shield import bounded, run_to_completion
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
    HookFailed,
    ImplicitCommit,
    UnitFinished,
    notify,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._engines import Engines
    from ._hooks import Hook
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
        attempt: int = 1,
    ) -> None:
        """Serve `databases`, the first being the default; opens nothing."""
        self.databases: tuple[Engines, ...] = tuple(databases)
        self.parent = parent
        self.attempt = attempt
        self.hooks: Hooks = Hooks()
        self.outcome: Outcome | None = None
        self.cause: Cause | None = None
        self.reason: str | None = None
        self.forced: bool = False
        self.previous: UnitOfWork | None = None
        self.settings = settings
        self._state = State.NEW
        self._writers: dict[Engines, Session] = {}
        self._readers: dict[Engines, Session] = {}
        self._outages = Outages()
        self._events: list[Event] = []
        report = self._events.append
        self._end = End(self._writers, settings, self._outages, report)
        self._doomed_by: BaseException | None = None
        self._opened = time.perf_counter()

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
        doomed = (session.doomed_by for session in self._writers.values())
        return next((error for error in doomed if error is not None), None)

    @property
    def failure(self) -> UnitOfWorkFailedError | None:
        """What is raised because a commit was wanted and the work was not kept."""
        return self._end.failure

    @property
    def is_open(self) -> bool:
        """Whether the end is not decided yet."""
        return self._state in UNDECIDED

    @property
    def is_decided(self) -> bool:
        """Whether COMMIT or ROLLBACK is being sent or lies behind."""
        return self._state not in WRITABLE

    def session(self, db: Engines | None = None) -> Session:
        """Give the write session of `db`, of the first database by default.

        Raises `UnitOfWorkClosedError` once the unit is decided and
        `UnknownDatabaseError` for a database that it does not serve.
        """
        db = self.databases[0] if db is None else db
        if db not in self.databases:
            return self._around("session()", db).session(db)
        self.check_writable("session()")
        if db not in self._writers:
            self._writers[db] = db.write_session(
                self.check_writable, self._outages.note
            )
            self._activate()
        return self._writers[db]

    def read_session(self, db: Engines | None = None) -> Session:
        """Give the read-only session of `db`; open until the unit is closed."""
        db = self.databases[0] if db is None else db
        if db not in self.databases:
            return self._around("read_session()", db).read_session(db)
        self._check_readable("read_session()")
        if db not in self._readers:
            self._readers[db] = db.make_read_session(
                self._check_readable,
                self._outages.note,
                functools.partial(self._reads_move_to, db),
            )
            self._activate()
        return self._readers[db]

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

    def serves(self, db: Engines) -> bool:
        """Tell whether this unit, or one around it, serves `db`."""
        if db in self.databases:
            return True
        return self.parent is not None and self.parent.serves(db)

    def has_used(self, db: Engines) -> bool:
        """Tell whether a connection is held that another unit would wait for."""
        if db not in self.databases:
            return self.parent is not None and self.parent.has_used(db)
        sessions = [] if self.is_decided else [self._writers.get(db)]
        if db.is_memory:
            sessions.append(self._readers.get(db))
        return any(s is not None and s.sync_session.connections for s in sessions)

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
        if decision.commit:
            self._move(State.PREPARING)
            try:
                await self._prepare()
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
            if self._writers or self.hooks:
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
            if self._readers or (committed and self.hooks.after_response):
                await run_to_completion(self._release())
        finally:
            self.hooks.clear()
            self._tell()

    def responding(self) -> None:
        """Note that the start of the response has been forwarded."""
        self._move(State.RESPONDING)

    # Checks

    def check_undecided(self, operation: str) -> None:
        """Raise `UnitOfWorkClosedError` once the end has been decided."""
        if self._state not in UNDECIDED:
            raise UnitOfWorkClosedError(operation, self._state)

    def check_writable(self, operation: str) -> None:
        """Raise `UnitOfWorkClosedError` once the flush before COMMIT is over."""
        if self._state not in WRITABLE:
            raise UnitOfWorkClosedError(operation, self._state)

    def _check_readable(self, operation: str) -> None:
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

    def _reads_move_to(self, db: Engines) -> Session | None:
        """Give the write session once reads belong into its transaction."""
        if self._state not in WRITABLE:
            return None
        if db.is_memory:
            return self.session(db)
        writer = self._writers.get(db)
        return (
            writer if writer is not None and writer.sync_session.connections else None
        )

    # The end

    async def _prepare(self) -> None:
        """Run the `before_commit` hooks and flush, until neither adds to the other."""
        for session in list(self._readers.values()):
            session.refuse_changes()
        timeout = self.settings.hook_timeout
        queue = self.hooks.before_commit
        done = 0
        while True:
            while done < len(queue):
                hook = queue[done]
                done += 1
                try:
                    await hook.call(timeout)
                except Exception as error:
                    raise _HookStoppedError(hook.name) from error
            writers = list(self._writers.values())
            for session in writers:
                if session.has_changes:
                    with anyio.fail_after(timeout):
                        await session.flush()
            if done == len(queue) and len(writers) == len(self._writers):
                return

    def _give_up(self, error: BaseException) -> Decision:
        """Turn what stopped the preparation into a rollback and the failure."""
        kind: type[UnitOfWorkFailedError] = CommitFailedError
        cause, detail = Cause.COMMIT_FAILED, ""
        if isinstance(error, _HookStoppedError) and error.__cause__ is not None:
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
        if outcome is Outcome.COMMITTED:
            await self._run_hooks("after_commit", self.hooks.after_commit)
        elif outcome is Outcome.ROLLED_BACK:
            self.hooks.after_rollback.reverse()
            await self._run_hooks("after_rollback", self.hooks.after_rollback)

    def _conclude(self, outcome: Outcome) -> None:
        """Record the outcome and tell the observers."""
        self.outcome = outcome
        self._move(State[outcome.name])
        for session in self._writers.values():
            statement = session.sync_session.journal.committed_by
            if statement is not None:
                self._events.append(ImplicitCommit(statement))
        if self.failure is not None:
            self._events.append(
                CommitFailed(
                    self.failure,
                    outcome,
                    self.failure.cause,
                    _dialects.code_of(self.failure.__cause__),
                ),
            )
        if self._writers or self._readers or self.hooks:
            used = [db for db, s in self._writers.items() if s.sync_session.connections]
            self._events.append(
                UnitFinished(
                    outcome,
                    self.cause,
                    self.reason,
                    tuple(db.name for db in used),
                    time.perf_counter() - self._opened,
                ),
            )

    async def _run_hooks(self, phase: str, queue: list[Hook]) -> None:
        """Run every hook, also those registered meanwhile; none stops another."""
        for hook in queue:
            try:
                await bounded(hook.call(None), self.settings.hook_timeout)
            except BaseException as error:  # noqa: BLE001  # hook isolation
                self._events.append(HookFailed(phase, hook.name, error))

    async def _release(self) -> None:
        """Close the read sessions, then run the `after_response` hooks."""
        for session in list(self._readers.values()):
            await self._end.close_reader(session)
        if self.outcome is Outcome.COMMITTED:
            await self._run_hooks("after_response", self.hooks.after_response)

    def _tell(self) -> None:
        """Tell the observers, in the task and context of the request.

        Sentry's own ASGI middleware drops what was reported in that context before.
        """
        while self._events:
            notify(self.settings.observers, self._events.pop(0))

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


class _HookStoppedError(Exception):
    """Carries the name of the `before_commit` hook whose error is its cause."""
