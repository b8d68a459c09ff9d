"""How the sessions of a unit of work end: the lines that commit and roll back."""

from __future__ import annotations

import dataclasses
import time
import weakref
from typing import TYPE_CHECKING, Literal

from asgi_uow._concurrency import bounded
from asgi_uow._databases import driver_errors as _errors
from asgi_uow._decision import Cause, Outcome, rollback
from asgi_uow._entrypoints.problem import RETRY_AFTER
from asgi_uow._unit.before import HookStoppedError
from asgi_uow._unit.commit import Commit
from asgi_uow.errors import (
    BeforeCommitError,
    CommitFailedError,
    DoomedError,
    OutcomeUnknownError,
    PartialCommitError,
    TransactionGoneError,
    UnitOfWorkFailedError,
)
from asgi_uow.observers import (
    ConnectionReleased,
    ImplicitCommit,
    LoggingObserver,
    Observer,
    ReleaseFailed,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asgi_uow._databases.engines import Engines
    from asgi_uow._decision import Decision
    from asgi_uow._sessions.read_session import ReadSession
    from asgi_uow._sessions.session import Session
    from asgi_uow._unit.unit import UnitOfWork

RESOLVE_SECONDS = 30.0
"""Seconds for settling an unknown outcome where `commit_timeout` is None."""


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """What a unit of work is told from outside; times in seconds, None is no limit."""

    observers: tuple[Observer, ...] = (LoggingObserver(),)
    commit_timeout: float | None = 30.0
    hook_timeout: float | None = 5.0


class Outages:
    """The errors that mean a database out of reach, as sessions ran into them."""

    def __init__(self) -> None:
        """Start with none."""
        self._errors: list[Exception] = []

    def note(self, error: Exception) -> None:
        """Remember `error` if it is one."""
        if _errors.is_unavailable(error):
            self._errors.append(error)

    def behind(self, error: BaseException) -> bool:
        """Tell whether `error` is one of them, or follows from one."""
        seen: list[BaseException] = []
        ahead: list[BaseException | None] = [error]
        while ahead:
            cause = ahead.pop()
            # A task group's only error, raised again by Starlette, has the group as
            # its context, and is in the group.
            if cause is None or any(cause is each for each in seen):
                continue
            if any(cause is noted for noted in self._errors):
                return True
            seen.append(cause)
            ahead.append(cause.__cause__ or cause.__context__)
            if isinstance(cause, BaseExceptionGroup):
                ahead.extend(cause.exceptions)
        return False


class End:
    """Ends the write sessions of one unit, once, and says what became of them."""

    def __init__(
        self,
        unit: UnitOfWork,
        writers: Mapping[Engines, Session],
        outages: Outages,
    ) -> None:
        """Be ready to end the `writers` of `unit`."""
        self.failure: UnitOfWorkFailedError | None = None
        self._unit = weakref.proxy(unit)
        self._stuck = False
        self._writers = writers
        self._settings = unit.settings
        self._outages = outages

    def fail(
        self,
        kind: type[UnitOfWorkFailedError],
        cause: Cause,
        error: BaseException | None,
        *,
        outcome: Outcome = Outcome.ROLLED_BACK,
        detail: str = "",
    ) -> UnitOfWorkFailedError:
        later = (
            outcome is Outcome.ROLLED_BACK
            and error is not None
            and (self._outages.behind(error) or _errors.is_conflict(error))
        )
        failure = kind(
            outcome,
            cause,
            detail=detail,
            retry_after=RETRY_AFTER if later else None,
        )
        failure.__cause__ = error
        return failure

    def give_up(self, error: BaseException) -> Decision:
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
        self.failure = self.fail(kind, cause, error, detail=detail)
        return rollback(cause)

    async def run(self, *, commit: bool, cause: Cause | None) -> Outcome:
        """Commit or roll back, and give every connection back or throw it away."""
        outcome = await self._commit() if commit else Outcome.ROLLED_BACK
        if outcome is Outcome.ROLLED_BACK:
            outcome = self._look_for_implicit_commits(cause)
        if outcome is not Outcome.COMMITTED:
            for session in self._writers.values():
                await self._roll_back(session, outcome)
        for db, session in self._writers.items():
            sync = session.sync_session
            kept = sync.committed or outcome is Outcome.COMMITTED
            if kept and sync.connections:
                self._unit.note_kept(db)
            self._report_release(db, session, "write")
            if sync.journal.committed_by is not None:
                self._unit.report.add(ImplicitCommit(sync.journal.committed_by))
        return outcome

    def _report_release(
        self, db: Engines, session: Session, access: Literal["read", "write"]
    ) -> None:
        since, held = session.sync_session.connected, session.sync_session.held
        if since is not None or held:
            seconds = held if since is None else held + time.perf_counter() - since
            event = ConnectionReleased(db.name, access, seconds)
            self._unit.report.add(event)

    def _look_for_implicit_commits(self, cause: Cause | None) -> Outcome:
        """Tell whether DDL has kept a part of what is to be rolled back."""
        for session in self._writers.values():
            statement = session.sync_session.journal.committed_by
            if statement is not None:
                self.failure = self.fail(
                    PartialCommitError,
                    cause or Cause.COMMIT_FAILED,
                    self.failure.__cause__ if self.failure else None,
                    outcome=Outcome.PARTIAL,
                    detail=f"MySQL committed by itself for {statement!r}",
                )
                return Outcome.PARTIAL
        return Outcome.ROLLED_BACK

    async def _commit(self) -> Outcome:
        """COMMIT every session that executed something, in the order of first use.

        Sessions with `twophase=True` are all prepared before the first COMMIT.
        """
        committed = False
        commits = [Commit(db, session) for db, session in self._writers.items()]
        steps = [(commit, commit.prepare) for commit in commits if commit.two_phase]
        steps += [(commit, commit.run) for commit in commits]
        for commit, step in steps:
            try:
                await bounded(step(), self._settings.commit_timeout)
            except Exception as error:  # noqa: BLE001  # becomes the failure
                if not await self._was_kept(commit, error):
                    return self._commit_failed(error, commit, committed)
                await self._throw_away(commit.session, error)
            committed = committed or commit.is_kept
        return Outcome.COMMITTED

    async def _was_kept(self, commit: Commit, error: Exception) -> bool:
        """Tell whether the work is kept all the same; settles what was in doubt."""
        if commit.acknowledged:
            return True
        timed_out = isinstance(error, TimeoutError)
        commit.in_doubt = commit.sent and (timed_out or _errors.is_in_doubt(error))
        if not commit.in_doubt or commit.transaction_id is None:
            return False
        seconds = self._settings.commit_timeout or RESOLVE_SECONDS
        kept = await commit.db.was_committed(commit.transaction_id, seconds)
        commit.in_doubt = kept is None
        return bool(kept)

    def _commit_failed(
        self,
        error: Exception,
        commit: Commit,
        committed: bool,  # noqa: FBT001
    ) -> Outcome:
        """Tell what a failed COMMIT means, and remember the failure."""
        self._outages.note(error)
        self._stuck = isinstance(error, TimeoutError)
        kind: type[UnitOfWorkFailedError]
        outcome, kind = Outcome.ROLLED_BACK, CommitFailedError
        cause = Cause.TIMEOUT if self._stuck else Cause.COMMIT_FAILED
        doomed_by = commit.session.doomed_by
        if isinstance(error, TransactionGoneError) and doomed_by is not None:
            # A statement in flight at the decision failed before its COMMIT.
            kind, cause = DoomedError, Cause.DOOMED
        if committed:
            outcome, kind = Outcome.PARTIAL, PartialCommitError
        elif commit.in_doubt:
            outcome, kind = Outcome.UNKNOWN, OutcomeUnknownError
        error_below = doomed_by if kind is DoomedError else error
        self.failure = self.fail(kind, cause, error_below, outcome=outcome)
        return outcome

    async def _roll_back(self, session: Session, outcome: Outcome) -> None:
        """Roll back and give the connection back clean, or throw it away."""
        failure = self.failure

        async def end() -> None:
            session.hand_over()
            async with session.turn:
                if outcome is not Outcome.ROLLED_BACK:
                    await session.invalidate()
                elif failure is not None:
                    # After a failed COMMIT close() alone sends nothing.
                    await session.rollback()
                await session.close()

        if self._stuck:
            # What did not answer in time is not waited for again.
            await self._throw_away(session)
            return
        try:
            await bounded(end(), self._settings.commit_timeout)
        except Exception as error:  # noqa: BLE001  # reported; the outcome stands
            await self._throw_away(session, error)

    async def rest(self, session: ReadSession) -> None:
        """Have a read session that is idle hold no connection."""
        try:
            await bounded(session.rest(), self._settings.commit_timeout)
        except Exception as error:  # noqa: BLE001  # reported; nothing depends on it
            self._report_failed("giving a read connection back", error)

    async def close_reader(self, db: Engines, session: Session) -> None:
        """Give the connection of a read session back, or throw it away."""

        async def close() -> None:
            session.hand_over()
            async with session.turn:
                await session.close_streams()
                await session.close()

        try:
            await bounded(close(), self._settings.commit_timeout)
        except Exception as error:  # noqa: BLE001  # reported; nothing depends on it
            await self._throw_away(session, error)
        self._report_release(db, session, "read")

    async def _throw_away(
        self,
        session: Session,
        error: Exception | None = None,
    ) -> None:
        """Give up a session that could not be closed; its connection is not reused."""
        lost = getattr(error, "connection_invalidated", False)
        if error is not None and not lost and session.doomed_by is None:
            self._report_failed("closing the session", error)
        try:
            await bounded(session.throw_away(), self._settings.commit_timeout)
        except Exception as again:  # noqa: BLE001  # reported; the outcome stands
            self._report_failed("throwing the connection away", again)

    def _report_failed(self, operation: str, error: Exception) -> None:
        self._unit.report.add(ReleaseFailed(operation, error))
