"""A SAVEPOINT whose statements take turns with the others of its session."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol

from anyio import CancelScope, fail_after
from sqlalchemy.ext.asyncio import AsyncSessionTransaction

from asgi_uow.errors import ConcurrentUseError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from sqlalchemy.orm import Session

    from asgi_uow._concurrency import TaskLock
    from asgi_uow._databases.journal import Journal

END_SECONDS = 30.0
"""Seconds for RELEASE and ROLLBACK TO, which a cancelled scope does not interrupt."""


class Owner(Protocol):
    """A session, as its savepoints see it."""

    journal: Journal

    @property
    def sync_session(self) -> Session: ...
    @property
    def lock(self) -> TaskLock: ...
    @property
    def is_decided(self) -> bool: ...
    def check(self, operation: str) -> None: ...
    def record_error(self, error: Exception) -> None: ...
    async def call_due(self) -> None: ...


class Savepoint(AsyncSessionTransaction):
    """SQLAlchemy's `AsyncSessionTransaction` for a SAVEPOINT, taking turns."""

    __slots__ = ("ended",)
    session: Owner  # type: ignore[assignment]  # SQLAlchemy's, as far as is used here
    ended: bool

    async def start(self, is_ctxmanager: bool = False) -> Savepoint:  # noqa: FBT001, FBT002
        async with self._turn():
            self.session.check("session.begin_nested()")
            self.ended = False
            await super().start(is_ctxmanager)
        return self

    async def commit(self) -> None:
        """Send RELEASE SAVEPOINT."""
        self.ended = True
        async with self._turn():
            await super().commit()

    async def rollback(self) -> None:
        """Send ROLLBACK TO SAVEPOINT."""
        self.ended = True
        async with self._turn():
            await super().rollback()
        await self.session.call_due()

    async def __aexit__(self, type_: object, value: object, traceback: object) -> None:
        """Release, or roll back to the savepoint after an exception.

        Raises `ConcurrentUseError` if another task has ended it with one around it;
        then it is not known what this block has kept, and nothing will be.
        """
        session = self.session
        try:
            with CancelScope(shield=True):
                await session.lock.__aenter__()
        except asyncio.CancelledError as error:
            session.journal.doom(error)  # the savepoint stays open
            raise
        try:
            async with self._turn():
                if session.is_decided:
                    return  # the decision has ended it, as it ends all of them
                if not self.ended and not self._is_open():
                    lost = ConcurrentUseError("A savepoint", "another task ended it")
                    session.journal.doom(lost)
                    if value is None:
                        raise lost
                with fail_after(END_SECONDS, shield=True):
                    await super().__aexit__(type_, value, traceback)
        finally:
            session.lock.release()
        await session.call_due()

    @asynccontextmanager
    async def _turn(self) -> AsyncGenerator[None]:
        async with self.session.lock:
            try:
                yield
            except Exception as error:
                self.session.record_error(error)
                raise

    def _is_open(self) -> bool:
        """Tell whether SQLAlchemy still has this savepoint among the open ones."""
        transaction = self.session.sync_session.get_nested_transaction()
        while transaction is not None and transaction is not self.sync_transaction:
            transaction = transaction.parent
        return transaction is not None
