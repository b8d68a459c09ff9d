"""Ask every question, in time and in instructions, and print one table."""

from __future__ import annotations

import argparse
import asyncio
import sys

from . import instructions, measure
from .databases import Databases
from .memory import parked_bytes
from .questions import chosen
from .tables import print_table


async def main() -> None:
    """Measure, then print: a table is read as a whole."""
    parser = argparse.ArgumentParser(prog="benchmarks")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each question")
    options = parser.parse_args()
    without, held = await parked_bytes()
    times: dict[tuple[str, str], measure.Time] = {}
    async with Databases() as databases:
        urls = await databases.urls(chosen(options.only))
        for question, url in urls.items():
            print(f"timing {question.name} ...", file=sys.stderr)
            times |= await measure.compare(question, url, seconds=options.seconds)
        print("counting ...", file=sys.stderr)
        counts = await instructions.count(urls)
    print_table(
        ("question", "contestant", *measure.TITLES, *instructions.TITLES),
        [(*names, *times[names].cells(), *counts[names]) for names in times],
    )
    more = f"{held - without:,.0f} more than in a no-op middleware"
    print(f"A parked request holds {held:,.0f} bytes: {more}.")


if __name__ == "__main__":
    asyncio.run(main())
