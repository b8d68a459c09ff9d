"""Count what a request costs: `python -m benchmarks.instructions`.

In instructions of the processor where valgrind is installed, else in calls of
Python functions. Both hardly move between runs; only ratios mean something.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from .databases import Databases
from .questions import chosen
from .tables import print_table

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from .questions import Question

REQUESTS = (100, 300)
VALGRIND = (
    ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--log-file=/dev/null"]
    if shutil.which("valgrind")
    else []
)
TITLES = ("instructions" if VALGRIND else "Python calls", "ratio")


async def count(
    urls: Mapping[Question, str],
    repeats: int = 1,
    requests: Sequence[int] = REQUESTS,
) -> dict[tuple[str, str], tuple[str, ...]]:
    """Return number and ratio by question and contestant, as texts.

    Each repetition has other hashes, so other collisions of them: medians count.
    """
    if not VALGRIND:
        print("valgrind is not installed: calls of Python functions are counted.")
    totals = [await _totals(urls, requests, seed) for seed in range(repeats)]
    counts: dict[tuple[str, str], tuple[str, ...]] = {}
    for question in urls:
        parts = (requests[1] - requests[0]) * question.parts
        numbers = {}
        for name in question.contestants:
            pairs = (each[question.name, name] for each in totals)
            numbers[name] = statistics.median((b - a) / parts for a, b in pairs)
        first = next(iter(numbers.values()))
        for name, number in numbers.items():
            cells = f"{number:,.0f}", f"{number / first:.3f}"
            counts[question.name, name] = cells
    return counts


async def _totals(
    urls: Mapping[Question, str], requests: Sequence[int], seed: int
) -> dict[tuple[str, str], list[int]]:
    """Return what the processes for few and for many requests cost."""
    totals: dict[tuple[str, str], list[int]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for line in await run_counted(urls, requests, folder, seed=seed):
            question, contestant, process, calls = line.split("\t")
            total = _instructions(folder / process) if VALGRIND else int(calls)
            totals.setdefault((question, contestant), []).append(total)
    return totals


async def run_counted(
    urls: Mapping[Question, str],
    requests: Sequence[int],
    folder: Path,
    *,
    seed: int = 0,
    contestants: Collection[str] = (),
) -> list[str]:
    """Run `benchmarks.child` and return the lines it prints.

    Valgrind writes a file for each process into the folder.
    """
    jobs = {
        "urls": {question.name: url for question, url in urls.items()},
        "requests": requests,
        "count_calls": not VALGRIND,
        "contestants": list(contestants),
    }
    fixed = {"PYTHONHASHSEED": str(seed), "PYTHONDONTWRITEBYTECODE": "1"}
    child = await asyncio.create_subprocess_exec(
        *VALGRIND and [*VALGRIND, f"--cachegrind-out-file={folder}/%p"],
        *(sys.executable, "-m", "benchmarks.child", json.dumps(jobs)),
        cwd=Path(__file__).parents[1],
        env=os.environ | fixed,
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await child.communicate()
    if child.returncode:
        sys.exit("what was to be counted has failed")
    return output.decode().splitlines()


def _instructions(file: Path) -> int:
    [total] = re.findall(r"^summary: (\d+)", file.read_text("utf-8"), re.MULTILINE)
    return int(total)


async def main() -> None:
    """Count for the questions whose names begin with one of those given."""
    parser = argparse.ArgumentParser(prog="benchmarks.instructions")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME")
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    async with Databases() as databases:
        urls = await databases.urls(chosen(options.only))
        counts = await count(urls, options.repeats)
    print_table(
        ("question", "contestant", *TITLES),
        [(*names, *cells) for names, cells in counts.items()],
    )


if __name__ == "__main__":
    asyncio.run(main())
