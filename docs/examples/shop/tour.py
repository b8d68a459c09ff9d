"""Play the steps, look from outside, compare with what is promised."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Self

from sqlalchemy import func, select

from .accidents import from_outside
from .models import Order, Product
from .steps import STEPS

if TYPE_CHECKING:
    import httpx

    from asgi_uow import Database

    from .steps import Step

TITLES = (
    "what happens",
    "the client saw",
    "the database holds",
    "mails sent",
    "the unit of work",
    "as promised",
)


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the world holds at one moment."""

    orders: int
    tea: int
    mails: int
    outcomes: tuple[str, ...]

    @classmethod
    async def look(cls, client: httpx.AsyncClient, database: Database) -> Self:
        """Ask the database through a fresh connection, and the shop for the rest."""
        async with from_outside(database.engine.url) as connection:
            orders = await connection.scalar(select(func.count(Order.id)))
            tea = await connection.scalar(select(Product.quantity))
        state = (await client.get("/state")).raise_for_status().json()
        return cls(orders or 0, tea or 0, len(state["outbox"]), (*state["outcomes"],))


@dataclasses.dataclass(frozen=True)
class Line:
    """One step, and what came of it."""

    step: Step
    response: httpx.Response
    before: Facts
    after: Facts

    @property
    def as_promised(self) -> bool:
        """Whether client, database and mails agree with the promise."""
        changes = (
            self.after.orders - self.before.orders,
            self.before.tea - self.after.tea,
            self.after.mails - self.before.mails,
        )
        quantity = self.step.wanted["quantity"]
        promised = (1, quantity, 1) if self.step.kept else (0, 0, 0)
        return changes == promised and self.response.status_code in self.step.answers

    def cells(self) -> tuple[str, ...]:
        """Return the columns of the table."""
        before, after = self.before, self.after
        seen = str(self.response.status_code)
        if "retry-after" in self.response.headers:
            seen += f", Retry-After: {self.response.headers['retry-after']}"
        orders = _with_change(after.orders, after.orders - before.orders)
        tea = _with_change(after.tea, after.tea - before.tea)
        return (
            self.step.title,
            seen,
            f"orders {orders}, tea {tea}",
            _with_change(after.mails, after.mails - before.mails),
            ", ".join(after.outcomes[len(before.outcomes) :]),
            "yes" if self.as_promised else "NO",
        )


class Transcript(logging.Handler):
    """Keeps what the server logs, for a line that is not as promised."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record, traceback included."""
        self.lines.append(self.format(record))

    def __enter__(self) -> Self:
        """Listen to every logger."""
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening."""
        logging.getLogger().removeHandler(self)


async def play(client: httpx.AsyncClient, database: Database) -> bool:
    """Play all steps, print the table; tell whether every line is as promised."""
    rows: list[tuple[str, ...]] = [TITLES]
    unexpected: list[str] = []
    for step in STEPS:
        before = await Facts.look(client, database)
        with Transcript() as transcript:
            response = await client.post(step.path, json=step.wanted)
        after = await Facts.look(client, database)
        line = Line(step, response, before, after)
        rows.append(line.cells())
        if not line.as_promised:
            unexpected += [f"{step.title}:", response.text, *transcript.lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    for text in unexpected:
        print(f"\n{text}")
    return not unexpected


def _with_change(number: int, change: int) -> str:
    return f"{number} ({change:+d})" if change else f"{number}"
