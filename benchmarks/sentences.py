"""Say where we stand, in sentences that are made from the numbers."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from .budgets import NO_PEERS, OURS, PEERS, PLACE_NAMES, ahead, verdicts
from .growth import Growth
from .questions import PLACES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .results import Results


def sentences(results: Results) -> Iterable[str]:
    """Give a few sentences that can be read in one screen."""
    yield from _untouched(results)
    for statement in ("select", "insert"):
        yield from _statement(results, statement)
    yield from _budgets(results)
    yield from _peers(results)
    yield from _throughput(results)
    yield from _memory(results)
    yield from _growth(results)


def _untouched(results: Results) -> Iterable[str]:
    if found := results.find("untouched-starlette", OURS):
        yield (
            "A request on Starlette that touches no session costs "
            f"{found.cost_ratio:.3f} times the {results.counted} of a middleware that "
            "does nothing. It sends nothing to the database."
        )
    if found := results.find("hook", "async hook"):
        yield f"An empty asynchronous hook takes {found.microseconds:.1f} µs."


def _statement(results: Results, statement: str) -> Iterable[str]:
    for contestant, words in (
        ("as written", "code written by hand with SQLAlchemy's default options"),
        ("same trips", "code written by hand that makes the same round trips"),
    ):
        parts: list[str] = []
        for place in PLACES:
            mine = results.find(f"{statement}-{place}", OURS)
            theirs = results.find(f"{statement}-{place}", contestant)
            if mine and theirs:
                ratio = mine.cost / theirs.cost
                parts.append(f"{ratio:.2f} on {PLACE_NAMES[place]}")
        if parts:
            yield (
                f"One {statement.upper()}, in {results.counted}, compared with "
                f"{words}: {', '.join(parts)}."
            )


def _budgets(results: Results) -> Iterable[str]:
    found = verdicts(results)
    missed = [each for each in found if not each.is_kept]
    if not found:
        return
    explained = bool(results.profiles)
    if not missed:
        yield f"All {len(found)} [budgets](#budgets) are kept."
        return
    yield (
        f"{len(missed)} of {len(found)} [budgets](#budgets) are missed: "
        + "; ".join(
            f"{each.what}, {each.shown[0]} {each.unit} (budget {each.shown[1]})"
            for each in missed
        )
        + (
            ". [Profiles](#where-the-difference-comes-from) show why."
            if explained
            else "."
        )
    )


def _peers(results: Results) -> Iterable[str]:
    asked = Counter(
        each.contestant
        for each in results.costs
        if each.question.startswith(PEERS) and each.contestant not in NO_PEERS
    )
    found = ahead(results)
    for words, ratios in (
        (f"fewer {results.counted}", [(each.counted, each) for each in found]),
        ("less time", [(each.timed, each) for each in found]),
    ):
        best: dict[str, list[float]] = {}
        for ratio, each in ratios:
            if ratio < 1:
                best.setdefault(each.peer.contestant, []).append(ratio)
        parts = [
            f"{peer} in {len(ratios)} of {asked[peer]} questions (at best "
            f"{min(ratios):.2f} times ours)"
            for peer, ratios in sorted(best.items())
        ]
        if parts:
            yield (
                f"[These libraries](#beside-other-libraries) need {words} than "
                f"asgi-uow: {', '.join(parts)}."
            )
        elif asked:
            yield f"None of {len(asked)} other libraries needs {words} than asgi-uow."


def _throughput(results: Results) -> Iterable[str]:
    if results.throughput is None:
        return
    ratios = [
        float(ratio)
        for _, contestant, _, ratio, *_ in results.throughput.rows
        if contestant == OURS
    ]
    if ratios:
        yield (
            f"On uvicorn, asgi-uow answers {min(ratios):.2f} to {max(ratios):.2f} "
            "times as many requests per second as code written by hand."
        )


def _memory(results: Results) -> Iterable[str]:
    if results.memory:
        number, without, held = results.memory
        yield (
            f"A waiting request holds {held - without:,.0f} bytes more than in a "
            f"middleware that does nothing, measured with {number:,.0f} of them."
        )


def _growth(results: Results) -> Iterable[str]:
    grown = [
        Growth(name, {int(number): cost for number, cost in costs.items()})
        for name, costs in results.growth
    ]
    fast = [each.what.replace("-", " ") for each in grown if not each.is_linear]
    slow = [each.what.replace("-", " ") for each in grown if each.is_linear]
    if slow:
        yield f"The cost grows linearly, or more slowly, with: {', '.join(slow)}."
    if fast:
        yield f"The cost grows [faster than linearly](#growth) with: {', '.join(fast)}."
