"""Try again: what met a conflict with another transaction is done once more, whole.

A request can be, since its response is held until COMMIT: its client notices nothing.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import dataclasses
import random
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import anyio

from asgi_uow._asgi import START
from asgi_uow._databases.configuration import check
from asgi_uow._databases.driver_errors import code_of
from asgi_uow._databases.engines import check_databases
from asgi_uow._decision import Cause, State
from asgi_uow._entrypoints.body import Body, Progress
from asgi_uow._entrypoints.exchange import Again
from asgi_uow._unit.hooks import is_async, name_of, run_in
from asgi_uow.observers import RetryScheduled

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection
    from contextlib import AbstractAsyncContextManager

    from asgi_uow._asgi import Message, Receive, Scope, Send
    from asgi_uow._sessions.managed import Shared
    from asgi_uow._unit.hooks import Work
    from asgi_uow._unit.unit import UnitOfWork

P = ParamSpec("P")
T = TypeVar("T")

# https://www.rfc-editor.org/rfc/rfc9110#section-9.2.2
IDEMPOTENT = ("GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE")
NOT_REPLAYED = {Cause.EXPLICIT, Cause.CANCELLED}
FIXED = {  # https://asgi.readthedocs.io/en/latest/specs/www.html#http-connection-scope
    *("type", "asgi", "http_version", "method", "scheme", "path", "raw_path"),
    *("query_string", "root_path", "client", "server"),
}
CONTAINERS = dict, list, set
PLAIN = {bytes, int, str, tuple, type(None)}  # most of a scope, and never changed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retry:
    """Does a request, or a function, again if a conflict has undone its work.

    `UnitOfWorkMiddleware(app, db, retry=Retry())` replays whole requests: a deadlock, a
    serialization failure, a connection that was lost before COMMIT. The application is
    called again with a new unit of work, a fresh copy of the scope and the same body;
    the client sees the last response alone. When `attempts` are used up it is a 503.

    `attempts`: how often in all. `methods`: of the requests that may be replayed; those
    that RFC 9110 calls idempotent, unless you name others, and what has an idempotency
    key. `when(scope)`: whether this
    one may be. `max_body`: bytes; with a larger body there is one attempt. Between
    attempts a random time passes, at most `backoff` seconds, doubled each time, and
    never more than `max_backoff`.

    Never replayed: what was kept in part, or may have been; what has sent something to
    the client; after a disconnect, the unit's `deadline`, `set_rollback_only()`, or a
    wait for the pool that was too long. Raises `ConfigurationError` for an option that
    cannot work.
    """

    attempts: int = 3
    max_body: int = 65536
    methods: Collection[str] = IDEMPOTENT
    when: Callable[[Scope], bool] = bool  # every one: no scope is empty
    backoff: float = 0.05
    max_backoff: float = 1.0

    def __post_init__(self) -> None:
        check(vars(self))
        object.__setattr__(self, "methods", frozenset(map(str.upper, self.methods)))

    def covers(self, scope: Scope, keys: Callable[[Scope], list[bytes]]) -> bool:
        """Tell whether this request may be replayed at all."""
        may_be = scope.get("method") in self.methods or keys(scope)
        return bool(may_be and self.when(scope))

    async def run(
        self,
        db: AbstractAsyncContextManager[UnitOfWork, None],
        fn: Callable[P, Awaitable[T]],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Await `fn` in a unit of work of its own, again after a conflict.

        For jobs and scripts: `await Retry().run(db, transfer, 1, 2)` is `async with
        db:` around `await transfer(1, 2)`. Gives what it returned; raises what ended
        the last attempt. `methods`, `max_body` and `when` do not matter here.
        """
        check_databases("Retry.run(db, fn)", (db,))
        if not is_async(fn):
            message = f"Retry.run(db, fn): {name_of(fn)} has to be async."
            raise TypeError(message)
        attempts, results = Attempts(self), list[T]()

        async def attempt() -> None:
            async with db as unit:
                attempts.enter(unit)
                results[:] = [await fn(*args, **kwargs)]

        await attempts.run(attempt)
        return results[0]


class Attempts(Progress):
    """Those of one request, or of one function."""

    number: int = 1
    until: float | None = None  # the deadline of the first unit
    before: tuple[int, tuple[object, ...]] = 0, ()  # see `enter`

    def __init__(self, retry: Retry) -> None:
        self.retry = retry
        self._context = contextvars.copy_context()
        self._cancelling = _cancelling()

    async def run(
        self, attempt: Callable[P, Work], /, *args: P.args, **kwargs: P.kwargs
    ) -> None:
        """Make attempts until one is the last, or nobody is there any more."""
        try:
            while not self.is_gone:
                work = attempt(*args, **kwargs)
                try:
                    await (work if self.number == 1 else self._run_apart(work))
                except BaseException as error:
                    if self.pause is None or not _is_replayed(error):
                        raise
                if self.pause is None:
                    return
                pause, self.pause = self.pause, None
                self.number += 1
                await anyio.sleep(pause)
        finally:
            if self.number > 1:
                self.give_back()

    def give_back(self) -> None:
        """Leave to the caller what the last attempt has left; a function has none."""

    async def _run_apart(self, work: Work) -> None:
        """Have a later attempt see no context variable of those before."""
        context = self._context.copy()
        try:
            await run_in(context, work)
        finally:
            for var, value in context.items():
                var.set(value)

    def enter(self, unit: UnitOfWork) -> None:
        """Have a unit ask, once it is rolled back, whether there is another attempt."""
        unit.attempt, unit.attempts = self.number, self
        if unit.around is not None:  # what was kept there is none of this attempt's
            shared = unit.share()
            self.before = shared.kept[0], tuple(shared.writers)
        if self.number > 1:
            unit.until = self.until
        self.until = unit.until

    @property
    def is_used_up(self) -> bool:
        return self.is_last or self.number >= self.retry.attempts

    def schedule(
        self, unit: UnitOfWork, conflict: BaseException | None
    ) -> RetryScheduled | None:
        """Decide that there is another attempt; gives the event that tells of it."""
        shared = unit.share()
        if conflict is None or self.is_used_up or not self._may_repeat(unit, shared):
            return None
        longest = self.retry.backoff * 2 ** min(self.number - 1, 60)
        pause = random.uniform(0, min(longest, self.retry.max_backoff))  # noqa: S311  # to spread, not to hide
        if self.until and asyncio.get_running_loop().time() + pause >= self.until:
            return None
        self.pause = pause
        return RetryScheduled(self.number + 1, pause, conflict, code_of(conflict))

    def _may_repeat(self, unit: UnitOfWork, shared: Shared) -> bool:
        """Tell whether nothing was kept or called, and nobody has another wish."""
        kept, others = self.before
        # A unit inside that still runs may keep something later.
        inside = [each for each in shared.writers if each not in others]
        is_kept = shared.kept[0] > kept or any(
            each.shared is not shared and each.shared.state is not State.ROLLED_BACK
            for each in inside
        )
        is_wished = unit.reason is not None or unit.cause in NOT_REPLAYED
        return not (is_kept or is_wished or _cancelling() > self._cancelling)


class Replay(Attempts):
    """The attempts of one request: the scope, the body, and what is forwarded."""

    def __init__(
        self, retry: Retry, scope: Scope, receive: Receive, send: Send
    ) -> None:
        super().__init__(retry)
        self._scope, self._send = scope, send
        self._attempted = scope  # then copies of what it was
        self._before = _copy(scope)
        self._state = scope.get("state")
        self._body = Body(receive, retry.max_body)

    def attempt(
        self, call: Callable[[T, Scope, Receive, Send, Replay], Work], middleware: T
    ) -> Work:
        """Give the call that serves the request; a later one has a fresh scope."""
        if self.number > 1:
            self._attempted = _copy(self._before)
        receive = self._body.reader(self)
        return call(middleware, self._attempted, receive, self.forward, self)

    def forward(self, message: Message) -> Awaitable[None]:
        """Pass a message on; this attempt is the last then."""
        self.is_last = True
        if self.number > 1 and message["type"] == START:
            self.give_back()
        return self._send(message)

    def give_back(self) -> None:
        """Leave in the caller's scope what the last attempt has left in its own."""
        if self._attempted is self._scope:
            return  # cancelled before another one began
        state = self._attempted.get("state")
        self._scope.clear()
        self._scope.update(self._attempted)
        if type(self._state) is dict and type(state) is dict:
            # The one that applications around may hold.
            self._scope["state"] = self._state
            left = state.copy()
            self._state.clear()
            self._state.update(left)


def _cancelling() -> int:
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()


def _copy(scope: Scope) -> dict[str, Any]:
    copied: dict[str, Any] = scope.copy()
    for key in scope:
        if key not in FIXED and type(value := scope[key]) not in PLAIN:
            copied[key] = _copy_of(value)
    if isinstance(session := copied.get("session"), dict):
        with suppress(RecursionError):  # a strange one
            for key, value in session.items():
                if isinstance(value, CONTAINERS):
                    dict.__setitem__(session, key, _deep(value))  # notes no change
    return copied


def _copy_of(value: Any) -> Any:
    """Copy a container; what it holds may be everybody's, as in the state."""
    if type(value) in CONTAINERS:
        return value.copy()
    copied = value
    if isinstance(value, CONTAINERS):
        with suppress(Exception):  # whatever its class does
            copied = copy.copy(value)
            if hasattr(value, "__dict__"):  # Starlette's notes that it was changed
                copied.__dict__ = vars(value).copy()
    return copied


def _deep(value: Any) -> Any:
    if type(value) is dict:
        return {key: _deep(each) for key, each in value.items()}
    return [*map(_deep, value)] if type(value) is list else _copy_of(value)


def _is_replayed(error: BaseException) -> bool:
    """Tell whether nothing but the end of the attempt comes out of an application."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_is_replayed, error.exceptions))
    return isinstance(error, Again | Exception)
