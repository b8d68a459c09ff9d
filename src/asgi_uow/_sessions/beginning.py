"""What comes first in each transaction: a connection in time, and `on_begin`."""

from __future__ import annotations

import asyncio
import functools
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from sqlalchemy import orm
from sqlalchemy.ext.asyncio import async_session
from sqlalchemy.util import await_only

from asgi_uow._sessions.managed import ManagedSession, ReadOnlySession
from asgi_uow.errors import ConcurrentUseError

if TYPE_CHECKING:
    import sqlalchemy as sa


BEGINNING: ContextVar[tuple[ManagedSession, ...]] = ContextVar(
    "asgi_uow.beginning", default=()
)
"""Whose `on_begin` this is inside of, which would wait for itself."""


class BeginningSession(ManagedSession):
    """Connects before its deadline and awaits `on_begin`, whatever executes first.

    Before, not in an event: SQLAlchemy lets nobody use a session that is connecting.
    """

    begun: orm.SessionTransaction | None = None  # the one for which that was done

    def begin_first(self) -> None:
        """Await `on_begin`, unless this is its own call, or the transaction has it."""
        transaction, task = self.get_transaction(), asyncio.current_task()
        if (transaction and self.begun is transaction) or self.beginning is task:
            return
        around = [it for it in BEGINNING.get() if it.database is self.database]
        if len(around) > 1 and all(it.beginning for it in around):
            # A unit has two sessions; of others there would be no end.
            operation = "A transaction that on_begin begins for another on_begin"
            raise ConcurrentUseError(operation, "on_begin has not returned")
        await_only(self.lock.__aenter__())  # an attribute is loaded without it
        try:
            with self.lock.limit():
                connection: Any = orm.Session.connection(self)
            if self.begun is not self.get_transaction():
                self._await_on_begin(connection)
        finally:
            self.lock.release()

    def _await_on_begin(self, connection: Any) -> None:
        self.beginning, connection.is_beginning = asyncio.current_task(), True
        token = BEGINNING.set((*BEGINNING.get(), self))
        try:
            if self.database.on_begin is not None:
                with self.no_autoflush:
                    await_only(self.database.on_begin(async_session(self)))
            self.begun = self.get_transaction()
        finally:
            BEGINNING.reset(token)
            self.beginning, connection.is_beginning = None, False

    def connection(
        self, bind_arguments: Any = None, execution_options: Any = None
    ) -> sa.Connection:
        if execution_options is not None:  # they are for the moment of connecting
            orm.Session.connection(self, bind_arguments, execution_options)
        self.begin_first()
        return super().connection(bind_arguments)


def _begin_before(name: str) -> None:
    method = getattr(ManagedSession, name)

    @functools.wraps(method)
    def call(self: BeginningSession, *args: Any, **kwargs: Any) -> Any:
        self.begin_first()
        return method(self, *args, **kwargs)

    setattr(BeginningSession, name, call)


# What it sets is not to go with a savepoint. `_flush`: there is something to flush.
for _name in ("_execute_internal", "_flush", "_bulk_save_mappings", "begin"):
    _begin_before(_name)


class BeginningReadSession(ReadOnlySession, BeginningSession):
    """Leaves it to the write session to begin while it reads in its transaction."""

    def begin_first(self) -> None:
        host = self.writer
        BeginningSession.begin_first(
            host if isinstance(host, BeginningSession) else self
        )
