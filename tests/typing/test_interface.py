"""mypy and pyright check this file; the tests only show that it also runs.

A comment that ignores an error is a claim: without that error the comment itself is
one, for mypy (`warn_unused_ignores`) and for pyright alike.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from typing import TYPE_CHECKING, Any, assert_type

import pytest
from fastapi import FastAPI
from sqlalchemy import String, column, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.middleware import Middleware

import asgi_uow as uow
from asgi_uow import Database
from asgi_uow.observers import Event, HookFailed, LoggingObserver

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping

    from sqlalchemy import TextClause

PEOPLE = "SELECT name FROM (SELECT 'Ann' AS name) AS person WHERE name = :name"


@pytest.fixture
async def db() -> AsyncIterator[Database]:
    """An in-memory database."""
    db = Database.from_url("sqlite://")
    yield db
    await db.dispose()


async def plain_app(
    scope: MutableMapping[str, Any],
    receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
    send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
) -> None:
    """An ASGI app with Starlette's types."""


async def loose_app(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI app with no types to speak of."""


def keep_4xx(status: int, headers: list[tuple[bytes, bytes]]) -> bool:
    return status < 500 or (b"x-keep", b"1") in headers


def observe(event: Event) -> None:
    assert isinstance(event, HookFailed)
    assert_type(event.hook, str)


async def test_middleware(db: Database) -> None:
    """Every framework's way to add the middleware is well typed."""
    Starlette().add_middleware(uow.UnitOfWorkMiddleware, db)
    FastAPI().add_middleware(uow.UnitOfWorkMiddleware, db, hook_timeout=1.0)
    Starlette(middleware=[Middleware(uow.UnitOfWorkMiddleware, db, db)])
    for app in (plain_app, loose_app, Starlette(), FastAPI()):
        wrapped = uow.UnitOfWorkMiddleware(app, db, commit_when=keep_4xx)
        uow.UnitOfWorkMiddleware(
            wrapped,
            db,
            observers=(LoggingObserver(), observe),
            error_app=loose_app,
            commit_timeout=None,
        )
    assert keep_4xx(404, [])
    observe(HookFailed("after_commit", "greet", ValueError()))


async def test_units(db: Database) -> None:
    """A block gives a unit, a unit gives sessions, a session is SQLAlchemy's."""
    async with db as unit:
        assert_type(unit, uow.UnitOfWork)
        assert_type(unit.session(), uow.Session)
        assert_type(unit.read_session(db), uow.Session)
        assert_type(db.read, uow.Session)
        assert_type(db.write, uow.Session)
        assert_type(uow.current_session(), uow.Session)
        assert_type(uow.current_read_session(db), uow.Session)
        as_sqlalchemy: AsyncSession = uow.current_session()
        assert isinstance(as_sqlalchemy, AsyncSession)
        assert uow.current_unit_of_work() is unit
    async with uow.unit_of_work(db) as unit:
        assert_type(unit, uow.UnitOfWork)


async def test_rows(db: Database) -> None:
    """Rows keep their types; plain strings are accepted and give rows of anything."""
    name = column("name", String)
    number = column("number", String)
    person = select(name, number).select_from(text_table())
    async with db:
        session = uow.current_session()
        for row in await session.execute(person):
            first, second = row
            assert_type(first, str)
            assert_type(second, str)
        names = select(name).select_from(text_table())
        assert_type(await session.scalar(names), str | None)
        assert_type((await session.scalars(names)).one(), str)
        async for one in await session.stream_scalars(names):
            assert_type(one, str)
        assert "Ann" == await session.scalar(PEOPLE, name="Ann")
        assert_type((await session.execute(PEOPLE, {"name": "Ann"})).one()[0], Any)


def text_table() -> TextClause:
    return text("(SELECT 'Ann' AS name, '1' AS number) AS person")


def greet(name: str, *, loud: bool = False) -> str:
    return name.upper() if loud else name


async def send_mail(name: str) -> int:
    return len(name)


@uow.deferred
def greet_later(name: str, *, loud: bool = False) -> str:
    return greet(name, loud=loud)


def is_known(name: str) -> bool:
    return name != ""


@uow.deferred(when=is_known)
async def mail_later(name: str) -> int:
    return await send_mail(name)


class Mailer:
    def has_name(self, name: str) -> bool:
        return name != ""

    @uow.deferred
    def send(self, name: str) -> int:
        return len(name)

    @uow.deferred(when=has_name)
    async def send_later(self, name: str) -> int:
        return await send_mail(name)

    @staticmethod
    @uow.deferred
    def greet(name: str) -> int:
        return len(name)

    @classmethod
    @uow.deferred
    def make(cls, name: str) -> int:
        return len(name)


async def test_deferred_methods(db: Database) -> None:
    """Deferred methods keep their signature, and return None."""
    async with db:
        assert_type(Mailer().send("Ann"), None)
        assert_type(Mailer().send_later(name="Ann"), None)
        assert_type(Mailer().send_later(""), None)
        assert_type(Mailer.greet("Ann"), None)
        assert_type(Mailer.make("Ann"), None)
        with pytest.raises(TypeError):
            Mailer().send_later()  # type: ignore[call-arg]


async def test_hooks(db: Database) -> None:
    """Hooks are checked against the arguments of what they call."""
    async with db:
        for register in (
            uow.before_commit,
            uow.after_commit,
            uow.after_rollback,
            uow.after_response,
        ):
            assert_type(register(greet, "Ann", loud=True), None)
            register(send_mail, name="Ann")
            register(print, "Ann", end="")
        assert_type(greet_later("Ann", loud=True), None)
        assert_type(mail_later("Ann"), None)
        assert_type(mail_later(""), None)


async def test_mistakes(db: Database) -> None:
    """What would fail in the hook is an error where it is registered."""
    async with db:
        uow.after_commit(greet, 1)  # type: ignore[arg-type]
        uow.after_commit(greet, "Ann", quiet=True)  # type: ignore[call-arg]
        uow.before_commit(send_mail)  # type: ignore[call-arg]
        greet_later(1)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            mail_later()  # type: ignore[call-arg]
        with pytest.raises(TypeError):
            uow.after_commit(greet("Ann"))  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            uow.UnitOfWorkMiddleware(loose_app, db, commit_timout=1)  # type: ignore[call-arg]
        uow.set_rollback_only("none of these is to be called")
