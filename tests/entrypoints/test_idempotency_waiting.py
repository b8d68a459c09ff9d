"""`Idempotency`: requests with one key at once, in one process and in several."""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

import asgi_uow as uow
from asgi_uow import Database, Idempotency, Retry, UnitOfWorkMiddleware, unit_of_work
from asgi_uow._databases.keys import Claim, table_of
from asgi_uow._databases.known import database_of
from asgi_uow.errors import ConfigurationError, KeyInUseError, UnitOfWorkClosedError
from tests.servers import eventually
from tests.support import shop
from tests.support.asgi import Client
from tests.support.conflicts import rival_of
from tests.support.databases import (
    DATABASES,
    SERVER_DRIVERS,
    SERVERS,
    checked_out,
    on,
)
from tests.support.keys import KEYS, Shop, create_table, is_replayed

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from sqlalchemy.ext.asyncio import AsyncConnection

    from asgi_uow._asgi import ASGIApp, Receive, Scope, Send
    from tests.servers import Backend, MariaDBBackend, ServerBackend

pytestmark = on(*DATABASES)

AT_ONCE = 8
POST: dict[str, Any] = {"method": "POST", "headers": [(b"idempotency-key", b"key")]}
CLAIM = Claim.of(table_of("idempotency_keys"), "http:", "key", b"POST", b"/", b"")


@pytest.fixture(autouse=True)
async def _table(backend: Backend) -> None:
    await create_table(backend)


class Gate:
    """Holds a handler until it is opened."""

    def __init__(self, site: Shop) -> None:
        self.reached, self.opened = asyncio.Event(), asyncio.Event()
        site.before = self.wait

    async def wait(self) -> None:
        self.reached.set()
        await self.opened.wait()


@asynccontextmanager
async def held_elsewhere(
    backend: Backend, claim: Claim = CLAIM
) -> AsyncGenerator[AsyncConnection]:
    """Have another process, to all appearances, claim the key; then roll it back."""
    engine = create_async_engine(backend.url, poolclass=NullPool)
    async with engine.connect() as connection:
        await connection.execute(claim.insert(database_of(engine.dialect)))
        yield connection


async def test_all_at_once(db: Database, backend: Backend) -> None:
    """One of them does the work; the others wait, and get what it got."""
    site = Shop(db)
    responses = await asyncio.gather(*(site.post() for _ in range(AT_ONCE)))

    assert 1 == site.runs
    assert [1] == await shop.items(backend)
    assert AT_ONCE - 1 == sum(map(is_replayed, responses))
    assert {("item 1",)} == {tuple(each.chunks) for each in responses}
    assert [0, 0] == checked_out(db)


async def test_who_waits_here_holds_no_connection(db: Database) -> None:
    """In one process the requests of a key need one connection, however many."""
    site = Shop(db)
    gate = Gate(site)
    first = asyncio.create_task(site.post())
    await gate.reached.wait()
    others = [asyncio.create_task(site.post()) for _ in range(AT_ONCE)]
    await asyncio.wait(others, timeout=0)
    assert [1, 0] == checked_out(db)
    gate.opened.set()
    responses = await asyncio.gather(first, *others)
    assert {201} == {each.status for each in responses}


async def test_a_wait_that_is_over(db: Database) -> None:
    """Who has waited long enough is told when to come again."""
    site = Shop(db, idempotency=Idempotency(wait=0.01))
    gate = Gate(site)
    first = asyncio.create_task(site.post())
    await gate.reached.wait()
    second = await site.post()
    assert 409 == second.status
    assert "1" == second.headers["retry-after"]
    assert "in use" in second.chunks[0]
    gate.opened.set()
    assert 201 == (await first).status
    assert is_replayed(await site.post())


async def test_who_waits_runs_after_a_rollback(db: Database, backend: Backend) -> None:
    """What failed is done by the next who waits for it, and by that one alone."""
    site = Shop(db)

    async def fail_once() -> None:
        if site.runs == 1:
            raise LookupError

    site.before = fail_once
    responses = await asyncio.gather(*(site.post() for _ in range(AT_ONCE)))
    assert 2 == site.runs
    assert [2] == await shop.items(backend)
    assert 1 == sum(isinstance(each.error, LookupError) for each in responses)


@pytest.mark.parametrize("cancelled", [0, 1])
async def test_cancelled_while_it_waits(db: Database, cancelled: int) -> None:
    """Who goes away, at work or in the line, gives the turn to the next."""
    site = Shop(db)
    gate = Gate(site)
    tasks = [asyncio.create_task(site.post()) for _ in range(3)]
    await gate.reached.wait()
    tasks[cancelled].cancel()
    gate.opened.set()
    await asyncio.wait(tasks)
    assert 201 == tasks[2].result().status
    assert 2 - cancelled == site.runs
    assert [0, 0] == checked_out(db)


async def test_background_work_keeps_no_turn(db: Database) -> None:
    """Once the response has left, others get it: what goes on is nobody's business."""
    left, goes_on = asyncio.Event(), asyncio.Event()

    def of(site: Shop) -> ASGIApp:
        async def app(_: Scope, receive: Receive, send: Send) -> None:
            await site.serve(_, receive, send)
            left.set()
            await goes_on.wait()

        return app

    site = Shop(db, app=of)
    first = asyncio.create_task(site.post())
    await left.wait()
    assert is_replayed(await site.post())
    goes_on.set()
    assert 201 == (await first).status


@on(*SERVER_DRIVERS)
async def test_waiting_for_another_process(
    db: Database, backend: ServerBackend
) -> None:
    """The unique index has it wait until the other has ended; rolled back, it runs."""
    site = Shop(db)
    async with held_elsewhere(backend):
        request = asyncio.create_task(site.post())
        await eventually(2, backend.open_transactions)
        assert 0 == site.runs
    assert 201 == (await request).status
    assert 1 == site.runs


@on(*SERVERS)
async def test_another_process_that_takes_long(
    db: Database, backend: ServerBackend
) -> None:
    """After the wait, a second at least, the request is told to come again."""
    site = Shop(db, idempotency=Idempotency(wait=0.0))
    async with held_elsewhere(backend):
        response = await site.post()
        assert 409 == response.status
        assert "1" == response.headers["retry-after"]
    await eventually(0, backend.open_transactions)
    assert [0, 0] == checked_out(db)
    assert 201 == (await site.post()).status


@on("aiosqlite")
async def test_another_process_that_writes(db: Database, backend: Backend) -> None:
    """On SQLite the write lock does the waiting."""
    site = Shop(db, idempotency=Idempotency(wait=0.0))
    engine = create_async_engine(backend.url, poolclass=NullPool)
    async with engine.connect() as connection:
        await connection.exec_driver_sql("BEGIN IMMEDIATE")
        assert 409 == (await site.post()).status
    assert 201 == (await site.post()).status


IMPATIENT = {"init_command": "SET SESSION innodb_lock_wait_timeout = 1"}


@on("asyncmy", connect_args=IMPATIENT)
async def test_a_lock_timeout_is_waited_out(
    db: Database, backend: ServerBackend
) -> None:
    """A conflict over the key alone is no answer: the claim is begun anew."""
    site, given_up = Shop(db), asyncio.Event()

    def note(_: object) -> None:
        given_up.set()

    event.listen(db.engine.sync_engine, "handle_error", note)
    async with held_elsewhere(backend):
        request = asyncio.create_task(site.post())
        await given_up.wait()
    assert 201 == (await request).status
    assert 1 == site.runs


@on("asyncpg", "psycopg", isolation_level="SERIALIZABLE")
async def test_serializable(db: Database, backend: ServerBackend) -> None:
    """Where the other's commit is a conflict, the claim is begun anew, and answered."""
    site = Shop(db)
    async with held_elsewhere(backend) as other:
        request = asyncio.create_task(site.post())
        await eventually(2, backend.open_transactions)
        nothing = hashlib.sha256().hexdigest()
        done = {"status": 201, "response": b"[]\ndone", "fingerprint": f"0 1 {nothing}"}
        await other.execute(CLAIM.update(**done))
        await other.commit()
    response = await request
    assert ["done"] == response.chunks
    assert is_replayed(response)
    assert 0 == site.runs


@on(*DATABASES)
async def test_a_key_that_was_deleted(db: Database, backend: Backend) -> None:
    """It is as new."""
    site = Shop(db)
    await site.post()
    await backend.execute("DELETE FROM idempotency_keys")
    assert 201 == (await site.post()).status
    assert 2 == site.runs


@on("asyncmy", connect_args=IMPATIENT)
async def test_a_replay_of_a_request_with_a_key(
    db: Database, backend: MariaDBBackend
) -> None:
    """With `Retry` it may be replayed, whatever its method; one without may not."""
    await backend.execute("INSERT INTO items (id) VALUES (1)")
    site = Shop(db, retry=Retry(backoff=0.001))
    site.runs = 9
    change = "UPDATE items SET parent = 1 WHERE id = 1"

    async def fail_once() -> None:
        site.before = None
        async with rival_of(backend) as rival:
            await rival.exec_driver_sql(change)
            await uow.current_session().execute(change)

    site.before = fail_once
    assert 201 == (await site.post()).status
    assert 11 == site.runs
    site.before = fail_once
    assert 503 == (await site.post(None)).status
    assert 12 == site.runs


async def test_keys_inside_and_outside(db: Database, backend: Backend) -> None:
    """Where the middleware around has the key, the one inside passes through."""
    site = Shop(db)
    app = UnitOfWorkMiddleware(site.app, db, idempotency=Idempotency(wait=0.0))
    first, second = [await Client(app).request(**POST) for _ in range(2)]
    assert [201, 201] == [first.status, second.status]
    assert is_replayed(second)
    assert [1] == await shop.items(backend)


@on("asyncpg")
async def test_keys_in_two_databases(
    db: Database, other: Database, mariadb: MariaDBBackend, backend: Backend
) -> None:
    """The same key in another database is another: nobody waits for himself."""
    await create_table(mariadb)
    inner = Shop(other, idempotency=Idempotency(wait=0.0))

    async def around(scope: Scope, receive: Receive, send: Send) -> None:
        await shop.insert(1)
        await inner.app(scope, receive, send)

    app = UnitOfWorkMiddleware(around, db, idempotency=Idempotency(wait=0.0))
    response = await Client(app).request(**POST)
    assert 201 == response.status
    assert [1] == await shop.items(backend) == await shop.items(mariadb)


@pytest.mark.parametrize("has_answered", [False, True])
async def test_a_key_of_the_application(db: Database, has_answered: bool) -> None:
    """That a key of its own is in use is the application's to answer."""

    def of(site: Shop) -> ASGIApp:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if has_answered:
                await site.serve(scope, receive, send)
            raise KeyInUseError

        return app

    response = await Shop(db, app=of).post()
    assert isinstance(response.error, KeyInUseError)
    assert (["http.response.start", "http.response.body"] * has_answered) == [
        each["type"] for each in response.messages
    ]


async def test_the_deadline_ends_the_wait(db: Database) -> None:
    """Who waits for a key gives up when its own time is over."""
    site, patient = Shop(db, deadline=0.01), Shop(db)
    gate = Gate(patient)
    first = asyncio.create_task(patient.post())
    await gate.reached.wait()
    assert 409 == (await site.post()).status
    gate.opened.set()
    assert 201 == (await first).status


@on(*DATABASES)
async def test_inside_another_unit(db: Database, backend: Backend) -> None:
    """What a middleware around has written before goes with the key, or without it."""
    site = Shop(db)
    outside = iter(range(100, 200))

    async def around(scope: Scope, receive: Receive, send: Send) -> None:
        await shop.insert(next(outside))
        await site.app(scope, receive, send)

    app = UnitOfWorkMiddleware(around, db)
    first, second = [await Client(app).request(**POST) for _ in range(2)]
    assert [201, 201] == [first.status, second.status]
    assert is_replayed(second)
    assert [1, 100] == await shop.items(backend)


async def test_jobs(db: Database, backend: Backend) -> None:
    """A job with a key is done once; a repetition is told, and refuses to write."""
    for number, was_done in ((1, False), (2, True)):
        async with unit_of_work(db, key="job") as unit:
            assert was_done == unit.replayed
            if not unit.replayed:
                await shop.insert(number)
                continue
            with pytest.raises(UnitOfWorkClosedError, match="used before"):
                unit.session()
            assert 1 == await db.read.scalar(shop.COUNT)
    assert [1] == await shop.items(backend)
    assert [(1,)] == await backend.fetch(KEYS)
    assert [0, 0] == checked_out(db)


async def test_a_job_that_failed(db: Database, backend: Backend) -> None:
    """It is done by its next try."""

    async def job() -> None:
        async with unit_of_work(db, key="job"):
            await shop.insert(1)
            raise LookupError

    with pytest.raises(LookupError):
        await job()
    async with unit_of_work(db, key="job") as unit:
        assert not unit.replayed
        await shop.insert(2)
    assert [2] == await shop.items(backend)


async def test_jobs_at_once(db: Database, backend: Backend) -> None:
    """Workers that have the same job wait for each other."""
    done: list[bool] = []

    async def job() -> None:
        async with unit_of_work(db, key="job") as unit:
            done.append(unit.replayed)
            if not unit.replayed:
                await shop.insert(1)

    await asyncio.gather(*(job() for _ in range(AT_ONCE)))
    assert [False, *[True] * (AT_ONCE - 1)] == done
    assert [1] == await shop.items(backend)


@on(*SERVERS)
async def test_a_job_of_another_process(
    db: Database, backend: ServerBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`KeyInUseError` says that it is still at work; the block is not entered."""
    monkeypatch.setattr("asgi_uow._unit.block.WAIT", 0.0)
    claim = Claim.of(table_of("idempotency_keys"), "job", "job")
    async with held_elsewhere(backend, claim):
        block = unit_of_work(db, key="job")
        with pytest.raises(KeyInUseError, match="in use"):
            await block.__aenter__()
    assert not uow.in_unit_of_work()
    assert [0, 0] == checked_out(db)
    async with block as unit:
        assert not unit.replayed


async def test_keys_of_jobs_are_not_those_of_requests(db: Database) -> None:
    """A client cannot take the key of a job."""
    async with unit_of_work(db, key="key"):
        pass
    assert not is_replayed(await Shop(db).post())


@pytest.mark.parametrize("key", ["", 1, b"key"])
async def test_a_key_that_is_none(db: Database, key: Any) -> None:
    """A key is a text."""
    with pytest.raises(ConfigurationError, match="key"):
        unit_of_work(db, key=key)
