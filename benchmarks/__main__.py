"""Measure everything, print tables, and write the page of numbers.

`--only` takes the beginnings of questions' names, and `memory`, `growth`,
`throughput`, `slow-clients`, `truth`. With `--report docs` the results go into
`docs/numbers.md`; what was not measured this time stays as it is.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime as dt
import importlib
import importlib.util
import os
import shutil
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from . import (
    growth,
    instructions,
    machine,
    measure,
    memory,
    profile,
    report,
    results,
    slow_clients,
    throughput,
)
from .budgets import explained
from .contestants import FRAMEWORKS, installed
from .databases import Databases
from .questions import Question, chosen
from .results import Cost, Profile, Results, Table
from .tables import print_table

if TYPE_CHECKING:
    from collections.abc import Mapping


EVERYTHING = ("",)
PARTS = ("memory", "slow-clients", "truth")
SLOW = ("Beside", "Contestant", "Connections in use", "Other request, ms", "Slow, s")
SLOW_CLIENTS = (5, 10)
LOAD = ("Requests/s", "Ratio", "p50 ms", "p99 ms", "Server CPU µs", "Ratio")


async def main() -> None:
    """Measure what was asked for; keep it after each part, since a run is long."""
    options = _options()
    only = tuple(options.only)
    facts, counted = machine.facts(), instructions.TITLES[0]
    folder = options.report and options.report / "charts"
    found = Results(facts, counted)
    if folder and only != EVERYTHING:
        found = results.load(folder, facts, counted)
    found.seconds = options.seconds
    found.remark = options.remark or found.remark
    today = dt.datetime.now(dt.UTC).date().isoformat()
    found.dates = sorted({*found.dates, today})
    async with Databases() as databases:
        for part in MEASURED:
            await part(found, databases, only)
            if folder:
                results.save(folder, found)
    if options.report:
        charts = importlib.import_module("benchmarks.charts")  # it needs matplotlib
        report.write(found, options.report, charts.draw_all(found, folder))


def _options() -> Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", default=EVERYTHING, metavar="NAME")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each question")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="docs")
    parser.add_argument("--remark", default="", help="for the page: what was special")
    options = parser.parse_args()
    if options.report and not importlib.util.find_spec("matplotlib"):
        parser.error("--report needs matplotlib, which is not installed.")
    only = tuple(options.only)
    names = [each.name for each in (*chosen(only), *growth.growing(only))]
    asked = any(_is_asked(part, only) for part in PARTS)
    if not (names or asked or _loaded(only)):
        parser.error("--only: no question has a name that begins like this.")
    return options


def _is_asked(part: str, only: tuple[str, ...]) -> bool:
    return part.startswith(only)


def _say(what: str) -> None:
    print(f"{what} ...", file=sys.stderr, flush=True)


async def _costs(found: Results, databases: Databases, only: tuple[str, ...]) -> None:
    """Time and count the questions."""
    urls = await databases.urls(chosen(only))
    if not urls:
        return
    times: dict[tuple[str, str], measure.Time] = {}
    for question, url in urls.items():
        _say(f"timing {question.name}")
        times |= await measure.compare(question, url, seconds=found.seconds)
    _say("counting")
    counts = await instructions.count(urls)
    print_table(
        ("question", "contestant", *measure.TITLES, *instructions.TITLES),
        [(*names, *times[names].cells(), *counts[names]) for names in times],
    )
    found.add_costs(
        _cost(question, name, times[question.name, name], counts)
        for question in urls
        for name in question.contestants
    )


def _cost(
    question: Question,
    contestant: str,
    took: measure.Time,
    counts: Mapping[tuple[str, str], tuple[str, ...]],
) -> Cost:
    number, ratio = counts[question.name, contestant]
    low, middle, high = (round(each, 4) for each in took.quartiles)
    return Cost(
        question.name,
        contestant,
        question.place,
        round(took.median, 2),
        middle,
        low,
        high,
        len(took.ratios),
        float(number.replace(",", "")),
        float(ratio),
    )


async def _memory(found: Results, databases: Databases, only: tuple[str, ...]) -> None:  # noqa: ARG001
    if not _is_asked("memory", only):
        return
    _say("measuring memory")
    without, held = await memory.parked_bytes()
    found.memory = [memory.REQUESTS, round(without, 1), round(held, 1)]
    more = f"{held - without:,.0f} more than in a no-op middleware"
    print(f"A parked request holds {held:,.0f} bytes: {more}.")


async def _growth(found: Results, databases: Databases, only: tuple[str, ...]) -> None:
    asked = growth.growing(only)
    if not asked:
        return
    _say("counting growth")
    grown = await growth.measure(databases, [each.name for each in asked])
    rows = [row for each in grown for row in each.rows()]
    print_table(("what", *growth.TITLES), rows)
    new = {each.what: each.costs for each in grown}
    kept = [each for each in found.growth if each[0] not in new]
    found.growth = kept + [[what, _with_texts(costs)] for what, costs in new.items()]


def _with_texts(costs: Mapping[int, float]) -> dict[str, float]:
    """Write the numbers as JSON does."""
    return {str(number): cost for number, cost in costs.items()}


async def _truth(found: Results, databases: Databases, only: tuple[str, ...]) -> None:  # noqa: ARG001
    if not _is_asked("truth", only):
        return
    if not importlib.util.find_spec("benchmarks.truth"):
        _say("The truth table is left out: there is no benchmarks.truth")
        return
    _say("looking for the truth")
    titles, rows = await importlib.import_module("benchmarks.truth").truth_table()
    print_table(titles, rows)
    found.truth = Table(list(titles), [list(row) for row in rows])


async def _profiles(
    found: Results, databases: Databases, only: tuple[str, ...]
) -> None:
    """Explain each budget that is missed, and each peer that costs less."""
    urls = await databases.urls(chosen(only))
    by_name = {question.name: question for question in urls}
    made: list[Profile] = []
    for name, first, second in explained(found):
        if name in by_name:
            _say(f"profiling {name}")
            question = by_name[name]
            made.append(await profile.profile(question, urls[question], first, second))
            print(name)
            profile.show(made[-1])
    found.add_profiles(made, set(by_name))


async def _throughput(
    found: Results, databases: Databases, only: tuple[str, ...]
) -> None:
    """Put load on the contestants of every framework."""
    asked = _loaded(only)
    if not asked:
        return
    if shutil.which("wrk") is None:
        _say("Throughput is left out: wrk is not installed")
        return
    options = Namespace(connections=(1, 10, 100), seconds=1, rounds=3)
    rows: list[tuple[str, ...]] = []
    for question, url in (await databases.urls(asked)).items():
        for framework in filter(installed, FRAMEWORKS):
            _say(f"putting load on {question.name}, {framework}")
            rows += await throughput.compare(question, framework, url, options)
    print_table(("question", "contestant", *LOAD), rows)
    names = tuple(f"{question.name}," for question in asked)
    before = found.throughput.rows if found.throughput else []
    kept = [row for row in before if not row[0].startswith(names)]
    titles = ["Load", "Contestant", *LOAD]
    found.throughput = Table(titles, kept + [list(row) for row in rows])


async def _slow_clients(
    found: Results, databases: Databases, only: tuple[str, ...]
) -> None:
    if not _is_asked("slow-clients", only):
        return
    _say("serving slow clients")
    place = Question(slow_clients.PLACE, {}, slow_clients.PLACE)
    rows = [
        await slow_clients.compare(url, name, number)
        for url in (await databases.urls([place])).values()
        for number in SLOW_CLIENTS
        for name in slow_clients.CONTESTANTS
    ]
    print_table(SLOW, rows)
    found.slow_clients = Table(list(SLOW), [list(row) for row in rows])


def _loaded(only: tuple[str, ...]) -> list[Question]:
    """Return what is put under load; the names begin with `throughput-`."""
    return [
        each
        for each in chosen(throughput.NAMES)
        if each.name in throughput.NAMES and _is_asked(f"throughput-{each.name}", only)
    ]


MEASURED = (
    _costs,
    _memory,
    _growth,
    _truth,
    _profiles,
    _slow_clients,
    _throughput,
)


if __name__ == "__main__":
    asyncio.run(main())
    sys.stdout.flush()
    os._exit(0)  # connections that a library leaves open have threads that never end
