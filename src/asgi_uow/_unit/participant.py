"""The sessions of one unit of work: opened on first use, and where they read."""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING

from asgi_uow._decision import State
from asgi_uow._reading.route import Route
from asgi_uow._sessions.session import Ties
from asgi_uow.errors import NestedUnitOfWorkError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from asgi_uow._databases.engines import Engines
    from asgi_uow._sessions.read_session import ReadSession
    from asgi_uow._sessions.session import Session
    from asgi_uow._unit.unit import UnitOfWork


class Sessions:
    """A writer and a reader per database, and readers of parallel tasks."""

    __slots__ = ("_routes", "_unit", "parallel", "readers", "writers")

    def __init__(self, unit: UnitOfWork) -> None:
        """Open none yet."""
        self._unit = weakref.proxy(unit)
        self._routes: dict[Engines, Route] = {}
        self.writers: dict[Engines, Session] = {}
        self.readers: dict[Engines, ReadSession] = {}
        self.parallel: dict[ReadSession, Engines] = {}

    def __bool__(self) -> bool:
        """Tell whether any was opened."""
        return bool(self.writers or self.readers or self.parallel)

    def writer(self, db: Engines) -> Session:
        """Give the write session of `db`."""
        self._unit.life.check_writable("session()")
        if db not in self.writers:
            self._refuse_to_wait_for_itself(db)
            ties = self._ties(self._unit.life.check_writable)
            self.writers[db] = db.write_session(ties)
            self._note_use()
        return self.writers[db]

    def reader(self, db: Engines) -> ReadSession:
        """Give the read session of `db`."""
        self._unit.life.check_readable("read_session()")
        if db not in self.readers:
            self.readers[db] = self._make_reader(db)
            self._note_use()
        return self.readers[db]

    async def one_more_reader(self, db: Engines) -> ReadSession:
        """Give a read session to one task among several."""
        self._unit.life.check_readable("parallel_read()")
        if db in self.readers:
            # Or requests that hold one connection and want another wait in a circle.
            await self.readers[db].rest()
        session = self._make_reader(db)
        self.parallel[session] = db
        self._note_use()
        return session

    def _note_use(self) -> None:
        if self._unit.state is State.NEW:
            self._unit.life.move(State.ACTIVE)
        self._unit.report.start()

    def forget(self) -> None:
        """Let go of what was closed; a leaked context may keep the unit alive."""
        self.writers.clear()
        self.readers.clear()
        self.parallel.clear()
        self._routes.clear()

    def all_readers(self) -> Iterator[tuple[Engines, ReadSession]]:
        """Give the read sessions that are to be closed."""
        yield from list(self.readers.items())
        for session, db in list(self.parallel.items()):
            yield db, session

    @property
    def doomed_by(self) -> BaseException | None:
        """The first error for which a database has given its work up."""
        doomed = (session.doomed_by for session in self.writers.values())
        return next((error for error in doomed if error is not None), None)

    def has_written(self, db: Engines) -> bool:
        """Tell whether the write session has executed something."""
        writer = self.writers.get(db)
        return writer is not None and bool(writer.sync_session.connections)

    def holds(self, db: Engines) -> bool:
        """Tell whether a connection is held that another unit would wait for."""
        if self.has_written(db) and self._unit.life.is_writable:
            return True
        reader = self.readers.get(db) if db.is_memory else None
        return reader is not None and any(
            not connection.closed for connection in reader.sync_session.connections
        )

    def _ties(self, check: Callable[[str], None]) -> Ties:
        unit = self._unit
        return Ties(check, unit.outages.note, unit.hooks, unit.call_undone)

    def _make_reader(self, db: Engines) -> ReadSession:
        if db.replicas and db not in self._routes:
            self._routes[db] = Route(
                db.replicas,
                db.read_engine,
                wrote=functools.partial(self._unit.has_written, db),
                report=self._unit.report.add,
                must_see=self._unit.must_see.position(db),
                seconds=self._unit.must_see.seconds,
            )
        return db.make_read_session(
            self._ties(self._unit.life.check_readable),
            functools.partial(self._reads_move_to, db),
            self._routes.get(db),
        )

    def _reads_move_to(self, db: Engines) -> Session | None:
        """Give the write session once reads belong into its transaction."""
        if not self._unit.life.is_writable:
            return None
        if db.is_memory:
            writer: Session = self._unit.session(db)
            return writer
        return self.writers[db] if self.has_written(db) else None

    def _refuse_to_wait_for_itself(self, db: Engines) -> None:
        # SQLite lets one writer in, and this unit would keep the other from ending.
        if db.one_writer and self._unit.kin.hold(db):
            raise NestedUnitOfWorkError(db)
