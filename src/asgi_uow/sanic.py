"""The same unit of work on Sanic's own server, which does not call ASGI middleware."""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from sanic import HTTPResponse
from sanic.exceptions import ServerError
from sanic.http.constants import HTTP

from asgi_uow._asgi import START, problem
from asgi_uow._decision import commit_below_400
from asgi_uow._entrypoints.middleware import UnitOfWorkMiddleware
from asgi_uow._unit.unit import current
from asgi_uow.database import Database
from asgi_uow.errors import ConfigurationError, UnitOfWorkFailedError
from asgi_uow.observers import LoggingObserver

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sanic import Request, Sanic

    from asgi_uow._asgi import Message, Receive, Scope, Send
    from asgi_uow._decision import CommitWhen
    from asgi_uow._entrypoints.idempotency import Idempotency
    from asgi_uow._entrypoints.replay import Retry
    from asgi_uow._reading.causal import CausalReads
    from asgi_uow.observers import Observer

__all__ = ["setup"]

REQUEST = "asgi_uow.sanic.request"
WRITE = "asgi_uow.sanic.write"


def setup(
    app: Sanic[Any, Any],
    *databases: Database,
    commit_when: CommitWhen = commit_below_400,
    observers: Sequence[Observer] = (LoggingObserver(),),
    retry: Retry | None = None,
    idempotency: Idempotency | None = None,
    causal_reads: CausalReads | None = None,
    deadline: float | None = None,
    commit_timeout: float | None = 30.0,
    hook_timeout: float | None = 5.0,
    held_idle: float | None = 1.0,
    server_timing: bool = False,
) -> Database:
    """Give every HTTP request of `app` one unit of work on `databases`.

    It is committed or rolled back just before the first byte of the response is
    written; the options are those of `UnitOfWorkMiddleware`, without `error_app`. Work
    that was not kept is raised as `UnitOfWorkFailedError`, which `@app.exception(...)`
    may answer, else the middleware does. Websockets use `async with db:` per message.

    Without a database one is made with `Database.from_config(app.config)` and is
    also `app.ctx.db`. Returns the first database. Connections are closed after the
    server has stopped, in every worker process.

    Raises `ConfigurationError` if called twice for one application, and at its start
    with HTTP/3 or under an ASGI server: wrap it in `UnitOfWorkMiddleware` there. For
    `retry` and `idempotency` too: this server reads a request once, into an object that
    handlers change, and writes a response in pieces.
    """
    _refuse(app, retry, idempotency)
    if not databases:
        app.ctx.db = Database.from_config(app.config)
        databases = (app.ctx.db,)
    middleware = UnitOfWorkMiddleware(
        _application,
        *databases,
        commit_when=commit_when,
        observers=observers,
        causal_reads=causal_reads,
        error_app=None,
        deadline=deadline,
        commit_timeout=commit_timeout,
        hook_timeout=hook_timeout,
        held_idle=held_idle,
        server_timing=server_timing,
    )
    server = app.ctx.asgi_uow = _Server(middleware)
    # First, before the application's own listener uses the database.
    app.before_server_start(server.start, priority=1000)
    app.after_server_stop(server.stop)
    app.add_signal(server.take, "http.lifecycle.request")
    return databases[0]


def _refuse(app: Sanic[Any, Any], *unfit: object) -> None:
    if any(each is not None for each in unfit):
        message = "retry and idempotency need an ASGI server and UnitOfWorkMiddleware: "
        message += "Sanic's own keeps neither a request nor a response."
        raise ConfigurationError(message)
    if hasattr(app.ctx, "asgi_uow"):
        message = "setup() was called for this application: pass all databases at once."
        raise ConfigurationError(message)


@dataclasses.dataclass(eq=False)
class _Server:
    """Has the middleware serve Sanic's requests; the start is their first write."""

    middleware: UnitOfWorkMiddleware
    serving: set[asyncio.Task[Any]] = dataclasses.field(default_factory=set)

    async def start(self, app: Sanic[Any, Any]) -> None:
        if app.asgi:
            message = "Under an ASGI server run UnitOfWorkMiddleware(app, db) instead."
            raise ConfigurationError(message)
        servers = app.state.server_info
        if any(each.settings.get("version") == HTTP.VERSION_3 for each in servers):
            message = "setup() is for HTTP/1.1; Sanic's HTTP/3 is experimental."
            raise ConfigurationError(message)
        with suppress(ServerError):  # the application has a handler for everything
            app.error_handler.add(Exception, asgi_uow_answer)

    async def stop(self, _: Sanic[Any, Any]) -> None:
        """Let units whose client has gone reach their end, then close the engines."""
        if self.serving:
            timeout = self.middleware.options.commit_timeout
            await asyncio.wait(self.serving, timeout=timeout)
        for db in self.middleware.databases:
            await db.dispose_owned()

    async def take(self, request: Request[Any, Any]) -> None:
        """Serve this request, and the others of its connection, in Sanic's place."""
        protocol: Any = request.protocol
        protocol.request_handler = self._serve

    async def _serve(self, request: Request[Any, Any]) -> None:
        task: Any = asyncio.current_task()
        upgrade = request.headers.getone("upgrade", "").lower() == "websocket"
        scope: Scope = {"type": "websocket" if upgrade else "http", REQUEST: request}
        scope |= {"method": request.method, "path": request.path}
        if self.middleware.causal_reads is not None:
            encode = partial(str.encode, errors="surrogateescape")  # as Sanic decodes
            pairs = request.headers.items()
            headers = [(encode(name), encode(value)) for name, value in pairs]
            scope |= {"headers": headers, "scheme": request.scheme}
        self.serving.add(task)
        try:
            await self.middleware(scope, _receive, lambda start: start[WRITE](start))
        finally:
            self.serving.discard(task)


async def _application(scope: Scope, _: Receive, send: Send) -> None:
    request: Request[Any, Any] = scope[REQUEST]
    if scope["type"] == "http":
        _hold_first_write(request, scope, send)
    await request.app.handle_request(request)


def _hold_first_write(request: Request[Any, Any], scope: Scope, send: Send) -> None:
    """Replace the function that writes status line and headers.

    A response middleware would be too early: its errors are logged and the response
    is sent. The signal `http.lifecycle.response` is too late for a stream.
    https://github.com/sanic-org/sanic/blob/v25.12.1/sanic/http/http1.py#L92
    """
    stream: Any = request.stream
    write_head = stream.response_func
    was_refused = False

    async def gate(data: bytes, end_stream: bool) -> None:  # noqa: FBT001  # Sanic's
        nonlocal was_refused
        status, fields = stream.response.status, stream.response.processed_headers
        headers = [(name.lower(), value) for name, value in fields]
        scope["path_template"] = request.uri_template

        async def write(message: Message) -> None:
            if stream.response_func is gate:
                for name, value in message["headers"][len(headers) :]:  # added by us
                    stream.response.headers.add(name.decode(), value.decode())
                await write_head(data, end_stream)
            else:  # another task's send, which came in meanwhile, was the first
                await stream.response.send(data, end_stream)

        start = {"type": START, "status": status, "headers": headers, WRITE: write}
        try:
            await send(start)
        except UnitOfWorkFailedError as failure:
            if not was_refused:
                was_refused = True
                raise
            # An exception handler answered it with a success.
            stream.respond(_problem(request, failure))
            await gate(b"", True)  # noqa: FBT003

    stream.response_func = gate


async def _receive() -> Message:
    raise NotImplementedError  # Sanic reads the body itself


def asgi_uow_answer(
    request: Request[Any, Any], error: Exception
) -> HTTPResponse | None:
    """Answer what the middleware would; None leaves it to Sanic's own pages."""
    unit = current.get()
    may_help = unit is not None and unit.share().may_repeat(error)
    is_ours = may_help or isinstance(error, UnitOfWorkFailedError)
    return _problem(request, error) if is_ours else None


def _problem(request: Request[Any, Any], error: Exception) -> HTTPResponse:
    request.app.error_handler.log(request, error)
    status, headers, body = problem(error)
    return HTTPResponse(body, status, headers)
