"""Have the next COMMIT fail, so that tests see what an application answers then."""

from __future__ import annotations

import copy
import threading
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from asgi_uow._databases.engines import check_databases
from asgi_uow._testing.handed import HandedConnection
from asgi_uow._testing.sandbox import here

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from contextlib import AbstractContextManager

    from asgi_uow._databases.engines import Engines

    Send: TypeAlias = Callable[[Any], None]
    Fault: TypeAlias = Callable[[Any, Send], None]

_lock = threading.Lock()
_faults: dict[Any, list[tuple[object, list[Fault]]]] = {}
"""By what is patched, and by block: whose sandbox it is in, what is still to happen."""


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
def _patched(
    target: Any, name: str, make: Callable[[], Any], faults: list[Fault]
) -> Generator[None]:
    """Have an attribute be another while there are blocks; some faults are for here."""
    block = here(), faults
    with _lock:
        if target not in _faults:
            vars(target)[name] = make()
        _faults.setdefault(target, []).append(block)
    try:
        yield
    finally:
        with _lock:
            _faults[target].remove(block)
            if not _faults[target]:
                del _faults[target], vars(target)[name]


def _next(target: object) -> Fault | None:
    """Take what is to happen now, in this sandbox or outside of any."""
    with _lock:
        blocks = _faults.get(target, ())
        mine = next((left for box, left in blocks if left and box is here()), None)
        return mine.pop(0) if mine else None


def _at_commit(db: Engines, *faults: Fault) -> Block:
    """Have the next commits of `db` go wrong."""
    check_databases("a fault", (db,))
    dialect: Any = db.engine.dialect

    def make() -> Any:
        return partial(_do_commit, dialect, dialect.do_commit)

    return Block(_patched(dialect, "do_commit", make, [*faults]))


def _do_commit(dialect: Any, send: Send, dbapi: Any) -> None:
    if (fault := _next(dialect)) is None:
        send(dbapi)
    else:
        fault(dbapi, send)


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

    def lose(dbapi: Any, send: Send) -> None:
        send(dbapi)
        message = "the answer to COMMIT was lost (asgi_uow.testing)"
        raise ConnectionResetError(message)

    return _at_commit(db, lose)


def drop_connection(db: Engines) -> Block:
    """Have the connection lost before the next COMMIT inside the block is sent.

    The work is rolled back for certain: 503 with `Retry-After`, or another attempt.
    """
    check_databases("drop_connection(db)", (db,))

    def make() -> Any:
        driver: Any = copy.copy(db.driver)
        driver.is_dead = partial(_is_dead, db, db.driver)
        return driver

    return Block(_patched(db, "driver", make, [_cut_off]))


def _is_dead(db: Engines, driver: Any, raw: Any) -> bool:
    fault = _next(db) if driver.in_transaction(raw) else None
    if fault is None:
        return bool(driver.is_dead(raw))
    fault(raw, driver.cut_off)
    return True


def _cut_off(raw: Any, cut_off: Send) -> None:
    raw.close() if isinstance(raw, HandedConnection) else cut_off(raw)
