"""A pool for each event loop: a connection never changes its loop, or its process."""

from __future__ import annotations

import asyncio
import ctypes
import os
import threading
from asyncio import _get_running_loop
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary, WeakSet

import sqlalchemy as sa
from sqlalchemy.util import await_only, greenlet_spawn

from asgi_uow._databases import known
from asgi_uow.errors import WrongLoopError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    Loop: TypeAlias = asyncio.AbstractEventLoop

_engines: WeakSet[LoopEngine] = WeakSet()
_owners: WeakKeyDictionary[object, tuple[Loop, known.Driver]] = WeakKeyDictionary()
"""Whose each driver's connection is that this process has made."""
_inherited: list[object] = []

MUTEX = "_execute_mutex"  # of SQLAlchemy's connection


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

    @property
    def pool(self) -> sa.Pool:
        """That of the running loop; raises `WrongLoopError` if it cannot be there."""
        loop = _get_running_loop()
        if loop is None:
            return self.like
        return self.pools.get(loop) or self._enter(loop)

    @pool.setter
    def pool(self, pool: sa.Pool) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Begin anew, as dispose() does."""
        events: Any = self.like.dispatch
        vars(pool)["dispatch"] = events
        events.connect.for_modify(events)._exec_once_mutex = SetUpLock()  # noqa: SLF001
        self.like, self.pools, self.endings = pool, {}, {}

    def raw_connection(self) -> sa.PoolProxiedConnection:
        # In place of the original, which costs a call more here.
        return (self.pools.get(_get_running_loop()) or self.pool).connect()

    def _enter(self, loop: Loop) -> sa.Pool:
        if self.is_memory:
            self._move_to(loop)
            return self.like
        _disown(lambda owner: owner.is_closed())
        for each in [each for each in tuple(self.pools) if each.is_closed()]:
            self.pools.pop(each, None)
            self.endings.pop(each, None)
        pool = self.like.recreate()
        vars(pool)["dispatch"] = self.like.dispatch
        self.pools[loop], self.endings[loop] = pool, _close_at_end(pool)
        with suppress(StopIteration):
            self.endings[loop].asend(None).send(None)
        return pool

    def _move_to(self, loop: Loop) -> None:
        owner: object = next((each for each in self.pools if each.is_running()), None)
        if self.process != os.getpid():
            owner = f"process {self.process}"
        if owner is not None:
            what = f"This in-memory database, which is one connection, is of {owner}"
            raise WrongLoopError(what, "Use a database file instead.")
        if self.pools:
            queue: Any = self.like._pool._queue  # type: ignore[attr-defined]  # noqa: SLF001
            entries = tuple(queue._queue)  # noqa: SLF001
            locks = (getattr(each.dbapi_connection, MUTEX, queue) for each in entries)
            for each in (queue, *locks):
                each._loop = None  # noqa: SLF001  # that in which somebody has waited
        self.pools = {loop: self.like}


async def _close_at_end(pool: sa.Pool) -> AsyncGenerator[None]:
    try:
        yield
    finally:
        await greenlet_spawn(pool.dispose)


class SetUpLock:
    """Has one connection at a time set the dialect up, whatever its loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        while not self._lock.acquire(blocking=False):
            await_only(asyncio.sleep(0.005))

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def attach(engine: Any) -> None:
    """Have an engine keep the connections of each loop apart."""
    while (original := getattr(engine, "_proxied", None)) is not None:
        engine = original
    if not isinstance(engine, LoopEngine):
        pool, engine.__class__ = engine.pool, LoopEngine
        engine.process, engine.is_memory = os.getpid(), known.is_memory(engine.url)
        engine.like = engine.pool = pool
        if (loop := _get_running_loop()) is not None:
            engine.pools[loop] = pool  # with the connections that it has
        _engines.add(engine)


def own(raw: object, driver: known.Driver) -> None:
    """Remember that a new connection belongs to the running loop."""
    _owners[raw] = asyncio.get_running_loop(), driver


def belongs_to(loop: Loop) -> WrongLoopError:
    """Make the error for a session that is used in another loop than its own."""
    what = f"This session is of {loop}"
    return WrongLoopError(what, "Open a unit of work here: `async with db:`.")


def _disown(is_foreign: Callable[[Loop], bool]) -> None:
    """Have nothing that is done with connections from now on reach their servers."""
    for raw in [each() for each in _owners.keyrefs()]:
        owner = _owners.get(raw)
        if owner is None or not is_foreign(owner[0]):
            continue
        _owners.pop(raw, None)
        sock = owner[1].socket(raw)
        if sock is not None and sock.fileno() >= 0:
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.dup2(nowhere, sock.fileno(), inheritable=False)
            os.close(nowhere)


def _begin_process() -> None:
    """Leave all connections to the process that this one was forked from."""
    _inherited.append([each() for each in _owners.keyrefs()])
    _disown(lambda _: True)
    for engine in _engines:
        _inherited.append((engine.like, engine.pools, engine.endings))
        engine.pool = engine.like.recreate()
    # For good: closing a file of SQLite, be it at the exit, would take its locks.
    # https://www.sqlite.org/howtocorrupt.html#_carrying_an_open_database_connection_across_a_fork
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_inherited))


os.register_at_fork(after_in_child=_begin_process)
