"""The end of the transactions of one unit of work: the only lines that commit."""

from __future__ import annotations

import asyncio
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING

from sqlalchemy import exc, orm, text
from sqlalchemy.util import greenlet_spawn

from asgi_uow import errors
from asgi_uow._concurrency import Shield
from asgi_uow._databases.connection import Connection, raw_of
from asgi_uow._databases.driver_errors import is_in_doubt
from asgi_uow._databases.keys import leave_mark
from asgi_uow._databases.loops import inherited
from asgi_uow._decision import Cause, Outcome
from asgi_uow.observers import ReleaseFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from asgi_uow._sessions.managed import ManagedSession
    from asgi_uow._sessions.read_session import ReadSession
    from asgi_uow._sessions.session import Session
    from asgi_uow._unit.hooks import Work
    from asgi_uow.errors import UnitOfWorkFailedError as Failure

    End = Callable[[ManagedSession], None]

RESOLVE_SECONDS = 30.0  # for an unknown outcome, where `commit_timeout` is None
ROLLBACK_SECONDS = 4.0  # at most; then the connection is cut off instead
OUTCOMES: dict[type[Failure], Outcome] = {
    errors.PartialCommitError: Outcome.PARTIAL,
    errors.OutcomeUnknownError: Outcome.UNKNOWN,
}


class Completion:
    """Ends the sessions of a unit of work, one after the other, each bounded."""

    __slots__ = ("_timeout", "began", "shield")

    def __init__(self, timeout: float | None) -> None:
        self.shield, self.began = Shield(), time.perf_counter()
        self._timeout = timeout

    async def commit(self, writers: Sequence[Session]) -> Failure | None:
        """COMMIT every session that executed something, in the order of first use.

        One with a key comes last: what a repetition is told has to be kept by all.
        Sessions with `twophase=True` are all prepared before the first COMMIT, and
        committed after the others, which may fail; from then on nothing stops them.
        """
        if writers[1:]:
            writers = sorted(writers, key=lambda each: each.journal.claim is not None)
            writers = sorted(writers, key=lambda each: each.sync_session.twophase)
        steps = [(each, _prepare) for each in writers if each.sync_session.twophase]
        steps += [(each, _commit) for each in writers]
        unproven: tuple[Session, BaseException] | None = None
        for writer, step in steps:
            journal = writer.journal
            try:
                await self.shield.run(_in_lock(writer, step), self._timeout)
            except BaseException as error:  # noqa: BLE001  # becomes the failure
                await self._settle(writer, error)
                if not journal.committed:
                    unproven = unproven or (writer, error)
                    if journal.xid is None or not journal.commit_sent:
                        break
        return None if unproven is None else self._refuse(*unproven, writers)

    async def _settle(self, session: Session, error: BaseException) -> None:
        """Find out whether the work is kept all the same."""
        journal, db = session.journal, session.sync_session.database
        if not journal.committed:
            is_uncertain = journal.xid is not None or is_in_doubt(error)
            if not (journal.commit_sent and is_uncertain):
                return
            journal.committed = None
            if journal.xid is None and (db.is_memory or not journal.claim):
                return
        # Closed first: MariaDB commits for others only then what it has prepared.
        await self.discard(session, error)
        if not journal.committed:
            seconds = self._timeout or RESOLVE_SECONDS
            settling = db.settle(journal.xid, journal.claim or "", seconds)
            kept = await self.shield.run(settling, at_once=False)
            if journal.xid is not None and kept is False:  # it is prepared no more
                kept = True if is_in_doubt(error) else None
            journal.committed = kept

    def _refuse(
        self, session: Session, error: BaseException, writers: Sequence[Session]
    ) -> Failure:
        if not isinstance(error, Exception):
            self.shield.raise_later(error)
        session.record_error(error)
        if isinstance(error, ConnectionError | TimeoutError):  # of this file, or Shield
            session.shared.outages.append(error)
        is_late, xid = isinstance(error, TimeoutError), session.journal.xid
        session.shared.stuck += is_late
        cause = Cause.TIMEOUT if is_late else Cause.COMMIT_FAILED
        why = cause, error, "" if xid is None else f"{xid!r} may still be prepared"
        if any(each.journal.committed for each in writers):
            return failed(errors.PartialCommitError, *why)
        if session.journal.committed is None:
            return failed(errors.OutcomeUnknownError, *why)
        doom = session.doomed_by
        if isinstance(error, errors.TransactionGoneError) and doom is not None:
            # A statement in flight at the decision failed before its COMMIT.
            return failed(errors.DoomedError, Cause.DOOMED, doom)
        return failed(errors.CommitFailedError, cause, error)

    async def prove(
        self, failure: Failure | None, cause: Cause, writers: Sequence[Session]
    ) -> Failure | None:
        """Tell whether something of what is to be rolled back was, or may be, kept."""
        for writer in writers:
            sync, journal = writer.sync_session, writer.journal
            if sync.driver_exposed and not writer.shared.stuck:
                # What is in flight may still end the transaction.
                await self._try(writer, _in_lock(writer, _wait_for_others))
            is_lost = bool(writer.shared.stuck)
            for each in sync.connections:
                if each.closed or each.invalidated:
                    is_lost = True
                    continue
                dbapi = each.connection.dbapi_connection
                if (raw := raw_of(dbapi)) in inherited:
                    journal.ended_unseen = True  # what becomes of it is not seen here
                try:
                    is_dead = sync.database.driver.is_dead(raw)
                    if not is_dead:
                        journal.look(dbapi)
                except Exception:  # noqa: BLE001  # closed so that it cannot be asked
                    is_dead = True
                is_lost = is_lost or is_dead
            if is_lost and sync.driver_exposed and not journal.entries:
                # What had no answer may be a COMMIT that only the driver knows of.
                journal.ended_unseen = True
        is_rollback = failure is None or failure.outcome is Outcome.ROLLED_BACK
        return _judge(failure, cause, writers) if is_rollback else failure

    async def roll_back(self, session: Session, outcome: Outcome) -> None:
        """Roll back and give the connection back clean, or throw it away."""

        def end(sync: ManagedSession) -> None:
            if outcome is Outcome.ROLLED_BACK:
                sync.detach_objects()
                sync.rollback()  # after a failed COMMIT close() alone sends nothing
            else:
                sync.invalidate()
            sync.close()

        await self._close(session, end)
        journal, db = session.journal, session.sync_session.database
        if (xid := journal.xid) is not None and not journal.commit_sent:
            seconds = self._timeout or RESOLVE_SECONDS
            ending = db.end_prepared(xid, seconds, commit=False)
            if await self.shield.run(ending, at_once=False) is None:
                _tell(session, f"rolling {xid!r} back", TimeoutError("it is prepared"))

    async def close_reader(self, reader: ReadSession) -> None:
        """Give the connection of a read session back, or throw it away."""
        sync = reader.sync_session
        if sync.in_transaction() or reader.own_lock.owner:
            await self._close(reader, orm.Session.close)
        else:
            orm.Session.close(sync)  # nothing to wait for
        if sync.record is not None:
            sync.record.release(reader.shared.events)

    async def _close(self, session: Session, end: End) -> None:
        error: BaseException | None = None
        if session.shared.stuck:
            # What did not answer in time is not waited for again.
            session.shared.stuck += 1
        elif (error := await self._try(session, _in_lock(session, end))) is None:
            return
        await self.discard(session, error)

    async def release_reader(self, session: ReadSession) -> None:
        if session.shared.stuck:
            session.sync_session.cut_off()
        if error := await self._try(session, session.lend_connection()):
            _tell(session, "giving a read connection back", error)

    async def discard(self, session: Session, error: BaseException | None) -> None:
        """Give up a session that could not be closed; its connection is not reused."""
        lost = getattr(error, "connection_invalidated", False)
        if error is not None and not lost and session.doomed_by is None:
            _tell(session, "closing the session", error)
        if again := await self._try(session, session.discard()):
            _tell(session, "throwing the connection away", again)

    async def _try(self, session: Session, work: Work) -> BaseException | None:
        """Give what `work` raised; what takes too long has its connection cut off."""
        seconds = min(ROLLBACK_SECONDS, self._timeout or ROLLBACK_SECONDS)
        try:
            await self.shield.run(work, seconds, cut=session.sync_session.cut_off)
        except BaseException as error:  # noqa: BLE001  # reported; the outcome stands
            session.shared.stuck += isinstance(error, TimeoutError)
            if not isinstance(error, Exception):
                self.shield.raise_later(error)
            return error
        return None


def _prepare(session: ManagedSession) -> None:
    """Have the server promise that it can commit; then it is asked nothing more."""
    _check(session)
    session.prepare()


def _commit(session: ManagedSession) -> None:
    """Check, flush, commit and close, in one greenlet."""
    if session.journal.xid is None:
        _check(session)
    orm.Session.commit(session)
    orm.Session.close(session)


def _check(session: ManagedSession) -> None:
    """Raise unless the transaction is there and whole.

    `ConnectionError` if the driver knows that a connection is dead: certainly not
    committed. `TransactionGoneError` if a statement through the driver itself,
    unseen by the journal, has ended it or failed; PostgreSQL has to be asked.
    """
    db, journal = session.database, session.journal
    if session.driver_exposed:
        _wait_for_others(session)
    for connection in session.connections:
        dbapi = connection.connection.dbapi_connection
        if db.driver.is_dead(raw_of(dbapi)):
            message = "the connection was lost before COMMIT was sent"
            raise ConnectionError(message)
        journal.look(dbapi)
        if session.driver_exposed and db.facts.QUESTION_BEFORE_COMMIT is not None:
            try:
                session.scalar(text(db.facts.QUESTION_BEFORE_COMMIT))
            except exc.DBAPIError as error:
                raise errors.TransactionGoneError from error
            journal.look(dbapi)
        if journal.ended_unseen:
            raise errors.TransactionGoneError from journal.doomed_by
    if db.resolve_unknown and session.connections and journal.claim is None:
        journal.claim = leave_mark(session, db.facts)


def _wait_for_others(session: ManagedSession) -> None:
    """Wait for statements past the session, so that the journal knows of them."""
    for each in session.connections:
        if isinstance(each, Connection) and not (each.closed or each.invalidated):
            each.call_alone(bool)


async def _in_lock(session: Session, end: End) -> None:
    """End a session in a greenlet, once no call is in flight."""
    lock, task = session.own_lock, asyncio.current_task()
    lock.limit = nullcontext
    if task is not None and not lock.take(task):
        await lock.wait(task)
    session.journal.ending = task
    try:
        if session.streams:
            await session.close_streams()
        await greenlet_spawn(end, session.sync_session)
    finally:
        lock.release()


def _judge(
    failure: Failure | None, cause: Cause, writers: Sequence[Session]
) -> Failure | None:
    """Give another failure where the journal does not let it be called a rollback."""
    for journal in (writer.journal for writer in writers):
        if (statement := journal.implicit_commit or journal.kept) is not None:
            why = cause, failure and failure.__cause__
            detail = f"MySQL committed by itself for {statement}"
            return failed(errors.PartialCommitError, *why, detail)
        if journal.ended_unseen:
            return failed(errors.OutcomeUnknownError, Cause.DOOMED, journal.doomed_by)
    return failure


def _tell(session: Session, operation: str, error: BaseException) -> None:
    session.shared.events.append(ReleaseFailed(operation, error))


def failed(
    kind: type[Failure], cause: Cause, error: BaseException | None, detail: str = ""
) -> Failure:
    """Make what is raised because the work was not kept."""
    failure = kind(OUTCOMES.get(kind, Outcome.ROLLED_BACK), cause, detail=detail)
    failure.__cause__ = error
    return failure
