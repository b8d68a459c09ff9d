"""Sandboxes: what a test does is in one transaction, and rolled back at its end."""

from __future__ import annotations

import asyncio
import os
import secrets
from asyncio import _get_running_loop
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Self

from sqlalchemy.engine.base import OptionEngine

from asgi_uow import errors
from asgi_uow._asgi import respond
from asgi_uow._concurrency import run_to_completion
from asgi_uow._databases import loops
from asgi_uow._databases.engines import check_databases
from asgi_uow._testing.handed import HandedPool
from asgi_uow._testing.shared import SharedConnection, background, hand_over

if TYPE_CHECKING:
    import sqlalchemy as sa

    from asgi_uow._asgi import ASGIApp, Receive, Scope, Send
    from asgi_uow._databases.engines import Engines

HEADER = "x-asgi-uow-sandbox"

_entered: ContextVar[sandbox | None] = ContextVar("asgi_uow.sandbox", default=None)
_of_process: list[sandbox] = []
"""Those entered by `with`: where no context names one, the last of them is meant."""
_by_token: dict[str, sandbox] = {}


class sandbox:  # noqa: N801  # used like a function: async with sandbox(db)
    """Everything inside is one transaction per database, rolled back at the end.

    `async with sandbox(db):` or, in a synchronous test, `with sandbox(db):`. Requests,
    `async with db:`, hooks, keys and `db.engine` itself work as outside: what they
    commit is a savepoint of the sandbox's only connection, for which they take turns.
    Whoever waits for 10 seconds gets a `SandboxError` that names the holder.

    `headers` name the sandbox to a server with `SandboxMiddleware`. By `with` it is
    that of the whole process, for servers and threads that the test has not started.
    Raises `SandboxError` where a database cannot undo what is written to it.
    """

    def __init__(self, *databases: Engines) -> None:
        check_databases("sandbox(db)", databases)
        self.databases = databases
        self.headers: dict[str, str] = {HEADER: secrets.token_hex(16)}
        self._connections: dict[Any, SharedConnection] = {}
        self._pools: dict[loops.LoopEngine, HandedPool] = {}
        self._around: sandbox | None = None

    async def __aenter__(self) -> Self:
        """Connect and begin."""
        try:
            await run_to_completion(hand_over(background(), self._open()))
        except asyncio.CancelledError:
            await run_to_completion(hand_over(background(), self._close()))
            raise
        self._around = _entered.get()
        _entered.set(self)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Roll everything back."""
        _entered.set(self._around)
        await run_to_completion(hand_over(background(), self._close()))

    def __enter__(self) -> Self:
        """Connect and begin, for the whole process."""
        asyncio.run_coroutine_threadsafe(self._open(), background()).result()
        self._around = _entered.get()
        _entered.set(self)
        _of_process.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        """Roll everything back."""
        _of_process.remove(self)
        _entered.set(self._around)
        asyncio.run_coroutine_threadsafe(self._close(), background()).result()

    async def _open(self) -> None:
        if self._connections:
            message = "Entered before: a new sandbox(db) for each block."
            raise errors.SandboxError(message)
        loops.find_sandbox = _pool_for
        try:
            for db in self.databases:
                shared = SharedConnection(db)
                await shared.open()
                for each in (db.engine, *db.readers):
                    self._connections[loops.attach(each.sync_engine)] = shared
                    # One that has never connected knows nothing of its server.
                    for name, value in vars(shared.dialect).items():
                        vars(each.dialect).setdefault(name, value)
        except BaseException:
            await self._close()
            raise
        _by_token[self.headers[HEADER]] = self

    async def _close(self) -> None:
        _by_token.pop(self.headers[HEADER], None)
        for each in dict.fromkeys(self._connections.values()):
            await each.end()

    def pool_for(self, engine: loops.LoopEngine) -> sa.Pool | None:
        """Give what connects in the place of an engine's own pool, if it is inside."""
        if engine not in self._pools and (shared := self._connection_to(engine)):
            self._pools[engine] = HandedPool(shared, engine)
        return self._pools.get(engine)

    def _connection_to(self, engine: Any) -> SharedConnection | None:
        """Give that of an engine, or of what it is derived from; also one around."""
        while engine not in self._connections and isinstance(engine, OptionEngine):
            engine = engine._proxied  # noqa: SLF001
        found = self._connections.get(engine)
        outside = self._around if found is None else None
        return found if outside is None else outside._connection_to(engine)  # noqa: SLF001


def here() -> sandbox | None:
    """Give the sandbox in which the caller is."""
    return _entered.get() or (_of_process[-1] if _of_process else None)


def _pool_for(engine: loops.LoopEngine) -> sa.Pool | None:
    found = here()
    if found is None or _get_running_loop() is background():
        return None
    return found.pool_for(engine)


class SandboxMiddleware:
    """Has a request with the headers of a sandbox run in it: for a live server.

    The server is in the process of the test. A sandbox that is not open, such as one
    of a test that has ended, is answered with 409; without headers nothing is done.
    Raises `ConfigurationError` outside of pytest, unless `outside_tests` is true: who
    could name a sandbox would have what is done undone.
    """

    def __init__(self, app: ASGIApp, *, outside_tests: bool = False) -> None:
        if not (outside_tests or "PYTEST_VERSION" in os.environ):
            message = (
                "SandboxMiddleware is for tests, and this is not pytest: leave it out "
                "here, or pass outside_tests=True."
            )
            raise errors.ConfigurationError(message)
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve in the sandbox of the headers."""
        headers = dict(scope.get("headers") or ())
        token = headers.get(HEADER.encode(), b"").decode("latin-1")
        if not token:
            return await self.app(scope, receive, send)
        if (named := _by_token.get(token)) is None:
            if scope["type"] != "http":
                return await send({"type": "websocket.close", "code": 1008})
            body = b"The sandbox of this test is not open, or is of another process."
            about = {"content-type": "text/plain; charset=utf-8"}
            return await respond(send, 409, about, body)
        before = _entered.set(named)
        try:
            await self.app(scope, receive, send)
        finally:
            _entered.reset(before)
