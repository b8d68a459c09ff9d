"""What looks for the current unit of work: accessors, hooks, `unit_of_work`."""

from __future__ import annotations

import functools
import inspect
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, ParamSpec, overload

from ._causal import NOTHING
from ._current import current
from ._end import Settings
from ._hooks import name_of
from ._policy import decide_exit
from ._states import State
from ._unit import UnitOfWork, held_by
from .errors import NestedUnitOfWorkError, NoUnitOfWorkError, UnitOfWorkClosedError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from types import TracebackType

    from ._engines import Engines
    from ._savepoint import Savepoint
    from ._session import Session

P = ParamSpec("P")


def _require(operation: str) -> UnitOfWork:
    unit = current.get()
    if unit is None:
        raise NoUnitOfWorkError(operation)
    if unit.state is State.CLOSED:
        raise UnitOfWorkClosedError(operation, unit.state)
    return unit


def current_unit_of_work() -> UnitOfWork:
    """Give the unit of work of this request or `async with db:` block.

    Raises `NoUnitOfWorkError` where there is none and `UnitOfWorkClosedError` in a
    task that has outlived it.
    """
    return _require("current_unit_of_work()")


def current_session(db: Engines | None = None) -> Session:
    """Give the write session of the current unit of work; it opens on first use.

    `db` is needed only where the unit serves several databases; the first is the
    default. Raises `NoUnitOfWorkError` without a unit, `UnknownDatabaseError` for a
    database the unit does not serve, `UnitOfWorkClosedError` once it is decided.
    """
    return _require("current_session()").session(db)


def current_read_session(db: Engines | None = None) -> Session:
    """Give the read-only session of the current unit of work.

    The database itself refuses writes on it. It stays open for generators and
    background tasks after the response has started, and is closed when the
    application returns. Raises as `current_session` does.
    """
    return _require("current_read_session()").read_session(db)


async def session_dependency() -> Session:
    """Give the write session, as `current_session` does, where one is injected.

    For FastAPI: `Annotated[AsyncSession, Depends(session_dependency)]`. It is async
    so that no worker thread is needed, and takes no argument that could become a
    parameter of the request. The session is that of the unit's first database.
    """
    return current_session()


async def read_session_dependency() -> Session:
    """Give the read-only session, as `current_read_session` does, to be injected."""
    return current_read_session()


@asynccontextmanager
async def parallel_read(db: Engines | None = None) -> AsyncGenerator[Session]:
    """Give a read session of its own to one of several tasks that read at once.

    `async with parallel_read() as session:`, inside each task. Its connection comes
    from the read engine, never from the writer's pool, and goes back when the block
    is left. It does not see objects of `current_read_session()`. Once the unit has
    written, it reads in the writer's transaction, where tasks take turns. Raises as
    `current_session` does.
    """
    unit = _require("parallel_read()")
    session = await unit.open_parallel(db)
    try:
        yield session
    finally:
        await unit.close_parallel(session)


def savepoint(db: Engines | None = None) -> Savepoint:
    """Open a SAVEPOINT around a part that may fail, with `async with`.

    An exception that leaves the block rolls back to the savepoint and goes on; the
    unit of work can still be committed.
    """
    return _require("savepoint()").session(db).begin_nested()


def set_rollback_only(reason: str) -> None:
    """Have the current unit of work rolled back; the response stays as it is.

    `reason` is for observers. Raises `UnitOfWorkClosedError` once it is decided.
    """
    _require("set_rollback_only()").set_rollback_only(reason)


def force_commit() -> None:
    """Have the current unit committed whatever the status: an audit row with a 403.

    Does not help a unit that the database has given up or `set_rollback_only` has
    marked. Raises `UnitOfWorkClosedError` once it is decided.
    """
    _require("force_commit()").force_commit()


def before_commit(fn: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
    """Call `fn` inside the transaction, just before COMMIT, in order.

    The place for a transactional enqueue. One that raises, or takes longer than
    `hook_timeout` seconds, has everything rolled back. It may register others.
    Raises `TypeError` if `fn` is not callable.
    """
    _register("before_commit", fn, args, kwargs)


def after_commit(fn: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
    """Call `fn` once COMMIT is proven, before the response leaves, in order.

    Never called for work that was not kept, nor if the savepoint that is open now is
    rolled back. A failure is reported to the observers, changes no outcome and stops
    no other hook. Sync callables run in a worker thread. A session that it asks for
    is of a unit of its own, committed when it returns. At most once: a process that
    dies after COMMIT calls it never.
    """
    _register("after_commit", fn, args, kwargs)


def after_rollback(fn: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
    """Call `fn` once a rollback is proven, in reverse order of registration.

    The rollback of the savepoint that is open now, or else of the unit. Not called
    while the outcome is unknown. A session is of a unit of its own.
    """
    _register("after_rollback", fn, args, kwargs)


def after_response(fn: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
    """Call `fn` as `after_commit` does, but after the application has returned."""
    _register("after_response", fn, args, kwargs)


def _register(
    phase: str,
    fn: Callable[..., object],
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> None:
    _require(f"{phase}()").register(phase, fn, args, kwargs)


@overload
def deferred(fn: Callable[P, object], /) -> Callable[P, None]: ...
@overload
def deferred(
    *,
    when: Callable[P, bool] | None = None,
) -> Callable[[Callable[P, object]], Callable[P, None]]: ...
def deferred(
    fn: Callable[P, object] | None = None,
    /,
    *,
    when: Callable[P, bool] | None = None,
) -> Callable[P, None] | Callable[[Callable[P, object]], Callable[P, None]]:
    """Make calls of a function wait for the commit, as with `after_commit`.

    Calling the decorated function, or method, registers it with its arguments and
    returns None. `when` gets the same arguments; where it is false the call does
    nothing. What was decorated can be called at once as `fn.__wrapped__(...)`.

    Calls raise `NoUnitOfWorkError` outside a unit of work. Raises `TypeError` for
    what is no function, and for a predicate that is async.
    """
    if inspect.iscoroutinefunction(when):
        message = f"deferred(when={name_of(when)}): the predicate cannot be async."
        raise TypeError(message)

    def decorate(fn: Callable[P, object]) -> Callable[P, None]:
        if isinstance(fn, staticmethod | classmethod) or not callable(fn):
            kind = type(fn).__name__
            message = (
                f"deferred() takes a function, not a {kind}. Is the order of the "
                "decorators wrong? Write @staticmethod or @classmethod above @deferred."
            )
            raise TypeError(message)

        @functools.wraps(fn)
        def register(*args: P.args, **kwargs: P.kwargs) -> None:
            if when is None or when(*args, **kwargs):
                after_commit(fn, *args, **kwargs)

        return register

    return decorate if fn is None else decorate(fn)


class unit_of_work:  # noqa: N801  # used like a function: async with unit_of_work(db)
    """A unit of work outside a request: `async with unit_of_work(db) as uow:`.

    The general form of `async with db:`, for several databases or, with
    `independent=True`, for one with connection and outcome of its own inside
    another unit of the same database.

    Leaving the block commits; an exception rolls back and goes on. Raises
    `NestedUnitOfWorkError` inside an undecided unit of the same database.
    """

    def __init__(self, *databases: Engines, independent: bool = False) -> None:
        """Serve `databases`, the first being the default."""
        if not databases:
            message = "unit_of_work() needs at least one Database."
            raise TypeError(message)
        self.databases = databases
        self.independent = independent
        self.unit: UnitOfWork

    async def __aenter__(self) -> UnitOfWork:
        """Open the unit; no session and no connection yet."""
        around = current.get()
        settings = around.settings if around is not None else Settings()
        for db in self.databases:
            self._refuse_nested(around, db)
        in_hook = around is not None and around.hook_of is not None
        nested = around is not None and not (in_hook or around.is_decided)
        self.unit = UnitOfWork(
            self.databases,
            settings,
            parent=around if nested else None,
            must_see=around.must_see if around is not None else NOTHING,
            # Or a hook that registers itself in a block of its own never ends.
            quota=around.hooks.quota if around and around.hooks.by_hook else None,
        )
        self.unit.previous = around
        current.set(self.unit)
        return self.unit

    def _refuse_nested(self, around: UnitOfWork | None, db: Engines) -> None:
        if db.one_writer and held_by(around, db):
            raise NestedUnitOfWorkError(db)  # it would wait for the outer forever
        if around is None or around.is_decided or self.independent:
            return
        # A hook has a unit of its own, which is in the way only once it is used.
        if around.holds(db) if around.hook_of is not None else around.serves(db):
            raise NestedUnitOfWorkError(db)

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Commit or roll back, then close; raises if the work was not kept."""
        await leave(self.unit, exc)


async def leave(unit: UnitOfWork, error: BaseException | None) -> None:
    """End the unit of work of an `async with` block."""
    try:
        await unit.finish(
            decide_exit(
                error,
                rollback_only=unit.state is State.ROLLBACK_ONLY,
                doomed=unit.doomed_by is not None,
                forced=unit.forced,
                commit_on_exit=all(db.commit_on_exit for db in unit.databases),
            ),
        )
    finally:
        try:
            await unit.release()
        finally:
            _step_back_from(unit)


def _step_back_from(unit: UnitOfWork) -> None:
    """Make the unit around current again, unless another one is current by now.

    Two blocks need not end in the order of their nesting (generators), nor in the
    task they began in; a token would insist on both.
    """
    if current.get() is unit:
        previous = unit.previous
        while previous is not None and previous.state is State.CLOSED:
            previous = previous.previous
        current.set(previous)
