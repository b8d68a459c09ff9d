"""Show where two contestants differ: `python -m benchmarks.profile insert-sqlite`.

In instructions by function of C, which valgrind counts, and in calls by function of
Python. Without names of contestants it compares the first one and ours.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import sysconfig
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from . import instructions
from .databases import Databases
from .questions import chosen
from .results import Profile
from .tables import print_table

if TYPE_CHECKING:
    from types import FrameType

    from .questions import Question

MOST = 10
"""How many functions are shown."""
WARM_UP = 50
REQUESTS = 100
ROOT = Path(__file__).parents[1]


async def profile(question: Question, url: str, first: str, second: str) -> Profile:
    """Count both contestants by function."""
    names = (first, second)
    calls = [await _calls(question, url, name) for name in names]
    functions: list[Counter[str]] = [Counter(), Counter()]
    if instructions.VALGRIND:
        functions = await _functions(question, url, names)
    totals = [float(sum(each.values())) for each in functions]
    return Profile(
        question.name,
        first,
        second,
        _largest(*functions),
        _largest(*calls),
        totals,
    )


def _largest(first: Counter[str], second: Counter[str]) -> list[list[object]]:
    names = sorted(first.keys() | second.keys())
    names.sort(key=lambda name: abs(second[name] - first[name]), reverse=True)
    return [
        [name, first[name], second[name]]
        for name in names[:MOST]
        if first[name] != second[name]
    ]


async def _functions(
    question: Question, url: str, contestants: tuple[str, str]
) -> list[Counter[str]]:
    """Return the instructions of a request by function of C."""
    few, many = instructions.REQUESTS
    found: dict[str, list[Counter[str]]] = {name: [] for name in contestants}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = await instructions.run_counted(
            {question: url}, (few, many), folder, contestants=contestants
        )
        for line in lines:
            _, contestant, process, _ = line.split("\t")
            found[contestant].append(_by_function(folder / process))
    counts: list[Counter[str]] = []
    for short, long in found.values():
        per = {each: round((long[each] - short[each]) / (many - few)) for each in long}
        counts.append(Counter(per))
    return counts


def _by_function(file: Path) -> Counter[str]:
    """Sum what valgrind wrote for each line of code."""
    counts: Counter[str] = Counter()
    function = ""
    for line in file.read_text("utf-8").splitlines():
        if line.startswith("fn="):
            function = line.removeprefix("fn=")
        elif line[:1].isdigit():
            counts[function] += int(line.split()[1])
    return counts


async def _calls(question: Question, url: str, contestant: str) -> Counter[str]:
    """Return the calls of a request by function of Python."""
    counts: Counter[str] = Counter()

    def look(frame: FrameType, event: str, argument: object) -> None:  # noqa: ARG001
        if event == "call":
            code = frame.f_code
            counts[f"{_short(code.co_filename)}: {code.co_qualname}"] += 1

    async with question.contestant(contestant, url) as request:
        for _ in range(WARM_UP):
            await request()
        sys.setprofile(look)
        try:
            for _ in range(REQUESTS):
                await request()
        finally:
            sys.setprofile(None)
    return Counter({name: round(each / REQUESTS, 2) for name, each in counts.items()})


def _short(file: str) -> str:
    """Leave out of a path what depends on the machine."""
    paths = sysconfig.get_paths()
    for folder in (paths["purelib"], paths["platlib"], paths["stdlib"]):
        file = file.removeprefix(f"{folder}/")
    return file.removeprefix(f"{ROOT}/").removeprefix("src/")


def show(found: Profile) -> None:
    """Print the two tables."""
    for title, lines in (
        ("function of C, instructions", found.functions),
        ("function of Python, calls", found.calls),
    ):
        rows = [
            (name, "", f"{first:,}", f"{second:,}", f"{second - first:+,.10g}")
            for name, first, second in lines
        ]
        print_table((title, "", found.first, found.second, "difference"), rows)
        print()


async def main() -> None:
    """Print the profile of each question whose name begins like this."""
    parser = argparse.ArgumentParser(prog="benchmarks.profile")
    parser.add_argument("question")
    parser.add_argument("contestants", nargs="*", help="two; else the first and ours")
    options = parser.parse_args()
    async with Databases() as databases:
        urls = await databases.urls(chosen([options.question]))
        for question, url in urls.items():
            first, second = options.contestants or (
                next(iter(question.contestants)),
                "ours",
            )
            print(question.name)
            show(await profile(question, url, first, second))


if __name__ == "__main__":
    asyncio.run(main())
