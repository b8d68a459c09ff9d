"""The unit of work: its sessions, its states, and `finish()`, which ends it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from asgi_uow._concurrency import run_to_completion
from asgi_uow._decision import Cause, Decision, Outcome, State, rollback
from asgi_uow._reading.causal import NOTHING, MustSee
from asgi_uow._unit.after import call_all
from asgi_uow._unit.before import prepare
from asgi_uow._unit.end import End, Outages, Settings
from asgi_uow._unit.hooks import Hooks
from asgi_uow._unit.kin import Kin
from asgi_uow._unit.life import Life
from asgi_uow._unit.participant import Sessions
from asgi_uow._unit.report import Report
from asgi_uow.errors import CommitFailedError, DoomedError, UnknownDatabaseError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from asgi_uow._databases.engines import Engines
    from asgi_uow._sessions.read_session import ReadSession
    from asgi_uow._sessions.session import Session
    from asgi_uow._unit.hooks import Quota
    from asgi_uow.errors import UnitOfWorkFailedError


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
        self.kin: Kin = Kin(parent, hook_of)
        self.attempt = attempt
        self.must_see = must_see
        self.hooks: Hooks = Hooks(quota)
        self.kin.join(self)
        self.outcome: Outcome | None = None
        self.cause: Cause | None = None
        self.reason: str | None = None
        self.forced: bool = False
        self.kept: set[Engines] = set()  # also by hooks, and by units inside
        self.settings = settings
        self.life: Life = Life()
        self.report: Report = Report(self, settings.observers)
        self.outages: Outages = Outages()
        self._sessions = Sessions(self)
        self._end = End(self, self._sessions.writers, self.outages)
        self._doomed_by: BaseException | None = None

    # What handlers use

    @property
    def state(self) -> State:
        """Where in its life the unit is."""
        return self.life.state

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

    def session(self, db: Engines | None = None) -> Session:
        """Give the write session of `db`, of the first database by default.

        Raises `UnitOfWorkClosedError` once the unit is decided and
        `UnknownDatabaseError` for a database that it does not serve.
        """
        db = self.databases[0] if db is None else db
        if db not in self.databases:
            return self._around("session()", db).session(db)
        return self._sessions.writer(db)

    def read_session(self, db: Engines | None = None) -> Session:
        """Give the read-only session of `db`; open until the unit is closed."""
        db = self.databases[0] if db is None else db
        if db not in self.databases:
            return self._around("read_session()", db).read_session(db)
        return self._sessions.reader(db)

    async def open_parallel(self, db: Engines | None = None) -> ReadSession:
        """Give one more read session, for one task; see `parallel_read`."""
        db = self.databases[0] if db is None else db
        if db not in self.databases:
            return await self._around("parallel_read()", db).open_parallel(db)
        return await self._sessions.one_more_reader(db)

    async def close_parallel(self, session: ReadSession) -> None:
        """Give its connection back, whatever happens."""
        db = self._sessions.parallel.pop(session, None)
        if db is not None:
            await run_to_completion(self._end.close_reader(db, session))
        elif self.kin.parent is not None:
            await self.kin.parent.close_parallel(session)

    def set_rollback_only(self, reason: str) -> None:
        """Have nothing kept, whatever the response; `reason` is for observers."""
        self.life.check_undecided("set_rollback_only()")
        self.reason = reason
        if self.state is not State.ROLLBACK_ONLY:
            self.life.move(State.ROLLBACK_ONLY)

    def force_commit(self) -> None:
        """Have everything committed whatever the status of the response."""
        self.life.check_undecided("force_commit()")
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
        self.life.check_writable(f"{phase}()")
        self.hooks.register(phase, fn, args, kwargs)
        self.report.start()

    def for_hook(self) -> UnitOfWork:
        """Make the unit that one hook of this one gets for itself."""
        databases = (*self.databases, *self.kin.databases())
        return UnitOfWork(
            tuple(dict.fromkeys(databases)),
            self.settings,
            hook_of=self,
            must_see=self.must_see,
            quota=self.hooks.quota,
        )

    def has_written(self, db: Engines) -> bool:
        """Tell whether reads of `db` must see what this unit did, or one around it."""
        mine = db in self.kept or self._sessions.has_written(db)
        return mine or self.kin.have_written(db)

    def note_kept(self, db: Engines) -> None:
        """Note that something was committed here, or in a unit inside."""
        self.kept.add(db)
        for unit in self.kin:
            unit.note_kept(db)

    def serves(self, db: Engines) -> bool:
        """Tell whether this unit, or one around it, serves `db`."""
        return db in self.databases or self.kin.serve(db)

    def holds(self, db: Engines) -> bool:
        """Tell whether this unit holds a connection that another would wait for."""
        return self._sessions.holds(db)

    async def finish(
        self, decision: Decision, because: Exception | None = None
    ) -> None:
        """Commit or roll back, release the write connections, run the hooks.

        The only place that does. Raises the failure if a commit was wanted, or
        claimed by the response, and the work was not kept. Until COMMIT is sent a
        cancellation rolls back; from then on it is delivered after the last hook.
        `because` is the error behind a decision that refuses the response.
        """
        cancelled: BaseException | None = None
        self.report.end()
        if decision.commit:
            self.life.move(State.PREPARING)
            try:
                await prepare(self, self._sessions)
            except Exception as error:  # noqa: BLE001  # raised below as the failure
                decision = self._end.give_up(error)
            except BaseException as error:  # noqa: BLE001  # raised below as it is
                cancelled = error
                decision = self._end.give_up(error)
            else:
                if self.doomed_by is not None:
                    decision = rollback(Cause.DOOMED, refuse=True)
        self._doomed_by = self.doomed_by
        self.life.move(State.COMMITTING if decision.commit else State.ROLLING_BACK)
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
            self.report.tell()
        if cancelled is not None:
            raise cancelled
        if self.failure is not None:
            raise self.failure

    async def release(self) -> None:
        """Close what is left open and run the `after_response` hooks."""
        committed = self.outcome is Outcome.COMMITTED
        self.life.move(State.CLOSED)
        try:
            hooks = committed and self.hooks.of("after_response")
            if self._sessions or hooks:
                await run_to_completion(self._release())
        finally:
            self.hooks.clear()
            self.kin.leave(self)
            self.report.tell()
            self._sessions.forget()

    def _around(self, operation: str, db: Engines) -> UnitOfWork:
        if self.kin.parent is None:
            raise UnknownDatabaseError(operation, db)
        return self.kin.parent

    async def call_undone(self, owner: object) -> None:
        """Call the `after_rollback` hooks of savepoints that were rolled back."""
        for inner in list(self.kin.inner):
            await inner.call_undone(owner)
        hooks = self.hooks.take_undone(owner)
        await run_to_completion(call_all(self, "after_rollback", hooks))

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
        self.life.move(State[outcome.name])
        self.hooks.leave_savepoints()
        if self.failure is not None:
            self.report.failed(self.failure, outcome)
        used = filter(self._sessions.has_written, self._sessions.writers)
        self.report.finished(outcome, self.cause, self.reason, used)

    async def _release(self) -> None:
        """Close the read sessions, then run the `after_response` hooks."""
        for db, session in self._sessions.all_readers():
            await self._end.close_reader(db, session)
        if self.outcome is Outcome.COMMITTED:
            hooks = self.hooks.take("after_response")
            await call_all(self, "after_response", hooks)

    def __del__(self) -> None:
        """Warn of hooks that never ran: the unit was dropped without an end."""
        if self.state is not State.CLOSED and self.hooks:
            warnings.warn(
                f"{self!r} was collected with hooks that never ran",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )

    def __repr__(self) -> str:
        """Show state and databases, without passwords."""
        names = ", ".join(db.name for db in self.databases)
        return f"<UnitOfWork {self.state.value} on {names}>"
