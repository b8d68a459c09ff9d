"""What looks for the current unit of work: accessors and hooks."""

from __future__ import annotations

import functools
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, ParamSpec, overload

from asgi_uow._concurrency import run_to_completion
from asgi_uow._decision import State
from asgi_uow._unit.completion import Completion
from asgi_uow._unit.finish import register
from asgi_uow._unit.hooks import Hook, is_async, name_of
from asgi_uow._unit.unit import current, require
from asgi_uow.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from asgi_uow._databases.engines import Engines
    from asgi_uow._sessions.session import Savepoint, Session
    from asgi_uow._unit.unit import UnitOfWork

P = ParamSpec("P")


def in_unit_of_work() -> bool:
    """Tell whether there is a unit of work here, of a request, block or hook."""
    unit = current.get()
    return unit is not None and unit.state is not State.CLOSED


def current_unit_of_work() -> UnitOfWork:
    """Give the unit of work of this request or `async with db:` block.

    Raises `NoUnitOfWorkError` without one, `UnitOfWorkClosedError` once it is closed.
    """
    return require("current_unit_of_work()")


def current_session(db: Engines | None = None) -> Session:
    """Give the write session of the current unit of work; it opens on first use.

    `db` is needed only where the unit serves several databases; the first is the
    default. Raises `NoUnitOfWorkError` without a unit, `UnknownDatabaseError` for a
    database the unit does not serve, `UnitOfWorkClosedError` once it is decided.
    """
    return require("current_session()").session(db)


def current_read_session(db: Engines | None = None) -> Session:
    """Give the read-only session of the current unit of work.

    The database itself refuses writes on it. It stays open until the application
    returns, for generators and background tasks. Raises as `current_session` does.
    """
    return require("current_read_session()").read_session(db)


async def session_dependency() -> Session:
    """Give the write session of the unit's first database, to be injected.

    For FastAPI: `Annotated[AsyncSession, Depends(session_dependency)]`.
    """
    # Async: it needs no worker thread. An argument could become one of the request.
    return current_session()


async def read_session_dependency() -> Session:
    """Give the read-only session, as `current_read_session` does, to be injected."""
    return current_read_session()


@asynccontextmanager
async def parallel_read(db: Engines | None = None) -> AsyncGenerator[Session]:
    """Give a read session of its own to one of several tasks that read at once.

    `async with parallel_read() as session:`, inside each task. Its connection is the
    read engine's, and goes back when the block is left. It does not see objects of
    `current_read_session()`. Once the unit has written, it reads in the writer's
    transaction, where tasks take turns. Raises as `current_session` does.
    """
    unit = require("parallel_read()")
    participant = unit.reading("parallel_read()", db)
    if participant.reader is not None:
        # Requests that hold one connection and wait for a second can deadlock.
        await run_to_completion(participant.reader.lend_connection())
    session = participant.open_reader()  # not looked after: its task is all it has
    try:
        yield session
    finally:
        if session in participant.readers:  # the unit has not closed it
            participant.readers.remove(session)
            completion = Completion(unit.options.commit_timeout)
            await completion.close_reader(session)
            completion.shield.deliver()


def savepoint(db: Engines | None = None) -> Savepoint:
    """Open a SAVEPOINT around a part that may fail, with `async with`.

    An exception rolls back to it and goes on; the unit can still be committed.
    """
    return require("savepoint()").session(db).begin_nested()


def isolation_level(level: str, db: Engines | None = None) -> None:
    """Have the write session's transaction in this unit use another isolation level.

    `isolation_level("SERIALIZABLE")`, before the first statement; the next unit has
    the default again. Raises `ConfigurationError` for AUTOCOMMIT, for what the database
    does not know, and once the write session has executed a statement.
    """
    session = require("isolation_level()").session(db)
    if session.sync_session.connections:
        message = "isolation_level() comes before the unit's first statement."
        raise ConfigurationError(message)
    session.bind_to(session.sync_session.database.engine_at(level))


def set_rollback_only(reason: str) -> None:
    """Have the current unit of work rolled back; the response stays as it is.

    `reason` is for observers. Raises `UnitOfWorkClosedError` once it is decided.
    """
    require("set_rollback_only()").set_rollback_only(reason)


def force_commit() -> None:
    """Have the current unit committed whatever the status: an audit row with a 403.

    Does not help a unit that the database has given up or `set_rollback_only` has
    marked. Raises `UnitOfWorkClosedError` once it is decided.
    """
    require("force_commit()").force_commit()


def before_commit(
    fn: Callable[P, object], /, *args: P.args, **kwargs: P.kwargs
) -> None:
    """Call `fn` inside the transaction, just before COMMIT, in order.

    For a transactional enqueue. One that raises, or takes longer than `hook_timeout`
    seconds, has everything rolled back. It may register others. Raises `TypeError` if
    `fn` is not callable.
    """
    register(require("before_commit()"), "before_commit", Hook(fn, args, kwargs))


def after_commit(fn: Callable[P, object], /, *args: P.args, **kwargs: P.kwargs) -> None:
    """Call `fn` once COMMIT is proven, before the response leaves, in order.

    Never called for work that was not kept, nor if the savepoint that is open now is
    rolled back. A failure is reported to the observers, changes no outcome and stops
    no other hook. Sync callables run in a worker thread. A session that it asks for
    is of a unit of its own, committed when it returns. At most once: a process that
    dies after COMMIT calls it never.
    """
    register(require("after_commit()"), "after_commit", Hook(fn, args, kwargs))


def after_rollback(
    fn: Callable[P, object], /, *args: P.args, **kwargs: P.kwargs
) -> None:
    """Call `fn` once a rollback is proven, in reverse order of registration.

    The rollback of the savepoint that is open now, or else of the unit. Not called
    while the outcome is unknown. A session is of a unit of its own.
    """
    register(require("after_rollback()"), "after_rollback", Hook(fn, args, kwargs))


def after_response(
    fn: Callable[P, object], /, *args: P.args, **kwargs: P.kwargs
) -> None:
    """Call `fn` as `after_commit` does, but after the application has returned."""
    register(require("after_response()"), "after_response", Hook(fn, args, kwargs))


@overload
def deferred(fn: Callable[P, object], /) -> Callable[P, None]: ...
@overload
def deferred(
    *, when: Callable[P, bool] | None = None
) -> Callable[[Callable[P, object]], Callable[P, None]]: ...
def deferred(
    fn: Callable[P, object] | None = None, /, *, when: Callable[P, bool] | None = None
) -> Callable[P, None] | Callable[[Callable[P, object]], Callable[P, None]]:
    """Make calls of a function wait for the commit, as with `after_commit`.

    A call registers the function, or method, with its arguments and returns None;
    where `when`, called with the same arguments, is false it does nothing. To call it
    at once: `fn.__wrapped__(...)`. Calls outside a unit raise `NoUnitOfWorkError`.
    Raises `TypeError` for what is no function, and for a predicate that is async.
    """
    if when is not None and (is_async(when) or not callable(when)):
        message = f"deferred(when={name_of(when)}): the predicate is a function and "
        raise TypeError(message + "cannot be async.")

    def decorate(fn: Callable[P, object]) -> Callable[P, None]:
        if isinstance(fn, staticmethod | classmethod) or not callable(fn):
            message = f"deferred() takes a function, not a {type(fn).__name__}: write "
            message += "@staticmethod or @classmethod above @deferred."
            raise TypeError(message)

        @functools.wraps(fn)
        def call_later(*args: P.args, **kwargs: P.kwargs) -> None:
            if when is None or when(*args, **kwargs):
                after_commit(fn, *args, **kwargs)

        return call_later

    return decorate if fn is None else decorate(fn)
