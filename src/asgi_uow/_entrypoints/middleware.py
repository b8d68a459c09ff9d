"""The ASGI shell: one unit of work per request, ended before the response leaves."""

from __future__ import annotations

import asyncio
import enum
from contextlib import suppress
from typing import TYPE_CHECKING

from asgi_uow import _decision, errors
from asgi_uow._concurrency import run_to_completion
from asgi_uow._databases.configuration import check
from asgi_uow._databases.engines import check_databases
from asgi_uow._decision import ERROR_STATUS, SETTLED, UNDECIDED, Cause, Outcome, State
from asgi_uow._entrypoints.problem import FAILURE, START, problem_details
from asgi_uow._reading.causal import MustSee
from asgi_uow._reading.route import written_position
from asgi_uow._sessions.deadline import earlier
from asgi_uow._unit.finish import finish, refuse_streams, release
from asgi_uow._unit.hooks import is_async
from asgi_uow._unit.unit import CLOSED, COMMITTED, NEW, UnitOfWork, UnitOptions, current
from asgi_uow.errors import UnitOfWorkClosedError, UnitOfWorkFailedError
from asgi_uow.observers import LoggingObserver

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from asgi_uow._asgi import ASGIApp, Message, Receive, Scope, Send
    from asgi_uow._databases.engines import Engines
    from asgi_uow._decision import CommitWhen, Headers
    from asgi_uow._reading.causal import CausalReads
    from asgi_uow.observers import Observer

UNIT = "asgi_uow.unit"  # the key in the scope, for another middleware inside
POSITION_SECONDS = 2.0  # for learning a position; then the client reads the writer


class UnitOfWorkMiddleware:
    """Gives every HTTP request one unit of work on `databases`.

    At the first `http.response.start` the unit is committed or rolled back, before
    that message is forwarded: the client never sees a success that the database did
    not keep. Websocket handlers use `async with db:`, once per message.

    `commit_when(status, headers)`: commit for this response? Default: below 400.
    `observers`: called with every event; default one `LoggingObserver`.
    `causal_reads=CausalReads(secret)`: clients see what they wrote, on replicas too.
    `error_app`: the ASGI app that answers when the work was not kept; it finds the
    failure in `scope["asgi_uow.failure"]`. None leaves the answer to what is around.
    `deadline`: seconds for each request's database calls; past it nothing is committed.
    `commit_timeout`: seconds for COMMIT; past it the outcome is UNKNOWN.
    `hook_timeout`: seconds for each hook. None is no limit.

    Raises `TypeError` for what is no `Database` and for an async `commit_when`,
    `ConfigurationError` for another option that cannot work.
    """

    def __init__(  # the public options, each of its own
        self,
        app: ASGIApp,
        *databases: Engines,
        commit_when: CommitWhen = _decision.commit_below_400,
        observers: Sequence[Observer] = (LoggingObserver(),),
        causal_reads: CausalReads | None = None,
        error_app: ASGIApp | None = problem_details,
        deadline: float | None = None,
        commit_timeout: float | None = 30.0,
        hook_timeout: float | None = 5.0,
    ) -> None:
        check(locals())
        check_databases("UnitOfWorkMiddleware(app, db)", databases)
        if is_async(commit_when):
            message = "commit_when cannot be async: a handler can set_rollback_only()."
            raise TypeError(message)
        errors.NoUnitOfWorkError.template = errors.NoUnitOfWorkError.wrong_order
        self.app = app
        self.deadline = deadline
        self.databases = databases
        self.commit_when = commit_when
        self.causal_reads = causal_reads
        self.error_app = error_app
        self.options: UnitOptions = UnitOptions(
            tuple(observers), commit_timeout, hook_timeout
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._serve_other(scope, receive, send)
        unit = UnitOfWork()
        unit.databases, unit.options, unit.state = self.databases, self.options, NEW
        outer: UnitOfWork | None = scope.get(UNIT)
        if outer is not None and outer.state in UNDECIDED:
            if all(map(outer.serves, self.databases)):
                return await self.app(scope, receive, send)
            unit.around, unit.is_nested, unit.until = outer, True, outer.until
        if self.deadline is not None:
            unit.until = earlier(unit.until, self.deadline)
        exchange = _Exchange()
        exchange.unit, exchange.forward, exchange.middleware = unit, send, self
        exchange.stage = OPEN
        if (reads := self.causal_reads) is not None:
            seen = reads.positions(scope.get("headers", ()))
            unit.must_see = MustSee(seen, reads.wait, reads.names)
            exchange.is_secure = scope.get("scheme") == "https"
        scope[UNIT] = unit
        # A request never trusts what it finds: servers start a pipelined request in
        # the context of the one before. https://github.com/encode/uvicorn/issues/2167
        token = current.set(unit)
        try:
            await self.app(scope, receive, exchange.send)
            if exchange.stage is not PASSING:
                await exchange.conclude(scope, receive, None)
        except BaseException as error:
            await exchange.conclude(scope, receive, error)
            raise
        finally:
            try:
                if unit.is_used:
                    await release(unit)
                else:
                    unit.state = CLOSED
            finally:
                current.reset(token)
                scope[UNIT] = outer

    async def _serve_other(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def disposing(message: Message) -> None:
            # Engines that asgi-uow made end with the application.
            if message["type"].startswith("lifespan.shutdown."):
                for db in self.databases:
                    await db.dispose_owned()
            await send(message)

        is_lifespan = scope["type"] == "lifespan"
        token = current.set(None)
        try:
            await self.app(scope, receive, disposing if is_lifespan else send)
        finally:
            current.reset(token)


class Stage(enum.Enum):
    """Where a request is on its way out."""

    OPEN = "the application has sent no start"
    DECIDING = "a start is held until the unit of work has ended"
    PASSING = "what the application sends is forwarded"
    REFUSED = "the work was not kept, so only an error is forwarded"
    ANSWERED = "the failure was answered"


# Python 3.11 takes long for each member of an enum.
OPEN, DECIDING, PASSING, REFUSED, ANSWERED = Stage


class _Exchange:
    """One request's way out: the decision, and what has been forwarded."""

    # Set by the middleware: a request that touches nothing runs no __init__.
    unit: UnitOfWork
    forward: Send
    middleware: UnitOfWorkMiddleware
    stage: Stage

    is_secure: bool = False
    settled: asyncio.Event | None = None

    def send(self, message: Message) -> Awaitable[None]:
        """Decide at the first start; after a failure let only an error answer pass."""
        if self.stage is PASSING:
            return self.forward(message)
        unit = self.unit
        if (
            self.stage is OPEN
            and not unit.is_used
            and message["type"] == START
            and self.middleware.commit_when is _decision.commit_below_400
        ):
            # Nothing was asked of the unit, so the status alone decides.
            if message["status"] < ERROR_STATUS:
                unit.state, unit.outcome = COMMITTED
            else:
                unit.conclude_unused(Cause.STATUS)
            self.stage = PASSING
            return self.forward(message)
        return self._send(message)

    async def _send(self, message: Message) -> None:
        if self.stage is DECIDING:  # another task's start
            await self._settle()
        is_start = message["type"] == START
        if is_start and self.stage is OPEN:
            message = await self._decide(message)
        elif is_start and self.stage is REFUSED and message["status"] >= ERROR_STATUS:
            self.stage = ANSWERED
        if self.stage is REFUSED:
            operation = "sending a response"
            raise self.unit.failure or UnitOfWorkClosedError(operation, self.unit.state)
        await self.forward(message)
        if is_start and self.unit.state in SETTLED:
            self.unit.move(State.RESPONDING)

    async def conclude(
        self, scope: Scope, receive: Receive, error: BaseException | None
    ) -> None:
        """End a unit that saw no start; answer, and raise, what nobody answered."""
        if self.stage is DECIDING:
            await run_to_completion(self._settle())
        elif self.stage is OPEN:
            self.stage = REFUSED
            why = Cause.ABANDONED if error is None else _decision.exception_cause(error)
            with suppress(UnitOfWorkFailedError):  # of the unit: answered below
                await finish(self.unit, _decision.rollback(why))
        failure = self._unanswered(error)
        if failure is None:
            return
        error_app = self.middleware.error_app
        if error_app is not None and self.stage is not PASSING:
            scope[FAILURE] = failure
            try:
                await error_app(scope, receive, self._answer)
            finally:
                self.stage = ANSWERED
                scope.pop(FAILURE, None)  # it refers to frames, and those to the scope
        try:
            if failure is not error:
                raise failure from failure.__cause__
        finally:
            del failure, error  # their tracebacks refer to this frame

    def _unanswered(self, error: BaseException | None) -> Exception | None:
        """Give what has to be answered for, if the application did not do so."""
        if self.stage is ANSWERED or not isinstance(error, Exception | None):
            return None
        shared = self.unit.shared
        if self.unit.failure is None and shared is not None:
            rolled_back = self.unit.outcome is Outcome.ROLLED_BACK
            return error if rolled_back and shared.may_repeat(error) else None
        return self.unit.failure

    async def _answer(self, message: Message) -> None:
        """Pass what an `error_app` sends; it may not claim a success."""
        if message["type"] == START and message["status"] < ERROR_STATUS:
            text = "an error_app has to answer with a status at or above 400"
            raise ValueError(text)
        await self.forward(message)

    async def _settle(self) -> None:
        if self.settled is None:
            self.settled = asyncio.Event()
        await self.settled.wait()

    async def _decide(self, message: Message) -> Message:
        unit, middleware = self.unit, self.middleware
        if unit.writers:
            unit.refuse_inside_call()
        self.stage = DECIDING
        # Sanic's headers are a generator, and are read twice: here and outside.
        headers: Headers = list(message.get("headers", ()))
        broken: BaseException | None = None
        try:
            decision = _decision.decide_response(
                status=message["status"],
                headers=headers,
                rollback_only=unit.state is State.ROLLBACK_ONLY,
                doomed=unit.doomed_by is not None,
                forced=unit.forced,
                commit_when=middleware.commit_when,
            )
            is_good = message["status"] < ERROR_STATUS
            if unit.writers and is_good and not decision.replace_response:
                await refuse_streams(unit)
        except BaseException as error:  # noqa: BLE001  # becomes the cause of the failure
            broken, cause = error, _decision.exception_cause(error)
            decision = _decision.rollback(cause, replace_response=True)
        try:
            await finish(unit, decision, broken)
            if middleware.causal_reads is not None:
                await self._add_causal_token(middleware.causal_reads, headers)
        finally:
            self.stage = PASSING if unit.failure is None else REFUSED
            if self.settled is not None:
                self.settled.set()
        return {**message, "headers": headers}

    async def _add_causal_token(self, causal: CausalReads, headers: Headers) -> None:
        """Tell the client of a unit that wrote what its next reads must see."""
        shared = self.unit.shared
        found: dict[Engines, str] = {}
        for db in () if shared is None else tuple(shared.committed):
            if (position := await written_position(db, POSITION_SECONDS)) is not None:
                found[db] = position
        if found:
            known = causal.merge(self.unit.must_see.positions, found)
            headers.append(causal.response_header(known, secure=self.is_secure))
