"""Put load on uvicorn with wrk: `python -m benchmarks.throughput`, 20 minutes.

Contestants on one framework stand side by side: ratios are to hand-written code on it.

Client, server and database share the machine: trust the server's CPU time more than
requests per second, and both less than `benchmarks.instructions`.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import random
import re
import shutil
import statistics
import sys
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tests.servers.process import HOST, free_port

from .contestants import FRAMEWORKS, installed, missing
from .databases import Databases
from .questions import chosen
from .tables import print_table

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from .questions import Question

NAMES = (
    "insert-mariadb-asyncmy",
    "select-mariadb-asyncmy",
    "insert-postgresql-asyncpg",
    "select-postgresql-asyncpg",
)
UNITS = {"us": 0.001, "ms": 1.0, "s": 1000.0}
BOOT_SECONDS = 30.0


@dataclasses.dataclass(frozen=True)
class Load:
    """What a server did under load."""

    rate: float  # requests per second
    p50: float  # milliseconds
    p99: float
    cpu: float  # microseconds of the server per request


@dataclasses.dataclass(frozen=True)
class Site:
    """A server that runs."""

    process: asyncio.subprocess.Process
    port: int

    async def load(self, connections: int, seconds: int) -> Load:
        """Send requests for so many seconds."""
        before = self._cpu_seconds()
        wrk = await asyncio.create_subprocess_exec(
            *("wrk", "--latency", "-t1", f"-c{connections}", f"-d{seconds}s"),
            f"http://{HOST}:{self.port}/",
            stdout=asyncio.subprocess.PIPE,
        )
        output = (await wrk.communicate())[0].decode()
        used = self._cpu_seconds() - before
        if wrk.returncode or "Non-2xx" in output:
            sys.exit(output)
        [requests] = re.findall(r"(\d+) requests in", output)
        [rate] = re.findall(r"Requests/sec: +([\d.]+)", output)
        p50, p99 = (
            float(number) * UNITS[unit]
            for number, unit in re.findall(r" (?:50|99)% +([\d.]+)(\w+)", output)
        )
        return Load(float(rate), p50, p99, used / int(requests) * 1e6)

    def _cpu_seconds(self) -> float:
        stat = Path(f"/proc/{self.process.pid}/stat").read_text("utf-8")
        fields = stat.rpartition(")")[2].split()  # from the third on
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


@asynccontextmanager
async def serve(
    framework: str, contestant: str, statement: str, url: str
) -> AsyncGenerator[Site, None]:
    """Run a contestant in a process of its own."""
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.served"),
        *(framework, contestant, statement, url, str(port)),
        cwd=Path(__file__).parents[1],
    )
    try:
        async with asyncio.timeout(BOOT_SECONDS):
            while process.returncode is None:
                with suppress(OSError):
                    _, writer = await asyncio.open_connection(HOST, port)
                    writer.close()
                    break
                await asyncio.sleep(0.1)
        yield Site(process, port)
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


async def compare(
    question: Question, framework: str, url: str, options: argparse.Namespace
) -> list[tuple[str, ...]]:
    """Put load on all contestants in turn; return the lines of the table."""
    statement = question.name.partition("-")[0]
    lines = []
    async with AsyncExitStack() as stack:
        sites = {
            each.name: await stack.enter_async_context(
                serve(framework, each.name, statement, url)
            )
            for each in installed(framework)
        }
        for connections in options.connections:
            loads: dict[str, list[Load]] = {name: [] for name in sites}
            for site in sites.values():
                await site.load(connections, 1)
            for _ in range(options.rounds):
                for name in random.sample(list(sites), len(sites)):
                    load = await sites[name].load(connections, options.seconds)
                    loads[name].append(load)
            title = f"{question.name}, {framework}, {connections} connections"
            lines += [(title, *_cells(name, loads)) for name in sites]
    return lines


def _cells(name: str, loads: dict[str, list[Load]]) -> tuple[str, ...]:
    """Return medians, and medians of the ratios within a round."""
    mine, reference = loads[name], next(iter(loads.values()))
    pairs = list(zip(mine, reference, strict=True))
    median = statistics.median
    return (
        name,
        f"{median(each.rate for each in mine):,.0f}",
        f"{median(a.rate / b.rate for a, b in pairs):.2f}",
        f"{median(each.p50 for each in mine):.1f}",
        f"{median(each.p99 for each in mine):.1f}",
        f"{median(each.cpu for each in mine):,.0f}",
        f"{median(a.cpu / b.cpu for a, b in pairs):.2f}",
    )


async def main() -> None:
    """Measure on both servers."""
    parser = argparse.ArgumentParser(prog="benchmarks.throughput")
    parser.add_argument("--only", nargs="+", default=NAMES, metavar="NAME")
    parser.add_argument("--frameworks", nargs="+", default=list(FRAMEWORKS))
    parser.add_argument("--connections", nargs="+", type=int, default=(1, 10, 100))
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("wrk is not installed.")
    for name in missing():
        print(f"{name} is left out: it is not installed.")
    lines = []
    async with Databases() as databases:
        asked = [each for each in chosen(options.only) if each.name in NAMES]
        for question, url in (await databases.urls(asked)).items():
            for each in filter(installed, options.frameworks):
                print(f"measuring {question.name} on {each} ...", file=sys.stderr)
                lines += await compare(question, each, url, options)
    titles = ("req/s", "ratio", "p50 ms", "p99 ms", "server CPU µs", "ratio")
    print_table(("question", "contestant", *titles), lines)


if __name__ == "__main__":
    asyncio.run(main())
