"""A pool for each event loop: a connection never changes its loop, or its process."""

from __future__ import annotations

import asyncio
import ctypes
import functools
import os
import threading
import weakref
from asyncio import _get_running_loop
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary, WeakSet

import sqlalchemy as sa
from sqlalchemy.engine.base import OptionEngine
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util import await_only, greenlet_spawn
from sqlalchemy.util.queue import AsyncAdaptedQueue

from asgi_uow._concurrency import register_at_fork, run_to_completion
from asgi_uow._databases import known
from asgi_uow._databases.fair_queue import free_place, make_fair
from asgi_uow.errors import ConfigurationError, WrongLoopError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    Access = Literal["read", "write"]
    Loop: TypeAlias = asyncio.AbstractEventLoop

_engines: WeakKeyDictionary[LoopEngine, None] = WeakKeyDictionary()
owners: WeakKeyDictionary[object, tuple[Loop, known.Driver]] = WeakKeyDictionary()
"""Whose each driver's connection is that this process has made."""
moving: WeakSet[object] = WeakSet()
"""Those of in-memory databases, which go from loop to loop."""
inherited: list[object] = []
"""What belongs to the process that this one was forked from."""
find_sandbox: Callable[[LoopEngine], sa.Pool | None] | None = None
"""Set by `asgi_uow.testing`: gives the pool of the sandbox that the caller is in."""


class LoopEngine(sa.Engine):
    """Has a pool for each loop; that of an in-memory database goes from loop to loop.

    Each pool has a generator that closes it: at the end of `asyncio.run()`, or when
    nobody refers to the generator any more; both are done by its own loop.
    """

    pools: dict[Any, sa.Pool]  # by loop
    endings: dict[Loop, AsyncGenerator[None]]
    like: sa.Pool
    """How pools are made; they share its listeners, whenever these are attached."""
    process: int
    is_memory: bool
    use: Any = None  # what its connections are set up for, in a database

    @property
    def pool(self) -> sa.Pool:
        """That of the running loop; where none runs, of the only one that is open."""
        if find_sandbox is not None and (pool := find_sandbox(self)) is not None:
            return pool
        loop = _get_running_loop()
        if loop is None or self.is_memory:
            found = [p for each, p in [*self.pools.items()] if not each.is_closed()]
            return found[0] if len(found) == 1 else self.like
        return self.pools.get(loop) or self.enter(loop, self.like.recreate())

    @pool.setter
    def pool(self, pool: sa.Pool) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Begin anew, as dispose() does, but in a sandbox, which has an end itself."""
        if find_sandbox is not None and pool is find_sandbox(self):
            return
        self._adopt(pool)
        events: Any = self.like.dispatch
        events.connect.for_modify(events)._exec_once_mutex = SetUpLock()  # noqa: SLF001
        self.like, self.pools, self.endings = pool, {}, {}

    def raw_connection(self) -> sa.PoolProxiedConnection:
        """Connect; raises `WrongLoopError` for what cannot be in this loop."""
        if find_sandbox is not None and (pool := find_sandbox(self)) is not None:
            return pool.connect()
        loop = _get_running_loop()
        if self.is_memory and loop not in self.pools and loop is not None:
            self._move_to(loop)
        return (self.pools.get(loop) or self.pool).connect()  # or: it costs a call

    def enter(self, loop: Loop, pool: sa.Pool) -> sa.Pool:
        """Have the running loop use a pool until its end."""
        for raw in _connections():
            if raw in owners and owners[raw][0].is_closed() and raw not in moving:
                _cut_off(raw)
        for each in [each for each in tuple(self.pools) if each.is_closed()]:
            self.pools.pop(each, None)
            self.endings.pop(each, None)
        self._adopt(pool)
        self.pools[loop], self.endings[loop] = pool, _close_at_end(pool)
        next(anext(self.endings[loop]).__await__(), None)  # now the loop knows of it
        return pool

    def _adopt(self, pool: Any) -> None:
        vars(pool)["dispatch"] = self.like.dispatch
        if type(queue := getattr(pool, "_pool", None)) is AsyncAdaptedQueue:
            make_fair(queue)
            this = weakref.ref(pool)
            vars(pool)["_dec_overflow"] = lambda: free_place(this())

    def _move_to(self, loop: Loop) -> None:
        used: bool = getattr(self.like, "checkedout", int)() > 0
        running = (each for each in self.pools if used and each.is_running())
        owner: object = next(running, None)
        if self.process != os.getpid():
            owner = f"process {self.process}"
        if owner is not None:
            raise WrongLoopError(str(owner))
        if self.pools and (waited := getattr(self.like, "_pool", None)) is not None:
            queue: Any = waited._queue  # of that loop  # noqa: SLF001
            for each in queue._queue:  # noqa: SLF001
                getattr(each.dbapi_connection, "_execute_mutex", queue)._loop = None  # noqa: SLF001
        self.pools = {loop: self.like}


async def _close_at_end(pool: sa.Pool) -> AsyncGenerator[None]:
    try:
        yield
    finally:
        await run_to_completion(close(pool))


async def close(*pools: Any) -> None:
    """Wait once for a silent server; SQLite's one by one, to leave no log behind."""
    servers = (p for p in pools if not known.database_of(p._dialect).SINGLE_WRITER)  # noqa: SLF001
    idle = (p for p in servers for _ in range(getattr(p, "checkedin", int)()))
    await asyncio.gather(*map(_dispose, idle), return_exceptions=True)
    for each in pools:
        await greenlet_spawn(each.dispose)


async def _dispose(pool: sa.Pool) -> None:
    await run_to_completion(greenlet_spawn(pool.dispose))


class SetUpLock(threading.Semaphore):
    """Has one connection at a time set the dialect up, whatever its loop."""

    def __enter__(self, *_: Any, **__: Any) -> bool:
        while not self.acquire(blocking=False):
            await_only(asyncio.sleep(0.005))
        return True


class DerivedEngine(LoopEngine, OptionEngine):
    """Has its own pools; its dialect and listeners, later ones too, are another's."""

    def __init__(self, source: Any, place: Any) -> None:
        OptionEngine.__init__(self, source, {})
        self.url, self.process, self.is_memory = place.url, os.getpid(), False
        # The place's creator knows its own dialect alone.
        vars(place.dialect).update(dispatch=source.dialect.dispatch, _has_events=True)
        self.like = attach(source).like
        pool = getattr(place, "like", place.pool).recreate()
        vars(pool)["_dialect"] = source.dialect
        self.pool = pool
        _engines[self] = None


def derive_engine(engine: AsyncEngine, place: AsyncEngine | None = None) -> AsyncEngine:
    """Make an engine that does all as `engine`, in the place of another if named."""
    place = place or engine
    if type(place.dialect) is not type(engine.dialect):
        message = "read_urls have to name the database and driver of the writer's URL."
        raise ConfigurationError(message)
    return AsyncEngine(DerivedEngine(engine.sync_engine, place.sync_engine))


def attach(engine: Any) -> LoopEngine:
    """Have an engine, which is returned, keep the connections of each loop apart."""
    while isinstance(engine, OptionEngine) and not isinstance(engine, LoopEngine):
        engine = engine._proxied  # noqa: SLF001
    if not isinstance(engine, LoopEngine):
        pool, engine.__class__ = engine.pool, LoopEngine
        engine.process, engine.is_memory = os.getpid(), known.is_memory(engine.url)
        engine.like = engine.pool = pool
        _engines[engine] = None
        if (loop := _get_running_loop()) is not None and not engine.is_memory:
            engine.enter(loop, pool)  # with the connections that it has
    attached: LoopEngine = engine
    return attached


class PoolState(NamedTuple):
    """What the pool of one event loop has."""

    url: sa.URL
    access: Access
    idle: int
    used: int
    waiting: int
    """How many wait for one of its connections."""
    most_idle: int | None
    most: int | None
    """How many it may have; None is no limit."""


def pool_states() -> list[PoolState]:
    """Look, from any thread, at those pools of all databases that have counts."""
    # Copies: their loops make engines and pools meanwhile.
    engines = [each for ref in _engines.keyrefs() if (each := ref()) is not None]
    return [
        _state_of(engine, pool)
        for engine in engines
        for loop, pool in engine.pools.copy().items()
        if engine.use is not None
        and isinstance(pool, sa.QueuePool)
        and (engine.is_memory or not loop.is_closed())
    ]


def _state_of(engine: LoopEngine, pool: Any) -> PoolState:
    queue = vars(pool._pool)  # whose parts its loop alone may make  # noqa: SLF001
    size, overflow = pool.size(), pool._max_overflow  # noqa: SLF001
    idle = queue["_queue"].qsize() if "_queue" in queue else 0
    waiting = len(queue.get("waiters", ()))
    used = max(0, size + pool._overflow - idle)  # below 0: it is closing  # noqa: SLF001
    most = None if overflow == -1 else size + overflow
    access: Access = "read" if engine.use.read_only else "write"
    return PoolState(engine.url, access, idle, used, waiting, size or None, most)


def own(raw: object, driver: known.Driver, memory: object) -> None:
    """Note whose it is; one in `memory`, an engine, lasts as long as that."""
    owners[raw] = asyncio.get_running_loop(), driver
    if memory is not None:
        moving.add(raw)
        weakref.finalize(memory, driver.stop, raw).atexit = False


def leave(raw: object, entry: Any) -> bool:
    """Cut a connection off if it is of another loop, where alone it could be closed."""
    if raw in owners and owners[raw][0] is _get_running_loop():
        return False
    if raw in owners:
        _cut_off(raw)
    entry.dbapi_connection = None
    return True


def _connections() -> list[object]:
    # Not list(owners): other threads connect meanwhile.
    return [raw for each in owners.keyrefs() if (raw := each()) is not None]


def _cut_off(raw: object) -> None:
    _, driver = owners.pop(raw)
    known.Driver.cut_off(driver, raw)
    driver.stop(raw)


def _disconnect(raw: object, driver: known.Driver) -> None:
    # Whoever uses or closes its socket in this process does not reach the server.
    place = driver.socket(raw).fileno()
    os.close(place)  # first, since no other descriptor may be free
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != place:
        os.dup2(nowhere, place, inheritable=False)
        os.close(nowhere)


def _begin_process() -> None:
    """Leave all connections to the process that this one was forked from."""
    for raw in _connections():
        _, driver = owners.pop(raw)
        inherited.append(raw)
        disconnect = functools.partial(_disconnect, driver=driver)
        for step in (driver.stop, disconnect, driver.cut_off):
            with suppress(Exception):  # it has no socket, its loop is closed
                step(raw)
    for engine in _engines:
        if not (engine.pools or getattr(engine.like, "checkedin", int)()):
            engine.process = os.getpid()  # in memory too there is nothing yet
        inherited.append((engine.like, engine.pools, engine.endings))
        engine.pool = engine.like.recreate()
    # For good: closing a file of SQLite, be it at the exit, would take its locks.
    # https://www.sqlite.org/howtocorrupt.html#_carrying_an_open_database_connection_across_a_fork
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))


register_at_fork(after_in_child=_begin_process)
