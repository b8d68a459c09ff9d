"""What the sessions of a unit do, and for how long, where somebody asks for it."""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Any, Literal

import sqlalchemy as sa

from asgi_uow._databases import known
from asgi_uow.observers import Statements, Step, Usage

if TYPE_CHECKING:
    from collections.abc import Callable

    from asgi_uow._concurrency import TaskLock

    Access = Literal["read", "write"]


class Recorder:
    """Of one unit: a record of each session, its hooks, and what a timeline shows."""

    def __init__(self, *, timeline: bool) -> None:
        self.records: list[Record] = []
        self.timeline: list[Step] | None = [] if timeline else None
        self.hooks: int = 0
        self.hook_seconds: float = 0.0
        self.ending: float = 0.0  # seconds of COMMIT and ROLLBACK

    def attach(self, session: Any, lock: TaskLock) -> None:
        """Have what a synchronous session does recorded."""
        session.record = Record(self, session.database.name, session.access)
        lock.resume = session.record.resume

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

    def __init__(self, recorder: Recorder, database: str, access: Access) -> None:
        self._recorder = recorder
        recorder.records.append(self)
        self.database, self.access = database, access
        self.statements: Statements = Statements()
        self.waited: float = 0.0
        self.held: float = 0.0
        self.idle: float = 0.0
        self.connected: float | None = None  # since when it holds a connection
        self._last = 0.0  # when the last statement ended

    @property
    def held_until_now(self) -> float:
        since = self.connected
        return self.held if since is None else self.held + time.perf_counter() - since

    def begin(self) -> Record:
        """Note that its session has a connection, which gets the record too."""
        if self.connected is None:
            self.connected = time.perf_counter()
        return self

    def is_used(self) -> bool:
        return bool(self.statements.count or self.waited or self.held_until_now)

    def disconnect(self) -> None:
        self.held, self.connected = self.held_until_now, None

    def resume(self, released: float) -> None:
        """Note that a call begins, and that there was none since `released`."""
        if self.connected is not None:
            since = max(released, self.connected, self._last)
            self.idle += max(0.0, time.perf_counter() - since)

    def connect(self, connect: Callable[[], sa.Connection]) -> sa.Connection:
        connection: sa.Connection = self._timed("connection", "", connect)
        return connection

    def execute(self, sql: str, send: Callable[[], object]) -> None:
        """Send a statement; one that fails counts as well."""
        self._timed("statement", sql, send)

    def end(self, kind: str, send: Callable[[], object]) -> None:
        """Send COMMIT or ROLLBACK."""
        self._timed(kind, "", send)

    def _timed(self, kind: Any, sql: str, call: Callable[[], Any]) -> Any:
        started, failed = time.perf_counter(), True
        try:
            result = call()
            failed = False
        finally:
            ended = self._last = time.perf_counter()
            if kind == "connection":  # in a savepoint that is sent at once, too
                ended = self.connected or ended
                self.waited += ended - started
            elif kind == "statement":
                seconds = ended - started
                self.statements += Statements(1, seconds, seconds)
            else:
                self._recorder.ending += ended - started
            if self._recorder.timeline is not None:
                text = known.without_literals(sql) if sql else ""
                about = kind, self.database, self.access, started, ended - started
                self._recorder.timeline.append(Step(*about, text, failed))
        return result


class Recording:
    """A mixin for a synchronous session: notes for how long it waits to connect."""

    record: Record

    def _connection_for_bind(self, bind: Any, *args: Any, **kw: Any) -> sa.Connection:
        plain: Any = super()
        connect = functools.partial(plain._connection_for_bind, bind, *args, **kw)  # noqa: SLF001  # no other way
        if self.record.connected is not None or not isinstance(bind, sa.Engine):
            found: sa.Connection = connect()  # one that is held already
            return found
        return self.record.connect(connect)


@functools.cache
def recording(session: Any) -> Any:
    """Give the class of a synchronous session that records."""
    return type(session.__name__, (Recording, session), {})
