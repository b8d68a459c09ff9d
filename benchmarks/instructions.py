"""Count what a request costs: `python -m benchmarks.instructions`.

In instructions of the processor where valgrind is installed, else in calls of
Python functions. Both hardly move between runs; only ratios mean something.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from .databases import Databases
from .questions import chosen
from .tables import print_table

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from .questions import Question

REQUESTS = (200, 600)
VALGRIND = (
    ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--log-file=/dev/null"]
    if shutil.which("valgrind")
    else []
)


@dataclasses.dataclass(frozen=True)
class Count:
    """What one part of a request costs."""

    number: float
    ratio: float
    """To the first contestant of the question."""

    def cells(self) -> tuple[str, ...]:
        """Return the columns of the table."""
        return (f"{self.number:,.0f}", f"{self.ratio:.3f}")


TITLES = ("instructions" if VALGRIND else "Python calls", "ratio")


async def count(urls: Mapping[Question, str]) -> dict[tuple[str, str], Count]:
    """Count by question and contestant, each question on the database of its URL."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = {
            "urls": {question.name: url for question, url in urls.items()},
            "requests": REQUESTS,
            "count_calls": not VALGRIND,
        }
        child = await asyncio.create_subprocess_exec(
            *VALGRIND and [*VALGRIND, f"--cachegrind-out-file={folder}/%p"],
            *(sys.executable, "-m", "benchmarks.child", json.dumps(jobs)),
            cwd=Path(__file__).parents[1],
            env=os.environ | {"PYTHONHASHSEED": "0"},
            stdout=asyncio.subprocess.PIPE,
        )
        output, _ = await child.communicate()
        totals: dict[tuple[str, str], list[int]] = {}
        for line in output.decode().splitlines():
            question, contestant, process, calls = line.split("\t")
            total = _instructions(Path(folder, process)) if VALGRIND else int(calls)
            totals.setdefault((question, contestant), []).append(total)
    return _per_part(urls, totals)


def _instructions(file: Path) -> int:
    [total] = re.findall(r"^summary: (\d+)", file.read_text("utf-8"), re.MULTILINE)
    return int(total)


def _per_part(
    asked: Iterable[Question], totals: Mapping[tuple[str, str], list[int]]
) -> dict[tuple[str, str], Count]:
    counts = {}
    for question in asked:
        parts = (REQUESTS[1] - REQUESTS[0]) * question.parts
        numbers = {}
        for name in question.contestants:
            few, many = totals[question.name, name]
            numbers[name] = (many - few) / parts
        first = next(iter(numbers.values()))
        for name, number in numbers.items():
            counts[question.name, name] = Count(number, number / first)
    return counts


async def main() -> None:
    """Count for the questions whose names begin with one of those given."""
    parser = argparse.ArgumentParser(prog="benchmarks.instructions")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME")
    asked = chosen(parser.parse_args().only)
    async with Databases() as databases:
        counts = await count(await databases.urls(asked))
    print_table(
        ("question", "contestant", *TITLES),
        [(*names, *number.cells()) for names, number in counts.items()],
    )


if __name__ == "__main__":
    asyncio.run(main())
