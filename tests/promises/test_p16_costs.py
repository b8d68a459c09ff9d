"""P16: what an idempotency key costs, and that nobody pays for it without one."""

from __future__ import annotations

import asyncio
import functools
import itertools
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from asgi_uow import Idempotency, UnitOfWorkMiddleware, unit_of_work
from benchmarks.apps import unused_database
from tests.promises.test_budgets import cell
from tests.support import shop
from tests.support.asgi import Client, endpoint, http_scope, no_body, respond
from tests.support.costs import cost, live, no_collector
from tests.support.databases import SERVER_DRIVERS, behind_proxy, on
from tests.support.keys import create_table

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable

    from asgi_uow import Database
    from asgi_uow._asgi import ASGIApp, Message, Receive, Scope, Send
    from tests.servers import RecordingProxy, ServerBackend

KEY = b"idempotency-key"
METHODS = pytest.mark.parametrize("method", ["GET", "POST"])
numbers = itertools.count()


async def insert() -> None:
    """Insert one row."""
    await shop.insert(next(numbers))


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    """Touch no session."""
    await respond(send)


# Statements, as the database is sent them


@asynccontextmanager
async def keyed(
    backend: ServerBackend,
) -> AsyncGenerator[tuple[Database, RecordingProxy]]:
    """A database with one connection and the tables, and the proxy before it."""
    async with behind_proxy(backend, pool_size=1, max_overflow=0) as (db, proxy):
        await create_table(backend)
        yield db, proxy


async def trips_of(
    work: Callable[[bytes], Coroutine[object, object, None]],
    keys: Iterable[bytes],
    db: Database,
    proxy: RecordingProxy,
) -> str:
    """Name the trips for the last of some keys; those before connect and prepare."""
    await db.dispose()
    for key in keys:
        proxy.clear()
        await work(key)
    return cell(proxy.trips)


async def ask(app: ASGIApp, key: bytes = b"") -> None:
    """Send a request that inserts a row; without a key if that is empty."""
    headers = [(KEY, key)] if key else []
    response = await Client(app).request(method="POST", headers=headers)
    assert 200 == response.status


async def run_job(db: Database, key: bytes) -> None:
    async with unit_of_work(db, key=key.decode()) as uow:
        if not uow.replayed:
            await insert()


NEW = b"1", b"2"
SAME = b"3", b"3", b"3"

BUDGETS = {
    "mariadb": {
        "a key": "4 INSERT INSERT UPDATE COMMIT",
        "a key that was used": "3 INSERT SELECT ROLLBACK",
        "no key": "2 INSERT COMMIT",
        "no option": "2 INSERT COMMIT",
        "a job": "4 INSERT INSERT UPDATE COMMIT",
        "a job that was done": "3 INSERT SELECT ROLLBACK",
    },
    "postgresql": {
        "a key": "5 BEGIN INSERT INSERT UPDATE COMMIT",
        "a key that was used": "4 BEGIN INSERT SELECT ROLLBACK",
        "no key": "3 BEGIN INSERT COMMIT",
        "no option": "3 BEGIN INSERT COMMIT",
        "a job": "5 BEGIN INSERT INSERT UPDATE COMMIT",
        "a job that was done": "4 BEGIN INSERT SELECT ROLLBACK",
    },
}


@on(*SERVER_DRIVERS)
async def test_round_trips(backend: ServerBackend) -> None:
    """A key costs two round trips, a repetition its look-up, no key nothing at all."""
    async with keyed(backend) as (db, proxy):
        app = endpoint(insert)
        ours = UnitOfWorkMiddleware(app, db, idempotency=Idempotency())
        without = UnitOfWorkMiddleware(app, db)
        request, job = functools.partial(ask, ours), functools.partial(run_job, db)
        cases = {
            "a key": (request, NEW),
            "a key that was used": (request, SAME),
            "no key": (request, (b"", b"")),
            "no option": (functools.partial(ask, without), (b"", b"")),
            "a job": (job, NEW),
            "a job that was done": (job, SAME),
        }
        measured = {
            name: await trips_of(work, keys, db, proxy)
            for name, (work, keys) in cases.items()
        }
        assert BUDGETS[backend.name] == measured


@on(*SERVER_DRIVERS)
async def test_statements_without_a_key(backend: ServerBackend) -> None:
    """A request without a key sends word for word what it does without the option."""
    async with keyed(backend) as (db, proxy):
        app = endpoint(functools.partial(shop.insert, 1))
        sent = []
        for option in (None, Idempotency()):
            ours = UnitOfWorkMiddleware(app, db, idempotency=option)
            for _ in range(2):  # the first connects and prepares
                await backend.execute("DELETE FROM items")
                proxy.clear()
                await ask(ours)
            sent.append([*proxy.trips])
        without, with_option = sent
        assert without == with_option


# What no database is asked for


def with_method(app: ASGIApp, method: str) -> ASGIApp:
    """Have an application called with another method."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        scope["method"] = method
        await app(scope, receive, send)

    return call


CALLS = {
    "Idempotency.wrap.<locals>.serve": 1,
    "Idempotency.keys": 1,
    "Idempotency.covers": 1,
}


@METHODS
async def test_calls_without_a_key(method: str) -> None:
    """A request without a key costs a look at its headers: nothing is awaited."""
    db = unused_database()
    without, ours = [
        await cost(
            with_method(UnitOfWorkMiddleware(answer, db, idempotency=it), method)
        )
        for it in (None, Idempotency())
    ]
    made = ours.functions - without.functions
    made.pop("Idempotency.keys.<locals>.<listcomp>", None)  # before Python 3.12
    assert CALLS == made
    assert {} == without.functions - ours.functions
    assert {} == ours.waits
    assert 0 == ours.greenlets


@METHODS
async def test_objects_without_a_key(method: str) -> None:
    """A request without a key has the objects that it has without the option."""
    waits = (asyncio.Future, asyncio.Handle, asyncio.Event, asyncio.Lock)
    seen: list[set[str]] = []

    def look() -> None:
        seen.append({type(each).__name__ for each in live(waits)})

    async def look_and_answer(scope: Scope, receive: Receive, send: Send) -> None:
        look()
        await answer(scope, receive, send)

    async def send(message: Message) -> None:
        look()

    db = unused_database()
    app = UnitOfWorkMiddleware(look_and_answer, db, idempotency=Idempotency())
    with no_collector():
        await app(http_scope(method=method), no_body, send)
        look()
    assert [{"UnitOfWork", "Exchange"}] * 3 + [set()] == seen


@on(*SERVER_DRIVERS)
async def test_tasks_without_a_key(backend: ServerBackend) -> None:
    """An INSERT without a key has the tasks and greenlets it has without the option."""
    async with keyed(backend) as (db, _):
        without, ours = [
            await cost(
                with_method(
                    UnitOfWorkMiddleware(endpoint(insert), db, idempotency=it),
                    "POST",
                )
            )
            for it in (None, Idempotency())
        ]
        assert without.waits == ours.waits
        assert without.greenlets == ours.greenlets
