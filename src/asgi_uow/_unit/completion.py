"""The end of the transactions of one unit of work: the only lines that commit."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
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
from asgi_uow._unit.ended import COMMITTED, Ended
from asgi_uow.observers import ReleaseFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from asgi_uow._databases.keys import Claim
    from asgi_uow._sessions.managed import ManagedSession
    from asgi_uow._sessions.read_session import ReadSession
    from asgi_uow._sessions.session import Session
    from asgi_uow._unit.hooks import Work
    from asgi_uow._unit.participant import Participant
    from asgi_uow.observers import Event

RESOLVE_SECONDS = 30.0  # for an unknown outcome, where `commit_timeout` is None
ROLLBACK_SECONDS = 4.0  # at most; then the connection is cut off instead


@dataclasses.dataclass(slots=True, eq=False)
class Commit:
    """One COMMIT, and whether the answer to it leaves its outcome in doubt."""

    session: Session
    proof: str | Claim | None = None  # asked what became of it, if that is in doubt
    in_doubt: bool = False

    def prepare(self) -> None:
        """Have the server promise that it can commit; then it is asked nothing more."""
        self._begin().prepare()

    def run(self) -> None:
        """Check, flush, commit and close, in one greenlet."""
        sync = self._begin()
        orm.Session.commit(sync)
        orm.Session.close(sync)

    def _begin(self) -> ManagedSession:
        """Raise unless the transaction is there and whole, or has been prepared.

        `ConnectionError` if the driver knows that a connection is dead: certainly not
        committed. `TransactionGoneError` if a statement through the driver itself,
        unseen by the journal, has ended it or failed; PostgreSQL has to be asked.
        """
        sync = self.session.sync_session
        db = sync.database
        if sync.journal.xid is not None:
            return sync
        if sync.driver_exposed:
            _wait_for_others(sync)
        for connection in sync.connections:
            dbapi = connection.connection.dbapi_connection
            if db.driver.is_dead(raw_of(dbapi)):
                message = "the connection was lost before COMMIT was sent"
                raise ConnectionError(message)
            sync.journal.look(dbapi)
            if sync.driver_exposed and db.facts.QUESTION_BEFORE_COMMIT is not None:
                try:
                    sync.scalar(text(db.facts.QUESTION_BEFORE_COMMIT))
                except exc.DBAPIError as error:
                    raise errors.TransactionGoneError from error
                sync.journal.look(dbapi)
            if sync.journal.ended_unseen:
                raise errors.TransactionGoneError from sync.journal.doomed_by
        self.proof = sync.journal.claim
        if db.resolve_unknown and sync.connections:
            self.proof = self.proof or leave_mark(sync, db.facts)
        return sync


class Completion:
    """Ends the sessions of a unit of work, one after the other, each bounded."""

    __slots__ = ("_timeout", "began", "events", "shield")

    def __init__(self, events: list[Event], timeout: float | None) -> None:
        self.shield, self.began = Shield(), time.perf_counter()
        self.events, self._timeout = events, timeout

    async def commit(self, writers: Sequence[Session]) -> Ended:
        """COMMIT every session that executed something, in the order of first use.

        One with a key comes last: what a repetition is told has to be kept by all.
        Sessions with `twophase=True` are all prepared before the first COMMIT, and
        committed after the others, which may fail; from then on nothing stops them.
        """
        steps: list[tuple[Commit, Callable[[], None]]] = []
        prepared: list[tuple[Commit, Callable[[], None]]] = []
        if writers[1:]:
            writers = sorted(writers, key=lambda each: each.journal.claim is not None)
        for writer in writers:
            commit = Commit(writer)
            if writer.sync_session.twophase:
                steps.insert(len(prepared), (commit, commit.prepare))
                prepared.append((commit, commit.run))
            else:
                steps.append((commit, commit.run))
        unproven: tuple[Commit, BaseException] | None = None
        for commit, step in (*steps, *prepared):
            journal = commit.session.journal
            try:
                await self.shield.run(_in_lock(commit.session, step), self._timeout)
            except BaseException as error:  # noqa: BLE001  # becomes the failure
                if not await self._was_kept(commit, error):
                    unproven = unproven or (commit, error)
                    if journal.xid is None or not journal.commit_sent:
                        break
        return COMMITTED if unproven is None else self._refused(*unproven, writers)

    async def _was_kept(self, commit: Commit, error: BaseException) -> bool:
        """Tell whether the work is kept all the same; settles what was in doubt."""
        journal, db = commit.session.journal, commit.session.sync_session.database
        if not journal.committed:
            is_uncertain = journal.xid is not None or is_in_doubt(error)
            commit.in_doubt = journal.commit_sent and is_uncertain
            proof = None if db.is_memory else commit.proof
            if not commit.in_doubt or not (journal.xid or proof):
                return False
        # Closed first: MariaDB commits for others only then what it has prepared.
        await self.discard(commit.session, error)
        if not journal.committed:
            seconds = self._timeout or RESOLVE_SECONDS
            settling = db.settle(journal.xid, commit.proof or "", seconds)
            kept = await self.shield.run(settling, at_once=False)
            if journal.xid is not None and kept is False:  # it is prepared no more
                kept = True if is_in_doubt(error) else None
            journal.committed, commit.in_doubt = bool(kept), kept is None
        return journal.committed

    def _refused(
        self, commit: Commit, error: BaseException, writers: Sequence[Session]
    ) -> Ended:
        commit.session.record_error(error)
        if isinstance(error, ConnectionError | TimeoutError):  # of this file, or Shield
            commit.session.shared.outages.append(error)
        is_late, xid = isinstance(error, TimeoutError), commit.session.journal.xid
        commit.session.shared.stuck += is_late
        cause = Cause.TIMEOUT if is_late else Cause.COMMIT_FAILED
        why = cause, error, "" if xid is None else f"{xid!r} may still be prepared"
        if any(each.journal.committed for each in writers):
            return Ended(Outcome.PARTIAL, errors.PartialCommitError, *why)
        if commit.in_doubt:
            return Ended(Outcome.UNKNOWN, errors.OutcomeUnknownError, *why)
        doom = commit.session.doomed_by
        if isinstance(error, errors.TransactionGoneError) and doom is not None:
            # A statement in flight at the decision failed before its COMMIT.
            return Ended(Outcome.ROLLED_BACK, errors.DoomedError, Cause.DOOMED, doom)
        return Ended(Outcome.ROLLED_BACK, errors.CommitFailedError, cause, error)

    async def prove(
        self, ended: Ended, cause: Cause | None, writers: Sequence[Session]
    ) -> Ended:
        """Tell whether something of what is to be rolled back was, or may be, kept."""
        for writer in writers:
            sync, journal = writer.sync_session, writer.journal
            if sync.driver_exposed and not writer.shared.stuck:
                # What is in flight may still end the transaction.
                waiting = functools.partial(_wait_for_others, sync)
                await self._try(writer, _in_lock(writer, waiting))
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
        is_rollback = ended.outcome is Outcome.ROLLED_BACK
        return _judge(ended, cause, writers) if is_rollback else ended

    async def roll_back(self, session: Session, ended: Ended) -> None:
        """Roll back and give the connection back clean, or throw it away."""
        sync = session.sync_session

        def end() -> None:
            if ended.outcome is Outcome.ROLLED_BACK:
                sync.detach_objects()
                sync.rollback()  # after a failed COMMIT close() alone sends nothing
            else:
                sync.invalidate()
            sync.close()

        await self._close(session, end)
        if (xid := sync.journal.xid) is not None and not sync.journal.commit_sent:
            seconds = self._timeout or RESOLVE_SECONDS
            ending = sync.database.end_prepared(xid, seconds, commit=False)
            if await self.shield.run(ending, at_once=False) is None:
                left = TimeoutError("it is prepared")
                self.events.append(ReleaseFailed(f"rolling {xid!r} back", left))

    async def close_reader(self, of: Participant, reader: ReadSession) -> None:
        """Give the connection of a read session back, or throw it away."""
        sync = reader.sync_session
        if sync.in_transaction() or reader.own_lock.owner:
            await self._close(reader, functools.partial(orm.Session.close, sync))
        else:
            orm.Session.close(sync)  # nothing to wait for
        if of.shared.recorder is not None:
            of.tell_release(reader)

    async def _close(self, session: Session, end: Callable[[], None]) -> None:
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
            self.events.append(ReleaseFailed("giving a read connection back", error))

    async def discard(self, session: Session, error: BaseException | None) -> None:
        """Give up a session that could not be closed; its connection is not reused."""
        lost = getattr(error, "connection_invalidated", False)
        if error is not None and not lost and session.doomed_by is None:
            self.events.append(ReleaseFailed("closing the session", error))
        again = await self._try(session, session.discard())
        if again is not None:
            self.events.append(ReleaseFailed("throwing the connection away", again))

    async def _try(self, session: Session, work: Work) -> BaseException | None:
        """Give what `work` raised; what takes too long has its connection cut off."""
        seconds = min(ROLLBACK_SECONDS, self._timeout or ROLLBACK_SECONDS)
        try:
            await self.shield.run(work, seconds, cut=session.sync_session.cut_off)
        except BaseException as error:  # noqa: BLE001  # reported; the outcome stands
            session.shared.stuck += isinstance(error, TimeoutError)
            if not isinstance(error, Exception):
                self.shield.cancelled = error  # raised later
            return error
        return None


def _wait_for_others(session: ManagedSession) -> None:
    """Wait for statements past the session, so that the journal knows of them."""
    for each in session.connections:
        if isinstance(each, Connection) and not (each.closed or each.invalidated):
            each.call_alone(bool)


async def _in_lock(session: Session, end: Callable[[], None]) -> None:
    """End a session in a greenlet, once no call is in flight."""
    lock, task = session.own_lock, asyncio.current_task()
    lock.limit = nullcontext
    if task is not None and not lock.take(task):
        await lock.wait(task)
    session.journal.ending = task
    try:
        if session.streams:
            await session.close_streams()
        await greenlet_spawn(end)
    finally:
        lock.release()


def _judge(ended: Ended, cause: Cause | None, writers: Sequence[Session]) -> Ended:
    """Give another end where the journal does not let it be called a rollback."""
    for journal in (writer.journal for writer in writers):
        if (statement := journal.implicit_commit or journal.kept) is not None:
            kind, cause = errors.PartialCommitError, ended.cause or cause
            detail = f"MySQL committed by itself for {statement}"
            return Ended(Outcome.PARTIAL, kind, cause, ended.error, detail)
        if journal.ended_unseen:
            why = Cause.DOOMED, journal.doomed_by
            return Ended(Outcome.UNKNOWN, errors.OutcomeUnknownError, *why)
    return ended
