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

if TYPE_CHECKING:
    from types import FrameType

    from .questions import Question


def main(jobs: str) -> None:
    """Print for each fork: question, contestant, process id, calls."""
    asked = json.loads(jobs)
    for url in filter(None, asked["urls"].values()):
        create_async_engine(url)  # imports the driver
    gc.collect()  # else a full collection falls into some of the forks
    for question in questions():
        if question.name not in asked["urls"]:
            continue
        for contestant in question.contestants:
            for requests in asked["requests"]:
                if process := os.fork():
                    os.waitpid(process, 0)
                else:
                    _run(question, contestant, asked, requests)


def _run(
    question: Question, contestant: str, asked: dict[str, dict[str, str]], requests: int
) -> None:
    """Make the requests, report, end the process without cleaning up."""
    counter = _CallCounter()
    if asked["count_calls"]:
        counter.start()
    try:
        url = asked["urls"][question.name]
        asyncio.run(_request(question, contestant, url, requests))
        sys.setprofile(None)
        print(
            question.name, contestant, os.getpid(), counter.calls, sep="\t", flush=True
        )
    except BaseException:
        sys.excepthook(*sys.exc_info())
        raise
    finally:
        os._exit(0)


async def _request(
    question: Question, contestant: str, url: str, requests: int
) -> None:
    async with question.contestant(contestant, url) as request:
        for _ in range(requests):
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
    main(sys.argv[1])
