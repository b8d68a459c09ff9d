"""Have the next COMMIT fail, so that tests see what an application answers then."""

from __future__ import annotations

import copy
import threading
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from asgi_uow._databases.connection import raw_of
from asgi_uow._databases.engines import check_databases
from asgi_uow.testing.sandbox import here

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from asgi_uow._databases.engines import Engines

    Send: TypeAlias = Callable[[Any], None]
    Fault: TypeAlias = Callable[[Any, Send], None]

_lock = threading.Lock()
_faults: dict[Any, list[tuple[object, Fault]]] = {}  # by dialect, with whose sandbox


def _do_commit(dialect: Any, send: Send, dbapi: Any) -> None:
    with _lock:
        waiting = _faults.get(dialect, [])
        found = next((each for each in waiting if each[0] is here()), None)
        if found is not None:
            waiting.remove(found)
    if found is None:
        send(dbapi)
    else:
        found[1](dbapi, send)


@asynccontextmanager
async def _at_commit(db: Engines, *faults: Fault) -> AsyncGenerator[None]:
    """Have the next commits of `db`, in this sandbox or outside of any, go wrong."""
    check_databases("a fault", (db,))
    dialect: Any = db.engine.dialect
    added = [(here(), each) for each in faults]
    with _lock:
        if dialect not in _faults:
            dialect.do_commit = partial(_do_commit, dialect, dialect.do_commit)
        _faults.setdefault(dialect, []).extend(added)
    try:
        yield
    finally:
        with _lock:
            _faults[dialect] = [e for e in _faults[dialect] if e not in added]
            if not _faults[dialect]:
                del _faults[dialect], dialect.do_commit


def _error(db: Engines, code: int | str, kind: str, what: str) -> Exception:
    message = f"{what} (asgi_uow.testing)"
    args = (code, message) if isinstance(code, int) else (message,)
    dbapi: Any = db.engine.dialect.loaded_dbapi  # type: ignore[attr-defined]
    error: Any = getattr(dbapi, kind)(*args)
    if isinstance(code, str):
        error.sqlstate = error.sqlite_errorname = code
    found: Exception = error
    return found


def fail_commit(db: Engines, *, error: Exception | None = None) -> Any:
    """Have the next COMMIT inside the block refused: `async with fail_commit(db):`.

    The work is rolled back and the client gets a 500, or what `Retry` makes of an
    `error` that can be tried again. Default: the database's error for a constraint that
    COMMIT checks. One that is not the server's leaves the outcome UNKNOWN.
    """
    what = error or _error(db, db.facts.REFUSED, "IntegrityError", "a constraint")

    def refuse(*_: object) -> None:
        raise what

    return _at_commit(db, refuse)


def serialization_failure(db: Engines, *, times: int = 1) -> Any:
    """Have so many COMMITs inside the block meet a conflict, which `Retry` replays."""

    def conflict(*_: object) -> None:
        raise _error(db, db.facts.CONFLICT, "OperationalError", "a conflict")

    return _at_commit(db, *[conflict] * times)


def lose_commit_answer(db: Engines) -> Any:
    """Have the next COMMIT inside the block carried out, and its answer lost.

    The outcome is UNKNOWN, or COMMITTED where a key or `resolve_unknown` settles it.
    """

    def lose(dbapi: Any, send: Send) -> None:
        send(dbapi)
        _cut_off(db, raw_of(dbapi))
        message = "the answer to COMMIT was lost (asgi_uow.testing)"
        raise ConnectionResetError(message)

    return _at_commit(db, lose)


@asynccontextmanager
async def drop_connection(db: Engines) -> AsyncGenerator[None]:
    """Have the connection lost before the next COMMIT inside the block is sent.

    The work is rolled back for certain: 503 with `Retry-After`, or another attempt.
    """
    check_databases("drop_connection(db)", (db,))
    before, mine = vars(db).get("driver"), here()
    driver: Any = copy.copy(db.driver)

    def is_dead(raw: Any) -> bool:
        waits = vars(db)["driver"] is driver and mine is here()
        if waits and driver.in_transaction(raw):
            vars(db)["driver"] = known
            _cut_off(db, raw)
            return True
        return bool(known.is_dead(raw))

    known, driver.is_dead = db.driver, is_dead
    vars(db)["driver"] = driver
    try:
        yield
    finally:
        if vars(db)["driver"] is driver:
            vars(db)["driver"] = before or known


def _cut_off(db: Engines, raw: Any) -> None:
    if hasattr(raw, "abandon") and not db.facts.SINGLE_WRITER:
        raw.abandon()  # of a sandbox
    else:
        db.driver.cut_off(raw)
