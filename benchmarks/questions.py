"""What is asked; the first contestant of a question is what others are compared to."""

from __future__ import annotations

import dataclasses
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from asgi_uow import UnitOfWorkMiddleware

from .apps import (
    HOOKS,
    INSERT,
    SELECT,
    NoOp,
    answer,
    awaits,
    by_hand,
    our_insert,
    our_select,
    ours,
    registers,
    registers_sync,
    starlette,
    unused,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping

    from asgi_uow._asgi import ASGIApp, Message

    Request: TypeAlias = Callable[[], Awaitable[None]]
    Maker: TypeAlias = Callable[[str, AsyncExitStack], ASGIApp]

PLACES = (
    "sqlite-aiosqlite",
    "mariadb-asyncmy",
    "postgresql-asyncpg",
    "postgresql-psycopg",
)
"""Databases and drivers."""


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """One block of the table."""

    name: str
    contestants: Mapping[str, Maker]
    place: str = ""
    """The database, if there is one."""
    parts: int = 1
    """How many of what is asked for one request does."""

    @asynccontextmanager
    async def contestant(self, name: str, url: str) -> AsyncGenerator[Request, None]:
        """Make an application, give the function that sends it one request."""
        async with AsyncExitStack() as stack:
            yield partial(ask, self.contestants[name](url, stack))


def questions() -> list[Question]:
    """Return all questions, in the order of the table."""
    return [
        Question(
            "untouched",
            {
                "no-op middleware": lambda *_: NoOp(answer),
                "ours": lambda *_: ours(answer),
            },
        ),
        Question(
            "untouched-starlette",
            {
                "no-op middleware": lambda *_: starlette(NoOp),
                "ours": lambda *_: starlette(UnitOfWorkMiddleware, unused()),
            },
        ),
        Question(
            "hook",
            {
                "awaited call": lambda *_: ours(awaits),
                "async hook": lambda *_: ours(registers),
                "hook in a thread": lambda *_: ours(registers_sync),
            },
            parts=HOOKS,
        ),
        *(_select(place) for place in PLACES),
        *(_insert(place) for place in PLACES),
    ]


def chosen(names: Iterable[str]) -> list[Question]:
    """Return the questions whose names begin with one of these."""
    return [each for each in questions() if each.name.startswith(tuple(names))]


def _select(place: str) -> Question:
    alike: dict[str, Any] = {
        "isolation_level": "AUTOCOMMIT",
        "skip_autocommit_rollback": True,
        "pool_reset_on_return": None,
    }
    # In AUTOCOMMIT mode SQLAlchemy still commits. On PostgreSQL the drivers know that
    # nothing is open; the others ask the database: a trip more than ours makes.
    with_commit = {"with a COMMIT": by_hand(SELECT, **alike)}
    return Question(
        f"select-{place}",
        {
            "same trips": by_hand(SELECT, sends_commit=False, **alike),
            **({} if place.startswith("postgresql") else with_commit),
            "as written": by_hand(SELECT),
            "ours": our_select,
        },
        place,
    )


def _insert(place: str) -> Question:
    return Question(
        f"insert-{place}",
        {
            "same trips": by_hand(INSERT, pool_reset_on_return=None),
            "as written": by_hand(INSERT),
            "ours": our_insert,
        },
        place,
    )


async def ask(app: ASGIApp) -> None:
    """Send one request as a server would."""
    await app(_scope(), _receive, _send)


def _scope() -> dict[str, object]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "server": ("127.0.0.1", 8000),
        "client": ("127.0.0.1", 50000),
        "scheme": "http",
        "method": "GET",
        "root_path": "",
        "path": "/",
        "raw_path": b"/",
        "query_string": b"",
        "headers": [(b"host", b"127.0.0.1:8000")],
        "state": {},
    }


async def _receive() -> Message:
    return {"type": "http.request", "body": b""}


async def _send(message: Message) -> None:
    pass
