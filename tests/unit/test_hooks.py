"""How a hook is named, called and bounded."""

from __future__ import annotations

import asyncio
import functools
import gc
import threading
import weakref
from contextvars import ContextVar
from typing import TYPE_CHECKING

import pytest

import asgi_uow as uow
from asgi_uow.observers import UnitStarted
from tests.support.asgi import handle
from tests.support.private import (
    PHASES,
    Hook,
    Hooks,
    Shield,
    check_callable,
    concurrency,
    name_of,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from asgi_uow import Database
    from asgi_uow.observers import Event


class Recorder:
    """Remembers the thread of every call and the arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, tuple[object, ...], dict[str, object]]] = []

    def sync(self, *args: object, **kwargs: object) -> str:
        self.calls.append((threading.get_ident(), args, kwargs))
        return "ignored"

    async def coroutine(self, *args: object, **kwargs: object) -> None:
        await asyncio.sleep(0)
        self.sync(*args, **kwargs)

    __call__ = coroutine


def function() -> None:
    """Does nothing."""


async def call(hook: Hook, seconds: float | None = 5.0) -> None:
    shield = Shield(forwards=True)
    await shield.run(hook.call(shield), seconds)


async def run(fn: Callable[..., object], seconds: float | None = 5.0) -> None:
    await call(Hook(fn, (), {}), seconds)


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (function, "function"),
        (functools.partial(function), "function"),
        (functools.partial(functools.partial(function)), "function"),
        (lambda: None, "<lambda>"),
        (Recorder().sync, "Recorder.sync"),
        (functools.partial(Recorder().coroutine, 1), "Recorder.coroutine"),
        (Recorder(), "Recorder"),
        (functools.partial(Recorder()), "Recorder"),
        (Recorder, "Recorder"),
        (print, "print"),
        ([].append, "list.append"),
    ],
)
def test_names(fn: Callable[..., object], name: str) -> None:
    """Every callable has a name that says where to look."""
    assert name == name_of(fn)
    assert name == Hook(fn, (), {}).name


@pytest.mark.parametrize("partial", [True, False])
async def test_sync(*, partial: bool) -> None:
    """A sync callable runs in a worker thread, with its arguments."""
    recorder = Recorder()
    fn = functools.partial(recorder.sync, 1) if partial else recorder.sync
    await call(Hook(fn, () if partial else (1,), {"key": 2}))
    [(thread, args, kwargs)] = recorder.calls
    assert thread != threading.get_ident()
    assert ((1,), {"key": 2}) == (args, kwargs)


async def test_the_context_of_a_thread() -> None:
    """A sync callable sees the context variables of the registering task."""
    variable = ContextVar("variable", default="unset")
    seen: list[str] = []
    variable.set("set")
    await run(lambda: seen.append(variable.get()))
    assert ["set"] == seen


async def test_async() -> None:
    """An async callable is awaited in the event loop, whatever form it has."""
    recorder = Recorder()
    partial = functools.partial(recorder)
    forms = (recorder.coroutine, recorder, partial, functools.partial(partial))
    for fn in forms:
        await call(Hook(fn, (1,), {"key": 2}))
    assert [(threading.get_ident(), (1,), {"key": 2})] * len(forms) == recorder.calls


async def test_awaitable_results() -> None:
    """What a sync callable returns is awaited if it can be."""
    recorder = Recorder()
    await run(lambda: recorder.coroutine("from a lambda"))
    future = asyncio.get_running_loop().create_future()

    def publish() -> Awaitable[None]:
        future.get_loop().call_soon_threadsafe(future.set_result, None)
        return future

    await run(publish)
    assert future.done()
    assert [(threading.get_ident(), ("from a lambda",), {})] == recorder.calls


async def never() -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("hook", [never, lambda: never()], ids=["async", "sync"])
async def test_timeout(hook: Callable[[], object]) -> None:
    """What is awaited, a hook or its result, is cancelled when it takes too long."""
    # Long enough for a thread to begin: its result would be awaited by nobody.
    with pytest.raises(TimeoutError):
        await run(hook, 0.5)


async def test_timeout_of_a_thread() -> None:
    """A sync hook that takes too long is left to its thread, which goes on."""
    go_on, finished = threading.Event(), threading.Event()

    def slow() -> None:
        assert go_on.wait(60)
        finished.set()

    # Long enough for the thread to begin: what has not begun is not called at all.
    with pytest.raises(TimeoutError):
        await run(slow, 1)
    assert not finished.is_set()
    go_on.set()
    assert await asyncio.to_thread(finished.wait, 60)


@pytest.mark.parametrize("error", [ValueError("wrong"), StopIteration(3)], ids=repr)
@pytest.mark.parametrize("in_thread", [True, False])
async def test_errors(*, error: Exception, in_thread: bool) -> None:
    """What a hook raises comes out; a StopIteration does not end anything else."""

    def sync() -> None:
        raise error

    async def coroutine() -> None:
        raise error

    with pytest.raises((type(error), RuntimeError)) as caught:
        await run(sync if in_thread else coroutine, None)
    assert error in {caught.value, caught.value.__cause__}


def test_queues() -> None:
    """Each phase has its queue, in order of registration, until it is taken."""
    hooks = Hooks()
    expected = [Hook(function, (1,), {"key": 2}), Hook(print, (), {})]
    for phase in PHASES:
        assert {} == hooks.queues
        hooks.queue(phase).extend(expected)
        assert {phase: expected} == hooks.queues
        assert expected == hooks.take(phase)
        assert [] == hooks.take(phase)


async def test_a_coroutine_is_not_callable() -> None:
    """A coroutine is refused, and nothing complains that it was never awaited."""
    with pytest.raises(TypeError, match=r"Did you call the function\?"):
        check_callable("after_commit", never())


@pytest.mark.parametrize("phase", PHASES)
def test_not_callable(phase: str) -> None:
    """The result of a call in place of the function is refused, with the remedy."""
    with pytest.raises(TypeError) as caught:
        check_callable(phase, None)
    assert str(caught.value) == (
        f"{phase}() takes a callable and its arguments, not None. Did you "
        f"call the function? Write {phase}(fn, arg), not {phase}(fn(arg))."
    )


async def generate() -> AsyncIterator[int]:
    yield 1  # pragma: no cover  # that is the point


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("fn", [generate, functools.partial(generate)])
def test_async_generator_function(phase: str, fn: Callable[[], object]) -> None:
    """Nobody would read it, so it would never start."""
    with pytest.raises(TypeError, match=r"generate.*async generator function"):
        check_callable(phase, fn)


async def test_hook_of_an_observer(db: Database) -> None:
    """What an observer registers when it is told of the unit comes after the first."""
    called: list[str] = []

    def observe(event: Event) -> None:
        if isinstance(event, UnitStarted):
            uow.after_commit(called.append, "observer")

    async def work() -> None:
        uow.after_commit(called.append, "handler")

    await handle(work, db, observers=[observe])
    assert ["handler", "observer"] == called


async def test_hook_after_a_late_one(db: Database) -> None:
    """A hook has all its own time, and no more, after one whose time was up."""
    taken: list[float] = []

    async def hang() -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            await loop.create_future()
        finally:
            taken.append(loop.time() - began)

    async def work() -> None:
        uow.after_commit(hang)
        uow.after_commit(hang)

    await handle(work, db, hook_timeout=0.2)
    first, second = taken
    assert first > 0.1
    assert 0.1 < second < concurrency.GRACE / 2


def test_closed_loop() -> None:
    """A loop that was closed while somebody waited is not kept with what waits."""
    shields: list[weakref.ref[Shield]] = []

    async def for_ever() -> None:
        await asyncio.get_running_loop().create_future()

    async def wait() -> None:
        shield = Shield()
        shields.append(weakref.ref(shield))
        await shield.run(for_ever(), 60)

    loop = asyncio.new_event_loop()
    loop.set_exception_handler(print)  # tasks that were destroyed
    task = loop.create_task(wait())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    del task, loop
    gc.collect()
    assert shields[0]() is None
