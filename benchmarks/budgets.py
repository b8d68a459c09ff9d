"""What asgi-uow may cost, and whether it does."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from .questions import PLACES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .results import Cost, Results

OURS = "ours"
PEERS = "peers-"
"""Their questions begin like this."""
NO_PEERS = {OURS, "bare app", "no-op middleware", "hand-written"}
PLACE_NAMES = {
    "sqlite-aiosqlite": "SQLite (aiosqlite)",
    "mariadb-asyncmy": "MariaDB (asyncmy)",
    "postgresql-asyncpg": "PostgreSQL (asyncpg)",
    "postgresql-psycopg": "PostgreSQL (psycopg)",
}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One number of ours, and what it may be."""

    what: str
    unit: str
    value: float
    budget: float
    question: str = ""
    """Where a profile can explain it."""

    @property
    def is_kept(self) -> bool:
        """Whether the number is within its budget, as precise as it is shown."""
        return round(self.value, 3) <= self.budget

    @property
    def shown(self) -> tuple[str, str]:
        """The number and its budget, as texts."""
        if self.unit.startswith("times"):
            return f"{self.value:.3f}", f"{self.budget:.2f}"
        return f"{self.value:,.1f}", f"{self.budget:,.0f}"


def verdicts(results: Results) -> list[Verdict]:
    """Compare everything that has a budget and was measured."""
    return [*_untouched(results), *_with_database(results), *_others(results)]


def _untouched(results: Results) -> Iterable[Verdict]:
    if found := results.find("untouched-starlette", OURS):
        what = "Request that touches no session, on Starlette"
        yield _counted(results, what, found, 1.10)


def _counted(results: Results, what: str, found: Cost, budget: float) -> Verdict:
    unit = f"times the {results.counted}"
    return Verdict(what, unit, found.cost_ratio, budget, found.question)


def _with_database(results: Results) -> Iterable[Verdict]:
    for statement, counted, timed in (("select", 1.00, 1.05), ("insert", 1.05, 1.10)):
        for place in PLACES:
            if found := results.find(f"{statement}-{place}", OURS):
                what = f"One {statement.upper()}, {PLACE_NAMES[place]}"
                yield _counted(results, what, found, counted)
                name = found.question
                yield Verdict(what, "times the time", found.ratio, timed, name)


def _others(results: Results) -> Iterable[Verdict]:
    if found := results.find("hook", "async hook"):
        what = "Empty asynchronous after-commit hook"
        yield Verdict(what, "µs", found.microseconds, 12, found.question)
    if results.memory:
        _, without, held = results.memory
        what = "Parked request, more than in a no-op middleware"
        yield Verdict(what, "bytes", held - without, 400)


@dataclasses.dataclass(frozen=True)
class Ahead:
    """A library that costs less than ours in a question."""

    peer: Cost
    mine: Cost

    @property
    def counted(self) -> float:
        """How many times our instructions it needs."""
        return self.peer.cost / self.mine.cost

    @property
    def timed(self) -> float:
        """How many times our time it takes."""
        return self.peer.microseconds / self.mine.microseconds


def ahead(results: Results) -> list[Ahead]:
    """Return where another library costs less, in instructions or in time."""
    found: list[Ahead] = []
    for each in results.costs:
        mine = results.find(each.question, OURS)
        if mine and each.question.startswith(PEERS) and each.contestant not in NO_PEERS:
            found.append(Ahead(each, mine))
    return [each for each in found if each.counted < 1 or each.timed < 1]


def explained(results: Results) -> list[tuple[str, str, str]]:
    """Return the questions that a profile must explain, and whom it compares.

    Of the questions with the same kind of request only the one in which another
    library is ahead most.
    """
    missed = dict.fromkeys(
        each.question
        for each in verdicts(results)
        if not each.is_kept and each.question
    )
    found = [(name, _first(results, name), _mine(name)) for name in missed]
    kinds: dict[str, Ahead] = {}
    for each in sorted(ahead(results), key=lambda each: each.counted):
        if each.counted < 1:
            kinds.setdefault(each.peer.question.split("-")[1], each)
    return found + [
        (each.peer.question, each.peer.contestant, OURS) for each in kinds.values()
    ]


def _first(results: Results, question: str) -> str:
    return next(each.contestant for each in results.costs if each.question == question)


def _mine(question: str) -> str:
    return "async hook" if question == "hook" else OURS
