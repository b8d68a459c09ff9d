"""The end of the transactions of one unit of work: the only lines that commit."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from typing import TYPE_CHECKING

from sqlalchemy import orm, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.util import greenlet_spawn

from asgi_uow import errors
from asgi_uow._databases.driver_errors import is_in_doubt
from asgi_uow._databases.pool import raw_of
from asgi_uow._decision import RETRY_AFTER, Cause, Outcome
from asgi_uow.observers import ReleaseFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from asgi_uow._concurrency import Shield
    from asgi_uow._databases.engines import Engines
    from asgi_uow._sessions.managed import ManagedSession, Shared
    from asgi_uow._sessions.read_session import ReadSession
    from asgi_uow._sessions.session import Session
    from asgi_uow._unit.participant import Participant
    from asgi_uow.observers import Event

RESOLVE_SECONDS = 30.0
"""Seconds for settling an unknown outcome where `commit_timeout` is None."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ended:
    """What became of the work, and what is to be raised if it was not kept."""

    outcome: Outcome
    kind: type[errors.UnitOfWorkFailedError] = errors.CommitFailedError
    cause: Cause | None = None
    error: BaseException | None = None
    detail: str = ""

    def failure(self, cause: Cause, shared: Shared) -> errors.UnitOfWorkFailedError:
        """Make the failure; it asks for a retry if nothing was kept and it may help."""
        retry_after: int | None = None
        if self.outcome is Outcome.ROLLED_BACK and shared.may_repeat(self.error):
            retry_after = RETRY_AFTER
        what = self.outcome, cause
        failure = self.kind(*what, detail=self.detail, retry_after=retry_after)
        failure.__cause__ = self.error
        return failure


COMMITTED, ROLLED_BACK = Ended(Outcome.COMMITTED), Ended(Outcome.ROLLED_BACK)


def stopped_by(error: BaseException, hook: str | None = None) -> Ended:
    """Tell what an error of the flush means, or of a `before_commit` hook."""
    kind: type[errors.UnitOfWorkFailedError] = errors.CommitFailedError
    cause = Cause.COMMIT_FAILED if isinstance(error, Exception) else Cause.CANCELLED
    if hook is not None and isinstance(error, Exception):
        kind, cause = errors.BeforeCommitError, Cause.BEFORE_COMMIT
    if isinstance(error, TimeoutError):
        cause = Cause.TIMEOUT
    return Ended(Outcome.ROLLED_BACK, kind, cause, error, hook or "")


def without_proof(
    ended: Ended, cause: Cause | None, participants: Iterable[Participant]
) -> Ended:
    """Tell whether something of what is to be rolled back was, or may be, kept."""
    for each in participants:
        if each.writer is None or ended.outcome is not Outcome.ROLLED_BACK:
            continue
        sync, cause = each.writer.sync_session, ended.cause or cause
        for connection in sync.connections:
            if not (connection.closed or connection.invalidated):
                sync.journal.look(raw_of(connection.connection.dbapi_connection))
        if (statement := sync.journal.implicit_commit) is not None:
            kind, error = errors.PartialCommitError, ended.error
            detail = f"MySQL committed by itself for {statement!r}"
            cause = cause or Cause.COMMIT_FAILED
            return Ended(Outcome.PARTIAL, kind, cause, error, detail)
        if sync.journal.ended_unseen:
            unknown, doom = errors.OutcomeUnknownError, sync.journal.doomed_by
            return Ended(Outcome.UNKNOWN, unknown, Cause.DOOMED, doom)
    return ended


class Commit:
    """One COMMIT, and whether the answer to it leaves its outcome in doubt."""

    __slots__ = ("db", "in_doubt", "session", "transaction_id")

    def __init__(self, db: Engines, session: Session) -> None:
        self.db = db
        self.session = session
        self.transaction_id: str | None = None
        self.in_doubt = False

    def prepare(self) -> None:
        """Have the server promise that it can commit."""
        sync = self.session.sync_session
        self._require_whole(sync)
        sync.journal.is_ending = True
        sync.prepare()

    def run(self) -> None:
        """Check, flush, commit and close, in one greenlet."""
        sync = self.session.sync_session
        self._require_whole(sync)
        if self.db.resolve_unknown and sync.connections:
            self.transaction_id = sync.scalar(text(self.db.facts.TRANSACTION_ID or ""))
        sync.journal.is_ending = True
        orm.Session.commit(sync)
        orm.Session.close(sync)

    def _require_whole(self, sync: ManagedSession) -> None:
        """Raise unless the transaction is there and whole, just before COMMIT.

        `ConnectionError` if the driver knows that a connection is dead: this tells
        "certainly not committed" from "nobody knows". `TransactionGoneError` if a
        statement through the driver itself, which the journal does not see, has
        ended it or has failed; PostgreSQL has to be asked for that.
        """
        facts, driver = self.db.facts, self.db.driver
        for connection in sync.connections:
            raw = raw_of(connection.connection.dbapi_connection)
            if driver.is_dead(raw):
                message = "the connection was lost before COMMIT was sent"
                raise ConnectionError(message)
            sync.journal.look(raw)
            if sync.journal.ended_unseen:
                raise errors.TransactionGoneError from sync.journal.doomed_by
            if sync.driver_exposed and facts.QUESTION_BEFORE_COMMIT is not None:
                try:
                    sync.scalar(text(facts.QUESTION_BEFORE_COMMIT))
                except DBAPIError as error:
                    raise errors.TransactionGoneError from error


class Completion:
    """Ends the sessions of a unit of work, one after the other, each bounded."""

    __slots__ = ("_events", "_is_stuck", "_shield", "_timeout")

    def __init__(
        self, events: list[Event], shield: Shield, timeout: float | None
    ) -> None:
        self._events = events
        self._shield = shield
        self._timeout = timeout
        self._is_stuck = False

    async def commit(self, participants: Iterable[Participant]) -> Ended:
        """COMMIT every session that executed something, in the order of first use.

        Sessions with `twophase=True` are all prepared before the first COMMIT.
        """
        steps: list[tuple[Commit, Callable[[], None]]] = []
        prepares = 0
        for each in participants:
            if each.writer is not None:
                commit = Commit(each.db, each.writer)
                steps.append((commit, commit.run))
                if each.writer.sync_session.twophase:
                    steps.insert(prepares, (commit, commit.prepare))
                    prepares += 1
        any_committed = False
        for commit, step in steps:
            try:
                await self._shield.run(_in_lock(commit.session, step), self._timeout)
            except BaseException as error:  # noqa: BLE001  # becomes the failure
                if not await self._was_kept(commit, error):
                    return self._refused(commit, error, any_committed=any_committed)
                await self.discard(commit.session, error)
            journal = commit.session.sync_session.journal
            any_committed = any_committed or journal.committed
        return COMMITTED

    async def _was_kept(self, commit: Commit, error: BaseException) -> bool:
        """Tell whether the work is kept all the same; settles what was in doubt."""
        journal = commit.session.sync_session.journal
        if journal.committed:
            return True
        commit.in_doubt = journal.commit_sent and is_in_doubt(error)
        if not commit.in_doubt or commit.transaction_id is None:
            return False
        seconds = self._timeout or RESOLVE_SECONDS
        settling = commit.db.was_committed(commit.transaction_id, seconds)
        kept = await self._shield.run(settling, at_once=False)
        commit.in_doubt = kept is None
        return bool(kept)

    def _refused(
        self, commit: Commit, error: BaseException, *, any_committed: bool
    ) -> Ended:
        commit.session.record_error(error)
        if isinstance(error, ConnectionError | TimeoutError):  # of this file, or Shield
            commit.session.shared.outages.append(error)
        self._is_stuck = isinstance(error, TimeoutError)
        cause = Cause.TIMEOUT if self._is_stuck else Cause.COMMIT_FAILED
        if any_committed:
            return Ended(Outcome.PARTIAL, errors.PartialCommitError, cause, error)
        if commit.in_doubt:
            return Ended(Outcome.UNKNOWN, errors.OutcomeUnknownError, cause, error)
        doom = commit.session.doomed_by
        if isinstance(error, errors.TransactionGoneError) and doom is not None:
            # A statement in flight at the decision failed before its COMMIT.
            return Ended(Outcome.ROLLED_BACK, errors.DoomedError, Cause.DOOMED, doom)
        return Ended(Outcome.ROLLED_BACK, errors.CommitFailedError, cause, error)

    async def roll_back(self, session: Session, ended: Ended) -> None:
        """Roll back and give the connection back clean, or throw it away."""
        if self._is_stuck:
            # What did not answer in time is not waited for again.
            await self.discard(session)
            return
        sync = session.sync_session

        def end() -> None:
            sync.journal.is_ending = True
            if ended.outcome is not Outcome.ROLLED_BACK:
                sync.invalidate()
            else:
                sync.detach_objects()
                # After a failed COMMIT close() alone sends nothing.
                sync.rollback()
            sync.close()

        await self._close(session, end)

    async def close_reader(
        self, participant: Participant, reader: ReadSession, *, wants_details: bool
    ) -> None:
        """Give the connection of a read session back, or throw it away."""
        end = functools.partial(orm.Session.close, reader.sync_session)
        await self._close(reader, end)
        if wants_details:
            participant.report_release(reader, "read")

    async def _close(self, session: Session, end: Callable[[], None]) -> None:
        try:
            await self._shield.run(_in_lock(session, end), self._timeout)
        except Exception as error:  # noqa: BLE001  # reported; the outcome stands
            await self.discard(session, error)

    async def release_reader(self, session: ReadSession) -> None:
        try:
            await self._shield.run(session.release_if_idle(), self._timeout)
        except Exception as error:  # noqa: BLE001  # reported; nothing depends on it
            self._report("giving a read connection back", error)

    async def discard(
        self, session: Session, error: BaseException | None = None
    ) -> None:
        """Give up a session that could not be closed; its connection is not reused."""
        lost = getattr(error, "connection_invalidated", False)
        if error is not None and not lost and session.doomed_by is None:
            self._report("closing the session", error)
        try:
            await self._shield.run(session.discard(), self._timeout)
        except Exception as again:  # noqa: BLE001  # reported; the outcome stands
            self._report("throwing the connection away", again)

    def _report(self, operation: str, error: BaseException) -> None:
        self._events.append(ReleaseFailed(operation, error))


async def _in_lock(session: Session, end: Callable[[], None]) -> None:
    """End a session in a greenlet, once no call is in flight."""
    lock, task = session.own_lock, asyncio.current_task()
    if task is not None and not lock.take(task):
        await lock.wait(task)
    try:
        if session.streams:
            await session.close_streams()
        await greenlet_spawn(end)
    finally:
        lock.release()
