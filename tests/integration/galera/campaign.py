"""Twenty clients write the same ten rows through three nodes, while nodes go away.

Moments are counted in answers to clients, so that they mean the same on a slow machine.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
import statistics
import time
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
from sqlalchemy import CursorResult
from sqlalchemy.exc import SQLAlchemyError

import asgi_uow as uow
from asgi_uow import Database, Outcome, UnitOfWorkMiddleware
from asgi_uow._databases.driver_errors import code_of
from asgi_uow.observers import RetryScheduled
from tests.integration.galera.servers import SYNCED
from tests.promises.faults.bank import Attempt, Order, lies
from tests.servers import eventually
from tests.support.asgi import http_scope, receiving, respond
from tests.support.databases import checked_out
from tests.support.observer import Events

if TYPE_CHECKING:
    from asgi_uow import Retry, UnitOfWork
    from asgi_uow._asgi import Receive, Scope, Send
    from tests.integration.galera.servers import GaleraCluster, GaleraNode
    from tests.promises.faults.bank import Row

ROWS = range(10)
CLIENTS = 20
SPACING = 100  # answers between two faults
LIMIT_SECONDS = 120.0  # for what is to last longer than asked for
CONFLICTS = {1020, 1205, 1213}

TABLES = (
    "CREATE TABLE counters (id INTEGER PRIMARY KEY, value INTEGER NOT NULL)",
    """
    CREATE TABLE writes (
        id VARCHAR(20), attempt INTEGER, counter INTEGER NOT NULL,
        amount INTEGER NOT NULL, PRIMARY KEY (id, attempt)
    )
    """,
    "INSERT INTO counters VALUES " + ", ".join(f"({row}, 0)" for row in ROWS),
)
WRITES = f"{SYNCED}SELECT id, attempt FROM writes ORDER BY id, attempt"
BOOKS = f"""
    {SYNCED}SELECT id, value, (
        SELECT CAST(coalesce(sum(amount), 0) AS INTEGER)
        FROM writes WHERE counter = counters.id
    ) FROM counters ORDER BY id
"""


@dataclasses.dataclass
class Request(Attempt):
    """What became of an order to add `amount` to the row `target`.

    What an `Attempt` tells is that of the last one.
    """

    compares: bool = False
    """By compare-and-set, and not by `value = value + amount`."""
    earlier: list[tuple[UnitOfWork, list[str]]] = dataclasses.field(
        default_factory=list
    )
    """The attempts that were replayed, with the hooks that they have called."""
    seconds: float = 0.0

    def begin(self) -> None:
        if self.unit is not None:
            self.earlier.append((self.unit, self.hooks))
            self.hooks = []
        self.unit = uow.current_unit_of_work()
        assert self.unit.attempt == self.attempt

    @property
    def attempt(self) -> int:
        """The number of the last attempt."""
        return len(self.earlier) + 1

    @property
    def last(self) -> Row:
        """What is in the table if the last attempt was kept."""
        return self.order.id, self.attempt

    @property
    def is_conflict(self) -> bool:
        """Whether it was a conflict that ended the last attempt."""
        return self.status != 200 and code_of(self.error) in CONFLICTS


class Campaign:
    """One run: an application on each node, its clients, and the faults."""

    def __init__(self, cluster: GaleraCluster, retry: Retry | None) -> None:
        self.cluster = cluster
        self.retry = retry
        self.events = Events()
        self.requests: list[Request] = []
        self.kept: set[Row] = set()
        """The attempts that were kept, once the books are checked."""
        self.faults = Counter[str]()
        self.over = asyncio.Event()
        self.answered = asyncio.Condition()
        self.answers = 0
        self.databases = [
            Database.from_url(cluster.at(node).url, pool_size=CLIENTS)
            for node in cluster.nodes
        ]
        self.apps = [
            UnitOfWorkMiddleware(self.serve, db, retry=retry, observers=[self.events])
            for db in self.databases
        ]

    # The application

    async def serve(self, scope: Scope, _: Receive, send: Send) -> None:
        request: Request = scope["request"]
        request.begin()
        uow.after_commit(request.note, "after_commit")
        uow.after_rollback(request.note, "after_rollback")
        order, session = request.order, uow.current_session()
        await session.execute(
            "INSERT INTO writes VALUES (:id, :attempt, :counter, :amount)",
            id=order.id,
            attempt=request.attempt,
            counter=order.target,
            amount=order.amount,
        )
        status = 200
        ignored = (SQLAlchemyError, OSError) if order.is_careless else ()
        with suppress(*ignored):
            add = self.compare_and_set if request.compares else self.add
            status = await add(order.target, order.amount)
        await respond(send, status)

    async def add(self, row: int, amount: int) -> int:
        sql = "UPDATE counters SET value = value + :amount WHERE id = :id"
        await uow.current_session().execute(sql, id=row, amount=amount)
        return 200

    async def compare_and_set(self, row: int, amount: int) -> int:
        session = uow.current_session()
        old = await session.scalar("SELECT value FROM counters WHERE id = :id", id=row)
        sql = "UPDATE counters SET value = :new WHERE id = :id AND value = :old"
        result = await session.execute(sql, id=row, old=old, new=old + amount)
        assert isinstance(result, CursorResult)
        return 200 if result.rowcount else 409

    # The clients

    async def run(self, seconds: float) -> None:
        """Have clients and faults for so many seconds, or until each fault was once."""
        with anyio.fail_after(seconds + LIMIT_SECONDS):
            async with anyio.create_task_group() as group:
                for number in range(CLIENTS):
                    group.start_soon(self.client, number)
                await self.strike(time.monotonic() + seconds)
                self.over.set()

    async def client(self, number: int) -> None:
        dice, counts = random.Random(number), itertools.count()
        while not self.over.is_set():
            count = next(counts)
            row = dice.choice(ROWS)
            order = Order(
                f"{number}-{count}",
                source=row,
                target=row,
                amount=dice.randint(1, 9),
                is_careless=dice.random() < 0.2,
            )
            request = Request(order, compares=dice.random() < 0.5)
            await self.submit(request, (number + count) % len(self.apps))
            async with self.answered:
                self.answers += 1
                self.answered.notify_all()

    async def submit(self, request: Request, node: int) -> None:
        self.requests.append(request)
        scope = http_scope(method="POST", request=request)
        began = time.perf_counter()
        try:
            receive = receiving(asyncio.Event())
            await self.apps[node](scope, receive, request.send)
        except Exception as error:  # noqa: BLE001  # what the server would log
            request.error = error
        request.seconds = time.perf_counter() - began

    # The faults

    async def strike(self, until: float) -> None:
        """Kill one node and isolate the next, then others, each until it is back."""
        nodes = itertools.pairwise(itertools.cycle(self.cluster.nodes))
        while time.monotonic() < until:
            killed, isolated = next(nodes)
            await self.fault("killed", killed)
            await self.fault("isolated", isolated)

    async def fault(self, name: str, node: GaleraNode) -> None:
        faults = {"killed": self.cluster.kill, "isolated": self.cluster.isolate}
        for step in (faults[name], self.cluster.rejoin):
            await self.answer(SPACING)
            await step(node)
        await self.cluster.mend()
        self.faults[name] += 1

    async def answer(self, more: int) -> None:
        """Wait until so many more requests have been answered."""
        enough = self.answers + more
        async with self.answered:
            await self.answered.wait_for(lambda: self.answers >= enough)

    # The books

    async def check(self) -> None:
        """Compare what was said with what each node holds."""
        assert [0, 0] * 3 == checked_out(*self.databases)
        backends = [self.cluster.at(node) for node in self.cluster.nodes]
        writes = [await backend.fetch(WRITES) for backend in backends]
        books = [await backend.fetch(BOOKS) for backend in backends]
        assert [writes[0]] * 3 == writes
        assert [books[0]] * 3 == books
        assert list(ROWS) == [row for row, *_ in books[0]]
        assert [] == [each for each in books[0] if each[1] != each[2]]

        kept = self.kept = set(writes[0])
        assert len(kept) == len({name for name, _ in kept})  # nothing twice
        assert [] == [
            lie
            for request in self.requests
            for lie in (
                *lies(request, is_kept=request.last in kept),
                *self.more_lies(request),
            )
        ]

    def more_lies(self, request: Request) -> list[str]:
        """Tell what is wrong with what was replayed, or should have been."""
        replayed = [(unit.outcome, hooks) for unit, hooks in request.earlier]
        undone = (Outcome.ROLLED_BACK, ["after_rollback"])
        attempts = 1 if self.retry is None else self.retry.attempts
        said = {
            "replayed what was not rolled back": replayed != [undone] * len(replayed),
            "kept what was replayed": any(
                (request.order.id, unit.attempt) in self.kept
                for unit, _ in request.earlier
            ),
            "a conflict that is no 503": request.is_conflict and request.status != 503,
            "a conflict with attempts left": (
                request.is_conflict and request.attempt < attempts
            ),
            "an answer of another kind": request.status not in {200, 409, 500, 503},
            "a 500 whose outcome is known": (
                request.status == 500 and request.outcome is not Outcome.UNKNOWN
            ),
        }
        return [f"{request.order.id}: {lie}" for lie, told in said.items() if told]

    async def goes_on(self) -> None:
        """Write through each node once more; the application was not restarted."""
        for node in range(len(self.apps)):

            async def succeeds(node: int = node) -> bool:
                request = Request(Order(f"after-{len(self.requests)}", 0, 0, amount=1))
                await self.submit(request, node)
                return request.status == 200

            await eventually(True, succeeds)

    async def close(self) -> None:
        for db in self.databases:
            await db.dispose()

    def figures(self) -> dict[str, object]:
        """Count what happened, for a report."""
        replays = Counter(each.code for each in self.events.of(RetryScheduled))
        statuses = Counter(each.status for each in self.requests)
        served = [each.seconds for each in self.requests if each.status == 200]
        centiles = statistics.quantiles(served, n=100)
        conflicts = sum(replays[code] for code in CONFLICTS)
        used_up = sum(each.is_conflict for each in self.requests)
        return {
            **self.faults,
            "requests": len(self.requests),
            "conflicts": conflicts + used_up,
            "conflicts replayed": conflicts,
            "conflicts answered 503": used_up,
            "replays": replays.total(),
            "200": statuses[200],
            "409 (compare-and-set missed)": statuses[409],
            "503": statuses[503],
            "UNKNOWN (500)": statuses[500],
            "UNKNOWN, and kept": sum(
                each.last in self.kept for each in self.requests if each.status == 500
            ),
            "p50 of a 200, ms": round(centiles[49] * 1000, 1),
            "p99 of a 200, ms": round(centiles[98] * 1000, 1),
        }
