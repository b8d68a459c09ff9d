"""Time contestants side by side: noise hits all of them in the same round."""

from __future__ import annotations

import dataclasses
import gc
import random
import statistics
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .questions import Question, Request

WARM_UP_ROUNDS = 10
FEWEST_ROUNDS = 2  # quartiles need two
MOST_ROUNDS = 500
ROUND_SECONDS = 0.003  # of the slowest contestant: short enough for many rounds


@dataclasses.dataclass(frozen=True)
class Time:
    """How long a contestant takes."""

    microseconds: list[float]
    """The time of one part in each round."""
    ratios: list[float]
    """To the first contestant, each in the same round."""

    @property
    def median(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.microseconds)

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Of the ratios: a quarter is below, half is below, a quarter is above."""
        low, middle, high = statistics.quantiles(self.ratios, n=4)
        return low, middle, high

    def cells(self) -> tuple[str, ...]:
        """Return the columns of the table."""
        low, middle, high = self.quartiles
        return (
            f"{self.median:.1f}",
            f"{middle:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{len(self.ratios)}",
        )


TITLES = ("median µs", "ratio", "middle half", "rounds")


async def compare(
    question: Question, url: str, *, seconds: float
) -> dict[tuple[str, str], Time]:
    """Time every contestant once per round, several requests in a row.

    Every round has an order of its own, so that nobody always follows the same
    other. Ends after `MOST_ROUNDS`, or with the first round past `seconds`.
    """
    async with AsyncExitStack() as stack:
        requests = {
            name: await stack.enter_async_context(question.contestant(name, url))
            for name in question.contestants
        }
        calls = 1
        for _ in range(WARM_UP_ROUNDS):
            took = [await _time(request, calls) for request in requests.values()]
            calls = max(1, round(ROUND_SECONDS * 1e6 / max(took)))
        gc.collect()
        times: dict[str, list[float]] = {name: [] for name in requests}
        end = time.monotonic() + seconds
        orders = random.Random(question.name)
        for rounds in range(MOST_ROUNDS):
            if rounds >= FEWEST_ROUNDS and time.monotonic() > end:
                break
            for name in orders.sample(list(requests), len(requests)):
                took_once = await _time(requests[name], calls)
                times[name].append(took_once / question.parts)
    first = next(iter(times.values()))
    return {
        (question.name, name): Time(
            mine, [own / other for own, other in zip(mine, first, strict=True)]
        )
        for name, mine in times.items()
    }


async def _time(request: Request, calls: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(calls):
        await request()
    return (time.perf_counter_ns() - start) / calls / 1000
