"""Have the next COMMIT fail, so that tests see what an application answers then."""

from __future__ import annotations

import copy
import threading
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from asgi_uow._databases import known
from asgi_uow._databases.engines import check_databases
from asgi_uow._testing.handed import HandedConnection
from asgi_uow._testing.sandbox import here

if TYPE_CHECKING:
    from collections.abc import Callable

    from asgi_uow._databases.engines import Engines
    from asgi_uow._testing.sandbox import sandbox

    Fault: TypeAlias = Callable[..., None]

_lock = threading.Lock()
_blocks: dict[Any, list[Block]] = {}
"""By what is patched: those that are entered."""


class Block:
    """A block with faults: of `async with`, and in synchronous tests of `with`.

    Inside it an attribute of `target` is `patch`, which asks `_next()`.
    """

    def __init__(self, target: Any, name: str, patch: object, *faults: Fault) -> None:
        self._target, self._name, self._patch = target, name, patch
        self._faults = faults

    def __enter__(self) -> None:
        """Have it happen from now on, in this sandbox or outside of any."""
        self.sandbox: sandbox | None = here()
        self.left: list[Fault] = [*self._faults]
        with _lock:
            vars(self._target)[self._name] = self._patch
            _blocks.setdefault(self._target, []).append(self)

    def __exit__(self, *_: object) -> None:
        with _lock:
            _blocks[self._target].remove(self)
            if not _blocks[self._target]:
                del _blocks[self._target], vars(self._target)[self._name]

    async def __aenter__(self) -> None:
        self.__enter__()

    async def __aexit__(self, *_: object) -> None:
        self.__exit__()


def _next(target: object) -> Fault | None:
    """Take what is to happen now."""
    with _lock:
        for each in _blocks.get(target, ()):
            if each.left and each.sandbox is here():
                return each.left.pop(0)
    return None


def _at_commit(db: Engines, *faults: Fault) -> Block:
    check_databases("a fault", (db,))
    dialect: Any = db.engine.dialect
    send = partial(type(dialect).do_commit, dialect)

    def do_commit(dbapi: Any) -> None:
        if (fault := _next(dialect)) is None:
            send(dbapi)
        else:
            fault(dbapi, send)

    return Block(dialect, "do_commit", do_commit, *faults)


def _error(db: Engines, code: int | str, kind: str, what: str) -> Any:
    message = f"{what} (asgi_uow.testing)"
    args = (code, message) if isinstance(code, int) else (message,)
    dbapi: Any = db.engine.dialect.loaded_dbapi
    error = getattr(dbapi, kind)(*args)
    if isinstance(code, str):
        error.sqlstate = error.sqlite_errorname = code
    return error


def fail_commit(db: Engines, *, error: Exception | None = None) -> Block:
    """Have the next COMMIT inside the block refused: `async with`, or `with`.

    The work is rolled back and the client gets a 500, or what `Retry` makes of an
    `error` that can be tried again. Default: the database's error for a constraint that
    COMMIT checks. One that is not the server's leaves the outcome UNKNOWN.
    """
    what = error or _error(db, db.facts.REFUSED, "IntegrityError", "a constraint")

    def refuse(*_: object) -> None:
        raise what

    return _at_commit(db, refuse)


def serialization_failure(db: Engines, *, times: int = 1) -> Block:
    """Have so many COMMITs inside the block meet a conflict, which `Retry` replays."""

    def conflict(*_: object) -> None:
        raise _error(db, db.facts.CONFLICT, "OperationalError", "a conflict")

    return _at_commit(db, *[conflict] * times)


def lose_commit_answer(db: Engines) -> Block:
    """Have the next COMMIT inside the block carried out, and its answer lost.

    The outcome is UNKNOWN, or COMMITTED where a key or `resolve_unknown` settles it; in
    a sandbox on PostgreSQL a key alone can.
    """

    def lose(dbapi: Any, send: Callable[[Any], None]) -> None:
        send(dbapi)
        message = "the answer to COMMIT was lost (asgi_uow.testing)"
        raise ConnectionResetError(message)

    return _at_commit(db, lose)


def drop_connection(db: Engines) -> Block:
    """Have the connection lost before the next COMMIT inside the block is sent.

    The work is rolled back for certain: 503 with `Retry-After`, or another attempt.
    """
    check_databases("drop_connection(db)", (db,))
    driver = known.driver_of(db.engine.dialect)
    dropping: Any = copy.copy(driver)

    def cut_off(raw: Any) -> None:
        raw.close() if isinstance(raw, HandedConnection) else driver.cut_off(raw)

    def is_dead(raw: Any) -> bool:
        fault = _next(db) if driver.in_transaction(raw) else None
        if fault is not None:
            fault(raw)
        return fault is not None or bool(driver.is_dead(raw))

    dropping.is_dead = is_dead
    return Block(db, "driver", dropping, cut_off)
