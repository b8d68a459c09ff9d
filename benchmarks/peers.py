"""The same request with other libraries, each used as its documentation says.

Every engine has SQLAlchemy's default options; ours has those of `Database.from_url`.
A library stands on the framework that its documentation shows, and is compared with
hand-written code on the same framework. A library without hooks calls the functions
after its own commit where our code is there; else the handler commits, then calls.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from asgi_uow import (
    Database,
    UnitOfWorkMiddleware,
    after_commit,
    current_read_session,
    current_session,
)

from .apps import engine_of
from .hosts import behind

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from contextlib import AsyncExitStack

    from sqlalchemy.ext.asyncio import AsyncEngine

    from .hosts import Host

    Do: TypeAlias = Callable[[AsyncSession], Awaitable[int]]


@dataclasses.dataclass(frozen=True)
class Work:
    """What the handler of a request does."""

    do: Do | None
    """Works on a session, returns the status of the response; None needs no session."""
    hooks: tuple[Callable[[], Awaitable[None]], ...] = ()
    """Functions to call after the commit."""
    is_read: bool = False

    async def call_hooks(self) -> None:
        for hook in self.hooks:
            await hook()

    async def with_session(self, session: AsyncSession) -> int:
        return 200 if self.do is None else await self.do(session)

    async def with_commit(self, session: AsyncSession) -> int:
        """Commit in the handler, as a response that is no error is returned."""
        status = await self.with_session(session)
        if status < 400:
            await session.commit()
            await self.call_hooks()
        return status

    def in_handler(self, *, commits: bool = False) -> Do:
        """Return what a handler does whose library has no hooks."""
        return self.with_commit if commits or self.hooks else self.with_session


def bare(host: Host, work: Work, url: str, stack: AsyncExitStack) -> Any:  # noqa: ARG001
    async def handle(request: Any) -> int:  # noqa: ARG001
        return 200

    return host(handle, stack=stack)


def behind_nothing(
    host: Host, middleware: Any, work: Work, url: str, stack: AsyncExitStack
) -> Any:
    """Make the bare application, behind a middleware that passes everything on."""
    return behind(bare(host, work, url, stack), middleware)


def hand_written(host: Host, work: Work, url: str, stack: AsyncExitStack) -> Any:
    sessions = sessions_of(engine_of(url, stack))

    async def handle(request: Any) -> int:  # noqa: ARG001
        async with sessions.begin() as session:
            status = await work.with_session(session)
        await work.call_hooks()
        return status

    return host(handle, stack=stack)


def ours(
    host: Host, work: Work, url: str, stack: AsyncExitStack, **options: Any
) -> Any:
    database = Database.from_url(url, **options)
    stack.push_async_callback(database.dispose)
    session_of = current_read_session if work.is_read else current_session

    async def handle(request: Any) -> int:  # noqa: ARG001
        for hook in work.hooks:
            after_commit(hook)
        return 200 if work.do is None else await work.do(session_of())

    return behind(host(handle, stack=stack), UnitOfWorkMiddleware, database)


def context_async_sqlalchemy(
    host: Host, work: Work, url: str, stack: AsyncExitStack, *, on_fastapi: bool = False
) -> Any:
    """Use its middleware for FastAPI, or the one for every ASGI application."""
    peer: Any = importlib.import_module("context_async_sqlalchemy")
    engine = engine_of(url, stack)
    database = peer.DBConnect(_giving(engine), sessions_of, host=url)
    do = work.in_handler()

    async def handle(request: Any) -> int:  # noqa: ARG001
        return 200 if work.do is None else await do(await peer.db_session(database))

    app = host(handle, stack=stack)
    if not on_fastapi:
        return behind(app, peer.ASGIHTTPDBSessionMiddleware)
    tools: Any = importlib.import_module("context_async_sqlalchemy.fastapi_utils")
    tools.add_fastapi_http_db_session_middleware(app.app)
    return app


def advanced_alchemy(
    host: Host, work: Work, url: str, stack: AsyncExitStack, *, commits: bool = False
) -> Any:
    peer: Any = importlib.import_module("advanced_alchemy.extensions.starlette")
    config = peer.SQLAlchemyAsyncConfig(
        engine_instance=engine_of(url, stack),
        session_config=peer.AsyncSessionConfig(expire_on_commit=False),
        commit_mode="manual" if commits else "autocommit",
    )
    do = work.in_handler(commits=commits)

    async def handle(request: Any) -> int:
        if work.do is None:
            return 200
        return await do(alchemy.get_async_session(request))

    app = host(handle, stack=stack)
    alchemy = peer.AdvancedAlchemy(config=config, app=app.app)
    return app


def svcs(
    host: Host, work: Work, url: str, stack: AsyncExitStack, *, commits: bool = False
) -> Any:
    """Make the factory commit, or the handler."""
    peer: Any = importlib.import_module("svcs.starlette")
    sessions = sessions_of(engine_of(url, stack))

    async def commit_at_the_end() -> AsyncGenerator[AsyncSession]:
        async with sessions.begin() as session:
            yield session
        await work.call_hooks()

    async def lifespan(app: Any, registry: Any) -> AsyncGenerator[None]:  # noqa: ARG001
        factory = sessions if commits else commit_at_the_end
        # Without this option an exception in the handler would be a commit.
        registry.register_factory(AsyncSession, factory, suppress_context_exit=False)
        yield

    async def handle(request: Any) -> int:
        if work.do is None:
            return 200
        session = await peer.aget(request, AsyncSession)
        return await (work.with_commit if commits else work.with_session)(session)

    app = host(handle, stack=stack, lifespan=peer.lifespan(lifespan))
    return behind(app, peer.SVCSMiddleware)


def yield_dependency(
    host: Host, work: Work, url: str, stack: AsyncExitStack, *, scope: str = "request"
) -> Any:
    """Make FastAPI open the session; a request that needs none gets one as well."""
    peer: Any = importlib.import_module("fastapi")
    sessions = sessions_of(engine_of(url, stack))

    async def session() -> AsyncGenerator[AsyncSession]:
        async with sessions.begin() as session:
            yield session
        await work.call_hooks()

    dependency = peer.Depends(session, scope=scope)
    return host(work.with_session, stack=stack, dependency=dependency)


def fastapi_async_sqlalchemy(
    host: Host, work: Work, url: str, stack: AsyncExitStack
) -> Any:
    peer: Any = importlib.import_module("fastapi_async_sqlalchemy")
    middleware, db = peer.create_middleware_and_session_proxy()
    do = work.in_handler()

    async def handle(request: Any) -> int:  # noqa: ARG001
        return 200 if work.do is None else await do(db.session)

    app = host(handle, stack=stack)
    engine = engine_of(url, stack)
    return behind(app, middleware, custom_engine=engine, commit_on_exit=True)


def fastapi_sqla(host: Host, work: Work, url: str, stack: AsyncExitStack) -> Any:
    """Make its one engine from the environment; there is one application at a time."""
    peer: Any = importlib.import_module("fastapi_sqla")
    fastapi: Any = importlib.import_module("fastapi")
    log: Any = importlib.import_module("structlog")
    quiet = log.make_filtering_bound_logger(logging.CRITICAL)
    log.configure(wrapper_class=quiet)  # else it prints among our tables
    os.environ["sqlalchemy_url"] = url  # noqa: SIM112 - this is its name
    do = work.in_handler()

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncGenerator[None]:  # noqa: ARG001
        await peer.startup()
        yield
        await peer.async_sqla._async_session_factories["default"].kw["bind"].dispose()  # noqa: SLF001

    async def handle(session: Any) -> int:
        return 200 if work.do is None else await do(session)

    async def handle_nothing(request: Any) -> int:  # noqa: ARG001
        return 200

    if work.do is None:
        app = host(handle_nothing, stack=stack, lifespan=lifespan)
    else:
        dependency = fastapi.Depends(peer.AsyncSessionDependency())
        app = host(handle, stack=stack, lifespan=lifespan, dependency=dependency)
    peer.setup_middlewares(app.app)
    return app


def _giving(engine: AsyncEngine) -> Callable[[str], AsyncEngine]:
    def give(host: str) -> AsyncEngine:  # noqa: ARG001
        return engine

    return give


def sessions_of(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    return async_sessionmaker(engine, expire_on_commit=False)
