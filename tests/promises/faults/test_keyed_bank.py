"""Exactly once: the bank under fire, whose clients repeat each order until they know.

Every order has an idempotency key, and is sent again with it after a 500, a 503, an
exception or a cancellation; some are sent twice at once. Each attempt writes a row of
its own name, so that nothing but the key is in the way of doing an order twice.
`ASGI_UOW_RUNS=60 pytest tests/promises/faults/test_keyed_bank.py` runs as many; the
number at the end of a test's name is the seed of its run.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import os
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy.schema import CreateTable

import asgi_uow as uow
from tests.promises.faults.bank import TABLES, Attempt, Bank, Order, Plan
from tests.support.asgi import http_scope, receiving

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.promises.faults.mortal import Mortal

RUNS = int(os.environ.get("ASGI_UOW_RUNS", "6"))
DRIVERS = ("asyncmy", "asyncpg", "asyncmy", "psycopg")
CASES = [(DRIVERS[seed % len(DRIVERS)], seed) for seed in range(RUNS)]
MORE_PATIENCE = 20  # round trips, each time that an order is repeated


@dataclasses.dataclass(frozen=True)
class KeyedOrder(Order):
    """An order that may be sent more than once at the same time."""

    copies: int = 1


class KeyedPlan(Plan):
    """No handler ends its transaction by itself: a key promises nothing for that."""

    def _order(self, name: str) -> Order:
        order: dict[str, Any] = {**vars(super()._order(name)), "ends_with": ""}
        return KeyedOrder(**order, copies=self._dice.choice([1, 1, 1, 2]))


def key_of(order: str) -> str:
    """Give the key of an attempt at an order: the name without the last number."""
    return order.partition(".")[0]


def is_final(attempt: Attempt) -> bool:
    """Tell whether the client has been told what became of its order."""
    status = attempt.status
    if attempt.is_cancelled or status is None or status == 500:
        return False
    # Also a 409, while another attempt is still at work.
    return b"retry-after" not in dict(attempt.messages[0]["headers"])


class KeyedBank(Bank):
    """Each order has a key, and is repeated with it until the answer is final."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.answers: dict[str, int | None] = {}
        """The last word to each order, by key."""
        self.unserved: list[Attempt] = []
        """What the handler has not seen: replayed, refused, or failed before it."""

    def make_app(self, **options: Any) -> uow.UnitOfWorkMiddleware:
        return super().make_app(idempotency=uow.Idempotency(), **options)

    async def create_tables(self) -> None:
        table = uow.idempotency_table(sa.MetaData())
        dialect = self.db.engine.dialect
        keys = str(CreateTable(table).compile(dialect=dialect))
        await self.mortal.backend.execute(*TABLES, keys)

    async def client(self, orders: list[Order]) -> None:
        for order in orders:
            assert isinstance(order, KeyedOrder)
            await self.insist(order)

    async def insist(self, order: KeyedOrder) -> None:
        """Send an order until all that were sent at once have a final answer."""
        numbers = itertools.count()
        attempts: list[Attempt] = []
        while not (attempts and all(map(is_final, attempts))):
            await self.up.wait()
            again = (
                dataclasses.replace(
                    order,
                    id=f"{order.id}.{number}",
                    patience=order.patience + number * MORE_PATIENCE,
                )
                for number in itertools.islice(numbers, order.copies)
            )
            attempts = await asyncio.gather(*map(self.submit, again))
        if not order.is_audit:
            # The second of two is done although the first found too little money.
            self.answers[order.id] = min(each.status or 0 for each in attempts)

    async def submit(self, order: Order) -> Attempt:
        attempt = await super().submit(order)
        if attempt.unit is None:
            self.attempts.remove(attempt)
            self.unserved.append(attempt)
        return attempt

    async def call(self, attempt: Attempt) -> None:
        key = key_of(attempt.order.id).encode()
        scope = http_scope(
            method="GET" if attempt.order.is_audit else "POST",
            headers=[(b"idempotency-key", key)],
            attempt=attempt,
        )
        await self.app(scope, receiving(asyncio.Event(), [key]), attempt.send)

    async def kept(self) -> Counter[str]:
        """Count how often each order was done."""
        rows = await self.mortal.backend.fetch("SELECT id FROM transfers")
        return Counter(key_of(str(row[0])) for row in rows)

    async def check(self) -> None:
        """Compare also what came of each order with what its client was told."""
        await super().check()
        kept = await self.kept()
        committed, hooks = Counter[str](), Counter[str]()
        for attempt in self.attempts:
            if not attempt.order.is_audit:
                key = key_of(attempt.order.id)
                committed[key] += attempt.outcome is uow.Outcome.COMMITTED
                hooks[key] += attempt.hooks.count("after_commit")

        expected = {key: int(status == 200) for key, status in self.answers.items()}
        assert {
            each.id
            for orders in self.plan.clients
            for each in orders
            if not each.is_audit
        } == set(self.answers)
        assert {200, 409} >= set(self.answers.values())
        assert expected == {key: kept[key] for key in self.answers}
        assert {1} >= set(kept.values())
        assert {0, 1} >= set(hooks.values())
        assert committed == hooks
        assert {e.status for e in self.unserved} <= {None, 200, 409, 500, 503}
        replayed = {key_of(e.order.id) for e in self.unserved if e.status == 200}
        assert replayed <= set(kept)
        assert [(200,)] * kept.total() == await self.mortal.backend.fetch(
            "SELECT status FROM idempotency_keys"
        )

    async def figures(self) -> Counter[str]:
        count = await super().figures()
        count["orders"] = len(self.answers)
        count.update(f"answer {status}" for status in self.answers.values())
        for attempt in self.unserved:
            about = "cancelled" if attempt.is_cancelled else f"{attempt.status}"
            count[f"without the handler: {about}"] += 1
        sent = Counter(
            key_of(each.order.id) for each in (*self.attempts, *self.unserved)
        )
        count["repeated orders"] = sum(sent[key] > 1 for key in self.answers)
        return count


@pytest.mark.parametrize(("driver", "seed"), sorted(CASES))
async def test_exactly_once(
    mortal: Mortal, seed: int, record_property: Callable[[str, object], None]
) -> None:
    """An order is done once if its client is told so in the end, else not at all."""
    async with mortal.backend.proxy() as proxy:
        bank = KeyedBank(mortal, proxy, KeyedPlan(seed))
        await bank.create_tables()
        try:
            await bank.run()
            await bank.check()
            await bank.goes_on()
            await bank.check()
            for name, number in (await bank.figures()).items():
                record_property(name, number)
        finally:
            await bank.db.dispose()


class ForgetfulBank(KeyedBank):
    """It does not look at keys."""

    def make_app(self, **options: Any) -> uow.UnitOfWorkMiddleware:
        return Bank.make_app(self, **options)


@pytest.mark.parametrize("driver", ["asyncmy"])
async def test_twice(mortal: Mortal) -> None:
    """What is done twice is noticed: the runs above are not green as nobody looks."""
    plan = KeyedPlan(0)
    plan.faults = [(moment, "cut_after_commit") for moment in range(10, 60, 10)]
    async with mortal.backend.proxy() as proxy:
        bank = ForgetfulBank(mortal, proxy, plan)
        await bank.create_tables()
        try:
            await bank.run()
            assert max((await bank.kept()).values()) > 1
            with pytest.raises(AssertionError):
                await bank.check()
        finally:
            await bank.db.dispose()
