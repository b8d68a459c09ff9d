"""Write the page of numbers from what was measured: no number is written by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .budgets import ahead, verdicts
from .growth import LINEAR, Growth
from .sentences import sentences

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .results import Profile, Results

PAGE = "numbers.md"
NUMBER = re.compile(r"([+-]?[\d.,]+( to [\d.]+)?)?")
TRUTH = "truth.md"
METHOD = Path(__file__).with_name("method.md")
COUNTING = {
    "instructions": "Valgrind (cachegrind) counts the processor's instructions.",
    "Python calls": "Calls of Python functions, since valgrind was not installed.",
}


def write(results: Results, docs: Path, drawn: dict[str, str]) -> None:
    """Write the page, and the table that another page includes.

    `drawn` has the names of the charts and what they show.
    """
    if results.truth is not None:
        titles, rows = results.truth.titles, results.truth.rows
        (docs / TRUTH).write_text("\n".join(_table(titles, rows)) + "\n", "utf-8")
    blocks = [
        _opening(results),
        _budgets(results, drawn),
        _profiles(results),
        _truth(results, docs),
        _memory(results),
        _growth(results, drawn),
        _throughput(results, drawn),
        _slow_clients(results),
        _peers(results, drawn),
        _method(results),
        _all_costs(results),
    ]
    lines = [line for block in blocks for line in block]
    (docs / PAGE).write_text("\n".join(lines).rstrip() + "\n", "utf-8")


def _opening(results: Results) -> Iterable[str]:
    """Say what was measured and where we stand, in one screen."""
    yield from ("# Numbers", "")
    yield (
        "You want to know what a request costs with asgi-uow. This page compares it "
        "with SQLAlchemy code written by hand and with other libraries. A command "
        "measured every number and wrote every sentence with a number: "
        "[how it was measured](#how-it-was-measured)."
    )
    yield ""
    yield from (f"- {sentence}" for sentence in sentences(results))
    yield ""
    facts = results.facts
    named = ("Processor", "System", "Python", "SQLAlchemy", "MariaDB", "PostgreSQL")
    machine = [
        facts[name] if name in {"Processor", "System"} else f"{name} {facts[name]}"
        for name in named
        if name in facts
    ]
    dates = " and ".join(dict.fromkeys((min(results.dates), max(results.dates))))
    yield f"Measured on {dates}: {'; '.join(machine)}. {results.remark}".rstrip()
    yield ""


def _budgets(results: Results, drawn: dict[str, str]) -> Iterable[str]:
    found = verdicts(results)
    if not found:
        return
    yield from ("## Budgets", "")
    yield (
        "The design of asgi-uow gives these numbers a budget. Ratios compare with "
        "hand-written code that makes the same round trips, or with a middleware that "
        "does nothing. A ratio below 1 means that asgi-uow costs less."
    )
    yield ""
    yield from _chart("budgets", drawn)
    rows = [
        [each.what, each.unit, *each.shown, "kept" if each.is_kept else "**missed**"]
        for each in found
    ]
    yield from _table(("What", "Unit", "Measured", "Budget", "Budget is"), rows)
    yield ""


def _profiles(results: Results) -> Iterable[str]:
    if not results.profiles:
        return
    yield from ("## Where the difference comes from", "")
    yield (
        "A number misses its budget, or another library needs fewer "
        f"{results.counted}. The tables show the ten functions of C and of Python in "
        "which the two requests differ most. `python -m benchmarks.profile` prints "
        "them for any question."
    )
    yield ""
    for each in results.profiles:
        yield from _profile(each)


def _profile(profile: Profile) -> Iterable[str]:
    yield from (f"### `{profile.question}`: {profile.first} and {profile.second}", "")
    titles = (profile.first, profile.second, "Difference")
    for name, counted in (
        ("Function of C, instructions", profile.functions),
        ("Function of Python, calls", profile.calls),
    ):
        rows = [
            [f"`{function}`", f"{a:,}", f"{b:,}", f"{b - a:+,.10g}"]
            for function, a, b in counted
        ]
        if rows:
            yield from _table((name, *titles), rows)
            yield ""


def _truth(results: Results, docs: Path) -> Iterable[str]:
    if results.truth is None or not (docs / TRUTH).exists():
        return
    yield from ("## What the client is told, and what the database holds", "")
    yield (
        "Each cell was observed: a program did what the title of the column says, "
        "looked at the answer, and looked into the database."
    )
    yield from ("", f"```{{include}} {TRUTH}", "```", "")


def _memory(results: Results) -> Iterable[str]:
    if not results.memory:
        return
    number, without, held = results.memory
    yield from ("## Memory", "")
    rows = [
        ["no-op middleware", f"{without:,.0f}", ""],
        ["asgi-uow", f"{held:,.0f}", f"{held - without:+,.0f}"],
    ]
    title = f"{number:,.0f} requests that wait, no session touched"
    yield from _table((title, "Bytes for each request", "Difference"), rows)
    yield ""


def _growth(results: Results, drawn: dict[str, str]) -> Iterable[str]:
    if not results.growth:
        return
    yield from ("## Growth", "")
    yield (
        "One request has more and more hooks, savepoints, databases, or blocks that "
        "are open at the same time. The lines in the chart must not rise."
    )
    yield ""
    yield from _chart("growth", drawn)
    rows: list[list[Any]] = []
    for name, costs in results.growth:
        found = Growth(name, {int(number): cost for number, cost in costs.items()})
        rows += [[*each] for each in found.rows()]
    counted = results.counted.capitalize()
    titles = ("What", "Number", counted, "For each", "Growth", "Cost of one more grows")
    yield from _table(titles, rows)
    yield ""


def _throughput(results: Results, drawn: dict[str, str]) -> Iterable[str]:
    if results.throughput is None:
        return
    yield from ("## Throughput", "")
    yield (
        "All engines have SQLAlchemy's default pool: it keeps 5 connections, and "
        "closes the others, up to 10, when they come back. So 10 clients have "
        "connections made all the time, by hand too. `pool_size=10, max_overflow=5` "
        "avoids that."
    )
    yield ""
    yield from _chart("throughput", drawn)
    yield from _table(results.throughput.titles, results.throughput.rows)
    yield ""


def _slow_clients(results: Results) -> Iterable[str]:
    if results.slow_clients is None:
        return
    yield from ("## Slow clients", "")
    yield (
        "Clients read a large response slowly. Each row shows how many connections of "
        "the pool are in use meanwhile, and how long another request takes."
    )
    yield ""
    yield from _table(results.slow_clients.titles, results.slow_clients.rows)
    yield ""


def _peers(results: Results, drawn: dict[str, str]) -> Iterable[str]:
    names = [name for name in drawn if name.startswith("peers-")]
    if names:
        yield from ("## Beside other libraries", "")
        yield (
            "Each library runs on the framework that its documentation names. It is "
            "compared with hand-written code on the same framework."
        )
        yield ""
    for name in names:
        yield from _chart(name, drawn)
    rows = [
        [
            f"`{each.peer.question}`",
            each.peer.contestant,
            f"{each.counted:.3f}",
            f"{each.timed:.2f}",
        ]
        for each in ahead(results)
    ]
    if rows:
        yield from ("Another library needs less than asgi-uow here:", "")
        titles = ("Question", "Library", f"Times our {results.counted}")
        yield from _table((*titles, "Times our time"), rows)
        yield ""


def _method(results: Results) -> Iterable[str]:
    yield from ("## How it was measured", "")
    counted = results.counted
    yield METHOD.read_text("utf-8").format(
        Counted=counted[0].upper() + counted[1:],
        counting=COUNTING[counted],
        linear=LINEAR,
    )
    yield f"Each question was timed for at most {results.seconds:g} seconds."
    yield ""
    yield from _table(
        ("What", "Version"), [list(each) for each in results.facts.items()]
    )
    yield ""


def _all_costs(results: Results) -> Iterable[str]:
    if not results.costs:
        return
    yield from ("## All questions", "")
    previous = ""
    rows = []
    counted = results.counted.capitalize()
    for each in results.costs:
        rows.append(
            [
                f"`{each.question}`" if each.question != previous else "",
                each.contestant,
                f"{each.microseconds:,.1f}",
                f"{each.ratio:.2f}",
                f"{each.low:.2f} to {each.high:.2f}",
                f"{each.rounds}",
                f"{each.cost:,.0f}",
                f"{each.cost_ratio:.3f}",
            ]
        )
        previous = each.question
    titles = ("Question", "Contestant", "Median µs", "Ratio", "Middle half", "Rounds")
    yield from _table((*titles, counted, "Ratio"), rows)


def _chart(name: str, drawn: dict[str, str]) -> Iterable[str]:
    if name in drawn:
        yield from (f"![{drawn[name]}](charts/{name}.svg)", "")


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    """Write words to the left and numbers to the right."""
    lines = list(rows)
    columns = list(zip(*lines, strict=True)) if lines else []
    marks = ["--:" if all(map(_is_number, each)) else "---" for each in columns]
    yield f"| {' | '.join(titles)} |"
    yield f"|{'|'.join(marks)}|"
    for row in lines:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def _is_number(cell: str) -> bool:
    return NUMBER.fullmatch(cell) is not None
