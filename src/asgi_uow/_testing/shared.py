"""The one connection of a sandbox to a database: opened, used in turns, closed."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

from sqlalchemy.util import greenlet_spawn

from asgi_uow import errors
from asgi_uow._databases.connection import raw_of
from asgi_uow._databases.driver_errors import means
from asgi_uow._databases.engines import cancel_statements
from asgi_uow._databases.pool import ABORTING_CODES
from asgi_uow._testing.nesting import Nesting, Part
from asgi_uow._testing.thread import background

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from asgi_uow._databases.engines import Engines

T = TypeVar("T")

WAIT = 10.0  # seconds for a transaction that is open, or for the database itself

BUSY = (
    "The database is in use by another sandbox, or by a connection outside of it, for "
    f"more than {WAIT} seconds: on SQLite one sandbox at a time. Close the other first."
)
ENDED = "The sandbox has ended: nothing can be done in it any more."
GONE = (
    "The database has rolled the whole sandbox back (a deadlock with another one?), or "
    "something has ended its transaction: nothing more can be done in it."
)
HELD = (
    "{} has a transaction open in this sandbox, which has one connection: others have "
    f"waited for {WAIT} seconds. Leave its block before the next request."
)
INSIDE = (
    "A transaction inside another one of this unit of work, such as that of "
    "independent=True: a sandbox has one connection. Test it without a sandbox."
)


class SharedConnection(Nesting):
    """A connection in a transaction that is rolled back, in turns for who asks."""

    is_over = False

    def __init__(self, db: Engines) -> None:
        super().__init__(db)
        self.engine, self.is_memory = db.engine.sync_engine, db.is_memory
        self.loop = background()
        self._undoing: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Connect and begin; raises `SandboxError` where that cannot be undone."""
        self.turns = asyncio.Condition()
        try:
            async with asyncio.timeout(WAIT):
                self.fairy = await greenlet_spawn(self.engine.raw_connection)
        except (TimeoutError, errors.WrongLoopError) as error:
            raise errors.SandboxError(BUSY) from error
        self.dbapi = self.fairy.dbapi_connection
        self.aborting: object = self.fairy.info.get(ABORTING_CODES, ())
        try:
            await greenlet_spawn(self.begin_all, WAIT)
        except BaseException as error:
            self.is_gone = True
            await self.close()
            if means(error, "conflict"):
                raise errors.SandboxError(BUSY) from error
            raise

    async def end(self) -> None:
        """Roll everything back, when the call in flight has ended."""
        async with self.turns:
            self.is_over = True
            self.turns.notify_all()
        while self._undoing:
            await asyncio.wait(self._undoing)
        await self.close()

    async def close(self) -> None:
        # Of a file none is to be left when somebody deletes it.
        is_left = self.is_changed or self.is_gone or self.facts.SINGLE_WRITER
        if is_left and not self.is_memory:
            await greenlet_spawn(self.fairy.invalidate)
        await greenlet_spawn(self.fairy.close)

    async def run(self, part: Part, work: Callable[[], T]) -> T:
        """Run `work` in the turn of a connection; a cancelled one is ended first."""
        async with self._turn(part):
            task = asyncio.ensure_future(greenlet_spawn(work))
            try:
                return await asyncio.shield(task)
            except asyncio.CancelledError:
                if not task.done():  # pragma: no branch  # it ends just now
                    await self._stop(task)
                if not task.cancelled():
                    task.exception()  # nobody asks for it
                raise
            finally:
                # Some errors end it on MySQL and SQLite, or what a procedure does.
                if not self.driver.in_transaction(raw_of(self.dbapi)):
                    self.is_gone = True

    async def _stop(self, task: asyncio.Task[T]) -> None:
        statement = self.driver.cancel_sql(raw_of(self.dbapi))
        if statement is not None:
            await cancel_statements([(self.engine, statement)])
        elif not self.facts.SINGLE_WRITER:  # SQLite would roll everything back
            task.cancel()
        await asyncio.wait((task,))

    @asynccontextmanager
    async def _turn(self, part: Part) -> AsyncGenerator[None]:
        async with self.turns:
            try:
                async with asyncio.timeout(WAIT):
                    await self.turns.wait_for(lambda: self._is_free(part))
            except TimeoutError:
                who = self.holder and self.holder.unit
                message = HELD.format(who or "A connection of an engine")
                raise errors.SandboxError(message) from None
            if self.is_over or (self.is_gone and not part.is_gone):
                raise errors.SandboxError(ENDED if self.is_over else GONE)
            try:
                yield
            finally:
                self.turns.notify_all()

    def _is_free(self, part: Part) -> bool:
        holder, unit = self.holder, part.unit
        if self.is_over or holder is None or holder is part:
            return True
        is_inside = unit is not None and holder.unit in (unit, *unit.outwards())
        if is_inside and not part.read_only:
            raise errors.SandboxError(INSIDE)
        return is_inside

    def give_up(self, part: Part) -> None:
        """Roll back what was open on a connection that is closed; nobody waits."""
        if part.is_open:
            with suppress(RuntimeError):  # the process ends
                self.loop.call_soon_threadsafe(self._undo, part)

    def _undo(self, part: Part) -> None:
        async def undo() -> None:
            with suppress(errors.SandboxError):
                await self.run(part, lambda: self.rollback(part))

        task = self.loop.create_task(undo())
        self._undoing.add(task)
        task.add_done_callback(self._undoing.discard)
