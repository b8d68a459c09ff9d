"""Replay where the conflict is met by a unit of work inside the request's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy.exc import DBAPIError

import asgi_uow as uow
from asgi_uow import Database, Retry, UnitOfWorkMiddleware
from asgi_uow.observers import RetryScheduled
from tests.entrypoints.test_replay_apart import RETRY, another, ask, of
from tests.support.asgi import Client, Response, http_scope, respond
from tests.support.conflicts import READ, WRITE, conflict, conflicting_shop
from tests.support.databases import on

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from asgi_uow._asgi import ASGIApp, Receive, Scope, Send
    from tests.servers import Backend

pytestmark = on("aiosqlite")


def as_middleware(app: ASGIApp, other: Database) -> ASGIApp:
    return UnitOfWorkMiddleware(app, other)


def as_block(app: ASGIApp, other: Database) -> ASGIApp:
    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async with other:
            await app(scope, receive, send)

    return wrapped


def as_independent_unit(app: ASGIApp, other: Database) -> ASGIApp:
    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async with uow.unit_of_work(other, independent=True):
            await app(scope, receive, send)

    return wrapped


WAYS = as_middleware, as_block, as_independent_unit


class Inside:
    """An application in a unit of its own, whose attempts meet conflicts."""

    def __init__(self, beside: Backend, conflicts: int = 1) -> None:
        self.beside, self.conflicts = beside, conflicts
        self.attempts: list[tuple[int, bool]] = []
        self.reason: str | None = None
        self.is_handled = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert "http" == scope["type"]
        await receive()
        unit = uow.current_unit_of_work()
        self.attempts.append((unit.attempt, unit.is_last_attempt))
        try:
            if len(self.attempts) <= self.conflicts:
                await conflict(self.beside)
            await uow.current_session().execute(WRITE)
        except DBAPIError:
            if self.reason is not None:
                uow.set_rollback_only(self.reason)
            if not self.is_handled:
                raise
            return await respond(send, 409)
        return await respond(send)

    async def serve(
        self, db: Database, other: Database, wrap: Callable[..., ASGIApp]
    ) -> Response:
        response = Response()
        observers = [response.events]
        app = wrap(self, other)
        app = UnitOfWorkMiddleware(app, db, retry=RETRY, observers=observers)
        scope, receive = http_scope(), of(b"")
        return await Client(app).request(scope=scope, receive=receive, into=response)


@pytest.mark.parametrize("wrap", WAYS)
async def test_it_is_replayed(
    backend: Backend, tmp_path: Path, wrap: Callable[..., ASGIApp]
) -> None:
    """The whole request is done again, in units that know which attempt it is."""
    async with another(tmp_path) as (other, beside), conflicting_shop(backend) as db:
        site = Inside(beside)
        response = await site.serve(db, other, wrap)
        assert (200, None) == (response.status, response.error)
        assert [(1, False), (2, False)] == site.attempts
        assert 1 == await beside.scalar(READ)
        assert 1 == len(response.events.of(RetryScheduled))


@pytest.mark.parametrize("wrap", WAYS)
async def test_used_up(
    backend: Backend, tmp_path: Path, wrap: Callable[..., ASGIApp]
) -> None:
    """After the last attempt the client is asked to come again."""
    async with another(tmp_path) as (other, beside), conflicting_shop(backend) as db:
        site = Inside(beside, conflicts=3)
        response = await site.serve(db, other, wrap)
        assert (503, "1") == (response.status, response.headers["retry-after"])
        assert [(1, False), (2, False), (3, True)] == site.attempts


async def test_run_that_is_used_up(backend: Backend, tmp_path: Path) -> None:
    """What `Retry.run` could not do counts as what any unit inside could not."""
    attempts: list[int] = []

    async def job() -> None:
        attempts.append(uow.current_unit_of_work().attempt)
        if len(attempts) <= 4:
            await conflict(beside)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await Retry(attempts=2, backoff=0.001).run(other, job)
        await respond(send)

    async with another(tmp_path) as (other, beside), conflicting_shop(backend) as db:
        response = await ask(app, db)
        assert (200, [1, 2, 1, 2, 1]) == (response.status, attempts)


async def test_an_answer_to_it(backend: Backend, tmp_path: Path) -> None:
    """What a middleware inside has let pass is held, and replaced."""
    async with another(tmp_path) as (other, beside), conflicting_shop(backend) as db:
        site = Inside(beside)
        site.is_handled = True
        response = await site.serve(db, other, as_middleware)
        assert (200, 2) == (response.status, len(site.attempts))


async def test_what_is_not_wanted(backend: Backend, tmp_path: Path) -> None:
    """A unit inside that was told to roll back asks for nothing."""
    async with another(tmp_path) as (other, beside), conflicting_shop(backend) as db:
        site = Inside(beside)
        site.is_handled, site.reason = True, "enough"
        response = await site.serve(db, other, as_middleware)
        assert (409, 1) == (response.status, len(site.attempts))
