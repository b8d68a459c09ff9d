"""The one connection of a sandbox to a database: opened, used in turns, closed.

All are in one loop, which has a thread of its own.
"""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy.util import greenlet_spawn

from asgi_uow import errors
from asgi_uow._concurrency import register_at_fork, run_to_completion
from asgi_uow._databases.connection import raw_of
from asgi_uow._databases.driver_errors import means
from asgi_uow._databases.engines import cancel_statements
from asgi_uow._databases.pool import ABORTING_CODES
from asgi_uow._testing.nesting import Nesting, Part

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from asgi_uow._databases.engines import Engines

T = TypeVar("T")

WAIT = 10.0  # seconds for a transaction that is open, or for the database itself
CLOSE_SECONDS = 5.0  # for the connections that are left at the end of the process

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

_loops: list[asyncio.AbstractEventLoop] = []
_starting = threading.Lock()
register_at_fork(after_in_child=_loops.clear)


def background() -> asyncio.AbstractEventLoop:
    """Give the one loop, which runs until the process ends."""
    with _starting:
        if not _loops:
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=loop.run_forever, daemon=True)
            thread.start()
            atexit.register(_close, loop, thread)
            _loops.append(loop)
        return _loops[0]


def _close(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    if thread.is_alive():  # pragma: no branch  # it is not in a forked process
        closing = asyncio.run_coroutine_threadsafe(loop.shutdown_asyncgens(), loop)
        with suppress(TimeoutError):
            closing.result(CLOSE_SECONDS)


async def hand_over(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> T:
    """Await here what runs in another loop; it has ended when this has."""
    here, tasks = asyncio.get_running_loop(), list[asyncio.Task[T]]()
    ended = here.create_future()

    def tell(_: object) -> None:
        with suppress(RuntimeError):  # nobody waits: this loop is closed
            here.call_soon_threadsafe(ended.set_result, None)

    def start() -> None:
        tasks.append(loop.create_task(work))
        tasks[0].add_done_callback(tell)

    # A context of its own: timers that were cancelled keep theirs, and units in it.
    loop.call_soon_threadsafe(start, context=contextvars.Context())
    try:
        await asyncio.wait((ended,))
    except asyncio.CancelledError:
        loop.call_soon_threadsafe(lambda: tasks[0].cancel())
        with suppress(asyncio.CancelledError):
            await run_to_completion(asyncio.wait((ended,)))
        raise
    return tasks[0].result()


class SharedConnection(Nesting):
    """A connection in a transaction that is rolled back, in turns for who asks."""

    is_over = False

    def __init__(self, db: Engines) -> None:
        super().__init__(db)
        self.engine, self.is_memory = db.engine.sync_engine, db.is_memory
        self.loop = background()

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
            await self.end()
            if means(error, "conflict"):
                raise errors.SandboxError(BUSY) from error
            raise

    async def end(self) -> None:
        """Roll everything back, when the call in flight has ended."""
        async with self.turns:
            self.is_over = True
            self.turns.notify_all()
        # Of a file none is to be left when somebody deletes it.
        is_left = self.is_changed or self.is_gone or self.facts.SINGLE_WRITER
        if is_left and not self.is_memory:
            await greenlet_spawn(self.fairy.invalidate)
        await greenlet_spawn(self.fairy.close)

    async def run(self, part: Part, work: Callable[[], T]) -> T:
        """Run `work` in the turn of a connection; a cancelled one is ended first."""
        async with self.turns:
            await self._wait_for_turn(part)
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
                self.is_gone |= not self.has_transaction()
                self.turns.notify_all()

    async def _stop(self, task: asyncio.Task[T]) -> None:
        statement = self.driver.cancel_sql(raw_of(self.dbapi))
        if statement is not None:
            await cancel_statements([(self.engine, statement)])
        elif not self.facts.SINGLE_WRITER:  # SQLite would roll everything back
            task.cancel()
        await asyncio.wait((task,))

    async def _wait_for_turn(self, part: Part) -> None:
        try:
            async with asyncio.timeout(WAIT):
                await self.turns.wait_for(lambda: self._is_free(part))
        except TimeoutError:
            who = self.holder and self.holder.unit
            message = HELD.format(who or "A connection of an engine")
            raise errors.SandboxError(message) from None
        if self.is_over or (self.is_gone and not part.is_gone):
            raise errors.SandboxError(ENDED if self.is_over else GONE)

    def _is_free(self, part: Part) -> bool:
        holder, unit = self.holder, part.unit
        if self.is_over or holder is None or holder is part:
            return True
        is_inside = unit is not None and holder.unit in (unit, *unit.outwards())
        if is_inside and not part.read_only:
            raise errors.SandboxError(INSIDE)
        return is_inside
