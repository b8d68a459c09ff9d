"""The ASGI shell: one unit of work per request, ended before the response leaves."""

from __future__ import annotations

from asyncio import current_task
from typing import TYPE_CHECKING

from asgi_uow import _decision, errors
from asgi_uow._asgi import Response, problem_details
from asgi_uow._databases.configuration import check
from asgi_uow._databases.engines import check_databases
from asgi_uow._decision import CLOSED, NEW, UNDECIDED
from asgi_uow._entrypoints.exchange import OPEN, PASSING, Exchange, Rules
from asgi_uow._entrypoints.replay import Replay
from asgi_uow._reading.causal import MustSee
from asgi_uow._sessions.deadline import earlier
from asgi_uow._unit.finish import release
from asgi_uow._unit.hooks import is_async
from asgi_uow._unit.options import UnitOptions, inspected
from asgi_uow._unit.unit import NONE, UnitOfWork, current
from asgi_uow.observers import LoggingObserver

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from asgi_uow._asgi import ASGIApp, Message, Receive, Scope, Send
    from asgi_uow._databases.engines import Engines
    from asgi_uow._decision import CommitWhen
    from asgi_uow._entrypoints.idempotency import Idempotency
    from asgi_uow._entrypoints.replay import Retry
    from asgi_uow._reading.causal import CausalReads
    from asgi_uow.observers import Observer

UNIT = "asgi_uow.unit"  # the key in the scope, for another middleware inside
make_current, restore = current.set, current.reset  # bound once, not by each


class UnitOfWorkMiddleware:
    """Gives every HTTP request one unit of work on `databases`.

    At the first `http.response.start` the unit is committed or rolled back, before
    that message is forwarded: the client never sees a success that the database did
    not keep. Websocket handlers use `async with db:`, once per message.

    `commit_when(status, headers)`: commit for this response? Default: below 400.
    `observers`: called with every event; default one `LoggingObserver`.
    `retry=Retry()`: requests that met a conflict are replayed, whole.
    `idempotency=Idempotency()`: what has an `Idempotency-Key` is done once.
    `causal_reads=CausalReads(secret)`: clients see what they wrote, on replicas too.
    `error_app`: the ASGI app that answers when the work was not kept; it finds the
    failure in `scope["asgi_uow.failure"]`. None leaves the answer to what is around.
    `deadline`: seconds for each request's database calls; past it nothing is committed.
    `commit_timeout`: seconds for COMMIT; past it the outcome is UNKNOWN.
    `hook_timeout`: seconds for each hook. None is no limit.
    `held_idle`: seconds after which a connection that is held while nothing is executed
    is a `HeldIdle`; None never tells. `server_timing=True`: responses of units that
    were used have a `Server-Timing` header for browsers' developer tools.

    Raises `TypeError` for what is no `Database` and for an async `commit_when`,
    `ConfigurationError` for another option that cannot work.
    """

    def __init__(  # the public options, each of its own
        self,
        app: ASGIApp,
        *databases: Engines,
        commit_when: CommitWhen = _decision.commit_below_400,
        observers: Sequence[Observer] = (LoggingObserver(),),
        retry: Retry | None = None,
        idempotency: Idempotency | None = None,
        causal_reads: CausalReads | None = None,
        error_app: ASGIApp | None = problem_details,
        deadline: float | None = None,
        commit_timeout: float | None = 30.0,
        hook_timeout: float | None = 5.0,
        held_idle: float | None = 1.0,
        server_timing: bool = False,
    ) -> None:
        check(locals())
        check_databases("UnitOfWorkMiddleware(app, db)", databases)
        if is_async(commit_when):
            message = "commit_when cannot be async: a handler can set_rollback_only()."
            raise TypeError(message)
        errors.NoUnitOfWorkError.template = errors.NoUnitOfWorkError.wrong_order
        self.app: ASGIApp = app if idempotency is None else idempotency.wrap(app)
        self.keys: Callable[[Scope], list[bytes]]
        self.keys = idempotency.keys if idempotency else lambda _: []
        self.deadline: float | None = deadline
        self.retry: Retry | None = retry
        self.databases = databases
        self.is_plain: bool = deadline is None and causal_reads is None
        self.rules: Rules = Rules(commit_when, error_app, causal_reads)
        self.causal_reads = causal_reads
        self.options: UnitOptions = UnitOptions(
            tuple(observers), commit_timeout, hook_timeout, held_idle, server_timing
        )

    async def __call__(
        self, scope: Scope, receive: Receive, send: Send, replay: Replay | None = None
    ) -> None:
        if scope["type"] != "http":
            return await self._serve_other(scope, receive, send)
        unit = UnitOfWork()
        unit.databases, unit.options, unit.state = self.databases, self.options, NEW
        unit.scope, unit.task, unit.outcome = scope, current_task(), None
        unit.shared, unit.participants, unit.writers = None, NONE, ()
        outer: UnitOfWork | None = scope.get(UNIT)
        if outer is not None and outer.state in UNDECIDED:
            if all(map(outer.serves, self.databases)):
                return await self.app(scope, receive, send)
            unit.around, unit.is_nested = outer, True
            unit.until, unit.attempt = outer.until, outer.attempt
        elif self.retry and not replay and self.retry.covers(scope, self.keys):
            replay = Replay(self.retry, scope, receive, send)
            return await replay.run(replay.attempt, UnitOfWorkMiddleware.__call__, self)
        exchange = Exchange()
        exchange.unit, exchange.forward = unit, send
        exchange.rules, exchange.stage = self.rules, OPEN
        if replay is not None or not self.is_plain or inspected:
            self._prepare(exchange, scope, replay)
        scope[UNIT], token = unit, make_current(unit)
        try:
            await self.app(scope, receive, exchange.send)
            if exchange.stage is not PASSING:
                await exchange.conclude(scope, receive, None)
        except BaseException as error:
            await exchange.conclude(scope, receive, error)
            raise
        finally:
            try:
                if exchange.unit.shared is not None:
                    await release(unit)
                else:
                    unit.state = CLOSED
            finally:
                restore(token)  # pipelined requests share it: encode/uvicorn#2167
                scope[UNIT] = outer

    def _prepare(self, exchange: Exchange, scope: Scope, replay: Replay | None) -> None:
        """Do what only some options ask for."""
        unit = exchange.unit
        if self.deadline is not None:
            unit.until = earlier(unit.until, self.deadline)
        if (reads := self.causal_reads) is not None:
            seen = reads.positions(scope.get("headers", ()))
            unit.must_see = MustSee(seen, reads.wait, reads.names)
            exchange.is_secure = scope.get("scheme") == "https"
        if replay is not None:
            replay.enter(unit)
        if any(db in inspected for db in self.databases):
            unit.response = response = Response(exchange.forward)
            exchange.forward = response.send

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
