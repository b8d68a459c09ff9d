"""One database of one unit of work: its sessions, opened on first use."""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Literal

from asgi_uow._databases.journal import Savepoints
from asgi_uow._reading.route import Route
from asgi_uow._sessions.read_session import ReadSession
from asgi_uow._sessions.session import Session
from asgi_uow.observers import ConnectionReleased, ImplicitCommit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from asgi_uow._databases.engines import Engines
    from asgi_uow._decision import State
    from asgi_uow._reading.causal import MustSee
    from asgi_uow.observers import Event


class Shared:
    """What the sessions of a unit of work have in common, also with units around it."""

    __slots__ = ("committed", "events", "outages", "savepoints", "writers")

    def __init__(self, around: Shared | None, *, nested: bool, hook: bool) -> None:
        self.outages: list[Exception] = []
        """Errors that mean a database out of reach."""
        self.events: list[Event] = around.events if around and hook else []
        """What observers are told at the end; of a hook, with those of its unit."""
        self.savepoints: Savepoints = (
            around.savepoints if around and nested else Savepoints()
        )
        self.writers: list[tuple[Engines, Session]] = around.writers if around else []
        """The write sessions that were opened."""
        self.committed: set[Engines] = around.committed if around else set()
        """The databases in which something was committed."""

    def has_written(self, db: Engines) -> bool:
        """Tell whether reads of `db` must see what a unit among these has written."""
        return db in self.committed or any(
            each is db and bool(session.sync_session.connections)
            for each, session in self.writers
        )


class Participant:
    """The sessions of one database: a writer, a reader, readers of parallel tasks."""

    __slots__ = ("db", "must_see", "parallel", "reader", "route", "shared", "writer")

    def __init__(self, db: Engines, shared: Shared, must_see: MustSee) -> None:
        self.db = db
        self.shared = shared
        self.must_see = must_see
        self.route: Route | None = None
        self.writer: Session | None = None
        self.reader: ReadSession | None = None
        self.parallel: list[ReadSession] = []

    def open_writer(self) -> Session:
        """Give the write session; it connects when it executes."""
        if self.writer is None:
            db, shared = self.db, self.shared
            self.writer = Session(
                db, db.engine, db.write_options, shared.savepoints, shared.outages
            )
            shared.writers.append((db, self.writer))
            for reader in self.readers():
                reader.follow(self.writer, always=db.is_memory)
        return self.writer

    def open_reader(self) -> ReadSession:
        """Give the read session."""
        if self.reader is None:
            self.reader = self._make_reader()
        return self.reader

    async def open_parallel(self) -> ReadSession:
        """Give one more read session, to one task among several."""
        if self.reader is not None:
            # Requests that hold one connection and wait for a second can deadlock.
            await self.reader.release_if_idle()
        session = self._make_reader()
        self.parallel.append(session)
        return session

    def _make_reader(self) -> ReadSession:
        db, shared = self.db, self.shared
        session = ReadSession(
            db, db.read_engine, db.read_options, shared.savepoints, shared.outages
        )
        if db.replicas:
            if self.route is None:
                wrote = functools.partial(shared.has_written, db)
                self.route = Route(db, shared.events, wrote, self.must_see)
            session.route = self.route
        if self.writer is not None:
            session.follow(self.writer, always=db.is_memory)
        return session

    def readers(self) -> Iterator[ReadSession]:
        """Give the read sessions that are open."""
        if self.reader is not None:
            yield self.reader
        yield from self.parallel

    @property
    def has_written(self) -> bool:
        """Whether the write session has executed something."""
        return self.writer is not None and bool(self.writer.sync_session.connections)

    @property
    def holds_connection(self) -> bool:
        """Whether another unit would have to wait for a connection held here.

        For the writer's until it is sealed; in memory also for a reader's.
        """
        writer = None if self.writer is None else self.writer.sync_session
        if writer is not None and writer.connections and writer.sealed is None:
            return True
        return (
            self.db.is_memory
            and self.reader is not None
            and any(not each.closed for each in self.reader.sync_session.connections)
        )

    def seal(self, state: State, *, readers: bool) -> None:
        """Have the write session, or all, refuse every further call."""
        if self.writer is not None:
            self.writer.sync_session.sealed = state
        if readers:
            for reader in self.readers():
                reader.sync_session.sealed = state

    def record_committed(self) -> None:
        """Record that something was committed: later reads must see it."""
        if self.has_written:
            self.shared.committed.add(self.db)

    def report_implicit_commit(self) -> None:
        """Tell of DDL for which MySQL has committed."""
        if self.writer is not None:
            statement = self.writer.sync_session.journal.implicit_commit
            if statement is not None:
                self.shared.events.append(ImplicitCommit(statement))

    def report_release(
        self, session: Session, access: Literal["read", "write"]
    ) -> None:
        """Tell for how long a session has held connections."""
        since, held = session.sync_session.connected, session.sync_session.held
        if since is not None or held:
            seconds = held if since is None else held + time.perf_counter() - since
            event = ConnectionReleased(self.db.name, access, seconds)
            self.shared.events.append(event)
