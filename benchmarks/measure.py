"""Measure contestants side by side: noise hits all of them in the same round."""

from __future__ import annotations

import dataclasses
import gc
import random
import statistics
import time
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    Contestant: TypeAlias = Callable[[], Awaitable[None]]

WARM_UP_ROUNDS = 10
FEWEST_ROUNDS = 2  # quartiles need two


@dataclasses.dataclass(frozen=True)
class Result:
    """One line of the table."""

    question: str
    contestant: str
    microseconds: list[float]
    """The time of one part in each round."""
    ratios: list[float]
    """To the reference, each in the same round."""

    def cells(self) -> tuple[str, ...]:
        """Return the columns of the table."""
        median = statistics.median(self.microseconds)
        low, middle, high = statistics.quantiles(self.ratios, n=4)
        return (
            self.question,
            self.contestant,
            f"{median:.1f}",
            f"{middle:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{len(self.ratios)}",
        )


TITLES = (
    "question",
    "contestant",
    "median µs",
    "ratio",
    "middle half",
    "rounds",
)


async def compare(
    question: str,
    contestants: Mapping[str, Contestant],
    *,
    calls: int,
    parts: int = 1,
    seconds: float = 5.0,
    most_rounds: int = 500,
) -> list[Result]:
    """Run every contestant once per round, `calls` times in a row.

    `parts`: how many of what is asked for one call does; the times are of one part.

    The first contestant is the reference. Every round has an order of its own, so
    that nobody always follows the same other. Ends after `most_rounds`, or with the
    first round past `seconds`.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(WARM_UP_ROUNDS):
        for contestant in contestants.values():
            await _time(contestant, calls, parts)
    gc.collect()
    end = time.monotonic() + seconds
    orders = random.Random(question)
    for rounds in range(most_rounds):
        if rounds >= FEWEST_ROUNDS and time.monotonic() > end:
            break
        for name in orders.sample(list(contestants), len(contestants)):
            times[name].append(await _time(contestants[name], calls, parts))
    reference = next(iter(times.values()))
    return [
        Result(
            question,
            name,
            mine,
            [own / other for own, other in zip(mine, reference, strict=True)],
        )
        for name, mine in times.items()
    ]


async def _time(contestant: Contestant, calls: int, parts: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(calls):
        await contestant()
    return (time.perf_counter_ns() - start) / calls / parts / 1000
