"""Make requests in processes that are counted; `benchmarks.instructions` starts it.

Everything is imported once. Then each contestant has a fork for few requests and
one for many: the difference is what requests cost, without start and end.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import threading
from typing import TYPE_CHECKING

from sqlalchemy.ext.asyncio import create_async_engine

from .questions import questions

# All, whatever is asked: addresses of objects decide about hash collisions.
DIALECTS = (
    "sqlite+aiosqlite",
    "mysql+asyncmy",
    "postgresql+asyncpg",
    "postgresql+psycopg",
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

    from .questions import Question


def main(urls: dict[str, str], requests: Sequence[int], *, count_calls: bool) -> None:
    """Print for each fork: question, contestant, process id, calls."""
    for dialect in DIALECTS:
        create_async_engine(f"{dialect}://")  # imports the driver
    gc.collect()  # else a full collection falls into some of the forks
    for question in questions():
        for contestant in question.contestants if question.name in urls else ():
            for number in requests:
                if process := os.fork():
                    if os.waitpid(process, 0)[1] != 0:
                        sys.exit(f"{question.name}, {contestant}: failed")
                    continue
                counter = _CallCounter()
                if count_calls:
                    counter.start()
                asyncio.run(_ask(question, contestant, urls[question.name], number))
                sys.setprofile(None)
                cells = (question.name, contestant, os.getpid(), counter.calls)
                print(*cells, sep="\t", flush=True)
                os._exit(0)  # at once: the end of Python costs the same for all


async def _ask(question: Question, contestant: str, url: str, number: int) -> None:
    async with question.contestant(contestant, url) as request:
        for _ in range(number):
            await request()


class _CallCounter:
    """Counts calls of Python functions; each resumption of a coroutine counts."""

    def __init__(self) -> None:
        self.calls = 0

    def start(self) -> None:
        threading.setprofile(self._count)
        sys.setprofile(self._count)

    def _count(self, frame: FrameType, event: str, argument: object) -> None:  # noqa: ARG002
        if event == "call":
            self.calls += 1


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
