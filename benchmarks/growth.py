"""Count how the cost of a request grows: `python -m benchmarks.growth`.

With more hooks, savepoints, databases, open blocks. The cost of one more must not
grow with their number.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
from contextlib import AsyncExitStack
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from asgi_uow import (
    Database,
    UnitOfWorkMiddleware,
    after_commit,
    current_session,
    unit_of_work,
)

from . import instructions
from .apps import SELECT, handler, in_our_middleware, unused_database
from .databases import Databases
from .questions import Question
from .tables import print_table

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence
    from typing import TypeAlias

    from sqlalchemy.ext.asyncio import AsyncSession

    from asgi_uow._asgi import ASGIApp, Scope

    Case: TypeAlias = Callable[[int, str, AsyncExitStack], ASGIApp]
    Work: TypeAlias = Callable[[int, AsyncSession], Awaitable[None]]

REQUESTS = (5, 15)
LINEAR = 1.1
"""One more may cost so many times as much among many as among few."""
TITLES = ("number", instructions.TITLES[0], "for each", "growth", "grows")
SQLITE = "sqlite-aiosqlite"
UNUSED_SQLITE = "sqlite:///never-opened.db"
UNUSED_SERVER = "postgresql+asyncpg://nobody@127.0.0.1/nothing"


@dataclasses.dataclass(frozen=True)
class Growth:
    """What a request costs with more and more of something."""

    what: str
    costs: dict[int, float]
    """By how many there are."""

    @property
    def bend(self) -> float:
        """How many times as much one more costs at the end as before it.

        One that costs nearly nothing before counts as a hundredth of the mean.
        """
        slopes = [
            (more - fewer) / (many - few)
            for (few, fewer), (many, more) in pairwise(self.costs.items())
        ]
        number, cost = list(self.costs.items())[-2]
        return slopes[-1] / max(slopes[-2], cost / number / 100)

    @property
    def is_linear(self) -> bool:
        """Whether one more costs no more among many than among few."""
        return self.bend <= LINEAR

    def rows(self) -> list[tuple[str, ...]]:
        """Return the lines of a table."""
        verdict = "linearly or less" if self.is_linear else "FASTER THAN LINEARLY"
        previous = [0.0, *self.costs.values()]
        return [
            (
                self.what,
                f"{number:,}",
                f"{cost:,.0f}",
                f"{cost / number:,.0f}",
                f"{cost / before:.2f}" if before else "",
                f"{verdict} ({self.bend:.2f})" if number == max(self.costs) else "",
            )
            for (number, cost), before in zip(
                self.costs.items(), previous, strict=False
            )
        ]


def growing(names: Iterable[str] = ("growth",)) -> list[Question]:
    """Return the questions whose names begin with one of these."""
    return [each for each in _questions() if each.name.startswith(tuple(names))]


def _questions() -> Iterable[Question]:
    few, many = (1, 10, 100), (1, 10, 100, 1000)
    yield _question("hooks", many, _hooks)
    yield _question("savepoints", few, partial(_ours, _in_turn), SQLITE)
    yield _question("savepoints-by-hand", few, partial(_by_hand, _in_turn), SQLITE)
    yield _question("savepoints-with-hooks", few, partial(_ours, _hooked), SQLITE)
    deep, databases = (1, 10, 50), (1, 2, 4, 8)
    yield _question("depth", deep, partial(_ours, _nested), SQLITE)
    yield _question("depth-by-hand", deep, partial(_by_hand, _nested), SQLITE)
    yield _question("open-blocks-sqlite", deep, partial(_blocks, UNUSED_SQLITE))
    yield _question("open-blocks-server", deep, partial(_blocks, UNUSED_SERVER))
    yield _question("databases", databases, _databases, SQLITE)
    yield _question("databases-untouched", databases, _untouched)


def _question(
    name: str, numbers: Sequence[int], case: Case, place: str = ""
) -> Question:
    makers = {str(number): partial(case, number) for number in numbers}
    return Question(f"growth-{name}", makers, place)


def _hooks(number: int, url: str, stack: AsyncExitStack) -> ASGIApp:  # noqa: ARG001
    async def register(scope: Scope) -> None:  # noqa: ARG001
        for _ in range(number):
            after_commit(_nothing)

    return in_our_middleware(register)


async def _nothing() -> None:
    pass


def _ours(work: Work, number: int, url: str, stack: AsyncExitStack) -> ASGIApp:
    async def call(scope: Scope) -> None:  # noqa: ARG001
        await work(number, current_session())

    return UnitOfWorkMiddleware(handler(call), _database(url, stack))


def _by_hand(work: Work, number: int, url: str, stack: AsyncExitStack) -> ASGIApp:
    engine = create_async_engine(url)
    stack.push_async_callback(engine.dispose)
    sessions = async_sessionmaker(engine, expire_on_commit=False)

    async def call(scope: Scope) -> None:  # noqa: ARG001
        async with sessions.begin() as session:
            await work(number, session)

    return handler(call)


async def _in_turn(number: int, session: AsyncSession) -> None:
    for _ in range(number):
        async with session.begin_nested():
            await session.execute(SELECT)


async def _hooked(number: int, session: AsyncSession) -> None:
    for _ in range(number):
        async with session.begin_nested():
            await session.execute(SELECT)
            after_commit(_nothing)


async def _nested(number: int, session: AsyncSession) -> None:
    async with AsyncExitStack() as stack:
        for _ in range(number):
            await stack.enter_async_context(session.begin_nested())
            await session.execute(SELECT)


def _blocks(unused: str, number: int, url: str, stack: AsyncExitStack) -> ASGIApp:  # noqa: ARG001
    database = Database.from_url(unused)

    async def open_blocks(scope: Scope) -> None:  # noqa: ARG001
        async with AsyncExitStack() as blocks:
            for _ in range(number):
                block = unit_of_work(database, independent=True)
                await blocks.enter_async_context(block)

    return handler(open_blocks)


def _databases(number: int, url: str, stack: AsyncExitStack) -> ASGIApp:
    databases = [_database(f"{url}.{each}", stack) for each in range(number)]

    async def call(scope: Scope) -> None:  # noqa: ARG001
        for each in databases:
            await each.write.execute("SELECT 1")

    return UnitOfWorkMiddleware(handler(call), *databases)


def _untouched(number: int, url: str, stack: AsyncExitStack) -> ASGIApp:  # noqa: ARG001
    databases = [unused_database() for _ in range(number)]
    return UnitOfWorkMiddleware(handler(_answer), *databases)


async def _answer(scope: Scope) -> None:
    pass


def _database(url: str, stack: AsyncExitStack) -> Database:
    database = Database.from_url(url)
    stack.push_async_callback(database.dispose)
    return database


async def measure(
    databases: Databases, names: Iterable[str] = ("growth",)
) -> list[Growth]:
    """Count requests with few and with many."""
    urls = await databases.urls(growing(names))
    counts = await instructions.count(urls, requests=REQUESTS)
    return [
        Growth(
            question.name.removeprefix("growth-"),
            {
                int(number): float(counts[question.name, number][0].replace(",", ""))
                for number in question.contestants
            },
        )
        for question in urls
    ]


async def main() -> None:
    """Count, and say what grows faster than linearly."""
    parser = argparse.ArgumentParser(prog="benchmarks.growth")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME")
    options = parser.parse_args()
    async with Databases() as databases:
        grown = await measure(databases, [f"growth-{name}" for name in options.only])
    print_table(("what", *TITLES), [row for each in grown for row in each.rows()])


if __name__ == "__main__":
    asyncio.run(main())
