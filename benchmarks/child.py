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

from .growth import growing
from .questions import PLACES, chosen

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractAsyncContextManager
    from types import FrameType

    from .questions import Request


def main(
    urls: dict[str, str],
    requests: Sequence[int],
    *,
    count_calls: bool,
    contestants: Sequence[str] = (),
) -> None:
    """Print for each fork: question, contestant, process id, calls.

    Of contestants that are named only those are counted.
    """
    # All of them, whatever is asked: where objects lie decides about collisions.
    for dialect in PLACES.values():
        create_async_engine(f"{dialect}://")  # imports the driver
    gc.collect()  # else a full collection falls into some of the forks
    for question in [*chosen(urls), *growing(urls)]:
        asked = question.contestants if question.name in urls else ()
        for contestant in (
            filter(contestants.__contains__, asked) if contestants else asked
        ):
            for number in requests:
                process = os.fork()
                if not process:
                    request = question.contestant(contestant, urls[question.name])
                    calls = _run(request, number, count_calls=count_calls)
                    print(question.name, contestant, os.getpid(), calls, sep="\t")
                    sys.stdout.flush()
                    os._exit(0)  # at once: the end of Python is not measured
                if os.waitpid(process, 0)[1] != 0:
                    sys.exit(f"{question.name}, {contestant}: failed")


def _run(
    contestant: AbstractAsyncContextManager[Request], number: int, *, count_calls: bool
) -> int:
    """Make so many requests; return how many Python calls they were, if counted.

    Each resumption of a coroutine counts as a call.
    """
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:  # noqa: ARG001
        nonlocal calls
        calls += event == "call"

    async def main() -> None:
        async with contestant as request:
            for _ in range(number):
                await request()

    if count_calls:
        threading.setprofile(count)
        sys.setprofile(count)
    asyncio.run(main())
    sys.setprofile(None)
    return calls


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
