"""The deadline of a unit of work: nothing that waits for a database outlives it."""

from __future__ import annotations

import asyncio
import contextvars
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import StatementError
from sqlalchemy.util import await_only

from asgi_uow._databases import known
from asgi_uow._databases.connection import info_of
from asgi_uow._databases.engines import cancel_statements
from asgi_uow._databases.pool import CANCEL_SQL
from asgi_uow.errors import DeadlineExceededError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

    import sqlalchemy as sa


class Deadline:
    """Cancels what still waits `until` then, by the clock of the event loop."""

    def __init__(self, until: float, outages: list[Exception]) -> None:
        self.until: float = until
        self._outages = outages
        self._ends: dict[object, Callable[[], None]] = {}
        """What ends, by task, the innermost of what is limited."""

    def check(self, cause: BaseException | None = None) -> None:
        """Raise `DeadlineExceededError` if it is over."""
        if cause is not None or asyncio.get_running_loop().time() >= self.until:
            self._outages.append(error := DeadlineExceededError())
            raise error from cause

    @contextmanager
    def limit(self) -> Generator[None]:
        """Do what `asyncio.timeout` does, also inside a greenlet."""
        self.check()
        task: Any = asyncio.current_task()
        others, is_over = task.cancelling(), False

        def end() -> None:
            nonlocal is_over
            is_over = task.cancel()

        around, self._ends[task] = self._ends.get(task), end
        loop = asyncio.get_running_loop()
        # In an empty context: the loop keeps that of a cancelled timer for long.
        timer: Any = around or loop.call_at(
            self.until, lambda: self._ends[task](), context=contextvars.Context()
        )
        try:
            yield
        except StatementError as error:  # SQLAlchemy has wrapped ours
            origin = error.orig
            late = origin if isinstance(origin, DeadlineExceededError) else error
            raise late from late.__cause__
        except asyncio.CancelledError as error:
            if is_over and task.cancelling() == others + 1:
                self.check(error)
            raise
        finally:
            if around is None:
                timer.cancel()
                del self._ends[task]
            else:
                self._ends[task] = around
            if is_over:
                task.uncancel()

    def execute(self, connection: sa.Connection, send: Callable[[], object]) -> None:
        """Execute a statement, which its server stops at the deadline."""
        raw = connection.connection.driver_connection
        known.driver_of(connection.dialect).hurry(raw)
        statement = info_of(connection).get(CANCEL_SQL)
        try:
            with self.limit():
                send()
        except DeadlineExceededError as error:
            if error.__cause__ is not None and statement is not None:
                await_only(cancel_statements([(connection.engine, statement)]))
            raise


def lift(sessions: Iterable[Any]) -> bool:
    """Leave COMMIT the time that it takes; raises if the deadline is over."""
    for session in sessions:
        for connection in session.sync_session.connections:
            connection.deadline.check()
            connection.deadline = None
    return True


def earlier(until: float | None, seconds: float | None) -> float | None:
    """Give the earlier end of two: a moment, and so many seconds from now on."""
    if seconds is None:
        return until
    end = asyncio.get_running_loop().time() + seconds
    return end if until is None else min(end, until)
