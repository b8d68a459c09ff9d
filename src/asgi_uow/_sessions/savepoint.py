"""A SAVEPOINT whose statements take turns with the others of its session."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from anyio import CancelScope, fail_after
from sqlalchemy.ext.asyncio import AsyncSessionTransaction

from asgi_uow._decision import WRITABLE
from asgi_uow.errors import ConcurrentUseError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator
    from types import TracebackType

    from asgi_uow._sessions.session import Session

END_SECONDS = 30.0
"""Seconds for RELEASE and ROLLBACK TO, which a cancelled scope does not interrupt."""


class Savepoint(AsyncSessionTransaction):
    """SQLAlchemy's `AsyncSessionTransaction` for a SAVEPOINT, taking turns."""

    __slots__ = ("ended",)

    # Narrower than SQLAlchemy's, which only reads it.
    session: Session  # pyright: ignore[reportIncompatibleVariableOverride]
    ended: bool

    async def start(self, is_ctxmanager: bool = False) -> Savepoint:  # noqa: FBT001, FBT002
        """Send SAVEPOINT."""
        async with self.session.lock:
            self.session.check("session.begin_nested()")
            self.ended = False
            with self._recording():
                await super().start(is_ctxmanager)
        return self

    async def commit(self) -> None:
        """Send RELEASE SAVEPOINT."""
        self.ended = True
        async with self.session.lock:
            with self._recording():
                await super().commit()

    async def rollback(self) -> None:
        """Send ROLLBACK TO SAVEPOINT."""
        self.ended = True
        async with self.session.lock:
            with self._recording():
                await super().rollback()
        await self._call_due()

    async def __aexit__(
        self,
        type_: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release, or roll back to the savepoint after an exception.

        Raises `ConcurrentUseError` if another task has ended it with one around it;
        then it is not known what this block has kept, and nothing will be.
        """
        async with self._locked():
            if self.session.shared.state not in WRITABLE:
                return  # the decision has ended it, as it ends all of them
            if not self.ended and not self._is_open():
                error = ConcurrentUseError("A savepoint", "another task ended it")
                self.session.sync_session.journal.doom(error)
                if value is None:
                    raise error
            with self._recording(), fail_after(END_SECONDS, shield=True):
                await super().__aexit__(type_, value, traceback)
        await self._call_due()

    @asynccontextmanager
    async def _locked(self) -> AsyncGenerator[None]:
        """Wait for the call in flight, in a cancelled scope too.

        A task that is cancelled in the meantime leaves the savepoint open.
        """
        lock = self.session.lock
        try:
            with CancelScope(shield=True):
                await lock.__aenter__()
        except asyncio.CancelledError as error:
            self.session.sync_session.journal.doom(error)
            raise
        try:
            yield
        finally:
            await lock.__aexit__()

    @contextmanager
    def _recording(self) -> Generator[None]:
        try:
            yield
        except Exception as error:
            self.session.record_error(error)
            raise

    async def _call_due(self) -> None:
        if self.session.shared.savepoints.due:
            await self.session.call_due()

    def _is_open(self) -> bool:
        """Tell whether SQLAlchemy still has this savepoint among the open ones."""
        transaction = self.session.sync_session.get_nested_transaction()
        while transaction is not None and transaction is not self.sync_transaction:
            transaction = transaction.parent
        return transaction is not None
