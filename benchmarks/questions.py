"""What is asked; the first contestant of a question is what others are compared to."""

from __future__ import annotations

import dataclasses
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, TypeAlias

from asgi_uow import (
    Retry,
    UnitOfWorkMiddleware,
    after_commit,
    current_read_session,
    current_session,
)

from . import apps, contestants, peers
from .apps import INSERT, SELECT

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping

    from sqlalchemy.ext.asyncio import AsyncSession

    from asgi_uow._asgi import ASGIApp, Message, Scope
    from asgi_uow.observers import Event

    from .apps import Maker

    Request: TypeAlias = Callable[[], Awaitable[None]]

PLACES = {  # and SQLAlchemy's dialects
    "sqlite-aiosqlite": "sqlite+aiosqlite",
    "mariadb-asyncmy": "mysql+asyncmy",
    "postgresql-asyncpg": "postgresql+asyncpg",
    "postgresql-psycopg": "postgresql+psycopg",
}
LEFT_OUT = {("fastapi-sqla", "postgresql-psycopg")}  # for it this driver is synchronous
HOOKS = 10
READS = 10
ALIKE: dict[str, Any] = {
    "isolation_level": "AUTOCOMMIT",
    "skip_autocommit_rollback": True,
    "pool_reset_on_return": None,
}
"""Options of an engine that sends what our read engines send."""


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


def chosen(names: Iterable[str]) -> list[Question]:
    """Return the questions whose names begin with one of these, in order."""
    beginnings = tuple(names)
    if any(each.startswith("peers") for each in beginnings):
        contestants.load()  # once, before somebody forks
    return [each for each in _questions() if each.name.startswith(beginnings)]


def _questions() -> Iterable[Question]:
    yield _without_database(
        "untouched",
        {
            "no-op middleware": lambda: apps.NoOp(apps.handler(_nothing)),
            "ours": lambda: apps.in_our_middleware(_nothing),
        },
    )
    yield _without_database(
        "untouched-starlette",
        {
            "no-op middleware": lambda: apps.on_starlette(apps.NoOp),
            "ours": lambda: apps.on_starlette(
                UnitOfWorkMiddleware, apps.unused_database()
            ),
        },
    )
    yield _without_database(
        "hook",
        {
            "awaited call": lambda: apps.in_our_middleware(_await_calls),
            "async hook": lambda: apps.in_our_middleware(_register(_nothing)),
            "hook in a thread": lambda: apps.in_our_middleware(
                _register(_nothing_sync)
            ),
        },
        parts=HOOKS,
    )
    for place in PLACES:
        yield Question(f"select-{place}", _selecting(place), place)
    for place in PLACES:
        yield Question(f"reads-{place}", _reading(), place, parts=READS)
    for place in PLACES:
        yield Question(f"insert-{place}", _inserting(), place)
    for place in PLACES:
        yield Question(f"retry-select-{place}", _with_retry("select"), place)
        yield Question(f"retry-insert-{place}", _with_retry("insert"), place)
    for place in PLACES:
        yield Question(f"seen-insert-{place}", _seen(), place)
    yield from _beside_peers()


def _beside_peers() -> Iterable[Question]:
    """Ask other libraries as well: those of one framework stand side by side."""
    for framework, host in contestants.FRAMEWORKS.items():
        makers: dict[str, Maker] = {
            "bare app": partial(peers.bare, host, UNTOUCHED),
            "no-op middleware": partial(
                peers.behind_nothing, host, apps.NoOp, UNTOUCHED
            ),
            **_makers(framework, UNTOUCHED),
        }
        if contestants.installed(framework):
            unused = {name: partial(_on_no_file, make) for name, make in makers.items()}
            yield Question(f"peers-untouched-{framework}", unused)
    for name, work in PEERS_WORK.items():
        for place, framework in product(PLACES, contestants.FRAMEWORKS):
            if makers := _makers(framework, work, place):
                yield Question(f"peers-{name}-{place}-{framework}", makers, place)


def _makers(framework: str, work: peers.Work, place: str = "") -> dict[str, Maker]:
    return {
        each.name: each.maker(work)
        for each in contestants.installed(framework)
        if (each.name, place) not in LEFT_OUT
    }


def _without_database(
    name: str, contestants: Mapping[str, Callable[[], ASGIApp]], parts: int = 1
) -> Question:
    def make(contestant: str, url: str, stack: AsyncExitStack) -> ASGIApp:  # noqa: ARG001
        return contestants[contestant]()

    return Question(
        name, {each: partial(make, each) for each in contestants}, parts=parts
    )


def _on_no_file(maker: Maker, url: str, stack: AsyncExitStack) -> ASGIApp:  # noqa: ARG001
    return maker("sqlite+aiosqlite://", stack)


def _selecting(place: str) -> dict[str, Maker]:
    # In AUTOCOMMIT mode SQLAlchemy still commits. PostgreSQL's drivers know that
    # nothing is open; the others ask the database: a trip more than ours makes.
    with_commit = {"with a COMMIT": partial(apps.by_hand, SELECT, **ALIKE)}
    return {
        "same trips": partial(apps.by_hand, SELECT, sends_commit=False, **ALIKE),
        **({} if place.startswith("postgresql") else with_commit),
        "as written": partial(apps.by_hand, SELECT),
        "ours": partial(apps.ours, SELECT, current_read_session),
    }


def _reading() -> dict[str, Maker]:
    """Several reads of one request, on one connection or on one for each."""
    by_hand = partial(apps.by_hand, SELECT, times=READS, sends_commit=False, **ALIKE)
    ours = partial(apps.ours, SELECT, current_read_session, times=READS)
    return {
        "by hand, held": by_hand,
        "ours, held": partial(ours, holds=True),
        "ours, given back": ours,
    }


def _inserting() -> dict[str, Maker]:
    return {
        "same trips": partial(apps.by_hand, INSERT, pool_reset_on_return=None),
        "as written": partial(apps.by_hand, INSERT),
        "ours": partial(apps.ours, INSERT, current_session),
    }


def _with_retry(name: str) -> dict[str, Maker]:
    """A request without a conflict that could be replayed if it had one."""
    what = {
        "select": (SELECT, current_read_session),
        "insert": (INSERT, current_session),
    }
    ours = partial(apps.ours, *what[name])
    return {"ours": ours, "ours, with retry": partial(ours, retry=Retry())}


def _seen() -> dict[str, Maker]:
    """What it costs that somebody is told what a request did, or inspects it."""
    ours = partial(apps.ours, INSERT, current_session)
    return {
        "ours": ours,
        "ours, with an observer": partial(ours, observers=(_take,)),
        "ours, with an inspector": partial(ours, is_inspected=True),
    }


def _take(_: Event) -> None:
    pass


async def _nothing(*_: Scope) -> None:
    pass


def _nothing_sync() -> None:
    pass


async def _await_calls(scope: Scope) -> None:  # noqa: ARG001
    for _ in range(HOOKS):
        await _nothing()


def _register(hook: Callable[[], object]) -> Callable[[Scope], Awaitable[None]]:
    async def register(scope: Scope) -> None:  # noqa: ARG001
        for _ in range(HOOKS):
            after_commit(hook)

    return register


async def _select(session: AsyncSession) -> int:
    await session.execute(SELECT)
    return 200


async def _insert(session: AsyncSession) -> int:
    await session.execute(INSERT)
    return 200


UNTOUCHED = peers.Work(None)
PEERS_WORK = {
    "select": peers.Work(_select, is_read=True),
    "insert": peers.Work(_insert),
    "hooks": peers.Work(_insert, (_nothing,) * 3),
}


async def ask(app: ASGIApp) -> None:
    """Send one request as a server would."""
    await app(http_scope(), _receive, _send)


def http_scope() -> dict[str, object]:
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
