"""What the client gets when the work cannot be kept, and what the server is told."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import exc as sa_exc

from asgi_uow import (
    Database,
    Session,
    UnitOfWorkMiddleware,
    after_commit,
    current_read_session,
    current_session,
    force_commit,
    unit_of_work,
)
from asgi_uow.errors import CommitFailedError, UnitOfWorkClosedError
from tests.support import shop
from tests.support.asgi import START, Response, endpoint, handle, respond, serve
from tests.support.databases import SERVERS, checked_out, on

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from pathlib import Path

    from asgi_uow._asgi import Receive, Scope, Send
    from tests.servers import Backend, ServerBackend

pytestmark = on("aiosqlite")

UNREACHABLE = "postgresql://nobody@127.0.0.1:1/app"


# Who answers a failed COMMIT


async def test_default_answer_is_problem_json(db: Database) -> None:
    """The default answer is small, complete and says nothing about the cause."""
    response = await handle(shop.insert_orphan, db)

    [body] = response.chunks
    assert "application/problem+json" == response.headers["content-type"]
    assert str(len(body)) == response.headers["content-length"]
    assert {
        "type": "about:blank",
        "title": "Internal Server Error",
        "status": 500,
        "detail": "The request could not be completed.",
    } == json.loads(body)


async def test_error_app_finds_the_failure(db: Database) -> None:
    """An error_app of one's own gets scope, receive, and the failure in the scope."""
    found: list[object] = []

    async def error_app(scope: Scope, receive: Receive, send: Send) -> None:
        found.append(scope["asgi_uow.failure"])
        await respond(send, 507)

    response = await handle(shop.insert_orphan, db, error_app=error_app)

    assert 507 == response.status
    assert [response.error] == found


async def test_error_app_cannot_claim_a_success(db: Database) -> None:
    """An error_app that answers 200 is a mistake, and nothing is forwarded."""

    async def nothing() -> None:
        """Have nothing to say."""

    response = await handle(shop.insert_orphan, db, error_app=endpoint(nothing))

    assert [] == response.types
    assert isinstance(response.error, ValueError)


async def test_no_error_app_leaves_it_to_the_framework(db: Database) -> None:
    """With error_app=None nothing is answered; the failure is raised all the same."""
    response = await handle(shop.insert_orphan, db, error_app=None)

    assert [] == response.types
    assert isinstance(response.error, CommitFailedError)


async def test_app_that_returns_normally_after_a_failure(db: Database) -> None:
    """A success answered twice is refused twice; then the failure is answered."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await shop.insert_orphan()
        for status in (200, 204):
            with pytest.raises(CommitFailedError):
                await respond(send, status)

    response = await serve(app, db)

    assert 500 == response.status
    assert isinstance(response.error, CommitFailedError)


@pytest.mark.parametrize("ending", [None, asyncio.CancelledError], ids=str)
async def test_success_after_a_failure_that_nobody_answered(
    db: Database, ending: type[BaseException] | None
) -> None:
    """It is refused also when the application has ended, whichever task sends it."""
    tasks: list[asyncio.Task[None]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await shop.insert_orphan()
        with suppress(CommitFailedError):
            await respond(send)
        tasks.append(asyncio.create_task(respond(send)))
        if ending is not None:
            raise ending

    response = Response()
    with suppress(asyncio.CancelledError):
        await serve(app, db, error_app=None, into=response)
    with pytest.raises(UnitOfWorkClosedError, match="sending a response"):
        await tasks[0]

    assert [] == response.types


async def test_error_app_that_fails_is_not_called_again(db: Database) -> None:
    """Not even where the application has hidden the failure: what it raises goes on."""
    calls: list[str] = []

    async def error_app(scope: Scope, receive: Receive, send: Send) -> None:
        calls.append(scope["type"])
        raise LookupError

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await shop.insert_orphan()
        with suppress(CommitFailedError):
            await respond(send)

    response = await serve(app, db, error_app=error_app)

    assert ["http"] == calls
    assert isinstance(response.error, LookupError)


def wrapped(failure: Exception) -> Exception:
    error = LookupError("exception after response started")
    error.__cause__ = failure
    return error


def as_it_is(failure: Exception) -> Exception:
    return failure


def another(_: Exception) -> Exception:
    return LookupError()


@pytest.mark.parametrize(
    ("answers", "raises", "raised"),
    [
        (False, wrapped, CommitFailedError),
        (True, as_it_is, CommitFailedError),
        (True, another, LookupError),
    ],
)
async def test_what_a_framework_makes_of_the_failure(
    db: Database,
    answers: bool,
    raises: Callable[[Exception], Exception],
    raised: type[Exception],
) -> None:
    """Whatever is raised for it, the server sees ours, and the client one answer.

    What is raised by an application that has answered the failure is left alone.
    """

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await shop.insert_orphan()
        with pytest.raises(CommitFailedError) as caught:
            await respond(send)
        if answers:
            await respond(send, 500, b"mine")
        raise raises(caught.value)

    response = await serve(app, db)

    assert 500 == response.status
    assert answers == (["mine"] == response.chunks)
    assert isinstance(response.error, raised)
    if raised is CommitFailedError:
        assert isinstance(response.error.__cause__, sa_exc.IntegrityError)


# The database out of reach


@on("asyncmy", pool_size=1, max_overflow=0, pool_timeout=0.01)
async def test_pool_timeout_is_answered_503(db: Database) -> None:
    """A pool that stays empty is a 503 with Retry-After; the same error is raised."""
    async with db.engine.connect():
        response = await handle(lambda: shop.insert(1), db)

    assert 503 == response.status
    assert "1" == response.headers["retry-after"]
    assert isinstance(response.error, sa_exc.TimeoutError)
    assert 200 == (await handle(lambda: shop.insert(1), db)).status


@on(*SERVERS)
async def test_connection_lost_in_the_handler_is_answered_503(
    db: Database, backend: ServerBackend
) -> None:
    """A connection that dies under a statement is a 503; the next request is fine."""

    async def handler() -> None:
        await shop.insert(1)
        await backend.kill_connections()
        await shop.insert(2)

    response = await handle(handler, db)
    after = await handle(lambda: shop.insert(3), db)

    assert 503 == response.status
    assert "1" == response.headers["retry-after"]
    assert isinstance(response.error, sa_exc.DBAPIError)
    assert 200 == after.status
    assert [3] == await shop.items(backend)


@pytest.mark.parametrize("scheme", ["mysql", "postgresql", "postgresql+psycopg"])
async def test_database_down_is_answered_503(scheme: str) -> None:
    """A server that is down is a 503 with Retry-After; no password is shown."""
    db = Database.from_url(f"{scheme}://user:secret@127.0.0.1:1/app")

    response = await handle(lambda: shop.insert(1), db)

    assert 503 == response.status
    assert "1" == response.headers["retry-after"]
    assert "secret" not in f"{response.error!r} {response.error}"
    await db.dispose()


RAISE = {
    "asyncmy": "SIGNAL SQLSTATE '{}' SET MYSQL_ERRNO = {}",
    "asyncpg": "DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{}'; END $$",
    "psycopg": "DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{}'; END $$",
}
"""What has the server send an error, by driver."""


@on(*SERVERS)
@pytest.mark.parametrize("session", [current_session, current_read_session])
async def test_conflict_in_the_handler_is_answered_503(
    db: Database, backend: ServerBackend, session: Callable[[], Session]
) -> None:
    """A deadlock that leaves the handler is answered as one at COMMIT is."""

    async def handler() -> None:
        await shop.insert(1)
        await session().execute(RAISE[backend.driver].format("40001", 1213))

    response = await handle(handler, db, hooks=True)

    assert 503 == response.status
    assert "1" == response.headers["retry-after"]
    assert ["rollback"] == response.hooks
    assert [] == await shop.items(backend)


@on(*SERVERS)
async def test_conflict_in_a_task_group_is_answered_503(
    db: Database, backend: ServerBackend
) -> None:
    """It is found inside an ExceptionGroup, too."""

    async def handler() -> None:
        async with asyncio.TaskGroup() as group:
            statement = RAISE[backend.driver].format("40001", 1213)
            group.create_task(current_session().execute(statement))

    response = await handle(handler, db)

    assert 503 == response.status
    assert isinstance(response.error, ExceptionGroup)


NODE_WITHOUT_CLUSTER = {"asyncmy": 1047, "asyncpg": 1290}  # of Galera


@pytest.mark.direct
@on(*SERVERS)
@pytest.mark.parametrize("codes", [{}, NODE_WITHOUT_CLUSTER])
async def test_writer_that_takes_no_writes_is_replaced(
    db: Database, backend: ServerBackend, codes: Mapping[str, int]
) -> None:
    """After a failover: 503, and every connection of the pool is made anew."""
    refusal = RAISE[backend.driver].format("25006", codes.get(backend.driver, 1290))
    own = "SELECT CONNECTION_ID()" if backend.name == "mariadb" else None
    question = own or "SELECT pg_backend_pid()"
    numbers: list[object] = []

    async def look() -> None:
        numbers.append(await current_session().scalar(question))

    async def write() -> None:
        await look()
        await current_session().execute(refusal)

    both = asyncio.Barrier(2)

    async def look_beside() -> None:
        await look()
        await both.wait()  # so that the pool has two connections

    await asyncio.gather(handle(look_beside, db), handle(look_beside, db))
    response = await handle(write, db)
    await asyncio.gather(handle(look_beside, db), handle(look_beside, db))

    assert 503 == response.status
    assert "1" == response.headers["retry-after"]
    assert [0, 0] == checked_out(db)
    first, second, third, *new = numbers
    assert third in {first, second}
    assert {first, second}.isdisjoint(new)


async def keep_by_itself(db: Database) -> None:
    async with unit_of_work(db, independent=True):
        await shop.insert(1)


async def keep_by_a_hook(db: Database) -> None:
    async with unit_of_work(db, independent=True):
        after_commit(shop.insert, 1)


@pytest.mark.parametrize("keep", [keep_by_itself, keep_by_a_hook])
async def test_nothing_was_changed_is_a_proof(
    db: Database, backend: Backend, keep: Callable[[Database], Awaitable[None]]
) -> None:
    """Where a unit inside the request was kept, nobody is asked to try again."""
    down = Database.from_url(UNREACHABLE)

    async def handler() -> None:
        await keep(db)
        await current_session(down).execute("SELECT 1")

    response = await handle(handler, down)

    assert [] == response.types  # the server's own 500
    assert isinstance(response.error, (OSError, sa_exc.DBAPIError))
    assert [1] == await shop.items(backend)
    await down.dispose()


async def test_error_of_a_file_is_no_outage(db: Database, tmp_path: Path) -> None:
    """An OSError that does not come from the database says nothing about it."""

    def read(_: object) -> None:
        (tmp_path / "missing").read_text()

    async def handler() -> None:
        await current_session().run_sync(read)

    response = await handle(handler, db)

    assert [] == response.types
    assert isinstance(response.error, FileNotFoundError)


async def test_inner_middleware_that_kept_something(
    db: Database, backend: Backend
) -> None:
    """Nor where an inner middleware's unit was."""
    down = Database.from_url(UNREACHABLE)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def forget(_: object) -> None:
            """Keep the answer back, as a cache may."""

        inner = UnitOfWorkMiddleware(endpoint(lambda: shop.insert(1)), db)
        await inner(dict(scope), receive, forget)
        await current_session(down).execute("SELECT 1")

    response = await serve(app, down)

    assert [] == response.types
    assert [1] == await shop.items(backend)
    await down.dispose()


async def test_database_down_in_a_task_group() -> None:
    """The 503 is found inside an ExceptionGroup, too."""
    db = Database.from_url(UNREACHABLE)

    async def handler() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(shop.insert(1))

    response = await handle(handler, db)

    assert 503 == response.status
    assert isinstance(response.error, ExceptionGroup)
    await db.dispose()


async def test_database_down_in_the_body() -> None:
    """After the start there is nothing left to answer; the error is raised."""
    db = Database.from_url(UNREACHABLE)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": START, "status": 200, "headers": []})
        await current_read_session().scalar("SELECT 1")

    response = await serve(app, db)

    assert [START] == response.types
    assert response.error is not None
    await db.dispose()


# What is none of our business


@on("asyncpg")
async def test_doomed_unit_and_an_error_response(
    db: Database, backend: Backend
) -> None:
    """A forced commit that cannot be leaves a response as it is that is an error."""

    async def handler() -> None:
        await shop.insert(1)
        with suppress(sa_exc.DBAPIError):
            await current_session().execute("SELECT 1 / 0")
        force_commit()

    response = await handle(handler, db, status=403)

    assert (403, ["ok"], None) == (response.status, response.chunks, response.error)
    assert [] == await shop.items(backend)


async def test_other_error_of_the_same_kind_is_not_ours(db: Database) -> None:
    """A connection error of somebody else's client is left to the framework."""

    async def handler() -> None:
        message = "the payment provider is down"
        raise ConnectionRefusedError(message)

    response = await handle(handler, db)

    assert [] == response.types
    assert isinstance(response.error, ConnectionRefusedError)


async def test_error_that_is_in_its_own_context(db: Database) -> None:
    """The only error of a task group, raised in its place, is raised as it is."""
    raised: list[Exception] = []

    async def fail() -> None:
        raise ZeroDivisionError

    async def handler() -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(fail())
        except ExceptionGroup as group:
            raised.extend(group.exceptions)
            raise raised[0]  # noqa: B904  # as Starlette does

    response = await handle(handler, db)

    assert [] == response.messages
    assert response.error is raised[0]


@pytest.mark.parametrize("in_its_own_context", [True, False])
async def test_error_after_an_outage(db: Database, *, in_its_own_context: bool) -> None:
    """What does not follow from a database that is down is left to the framework."""
    down = Database.from_url(UNREACHABLE)
    error = ZeroDivisionError()
    group = ExceptionGroup("one", [error])
    if in_its_own_context:
        error.__context__ = group

    async def handler() -> None:
        with suppress(OSError, sa_exc.DBAPIError):
            await current_session(down).execute("SELECT 1")
        raise error

    response = await handle(handler, db, down)

    assert [] == response.messages
    assert response.error is error
