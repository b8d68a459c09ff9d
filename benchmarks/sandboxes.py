"""Test the demo shop in sandboxes, and by committing and emptying the tables.

`python -m benchmarks.sandboxes`: the same 500 tests each way, in blocks that take
turns. The servers write what is committed to the disk, as they do unless told
otherwise; with `--no-sync` they do not, like those of our own tests. The shop has
three tables; with `--tables` there are as many to empty.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import statistics
import sys
import time
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import httpx

from asgi_uow import Database
from asgi_uow.testing import sandbox
from docs.examples.shop import app as shop
from docs.examples.shop.models import Base, Customer, Product, close_shop, open_shop
from docs.examples.shop.orders import outbox
from docs.examples.shop.steps import CUP, SHIPLOAD

from .databases import SERVERS, Databases
from .questions import PLACES, Question
from .tables import print_table

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from contextlib import AbstractAsyncContextManager
    from typing import Self

    Around: TypeAlias = Callable[[], AbstractAsyncContextManager[object]]

TABLES = [each.name for each in reversed(Base.metadata.sorted_tables)]


SYNC = {
    "mariadb": ("--innodb-flush-method=fsync", "--innodb-flush-log-at-trx-commit=1"),
    "postgresql": ("--fsync=on", "--full_page_writes=on", "--autovacuum=on"),
}


class SyncedDatabases(Databases):
    """Databases that write what is committed to the disk, as by default."""

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        for name, server in SERVERS.items():
            if server.is_installed():
                self._ports[name] = self.enter_context(server(*SYNC[name])).port
        return self


async def test(client: httpx.AsyncClient, db: Database) -> None:
    """Sell something, fail to sell something, look at what has come of it."""
    async with db as unit:
        unit.session().add_all([Customer(name="Ann"), Product(name="tea", quantity=9)])
    sold = await client.post("/orders", json=CUP)
    refused = await client.post("/orders", json=SHIPLOAD)
    state = (await client.get("/state")).json()
    found = sold.status_code, refused.status_code, state["order_count"], state["stock"]
    if found != (201, 409, 1, {"tea": 8}):
        sys.exit(f"A test has failed: {found}")
    outbox.clear()
    shop.outcomes.clear()


@asynccontextmanager
async def emptied(db: Database, statements: list[str]) -> AsyncGenerator[None]:
    """Empty the tables after a test."""
    yield
    async with db.engine.begin() as connection:
        for each in statements:
            await connection.exec_driver_sql(each)


def ways_of(place: str, db: Database, tables: list[str]) -> dict[str, Around]:
    """Return what can be done around a test; SQLite has no TRUNCATE."""
    truncate = {
        "mariadb": [
            "SET FOREIGN_KEY_CHECKS = 0",
            *(f"TRUNCATE {each}" for each in tables),
            "SET FOREIGN_KEY_CHECKS = 1",
        ],
        "postgresql": [f"TRUNCATE {', '.join(tables)}"],
    }
    statements = {"DELETE": [f"DELETE FROM {each}" for each in tables]}
    if (name := place.partition("-")[0]) in truncate:
        statements["TRUNCATE"] = truncate[name]
    emptying = {name: partial(emptied, db, each) for name, each in statements.items()}
    return {"sandbox": partial(sandbox, db), **emptying}


async def compare(
    place: str, url: str, options: argparse.Namespace
) -> list[tuple[str, ...]]:
    """Run so many tests each way; return the lines of the table."""
    others = [f"other_{number}" for number in range(options.tables - len(TABLES))]
    async with AsyncExitStack() as stack:
        db = Database.from_url(url)
        stack.push_async_callback(db.dispose)
        await open_shop(db)
        stack.push_async_callback(close_shop, db)
        async with db.engine.begin() as connection:
            for each in others:
                statement = f"CREATE TABLE {each} (id INTEGER PRIMARY KEY)"
                await connection.exec_driver_sql(statement)
        transport = httpx.ASGITransport(shop.create_app(db))
        client = await stack.enter_async_context(
            httpx.AsyncClient(transport=transport, base_url="http://shop")
        )
        ways = ways_of(place, db, [*TABLES, *others])
        async with ways["DELETE"]():
            pass  # what the shop opens with
        times: dict[str, list[float]] = {name: [] for name in ways}
        orders = random.Random(place)
        tests = options.tests // options.blocks
        for number in range(options.blocks + 1):
            for name in orders.sample(list(ways), len(ways)):
                took = await _time(ways[name], client, db, tests)
                if number:  # the first one fills caches
                    times[name].append(took)
    return [(place, name, *_cells(times[name], times["sandbox"])) for name in ways]


async def _time(
    around: Around, client: httpx.AsyncClient, db: Database, tests: int
) -> float:
    """Return milliseconds for one test."""
    start = time.perf_counter()
    for _ in range(tests):
        async with around():
            await test(client, db)
    return (time.perf_counter() - start) / tests * 1000


def _cells(mine: list[float], sandboxes: list[float]) -> tuple[str, ...]:
    """Return the mean of all tests, and ratios of blocks that stood side by side."""
    pairs = [own / other for own, other in zip(mine, sandboxes, strict=True)]
    low, middle, high = statistics.quantiles(pairs, n=4)
    return (
        f"{statistics.mean(mine):.1f}",
        f"{statistics.mean(mine) / statistics.mean(sandboxes):.2f}",
        f"{middle:.2f}",
        f"{low:.2f} to {high:.2f}",
    )


async def main() -> None:
    """Measure on all databases that are installed."""
    parser = argparse.ArgumentParser(prog="benchmarks.sandboxes")
    parser.add_argument("--only", nargs="+", default=[""], metavar="PLACE")
    parser.add_argument("--tests", type=int, default=500, help="each way")
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--tables", type=int, default=len(TABLES), help="to empty")
    parser.add_argument("--no-sync", action="store_true", help="write to no disk")
    options = parser.parse_args()
    logging.disable()  # the shop's orders that fail
    asked = [
        Question(place, {}, place)
        for place in PLACES
        if place.startswith(tuple(options.only))
    ]
    lines = []
    async with Databases() if options.no_sync else SyncedDatabases() as databases:
        for question, url in (await databases.urls(asked)).items():
            print(f"testing on {question.place} ...", file=sys.stderr)
            lines += await compare(question.place, url, options)
    titles = ("ms per test", "ratio", "of blocks", "middle half")
    print_table(("database", "after each test", *titles), lines)
    for place in dict.fromkeys(line[0] for line in lines):
        emptying = [line for line in lines if line[0] == place][1:]
        _, name, _, ratio, *_ = min(emptying, key=_ratio_of)
        print(f"{place}: {name}, at best, takes {ratio} times as long as a sandbox.")


def _ratio_of(line: tuple[str, ...]) -> float:
    return float(line[3])


if __name__ == "__main__":
    asyncio.run(main())
