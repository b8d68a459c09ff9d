"""What asgi-uow may cost, and whether it does."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from .questions import PLACES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .results import Cost, Results

OURS = "ours"
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


def ahead(results: Results) -> dict[str, list[Cost]]:
    """Return the peers that cost less than ours, by question."""
    found: dict[str, list[Cost]] = {}
    for each in results.costs:
        if not each.question.startswith("peers-") or _is_no_peer(each.contestant):
            continue
        ours = _ours_beside(results, each)
        if ours and (each.cost < ours.cost or each.ratio < ours.ratio):
            found.setdefault(each.question, []).append(each)
    return found


def _is_no_peer(contestant: str) -> bool:
    """Whether it is a yardstick, or ours."""
    return contestant in {OURS, "bare app", "no-op middleware", "hand-written"}


def _ours_beside(results: Results, peer: Cost) -> Cost | None:
    return results.find(peer.question, OURS)


def explained(results: Results) -> list[tuple[str, str, str]]:
    """Return the questions that a profile must explain, and whom it compares."""
    missed = dict.fromkeys(
        each.question
        for each in verdicts(results)
        if not each.is_kept and each.question
    )
    found = [(name, _first(results, name), _mine(name)) for name in missed]
    for name, peers in ahead(results).items():
        best = min(peers, key=lambda each: each.cost)
        found.append((name, best.contestant, OURS))
    return found


def _first(results: Results, question: str) -> str:
    return next(each.contestant for each in results.costs if each.question == question)


def _mine(question: str) -> str:
    return "async hook" if question == "hook" else OURS
