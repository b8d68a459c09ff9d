"""What the sessions of a unit do, and for how long, where somebody asks for it."""

from __future__ import annotations

import functools
import re
import time
from typing import TYPE_CHECKING, Any, Literal
from weakref import ref

import sqlalchemy as sa

from asgi_uow._databases import known
from asgi_uow.observers import ConnectionReleased, Statements, Step, Usage

if TYPE_CHECKING:
    from collections.abc import Callable

    from asgi_uow.observers import Event

    Access = Literal["read", "write"]
    Kind = Literal["connection", "statement", "commit", "rollback"]

QUOTED_NAME = re.compile(r'"([^"\'\\]*)"')
MOST_STEPS = 500  # of which a timeline is kept; COMMIT and ROLLBACK always are


class Recorder:
    """Of one unit: a record of each session, its hooks, and what a timeline shows."""

    def __init__(self, *, timeline: bool) -> None:
        self.records: list[Record] = []
        self.timeline: list[Step] | None = [] if timeline else None
        self.hooks: int = 0
        self.hook_seconds: float = 0.0

    @property
    def ending(self) -> float:
        """Seconds of COMMIT and ROLLBACK."""
        return sum(each.ending for each in self.records)

    def attach(self, session: Any) -> None:
        """Have what a synchronous session does recorded."""
        session.record = record = Record(session, self.timeline)
        self.records.append(record)
        session.lock.resume = record.resume

    def usage(self) -> tuple[Usage, ...]:
        """Give what was done so far to each database, by write and read sessions."""
        found: dict[tuple[str, Access], list[Record]] = {}
        for each in filter(Record.is_used, self.records):
            found.setdefault((each.database, each.access), []).append(each)
        return tuple(
            Usage(
                *key,
                sum((each.statements for each in records), Statements()),
                sum(each.waited for each in records),
                sum(each.held_until_now for each in records),
                sum(each.idle for each in records),
            )
            for key, records in found.items()
        )


class Record:
    """Of one session; the times are those of `time.perf_counter()`."""

    def __init__(self, session: Any, timeline: list[Step] | None) -> None:
        self.database: str = session.database.name
        self.access: Access = session.access
        self._timeline = timeline
        self.statements: Statements = Statements()
        self.waited: float = 0.0
        self.held: float = 0.0
        self.idle: float = 0.0
        self.ending: float = 0.0  # seconds of COMMIT and ROLLBACK
        self.connected: float | None = None  # since when it holds a connection
        self.asked: float | None = None  # since when it waits for one
        self._last = 0.0  # when the last statement ended, or a call began
        self._lock = ref(session.lock)  # which resumes this

    @property
    def held_until_now(self) -> float:
        since = self.connected
        return self.held if since is None else self.held + time.perf_counter() - since

    def begin(self) -> Record:
        """Note that its session has a connection, which gets the record too."""
        now = time.perf_counter()
        self.connected = self.connected or now
        self._note_wait(now, failed=False)
        return self

    def is_used(self) -> bool:
        """Tell whether there is anything to say of it; a wait in vain is over then."""
        lock = self._lock()
        if self.asked and lock is not None and self.asked < lock.released:
            self._note_wait(lock.released, failed=True)
        return bool(self.statements.count or self.waited or self.held_until_now)

    def disconnect(self) -> None:
        self.held, self.connected = self.held_until_now, None

    def release(self, events: list[Event]) -> None:
        """Tell that its session has given its connection back, if it had one."""
        if self.held_until_now:
            self.disconnect()
            events.append(ConnectionReleased(self.database, self.access, self.held))

    def resume(self, released: float) -> None:
        """Note that a call begins, and that there was none since `released`."""
        self.is_used()
        self.asked = None
        if self.connected is not None:
            since = max(released, self.connected, self._last)
            self._last = now = time.perf_counter()
            self.idle += max(0.0, now - since)

    def execute(self, send: Callable[[], object], sql: str, context: Any) -> None:
        """Send a statement; the names that SQLAlchemy quotes are left to read."""
        # Attributes that are loaded, and connections, do not take the lock.
        if (lock := self._lock()) is not None and lock.owner is None:
            self.resume(lock.released)
        made = getattr(context.compiled, "statement", None)
        if made is not None and not isinstance(made, sa.TextClause):
            sql = QUOTED_NAME.sub(r"\1", sql)
        self.send("statement", send, sql)

    def send(self, kind: Kind, send: Callable[[], object], sql: str = "") -> None:
        """Send a statement, COMMIT or ROLLBACK; what fails counts as well."""
        started, failed = time.perf_counter(), True
        try:
            send()
            failed = False
        finally:
            ended = self._last = time.perf_counter()
            seconds = ended - started
            if kind == "statement":
                self.statements += Statements(1, seconds, seconds)
            else:
                self.ending += seconds
            self._note(kind, started, ended, sql, failed=failed)

    def _note_wait(self, ended: float, *, failed: bool) -> None:
        since, self.asked = self.asked or ended, None
        self.waited += ended - since
        self._note("connection", since, ended, failed=failed)

    def _note(
        self, kind: Kind, start: float, end: float, sql: str = "", *, failed: bool
    ) -> None:
        steps = self._timeline
        # Each read has a connection: only that of a write session is one a unit.
        is_end = kind != "statement" and self.access == "write"
        if steps is not None and (is_end or len(steps) < MOST_STEPS):
            text = known.without_literals(sql) if sql else ""
            about = self.database, self.access, start, end - start
            steps.append(Step(kind, *about, text, failed))


@functools.cache
def recording(session: Any) -> Any:
    """Give the class of a synchronous session that notes since when it waits."""

    def get_bind(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Note the moment: SQLAlchemy asks just before it connects."""
        bind = session.get_bind(self, *args, **kwargs)
        if self.record.connected is None and isinstance(bind, sa.Engine):
            self.record.asked = time.perf_counter()
        return bind

    return type(session.__name__, (session,), {"get_bind": get_bind})
