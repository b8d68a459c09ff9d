"""One timer of a loop looks at all that has a limit of time."""

from __future__ import annotations

import asyncio
import weakref
from typing import TYPE_CHECKING, Any

from asgi_uow import _timers as timers

if TYPE_CHECKING:
    from collections.abc import Callable

FAR, SOON = 3600.0, 0.01  # seconds


class Limited:
    """Looked at as often as it has answers; the last one ends it."""

    def __init__(self, *answers: float | None) -> None:
        self.answers = list(answers)
        self.looked_at: list[float] = []
        self.ended = asyncio.Event()

    async def is_done(self) -> None:
        """Wait until it was looked at for the last time."""
        async with asyncio.timeout(20):
            await self.ended.wait()

    def __call__(self) -> Limited:
        """Give itself, as what is kept in the timer does."""
        return self

    def look(self) -> float | None:
        """Note the time."""
        self.looked_at.append(asyncio.get_running_loop().time())
        answer = self.answers.pop(0)
        if not self.answers:
            self.ended.set()
        return answer


def add(limited: Callable[[], Any], seconds: float) -> timers.Timer:
    """Have it looked at after so many seconds."""
    loop = asyncio.get_running_loop()
    timer = timers.timer_of(loop)
    timer.add(limited, loop.time() + seconds)
    return timer


async def test_what_is_sooner_comes_first() -> None:
    """A later limit keeps nothing that is sooner waiting."""
    late, soon = Limited(FAR, None), Limited(None)
    add(late, FAR)
    timer = add(soon, SOON)
    await soon.is_done()
    assert len(soon.looked_at) == 1
    assert late.answers == [None]
    assert list(timer.limited) == [late]
    timer.limited.clear()


async def test_never_before_its_time() -> None:
    """What answers with seconds is looked at again after these."""
    started = asyncio.get_running_loop().time()
    limited = Limited(SOON, None)
    timer = add(limited, SOON)
    await limited.is_done()
    first, second = limited.looked_at
    # As exact as the loop's clock, which takes an end within its resolution.
    assert first - started > SOON * 0.9
    assert second - first > SOON * 0.9
    assert not timer.limited


async def test_one_timer_for_all() -> None:
    """A thousand limits are one timer of the loop."""
    loop: Any = asyncio.get_running_loop()
    before = len(loop._scheduled)
    timer = add(Limited(None), FAR)
    for _ in range(1000):
        add(Limited(None), FAR)
    assert len(loop._scheduled) == before + 1
    timer.limited.clear()


async def test_an_error_keeps_nobody_waiting() -> None:
    """What a look raises is told by the loop; the others are looked at all the same."""
    told: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda _, about: told.append(about)
    )
    broken, whole = Limited(), Limited(None)
    add(broken, SOON)
    add(whole, SOON)
    await whole.is_done()
    assert isinstance(told[0]["exception"], IndexError)
    assert len(whole.looked_at) == len(broken.looked_at) == 1


async def test_what_is_gone_is_forgotten() -> None:
    """An object that nobody else refers to is not looked at, and not kept."""
    gone, last = Limited(None), Limited(None)
    add(weakref.ref(gone), SOON)
    timer = add(last, SOON)
    del gone
    await last.is_done()
    assert not timer.limited


async def test_added_by_a_look() -> None:
    """What gives itself more time while it is looked at is looked at then."""

    class Longer(Limited):
        def look(self) -> float | None:
            super().look()
            if self.answers:
                add(self, SOON)
            return None

    longer = Longer(SOON, None)
    timer = add(longer, SOON)
    await longer.is_done()
    assert len(longer.looked_at) == 2
    assert not timer.limited


def test_each_loop_has_its_own() -> None:
    """A loop that has ended keeps nothing from the next one in its thread."""

    async def wait() -> timers.Timer:
        limited = Limited(None)
        timer = add(limited, SOON)
        add(Limited(None), FAR)
        await limited.is_done()
        return timer

    first, second = asyncio.run(wait()), asyncio.run(wait())
    assert first is not second
