"""Nothing interrupts an end, and nothing waits for one for ever."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import anyio
import pytest

from tests.support.private import (
    Shield,
    TaskLock,
    bounded,
    concurrency,
    run_to_completion,
)

if TYPE_CHECKING:
    from collections.abc import Callable


class Work:
    """Something that must not be interrupted; it ends when it is told to."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.started = asyncio.Event()
        self.may_end = asyncio.Event()
        self.ended = asyncio.Event()
        self.error = error

    async def run(self) -> str:
        self.started.set()
        await self.may_end.wait()
        self.ended.set()
        if self.error is not None:
            raise self.error
        return "done"


async def test_result() -> None:
    """The result of the work is the result."""
    work = Work()
    work.may_end.set()
    assert "done" == await run_to_completion(work.run())


@pytest.mark.parametrize("error", [ValueError("wrong"), asyncio.CancelledError("me")])
async def test_error(error: BaseException) -> None:
    """What the work raises comes out, its own cancellation too."""
    work = Work(error)
    work.may_end.set()
    with pytest.raises(type(error), match=str(error)):
        await run_to_completion(work.run())


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize(
    "error", [None, ValueError("wrong"), asyncio.CancelledError()], ids=repr
)
async def test_native_cancellation(times: int, error: BaseException | None) -> None:
    """However often a task is cancelled, the work ends first; then it is delivered."""
    work = Work(error)
    task = asyncio.create_task(run_to_completion(work.run()))
    await work.started.wait()
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not task.done()
    work.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.ended.is_set()
    assert times == task.cancelling()


async def test_a_cancellation_hides_no_other_error() -> None:
    """What came before it, and is to end everything, is what is raised at last."""
    shield, may_end = Shield(), asyncio.Event()
    shield.raise_later(SystemExit(3))
    task = asyncio.create_task(shield.run(may_end.wait()))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    may_end.set()
    await task
    with pytest.raises(SystemExit):
        shield.deliver()


async def test_cancelled_before_it_starts() -> None:
    """A cancellation that is already on its way does not keep the work from ending."""
    work = Work()
    work.may_end.set()

    async def caller() -> None:
        current = asyncio.current_task()
        assert current is not None
        current.cancel()
        await run_to_completion(work.run())

    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(caller())
    assert work.ended.is_set()


async def test_asyncio_timeout() -> None:
    """A timeout around the end is still a timeout, after the end."""
    work = Work()

    async def caller() -> None:
        async with asyncio.timeout(3600) as timeout:
            loop = asyncio.get_running_loop()
            timeout.reschedule(loop.time())
            await run_to_completion(work.run())

    task = asyncio.create_task(caller())
    await work.started.wait()
    loop_has_run_twice = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.call_later(0, loop.call_soon, loop_has_run_twice.set)
    await loop_has_run_twice.wait()
    work.may_end.set()
    with pytest.raises(TimeoutError):
        await task
    assert work.ended.is_set()


@pytest.mark.parametrize("native", [0, 3])
async def test_cancel_scope(native: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A level-triggered cancel scope waits for the end, without a busy loop."""
    loop = asyncio.get_running_loop()
    iterations = 0
    run_once: Callable[[], None] = getattr(loop, "_run_once")  # noqa: B009 # private

    def count() -> None:
        nonlocal iterations
        iterations += 1
        run_once()

    work = Work()
    monkeypatch.setattr(loop, "_run_once", count)
    loop.call_later(0.05, work.may_end.set)

    async def caller() -> None:
        with anyio.CancelScope() as scope:
            scope.cancel()
            try:
                await run_to_completion(work.run())
            finally:
                assert work.ended.is_set()
            raise AssertionError  # pragma: no cover

    task = asyncio.create_task(caller())
    await work.started.wait()
    for _ in range(native):
        task.cancel()
    await asyncio.wait((task,))
    assert bool(native) == task.cancelled()
    assert iterations < 50


def test_the_end_of_asyncio_run() -> None:
    """`asyncio.run()` cancels what it can see, and waits for the work all the same."""

    async def main() -> Work:
        work = Work()
        bystander = asyncio.create_task(asyncio.Event().wait())
        bystander.add_done_callback(lambda _: work.may_end.set())
        tasks.append(bystander)
        tasks.append(asyncio.create_task(run_to_completion(work.run())))
        await work.started.wait()
        return work

    tasks: list[asyncio.Task[object]] = []
    work = asyncio.run(main())
    assert work.ended.is_set()
    assert [True, True] == [task.cancelled() for task in tasks]


async def test_bounded_result() -> None:
    """Work that ends in time gives its result or its error."""
    for seconds in (None, 60):
        work = Work()
        work.may_end.set()
        assert "done" == await bounded(work.run(), seconds)
    failing = Work(ValueError("wrong"))
    failing.may_end.set()
    with pytest.raises(ValueError, match="wrong"):
        await bounded(failing.run(), 60)


async def test_bounded_timeout() -> None:
    """Work that takes too long is cancelled."""
    work = Work()
    with pytest.raises(TimeoutError, match=r"^no answer within 0.01 seconds$"):
        await bounded(work.run(), 0.01)
    assert work.started.is_set()
    assert not work.ended.is_set()


class Stubborn(Work):
    """Goes on when it is cancelled, as a driver does that cleans up."""

    def __init__(self, *, returns_in_time: bool) -> None:
        super().__init__()
        self.returns_in_time = returns_in_time

    async def run(self) -> str:
        try:
            return await super().run()
        except asyncio.CancelledError:
            if self.returns_in_time:
                return "cleaned up"
            return await super().run()


async def test_bounded_work_that_cleans_up() -> None:
    """What cancelled work still says within the grace period counts."""
    assert "cleaned up" == await bounded(Stubborn(returns_in_time=True).run(), 0.01)


async def test_bounded_work_that_ignores_cancellation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Work that does not react to its cancellation is waited for no longer."""
    monkeypatch.setattr(concurrency, "GRACE", 0.01)
    work = Stubborn(returns_in_time=False)
    with pytest.raises(TimeoutError, match="no answer"):
        await bounded(work.run(), 0.01)
    work.may_end.set()
    await work.ended.wait()


async def test_bounded_work_cleans_up_in_a_cancelled_scope() -> None:
    """A scope that goes on cancelling does not cut the cleaning up of work short."""
    done: list[str] = []

    async def work() -> None:
        scope.cancel()
        try:
            await asyncio.Event().wait()
        finally:
            for _ in range(10):
                await asyncio.sleep(0)
            done.append("cleaned up")

    with anyio.CancelScope() as scope:
        await bounded(work(), None)
    assert ["cleaned up"] == done
    assert scope.cancelled_caught


@pytest.mark.parametrize("first", ["cancel", "release"])
async def test_lock_goes_on_to_the_next(first: str) -> None:
    """One that is cancelled as its turn comes hands the lock on."""
    lock = TaskLock()
    order: list[str] = []

    async def use(name: str) -> None:
        async with lock:
            order.append(name)

    await lock.__aenter__()
    cancelled = asyncio.create_task(use("cancelled"))
    last = asyncio.create_task(use("last"))
    await asyncio.sleep(0)
    steps: list[Callable[[], object]] = [cancelled.cancel, lock.release]
    for step in steps if first == "cancel" else reversed(steps):
        step()
    await asyncio.wait([cancelled, last])
    assert cancelled.cancelled()
    assert ["last"] == order
    assert lock.owner is None


async def test_one_task() -> None:
    """Work is in one task from its first line on, also before it waits."""
    tasks: list[asyncio.Task[object] | None] = []

    async def work() -> None:
        tasks.append(asyncio.current_task())
        await asyncio.sleep(0)
        tasks.append(asyncio.current_task())

    await run_to_completion(work())
    assert tasks[0] is tasks[1]
    assert tasks[0] is not asyncio.current_task()


async def test_one_task_that_does_not_wait() -> None:
    """The caller is itself again after work that ended, or failed, at once."""
    caller, tasks = asyncio.current_task(), asyncio.all_tasks()

    async def work(error: Exception | None) -> None:
        if error is not None:
            raise error

    await run_to_completion(work(None))
    with pytest.raises(ZeroDivisionError):
        await run_to_completion(work(ZeroDivisionError()))
    assert caller is asyncio.current_task()
    assert tasks == asyncio.all_tasks()


async def test_paused() -> None:
    """What has paused its limit has one again afterwards."""
    shield, may_go_on = Shield(), asyncio.Event()

    async def work() -> None:
        shield.pause()
        await may_go_on.wait()
        shield.restart()
        await asyncio.get_running_loop().create_future()

    asyncio.get_running_loop().call_soon(may_go_on.set)
    with pytest.raises(TimeoutError):
        await shield.run(work(), 0.05, at_once=False)
