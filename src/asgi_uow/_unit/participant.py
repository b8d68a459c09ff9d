"""One database of one unit of work: its sessions, opened on first use."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

from asgi_uow._decision import WRITABLE, Outcome
from asgi_uow._reading.route import Route
from asgi_uow._sessions.read_session import ReadSession
from asgi_uow._sessions.session import Session
from asgi_uow.observers import ImplicitCommit

if TYPE_CHECKING:
    from asgi_uow._databases.engines import Engines
    from asgi_uow._reading.causal import MustSee
    from asgi_uow._sessions.managed import Shared


@dataclasses.dataclass(slots=True, eq=False)
class Participant:
    """The sessions of one database; `readers` has those of parallel tasks too."""

    db: Engines
    shared: Shared
    must_see: MustSee
    writer: Session | None = None
    reader: ReadSession | None = None
    readers: list[ReadSession] = dataclasses.field(default_factory=list)
    route: Route | None = None

    def open_writer(self) -> Session:
        db = self.db
        writer = self.writer = Session(db, db.engine, db.write_options, self.shared)
        self.shared.writers.append(writer.sync_session)
        for reader in self.readers:
            reader.follow(writer)
        return writer

    def open_reader(self) -> ReadSession:
        db, shared = self.db, self.shared
        reader = ReadSession(db, db.read_engine, db.read_options, shared)
        if db.replicas:
            if self.route is None:
                wrote = functools.partial(shared.has_written, db)
                self.route = Route(db, shared.events, wrote, self.must_see)
            reader.route = self.route
        if self.writer is not None:
            reader.follow(self.writer)
        self.readers.append(reader)
        return reader

    @property
    def has_written(self) -> bool:
        return self.writer is not None and bool(self.writer.sync_session.connections)

    @property
    def holds_connection(self) -> bool:
        """Whether another unit would have to wait for a connection held here.

        For the writer's until the end begins; in memory also for a reader's.
        """
        if self.has_written and self.shared.state in WRITABLE:
            return True
        reader = self.reader if self.db.is_memory else None
        held = reader.sync_session.connections if reader is not None else ()
        return any(not each.closed for each in held)

    def conclude(self, outcome: Outcome) -> None:
        """Record what the end of the write session means for reads; tell of it."""
        if self.writer is None:
            return
        journal = self.writer.journal
        kept = journal.committed or outcome in {Outcome.COMMITTED, Outcome.UNKNOWN}
        committed = journal.implicit_commit or journal.kept
        if committed is not None or (kept and self.has_written):
            self.shared.committed.add(self.db)
            self.shared.kept[0] += 1
        if (record := self.writer.sync_session.record) is not None:
            record.release(self.shared.events)
        if journal.implicit_commit is not None:
            self.shared.events.append(ImplicitCommit(journal.implicit_commit))
