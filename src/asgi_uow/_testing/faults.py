"""Have the next COMMIT fail, so that tests see what an application answers then."""

from __future__ import annotations

import copy
import threading
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from asgi_uow._databases.engines import check_databases
from asgi_uow._testing.sandbox import here

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from contextlib import AbstractContextManager

    from asgi_uow._databases.engines import Engines

    Send: TypeAlias = Callable[[Any], None]
    Fault: TypeAlias = Callable[[Any, Send], None]

_lock = threading.Lock()
_faults: dict[Any, list[tuple[object, list[Fault]]]] = {}
"""By dialect, and by block: whose sandbox it is in, and what is still to happen."""
_drops: dict[Any, list[list[Any]]] = {}  # by database, and by block: its sandbox


def _do_commit(dialect: Any, send: Send, dbapi: Any) -> None:
    with _lock:
        blocks = _faults.get(dialect, ())
        mine = next((left for box, left in blocks if left and box is here()), None)
        fault = mine.pop(0) if mine else None
    if fault is None:
        send(dbapi)
    else:
        fault(dbapi, send)


class Block:
    """A block with a fault: of `async with`, and in synchronous tests of `with`."""

    def __init__(self, block: AbstractContextManager[None]) -> None:
        self._block = block

    def __enter__(self) -> None:
        """Have it happen from now on."""
        self._block.__enter__()

    def __exit__(self, *raised: Any) -> None:  # noqa: PYI036
        """Have it happen no more."""
        self._block.__exit__(*raised)

    async def __aenter__(self) -> None:
        """Have it happen from now on."""
        self.__enter__()

    async def __aexit__(self, *raised: Any) -> None:  # noqa: PYI036
        """Have it happen no more."""
        self.__exit__(*raised)


@contextmanager
def _at_commit(db: Engines, *faults: Fault) -> Generator[None]:
    """Have the next commits of `db`, in this sandbox or outside of any, go wrong."""
    check_databases("a fault", (db,))
    dialect: Any = db.engine.dialect
    block = here(), [*faults]
    with _lock:
        if dialect not in _faults:
            dialect.do_commit = partial(_do_commit, dialect, dialect.do_commit)
        _faults.setdefault(dialect, []).append(block)
    try:
        yield
    finally:
        with _lock:
            _faults[dialect].remove(block)
            if not _faults[dialect]:
                del _faults[dialect], dialect.do_commit


def _error(db: Engines, code: int | str, kind: str, what: str) -> Exception:
    message = f"{what} (asgi_uow.testing)"
    args = (code, message) if isinstance(code, int) else (message,)
    dbapi: Any = db.engine.dialect.loaded_dbapi
    error: Any = getattr(dbapi, kind)(*args)
    if isinstance(code, str):
        error.sqlstate = error.sqlite_errorname = code
    found: Exception = error
    return found


def fail_commit(db: Engines, *, error: Exception | None = None) -> Block:
    """Have the next COMMIT inside the block refused: `async with`, or `with`.

    The work is rolled back and the client gets a 500, or what `Retry` makes of an
    `error` that can be tried again. Default: the database's error for a constraint that
    COMMIT checks. One that is not the server's leaves the outcome UNKNOWN.
    """
    what = error or _error(db, db.facts.REFUSED, "IntegrityError", "a constraint")

    def refuse(*_: object) -> None:
        raise what

    return Block(_at_commit(db, refuse))


def serialization_failure(db: Engines, *, times: int = 1) -> Block:
    """Have so many COMMITs inside the block meet a conflict, which `Retry` replays."""

    def conflict(*_: object) -> None:
        raise _error(db, db.facts.CONFLICT, "OperationalError", "a conflict")

    return Block(_at_commit(db, *[conflict] * times))


def lose_commit_answer(db: Engines) -> Block:
    """Have the next COMMIT inside the block carried out, and its answer lost.

    The outcome is UNKNOWN, or COMMITTED where a key or `resolve_unknown` settles it; in
    a sandbox on PostgreSQL a key alone can.
    """

    def lose(dbapi: Any, send: Send) -> None:
        send(dbapi)
        message = "the answer to COMMIT was lost (asgi_uow.testing)"
        raise ConnectionResetError(message)

    return Block(_at_commit(db, lose))


def drop_connection(db: Engines) -> Block:
    """Have the connection lost before the next COMMIT inside the block is sent.

    The work is rolled back for certain: 503 with `Retry-After`, or another attempt.
    """
    return Block(_dropping(db))


@contextmanager
def _dropping(db: Engines) -> Generator[None]:
    check_databases("drop_connection(db)", (db,))
    block = [here()]
    with _lock:
        if db not in _drops:
            known, driver = db.driver, copy.copy(db.driver)
            driver.is_dead = partial(_is_dead, db, known)  # type: ignore[method-assign]
            vars(db)["driver"] = driver
        _drops.setdefault(db, []).append(block)
    try:
        yield
    finally:
        with _lock:
            _drops[db].remove(block)
            if not _drops[db]:
                del _drops[db], vars(db)["driver"]


def _is_dead(db: Engines, known: Any, raw: Any) -> bool:
    with _lock:
        blocks = _drops.get(db, ()) if known.in_transaction(raw) else ()
        mine = next((each for each in blocks if each and each[0] is here()), None)
        if mine:
            mine.clear()
    if mine is None:
        return bool(known.is_dead(raw))
    _cut_off(db, raw)
    return True


def _cut_off(db: Engines, raw: Any) -> None:
    if hasattr(raw, "abandon") and not db.facts.SINGLE_WRITER:
        raw.abandon()  # of a sandbox
    else:
        db.driver.cut_off(raw)
