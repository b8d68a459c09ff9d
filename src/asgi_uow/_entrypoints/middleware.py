"""The ASGI shell: one unit of work per request, ended before the response leaves."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from asgi_uow._concurrency import run_to_completion
from asgi_uow._decision import (
    ERROR_STATUS,
    SETTLED,
    Cause,
    State,
    commit_below_400,
    decide_response,
    exception_cause,
    rollback,
)
from asgi_uow._entrypoints.problem import FAILURE, problem
from asgi_uow._reading.causal import NOTHING, MustSee
from asgi_uow._unit.current import use
from asgi_uow._unit.end import Settings
from asgi_uow._unit.unit import UnitOfWork
from asgi_uow.errors import UnitOfWorkClosedError
from asgi_uow.observers import LoggingObserver

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asgi_uow._asgi import ASGIApp, Headers, Message, Receive, Scope, Send
    from asgi_uow._databases.engines import Engines
    from asgi_uow._decision import CommitWhen, Decision
    from asgi_uow._reading.causal import CausalReads
    from asgi_uow.errors import UnitOfWorkFailedError
    from asgi_uow.observers import Observer

UNIT = "asgi_uow.unit"
"""The key in the scope under which an inner middleware finds the unit."""

START = "http.response.start"

POSITION_SECONDS = 2.0
"""Seconds for learning a position; after them the client reads from the writer."""


class UnitOfWorkMiddleware:
    """Gives every HTTP request one unit of work on `databases`.

    At the first `http.response.start` the unit is committed or rolled back, before
    that message is forwarded: the client never sees a success that the database did
    not keep. Websocket handlers use `async with db:`, once per message.

    `commit_when(status, headers)`: commit for this response? Default: below 400.
    `observers`: called with every event; default one `LoggingObserver`.
    `causal_reads=CausalReads(secret)`: clients see what they wrote in their next
    requests, on replicas too.
    `error_app`: the ASGI app that answers when the work was not kept; it finds the
    failure in `scope["asgi_uow.failure"]`. None leaves the answer to what is around.
    `commit_timeout`: seconds for COMMIT; past it the outcome is UNKNOWN.
    `hook_timeout`: seconds for each hook. None is no limit.

    Raises `TypeError` if no database is given.
    """

    def __init__(  # the public options, each of its own
        self,
        app: ASGIApp,
        *databases: Engines,
        commit_when: CommitWhen = commit_below_400,
        observers: Sequence[Observer] = (LoggingObserver(),),
        causal_reads: CausalReads | None = None,
        error_app: ASGIApp | None = problem,
        commit_timeout: float | None = 30.0,
        hook_timeout: float | None = 5.0,
    ) -> None:
        """Wrap `app`; opens nothing."""
        if not databases:
            message = "UnitOfWorkMiddleware(app, db): pass at least one Database."
            raise TypeError(message)
        self.app = app
        self.databases = databases
        self.commit_when = commit_when
        self.causal_reads = causal_reads
        self.error_app = error_app
        self.settings: Settings = Settings(
            tuple(observers), commit_timeout, hook_timeout
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, self._disposing(send))
        elif scope["type"] != "http":
            with use(None):
                await self.app(scope, receive, send)
        else:
            outer: UnitOfWork | None = scope.get(UNIT)
            if outer is not None and not outer.life.is_open:
                outer = None
            if outer is not None and all(map(outer.serves, self.databases)):
                await self.app(scope, receive, send)
                return
            must_see = NOTHING
            if self.causal_reads is not None:
                positions = self.causal_reads.positions(scope.get("headers", ()))
                must_see = MustSee(positions, self.causal_reads.wait)
            unit = UnitOfWork(
                self.databases, self.settings, parent=outer, must_see=must_see
            )
            scope[UNIT] = unit
            try:
                with use(unit):
                    await self._serve(scope, receive, send, unit)
            finally:
                scope[UNIT] = outer

    def _disposing(self, send: Send) -> Send:
        """Close the engines that asgi-uow made once the application has shut down."""

        async def forward(message: Message) -> None:
            if message["type"].startswith("lifespan.shutdown."):
                for db in self.databases:
                    await db.dispose_owned()
            await send(message)

        return forward

    async def _serve(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        unit: UnitOfWork,
    ) -> None:
        stamp = None
        if self.causal_reads is not None:
            stamp = _Stamp(self.causal_reads, secure=scope.get("scheme") == "https")
        exchange = _Exchange(unit, send, self.commit_when, stamp)
        try:
            try:
                await self.app(scope, receive, exchange.send)
            except BaseException as error:
                await exchange.end(rollback(exception_cause(error)))
                failure = exchange.failure_behind(error)
                if failure is not None and isinstance(error, Exception):
                    await self._answer(scope, receive, exchange, failure)
                    if failure is not error:
                        raise failure from failure.__cause__
                raise
            await exchange.end(rollback(Cause.ABANDONED))
            if exchange.failure is not None and not exchange.forwarded:
                await self._answer(scope, receive, exchange, exchange.failure)
                raise exchange.failure
        finally:
            await unit.release()

    async def _answer(
        self,
        scope: Scope,
        receive: Receive,
        exchange: _Exchange,
        failure: Exception,
    ) -> None:
        if self.error_app is not None and not exchange.forwarded:
            scope[FAILURE] = failure
            await self.error_app(scope, receive, exchange.answer)


class _Stamp:
    """Tells the client of a unit that wrote what its next reads must see."""

    def __init__(self, causal_reads: CausalReads, *, secure: bool) -> None:
        self._causal_reads = causal_reads
        self._secure = secure

    async def put(self, unit: UnitOfWork, headers: Headers) -> None:
        """Add the header, if something was written and committed."""
        positions = {
            db.key: await db.position(POSITION_SECONDS) for db in list(unit.kept)
        }
        found = {key: each for key, each in positions.items() if each is not None}
        if found:
            known = self._causal_reads.merge(unit.must_see.positions, found)
            header = self._causal_reads.response_header(known, secure=self._secure)
            headers.append(header)


class _Exchange:
    """One request's way out: the decision, and what has been forwarded."""

    def __init__(
        self,
        unit: UnitOfWork,
        send: Send,
        commit_when: CommitWhen,
        stamp: _Stamp | None = None,
    ) -> None:
        self.unit = unit
        self.forwarded = False
        self.failure: UnitOfWorkFailedError | None = None
        self._answered = False
        self._decided = False
        self._settled = asyncio.Event()
        self._send = send
        self._commit_when = commit_when
        self._stamp = stamp

    async def send(self, message: Message) -> None:
        """Decide at the first start; after a failure let only an error answer pass."""
        if self._decided and not self._settled.is_set():
            await self._settled.wait()  # another task's start is being decided
        if message["type"] == START:
            # Sanic's headers are a generator, and are read twice: here and outside.
            message = {**message, "headers": list(message.get("headers", ()))}
            success = message["status"] < ERROR_STATUS
            if self.unit.life.is_open:
                await self._decide(message["status"], message["headers"])
            elif self.failure is not None and not self.forwarded:
                self._answered = not success
            elif success and not self._decided:
                # The application had returned or raised: that was the decision.
                operation = "sending a response"
                raise UnitOfWorkClosedError(operation, self.unit.state)
        if self.failure is not None and not self._answered:
            raise self.failure
        await self.forward(message)

    async def answer(self, message: Message) -> None:
        """Pass what an `error_app` sends; it may not claim a success."""
        if message["type"] == START and message["status"] < ERROR_STATUS:
            text = "an error_app has to answer with a status at or above 400"
            raise ValueError(text)
        await self.forward(message)

    async def forward(self, message: Message) -> None:
        """Pass a message to the server."""
        start = message["type"] == START
        if start:
            self.forwarded = True
        await self._send(message)
        if start and self.unit.state in SETTLED:
            self.unit.life.move(State.RESPONDING)

    async def end(self, decision: Decision) -> None:
        """Give a unit that never saw a start its end; wait for one being decided."""
        if self.unit.life.is_open:
            await self.unit.finish(decision)
        elif self._decided and not self._settled.is_set():
            await run_to_completion(self._settled.wait())

    def failure_behind(self, error: BaseException) -> Exception | None:
        """Give what has to be answered for, if the application did not do so."""
        if self.failure is not None:
            return None if self._answered else self.failure
        if isinstance(error, Exception) and self.unit.outages.behind(error):
            return error
        return None

    async def _decide(self, status: int, headers: Headers) -> None:
        """Decide, and end the unit before the start is forwarded."""
        unit = self.unit
        self._decided = True
        broken: Exception | None = None
        try:
            decision = decide_response(
                status=status,
                headers=headers,
                rollback_only=unit.state is State.ROLLBACK_ONLY,
                doomed=unit.doomed_by is not None,
                forced=unit.forced,
                commit_when=self._commit_when,
            )
        except Exception as error:  # noqa: BLE001  # becomes the cause of the failure
            broken = error
            decision = rollback(Cause.EXCEPTION, refuse=True)
        try:
            await unit.finish(decision, broken)
            if self._stamp is not None:
                await self._stamp.put(unit, headers)
        finally:
            self.failure = unit.failure
            self._settled.set()
