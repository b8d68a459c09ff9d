"""P17: nothing of one attempt is kept, sent, called or seen in another."""

from __future__ import annotations

import asyncio
import zlib
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.exc import DBAPIError

import asgi_uow as uow
from asgi_uow import Database, Retry, UnitOfWorkMiddleware, errors
from tests.servers.backend import SQLiteBackend
from tests.support.asgi import START, Client, Response, http_scope, respond
from tests.support.conflicts import READ, WRITE, conflict, conflicting_shop
from tests.support.databases import on

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from pathlib import Path

    from asgi_uow._asgi import ASGIApp, Message, Receive, Scope, Send
    from tests.servers import Backend

pytestmark = on("aiosqlite")

RETRY = Retry(methods=["GET", "POST"], backoff=0.001)


async def ask(
    app: ASGIApp,
    db: Database,
    receive: Receive | None = None,
    scope: Scope = None,
    retry: Retry | None = RETRY,
) -> Response:
    """Send a request that may be replayed."""
    wrapped = UnitOfWorkMiddleware(app, db, retry=retry)
    scope = http_scope() if scope is None else scope
    return await Client(wrapped).request(scope=scope, receive=receive or of(b""))


def of(*chunks: bytes) -> Receive:
    """Give a body in parts."""
    parts = [*chunks]

    async def receive() -> Message:
        body = parts.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(parts)}

    return receive


@asynccontextmanager
async def another(tmp_path: Path) -> AsyncGenerator[tuple[Database, Backend]]:
    """A second database."""
    async with SQLiteBackend(tmp_path) as backend, conflicting_shop(backend) as db:
        yield db, backend


def attempt() -> int:
    return uow.current_unit_of_work().attempt


async def test_a_task_that_was_left(backend: Backend) -> None:
    """What the first attempt has left behind sends nothing during the second."""
    ended = asyncio.Event()
    left: list[asyncio.Task[None]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def answer_late() -> None:
            await ended.wait()
            await respond(send, 504)

        if attempt() == 1:
            left.append(asyncio.create_task(answer_late()))
            await conflict(backend)
        ended.set()
        await asyncio.wait(left)
        await uow.current_session().execute(WRITE)
        await respond(send)

    async with conflicting_shop(backend) as db:
        response = await ask(app, db)
    assert (200, None) == (response.status, response.error)
    assert isinstance(left[0].exception(), errors.UnitOfWorkClosedError)


async def test_a_body_that_was_taken(backend: Backend) -> None:
    """A part that a task of the first attempt takes is in the body all the same."""
    parts: asyncio.Queue[bytes] = asyncio.Queue()
    bodies: list[bytes] = []
    left: list[asyncio.Task[Message]] = []

    async def from_server() -> Message:
        body = await parts.get()
        return {"type": "http.request", "body": body, "more_body": body != b"end"}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if attempt() == 1:
            await receive()
            left.append(asyncio.ensure_future(receive()))
            await asyncio.sleep(0)
            await conflict(backend)
        for part in (b"two,", b"three,", b"end"):
            parts.put_nowait(part)
        more = True
        while more:
            message = await receive()
            bodies.append(message["body"])
            more = message["more_body"]
        await respond(send)

    parts.put_nowait(b"one,")
    async with conflicting_shop(backend) as db, asyncio.timeout(10):
        response = await ask(app, db, from_server)
    assert 200 == response.status
    assert b"one,two,three,end" == b"".join(bodies)
    assert {"type": "http.disconnect"} == await left[0]


async def test_a_message_that_was_changed(backend: Backend) -> None:
    """What a middleware makes of a message is made anew in each attempt."""
    bodies: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        message["body"] = zlib.decompress(message["body"])
        bodies.append(message["body"])
        if attempt() == 1:
            await conflict(backend)
        await respond(send)

    async with conflicting_shop(backend) as db:
        response = await ask(app, db, of(zlib.compress(b"the body")))
    assert (200, [b"the body"] * 2) == (response.status, bodies)


CATALOG = {"of": "the application"}


async def test_dictionaries_of_the_application(backend: Backend) -> None:
    """What an application puts into the scope is its own, and stays as it is."""
    scope = http_scope()

    async def app(inner: Scope, receive: Receive, send: Send) -> None:
        inner["catalog"] = CATALOG
        inner["path_params"] = {"id": attempt()}
        if attempt() == 1:
            await conflict(backend)
        await respond(send)

    async with conflicting_shop(backend) as db:
        await ask(app, db, scope=scope)
    assert {"of": "the application"} == CATALOG
    assert CATALOG is scope["catalog"]
    assert {"id": 2} == scope["path_params"]


async def test_what_others_change_too(backend: Backend) -> None:
    """A dictionary of the whole process keeps what others have made of it."""
    counts = {"mine": 0, "of others": 0}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        counts["of others"] += 1
        scope["counts"]["mine"] += 1
        if attempt() == 1:
            await conflict(backend)
        await respond(send)

    scope = http_scope(counts=counts)
    del scope["state"]  # as of a server without lifespan
    async with conflicting_shop(backend) as db:
        await ask(app, db, scope=scope)
    assert {"mine": 1, "of others": 2} == counts
    assert {"mine": 1, "of others": 0} == scope["counts"]


class Fixed(dict[str, object]):
    """One that cannot be copied."""

    def __copy__(self) -> Fixed:
        raise NotImplementedError


def endless() -> dict[str, object]:
    session: dict[str, object] = {"at": 0}
    session["itself"] = session
    return session


@pytest.mark.parametrize(
    ("session", "seen"), [(Fixed(at=0), [0, 1]), (endless(), [0, 0])]
)
async def test_what_cannot_be_copied(
    backend: Backend, session: dict[str, object], seen: list[int]
) -> None:
    """It stops no request."""
    found: list[object] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        found.append((scope["session"]["at"], *scope["known"]))
        scope["session"]["at"] += 1
        scope["known"].add("one")
        if attempt() == 1:
            await conflict(backend)
        await respond(send)

    scope = http_scope(session=session, known=set())
    async with conflicting_shop(backend) as db:
        response = await ask(app, db, scope=scope)
    assert (200, [(each,) for each in seen]) == (response.status, found)


async def test_the_scope_at_the_start(backend: Backend) -> None:
    """What is outside sees the last attempt's, also after something was sent before."""
    scope = http_scope()
    seen: list[object] = []

    async def app(inner: Scope, receive: Receive, send: Send) -> None:
        inner["state"]["attempt"] = attempt()
        if attempt() == 1:
            await conflict(backend)
        await send({"type": "http.response.early_hint", "links": []})
        inner["route"] = "found"
        await respond(send)

    async with conflicting_shop(backend) as db:
        wrapped = UnitOfWorkMiddleware(app, db, retry=RETRY)

        async def send(message: Message) -> None:
            if message["type"] == START:
                seen.extend((scope["state"], scope["route"]))

        await wrapped(scope, of(b""), send)
    assert [{"attempt": 2}, "found"] == seen


async def test_hooks_of_units_inside(backend: Backend, tmp_path: Path) -> None:
    """Once a hook was called for a unit inside, the request is not done again."""
    called: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async with other:
            uow.after_commit(called.append, attempt())
        await conflict(backend)

    async with another(tmp_path) as (other, _), conflicting_shop(backend) as db:
        response = await ask(app, db)
    assert [1] == called
    assert isinstance(response.error, DBAPIError)


async def test_a_unit_inside_with_a_hook(backend: Backend, tmp_path: Path) -> None:
    """What a unit inside has committed is not done again, whatever its hooks are."""
    attempts: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        attempts.append(attempt())
        async with other:
            await other.write.execute(WRITE)
            uow.after_rollback(attempts.clear)
        await conflict(backend)

    async with another(tmp_path) as (other, _), conflicting_shop(backend) as db:
        response = await ask(app, db)
    assert [1] == attempts
    assert isinstance(response.error, DBAPIError)


async def test_a_unit_inside_that_still_runs(backend: Backend, tmp_path: Path) -> None:
    """What the first attempt may yet keep is not kept twice."""
    go_on, entered = asyncio.Event(), asyncio.Event()
    auditing: list[asyncio.Task[None]] = []

    async def audit() -> None:
        async with other:
            await other.write.execute(WRITE)
            entered.set()
            await go_on.wait()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        auditing.append(asyncio.create_task(audit()))
        await entered.wait()
        await conflict(backend)

    async with another(tmp_path) as (other, beside), conflicting_shop(backend) as db:
        await ask(app, db)
        go_on.set()
        await asyncio.wait(auditing)
        assert (1, 1) == (len(auditing), await beside.scalar(READ))


async def test_rollback_only_and_an_error(backend: Backend) -> None:
    """Who asks for a rollback has it, also if the error leaves the application."""
    attempts: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        attempts.append(attempt())
        uow.set_rollback_only("enough")
        await conflict(backend)

    async with conflicting_shop(backend) as db:
        response = await ask(app, db)
    assert (503, [1]) == (response.status, attempts)


async def test_a_hook_that_made_something_else_of_it(backend: Backend) -> None:
    """The first error counts, whatever a `before_commit` hook raises after it."""
    attempts: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def hook() -> None:
            with suppress(DBAPIError):
                await conflict(backend)
            raise LookupError

        attempts.append(attempt())
        if attempts == [1]:
            uow.before_commit(hook)
        await respond(send)

    async with conflicting_shop(backend) as db:
        response = await ask(app, db)
    assert (200, [1, 2]) == (response.status, attempts)


async def test_a_client_that_leaves_meanwhile(backend: Backend) -> None:
    """Who leaves while an attempt is ended does not have another one."""
    attempts: list[int] = []
    left = asyncio.Event()

    async def from_server() -> Message:
        await left.wait()
        return {"type": "http.disconnect"}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        attempts.append(attempt())

        async def leave() -> None:
            left.set()
            await hearing

        hearing = asyncio.ensure_future(receive())
        await asyncio.sleep(0)
        uow.after_rollback(leave)
        await conflict(backend)

    async with conflicting_shop(backend) as db:
        response = await ask(app, db, from_server)
    assert ([1], []) == (attempts, response.messages)


async def test_a_timeout_that_was_turned(backend: Backend) -> None:
    """A cancellation is one, though the application raises something else."""
    attempts: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        attempts.append(attempt())
        with suppress(DBAPIError):
            await conflict(backend)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            reason = "too slow"
            raise RuntimeError(reason) from None

    async with conflicting_shop(backend) as db:
        wrapped = UnitOfWorkMiddleware(app, db, retry=RETRY)
        with pytest.raises((RuntimeError, TimeoutError)):
            async with asyncio.timeout(0.05):
                await wrapped(http_scope(), of(b""), Client(wrapped).take)
    assert [1] == attempts


# `Retry.run`


async def run_twice(backend: Backend, db: Database) -> list[int]:
    """Run a job whose first attempt meets a conflict; give its attempts."""
    attempts: list[int] = []

    async def job() -> None:
        attempts.append(attempt())
        if len(attempts) == 1:
            await conflict(backend)
        await uow.current_session().execute(WRITE)

    await RETRY.run(db, job)
    return attempts


async def in_the_background(
    backend: Backend, db: Database, seen: list[list[int]]
) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await uow.current_session().execute(WRITE)
        await respond(send)
        seen.append(await run_twice(backend, db))

    return app


async def in_a_hook(backend: Backend, db: Database, seen: list[list[int]]) -> ASGIApp:
    async def hook() -> None:
        seen.append(await run_twice(backend, db))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await uow.current_session().execute(WRITE)
        uow.after_commit(hook)
        await respond(send)

    return app


@pytest.mark.parametrize("where", [in_the_background, in_a_hook])
async def test_run_after_a_commit(
    backend: Backend, where: Callable[..., Awaitable[ASGIApp]]
) -> None:
    """What was kept before the job does not count against it."""
    seen: list[list[int]] = []
    async with conflicting_shop(backend) as db:
        app = await where(backend, db, seen)
        response = await ask(app, db, retry=None)
        assert (200, None) == (response.status, response.error)
        assert [[1, 2]] == seen
        assert 2 == await backend.scalar(READ)


async def test_run_beside_another_unit(backend: Backend, tmp_path: Path) -> None:
    """Nor does a unit of another database around it that has written."""
    async with another(tmp_path) as (other, _), conflicting_shop(backend) as db, other:
        await other.write.execute(WRITE)
        assert [1, 2] == await run_twice(backend, db)
        assert [1, 2] == await run_twice(backend, db)


async def test_many_attempts(backend: Backend) -> None:
    """The pause does not grow beyond what is told, however many there are."""
    attempts: list[int] = []

    async def job() -> None:
        attempts.append(attempt())
        await conflict(backend)

    async with conflicting_shop(backend) as db:
        retry = Retry(attempts=1100, backoff=1e-9, max_backoff=1e-9)
        with pytest.raises(DBAPIError):
            await retry.run(db, job)
    assert 1100 == len(attempts)


def test_a_class_in_its_place() -> None:
    """`Retry` is made, not passed."""
    db: Any = Database.from_url("sqlite://")
    with pytest.raises(errors.ConfigurationError, match="retry must be Retry"):
        UnitOfWorkMiddleware(respond, db, retry=Retry)  # type: ignore[arg-type]


class Counting(UnitOfWorkMiddleware):
    """Somebody's own."""

    calls = 0

    async def __call__(  # type: ignore[override]
        self, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self.calls += 1
        await super().__call__(scope, receive, send)


async def test_a_subclass(backend: Backend) -> None:
    """What somebody does around a request is done once."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if attempt() == 1:
            await conflict(backend)
        await respond(send)

    async with conflicting_shop(backend) as db:
        counting = Counting(app, db, retry=RETRY)
        assert 200 == (await Client(counting).request(receive=of(b""))).status
    assert 1 == counting.calls
