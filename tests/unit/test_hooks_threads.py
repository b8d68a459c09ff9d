"""Sync hooks: they have threads of their own, and what waits for one says so."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio.from_thread
import anyio.to_thread
import pytest

import asgi_uow as uow
from asgi_uow import Database
from asgi_uow.errors import BeforeCommitError
from asgi_uow.observers import HookFinished, HookStarted
from tests.servers import eventually
from tests.support.asgi import Response, handle
from tests.support.databases import on
from tests.support.private import Hook, Shield, call_in_thread, threads_of_hooks

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = on("aiosqlite")

NO_THREAD = r"no thread was free within 0\.2 seconds"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one sync hook run at a time, and have others wait for a short while."""
    monkeypatch.setattr("asgi_uow._unit.hooks.MOST_THREADS", 1)
    monkeypatch.setattr("asgi_uow._unit.hooks.THREAD_SECONDS", 0.2)


class Stuck:
    """A hook that holds its thread until it is told to go on."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.go_on = threading.Event()
        self._loop = asyncio.get_running_loop()

    def __call__(self) -> None:
        self._loop.call_soon_threadsafe(self.begun.set)
        assert self.go_on.wait(60)


async def register(phase: Callable[..., None], *hooks: Callable[[], object]) -> None:
    for hook in hooks:
        phase(hook)


async def send(
    db: Database,
    phase: Callable[..., None],
    *hooks: Callable[[], object],
    status: int = 200,
    hook_timeout: float | None = 30.0,
    into: Response | None = None,
) -> Response:
    """Send a request whose handler registers hooks."""
    return await handle(
        lambda: register(phase, *hooks),
        db,
        status=status,
        into=into,
        hook_timeout=hook_timeout,
    )


async def borrowed() -> int:
    limiter = threads_of_hooks.get()
    return 0 if limiter is None else limiter.borrowed_tokens


async def test_the_loop_frees_a_thread() -> None:
    """A thread that ends asks the event loop to free it, and does not do so itself."""
    free = await Hook(print, (), {})._take_thread()

    free()

    assert 1 == await borrowed()
    await asyncio.sleep(0)
    assert 0 == await borrowed()


async def test_busy_endpoints(db: Database) -> None:
    """Hooks start although sync endpoints keep every thread of the server busy."""
    limiter = anyio.to_thread.current_default_thread_limiter()
    for endpoint in range(int(limiter.total_tokens)):
        limiter.acquire_on_behalf_of_nowait(endpoint)
    called: list[str] = []
    response = await send(
        db, uow.after_commit, lambda: called.append("sent"), hook_timeout=0.5
    )
    assert ["sent"] == called
    assert [] == response.failures


@pytest.mark.parametrize("hook_timeout", [0.3, None])
@pytest.mark.parametrize(
    ("phase", "status"),
    [(uow.after_commit, 200), (uow.after_response, 200), (uow.after_rollback, 404)],
)
async def test_every_thread_is_stuck(
    db: Database,
    phase: Callable[..., None],
    status: int,
    hook_timeout: float | None,
) -> None:
    """Hooks that find no thread are reported as not started; async ones still run."""
    stuck, called = Stuck(), list[str]()

    async def coroutine() -> None:
        called.append("async")

    def sync() -> None:
        called.append("sync")

    first = await send(db, uow.after_commit, stuck, hook_timeout=0.3)
    hooks = (sync, coroutine, sync)
    response = await send(db, phase, *hooks, status=status, hook_timeout=hook_timeout)
    assert (200, status) == (first.status, response.status)
    assert ["no answer within 0.3 seconds"] == [
        str(each.error) for each in first.failures
    ]
    for failure in response.failures:
        assert isinstance(failure.error, TimeoutError)
        assert str(failure.error).startswith("no thread was free within 0.2 seconds")
        assert failure.hook.endswith("sync")
    assert 2 == len(response.failures)
    assert ["async"] == called
    stuck.go_on.set()
    await eventually(0, borrowed)
    assert [] == (await send(db, phase, sync, status=status)).failures
    assert ["async", "sync"] == called


async def test_before_commit(db: Database) -> None:
    """A `before_commit` hook that finds no thread rolls back, and says why."""
    stuck = Stuck()
    await send(db, uow.after_commit, stuck, hook_timeout=0.3)
    response = await send(db, uow.before_commit, lambda: None)
    stuck.go_on.set()
    assert isinstance(response.error, BeforeCommitError)
    with pytest.raises(TimeoutError, match=NO_THREAD):
        raise response.error.__cause__ or response.error


async def test_waiting_is_not_the_time_of_the_hook(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hook that waited for a thread longer than `hook_timeout` has all of it left."""
    monkeypatch.setattr("asgi_uow._unit.hooks.THREAD_SECONDS", 60.0)
    stuck, waits = Stuck(), Response()
    async with asyncio.TaskGroup() as group:
        group.create_task(send(db, uow.after_commit, stuck))
        await stuck.begun.wait()
        work = send(db, uow.after_commit, str, hook_timeout=0.3, into=waits)
        task = group.create_task(work)
        await eventually(1, lambda: told(waits, HookStarted))
        since = time.monotonic()
        await eventually(True, lambda: passed(since + 0.6))
        assert not task.done()
        stuck.go_on.set()
    assert [] == waits.failures
    assert waits.events.only(HookFinished).error is None


async def told(response: Response, kind: type[object]) -> int:
    return len(response.events.of(kind))


async def passed(moment: float) -> bool:
    return time.monotonic() >= moment


@pytest.mark.parametrize("turns", range(1, 7))
async def test_cancelled_before_it_begins(turns: int) -> None:
    """Wherever a hook is cancelled on its way into a thread, the thread is free."""
    shield = Shield(forwards=True)
    task = asyncio.create_task(shield.run(Hook(int, (), {}).call(shield), None))
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    with suppress(asyncio.CancelledError, TimeoutError):
        await task
    await eventually(0, borrowed)


async def test_back_into_the_event_loop(db: Database) -> None:
    """A sync hook has something called on its event loop by way of anyio."""
    saved = asyncio.Event()

    def hook() -> None:
        anyio.from_thread.run_sync(saved.set)

    assert [] == (await send(db, uow.after_commit, hook)).failures
    assert saved.is_set()


def test_cancelled_as_it_begins() -> None:
    """A hook whose end came first is not called by the thread that comes to it."""
    called: list[object] = []
    assert (None, None) == call_in_thread(lambda: called.append(1), [])
    assert [] == called


def test_loops() -> None:
    """Event loops in several threads do not share what is free."""
    together = threading.Barrier(2)
    failures: list[object] = []

    async def unit() -> None:
        # No database is asked, so the loops need none of their own.
        failures.extend((await send(db, uow.after_commit, meet)).failures)

    def meet() -> None:
        together.wait(10)

    db = Database.from_url("sqlite://")
    threads = [
        threading.Thread(target=asyncio.run, args=[unit()], daemon=True)
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [] == failures
    assert not together.broken


def test_loop_that_has_ended() -> None:
    """A hook that was left behind may end after its event loop."""
    stuck: list[Stuck] = []
    threads: list[threading.Thread] = []

    def hook() -> None:
        threads.append(threading.current_thread())
        stuck[0]()

    async def unit() -> Response:
        stuck.append(Stuck())
        db = Database.from_url("sqlite://")
        return await send(db, uow.after_commit, hook, hook_timeout=0.3)

    response = asyncio.run(unit())
    assert 1 == len(response.failures)
    stuck[0].go_on.set()
    [thread] = threads
    thread.join(20)
    assert not thread.is_alive()
